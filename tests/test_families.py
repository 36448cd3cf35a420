"""Every family against transformers in float64, the whole way: export, program, debug state, and back.

Models are small and random throughout: with norms at 1 and biases at 0, as initialised, a mistake in them would go unseen.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from command import succeeds

from llmgen import config as configs
from llmgen import models
from llmgen.formats import debug_state, tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_oracle import batch, loss_of, relative, run, safetensors_of, worst  # noqa: E402

V, B, T = 101, 2, 33
SIZES = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {"vocab_size": V, "n_positions": 40, "n_embd": 48, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {  # name -> architecture, what its config says, the family of ours
    "llama 2": ("Llama", {**SIZES, "num_key_value_heads": 4}, "llama"),
    "llama 3": ("Llama", {**SIZES, "rope_parameters": LLAMA3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}, "llama"),
    "llama with biases": ("Llama", {**SIZES, "attention_bias": True, "head_dim": 10, "num_key_value_heads": 1}, "llama"),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 9, "rms_norm_eps": 1e-5}, "mistral"),
    "qwen2": ("Qwen2", {**SIZES, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}, "qwen2"),
    "qwen2 with windows": (
        "Qwen2",
        {**SIZES, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        "qwen2",
    ),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 20, "tie_word_embeddings": True}, "qwen3"),
    "gemma": ("Gemma", {**SIZES, "head_dim": 16, "num_key_value_heads": 1}, "gemma"),
    "gemma 2": (
        "Gemma2",
        {
            **SIZES,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "attn_implementation": "eager",  # the only one with a softcap
        },
        "gemma",
    ),
    "gpt2 of other choices": (
        "GPT2",
        {**GPT2, "n_inner": 100, "activation_function": "relu", "layer_norm_epsilon": 1e-4, "tie_word_embeddings": False},
        "gpt2",
    ),
}


def random_model(architecture: str, said: dict):
    """A model of transformers' with every value random."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{architecture}Config")(**said)
    kind = getattr(transformers, f"{architecture}{'LMHeadModel' if architecture == 'GPT2' else 'ForCausalLM'}")
    model = kind._from_config(config, attn_implementation=said.get("attn_implementation", "sdpa"))
    ones = 0.0 if architecture.startswith("Gemma") else 1.0  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            if value.ndim > 1:
                value.copy_(noise * 0.5 / math.sqrt(value.shape[-1]))
            else:
                value.copy_(ones + 0.1 * noise if name.endswith("weight") else 0.05 * noise)
    return model.eval()


def built(folder: Path, family: str, *flags) -> Path:
    """The program for model.bin, by what the file says of itself."""
    quick = {"CFLAGS": "-O1 -Wall -Wextra -Wpedantic -Werror"}
    succeeds("build", "--config", "model.bin", *flags, "--out", "built", cwd=folder, env=quick)
    return folder / "built" / f"train_{family}"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_that_of_transformers_and_comes_back(tmp_path, name):
    architecture, said, family = FAMILIES[name]
    model = random_model(architecture, said)
    model.save_pretrained(tmp_path / "hf")
    succeeds("export-weights", "hf", "--out", "model.bin", cwd=tmp_path)
    program = built(tmp_path, family, "--batch-size", B, "--seq-len", T)
    text = np.random.default_rng(2).integers(0, V, B * T + 1)
    tokens.write(tmp_path / "train.bin", text, V)
    run(program, "--load", "model.bin", "--train-data", "train.bin", "--debug-state", "state.bin")
    run(program, "--load", "model.bin", "--steps", 0, "--sample-length", 0, "--save", "saved.bin")
    assert (tmp_path / "saved.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()
    succeeds("import-weights", "saved.bin", "--out", "back", "--state", "state.bin", cwd=tmp_path)

    # Back: the same tensors, the same logits.
    back, report = type(model).from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation=model.config._attn_implementation
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs, targets = batch(text, B, T)
    for (key, a), (_, b) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        if architecture.startswith("Gemma") and "norm" in key:  # 1 + weight was rounded to float32
            assert torch.allclose(a, b, rtol=0, atol=6e-8), key
        else:
            assert torch.equal(a, b), key
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(inputs).logits, model(inputs).logits, rtol=0, atol=2e-6)
        if not architecture.startswith("Gemma"):
            assert torch.equal(back(inputs).logits, model(inputs).logits)

    # There: logits, loss and every gradient.
    model = model.double()
    loss, logits = loss_of(model, inputs, targets)
    loss.backward()
    wanted = {key: value.grad.numpy() for key, value in model.named_parameters()}
    got = safetensors_of(tmp_path / "back" / "gradients.safetensors")
    assert sorted(got) == sorted(wanted)
    shapes = models.parameter_shapes(configs.load(str(tmp_path / "model.bin")))
    state = debug_state.read(tmp_path / "state.bin", V, shapes)
    whole = math.sqrt(sum(np.sum(w**2) for w in wanted.values()))
    errors = {key: relative(got[key], want, 1e-4 * whole) for key, want in wanted.items()}
    assert relative(state.logits, logits.detach().numpy()) <= 1e-5
    assert abs(state.loss - loss.item()) <= 1e-5
    assert max(errors.values()) <= 1e-4, worst(errors)
    print(f"\n{name}: logits {relative(state.logits, logits.detach().numpy()):.1e}, worst {worst(errors)}")
