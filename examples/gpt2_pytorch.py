"""GPT-2 in PyTorch, as short as it goes: what `llmgen bench --against torch` measures our programs against."""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.ln1, self.ln2 = heads, nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.attproj, self.fc, self.fcproj = (nn.Linear(i * c, o * c) for i, o in ((1, 3), (1, 1), (1, 4), (4, 1)))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.ln1(x)).chunk(3, -1))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(attention.transpose(1, 2).flatten(-2))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, layers, heads, channels, vocab_size, max_seq_len):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, channels), nn.Embedding(max_seq_len, channels)
        self.blocks, self.lnf = nn.ModuleList(Block(channels, heads) for _ in range(layers)), nn.LayerNorm(channels)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.lnf(x), self.wte.weight).flatten(0, 1), targets.flatten())


parser = argparse.ArgumentParser(description=__doc__)
for name in ["layers", "heads", "channels", "vocab-size", "max-seq-len", "batch-size", "seq-len", "steps", "threads"]:
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--device", default="cpu", help="cuda: in bf16 by autocast")
parser.add_argument("--compile", metavar="MODE", help="torch.compile's mode: default, max-autotune, reduce-overhead")
a = parser.parse_args()
torch.set_num_threads(a.threads)
model = GPT2(a.layers, a.heads, a.channels, a.vocab_size, a.max_seq_len).to(a.device)
forward = torch.compile(model, mode=a.compile) if a.compile else model
groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == d], "weight_decay": 0.1 * d} for d in (1, 0)]
optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
tokens = torch.randint(a.vocab_size, (a.steps, a.batch_size, a.seq_len + 1), device=a.device)
for step in range(a.steps):
    start = time.perf_counter()
    with torch.autocast(a.device, torch.bfloat16, enabled=a.device == "cuda"):
        loss = forward(tokens[step, :, :-1], tokens[step, :, 1:])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}/{a.steps} | loss {loss.item():.6f} | {1e3 * (time.perf_counter() - start):.1f} ms", flush=True)
print("memory:", torch.cuda.max_memory_allocated() if a.device == "cuda" else 0, "bytes on the GPU")
