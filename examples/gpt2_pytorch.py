"""GPT-2 in PyTorch, eager, as short as it goes: what `llmgen bench --against torch` measures our program against."""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.attproj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.fc, self.fcproj = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.ln1(x)).chunk(3, -1))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(attention.transpose(1, 2).flatten(-2))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, layers, heads, channels, vocab_size, max_seq_len):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, channels), nn.Embedding(max_seq_len, channels)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(layers))
        self.lnf = nn.LayerNorm(channels)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.lnf(x), self.wte.weight).flatten(0, 1), targets.flatten())


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ["layers", "heads", "channels", "vocab-size", "max-seq-len", "batch-size", "seq-len", "steps", "threads"]:
    parser.add_argument(f"--{name}", type=int, required=True)
a = parser.parse_args()
torch.set_num_threads(a.threads)
model = GPT2(a.layers, a.heads, a.channels, a.vocab_size, a.max_seq_len)
groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1}]
groups += [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
tokens = torch.randint(a.vocab_size, (a.steps, a.batch_size, a.seq_len + 1))
for step in range(a.steps):
    start = time.perf_counter()
    loss = model(tokens[step, :, :-1], tokens[step, :, 1:])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(f"step {step + 1}/{a.steps} | loss {loss.item():.6f} | {1e3 * (time.perf_counter() - start):.1f} ms", flush=True)
