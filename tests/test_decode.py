"""`decode` of the graph: tokens of several sequences in pieces, with a cache, give the logits of each sequence at once."""

import dataclasses

import numpy as np
import pytest

from llmgen import config as configs
from llmgen.models import transformer
from llmgen.reference import run

SIZES = {"num_layers": 3, "num_heads": 4, "channels": 24, "vocab_size": 37, "max_seq_len": 21}
VARIATIONS = {  # name -> family, what is said beside the sizes
    "gpt2": ("gpt2", {}),
    "gpt2 with its own head": ("gpt2", {"tie_embeddings": False, "activation": "relu"}),
    "llama with shared keys": ("llama", {"num_kv_heads": 2, "mlp_channels": 40}),
    "llama with one key head": ("llama", {"num_kv_heads": 1, "head_size": 10, "rope_scaling": "llama3"}),
    "windows": ("mistral", {"num_kv_heads": 2, "attention_window": [5, 0], "mlp_channels": 40}),
    "qk norm, part of the channels turned": (
        "qwen3",
        {"num_kv_heads": 2, "rope_fraction": 0.5, "head_size": 8, "qkv_bias": True},
    ),
    "gemma 2": (
        "gemma",
        {
            "attention_softcap": 2.0,
            "logit_softcap": 3.0,
            "norm_position": "sandwich",
            "attention_scale": 0.3,
            "num_kv_heads": 2,
        },
    ),
    "speedrun": ("speedrun", {"embedding_scale": 1.5}),
    "no positions": ("llama", {"position": "none", "residual_scale": 0.5, "norm_weight": False, "activation": "relu_squared"}),
}


def config_of(name: str) -> configs.Config:
    family, said = VARIATIONS[name]
    tables = {"family": family, "model": {**SIZES, **said}, "program": {"seq_len": 16}}
    return configs.from_tables("varied", tables, name)


def random_parameters(config: configs.Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every value random, the vocabulary's padding 0."""
    values = {}
    for p in transformer.parameters(config).values():
        shape = tuple(d.size for d in p.stacked)
        mean, _ = transformer.initial(p, config)
        values[p.name] = mean + rng.normal(0, 0.1 if len(p.shape) == 1 else 1.5 / np.sqrt(p.shape[-1].size), shape)
        if p.shape[0].expr == "VP":
            values[p.name][config.model.vocab_size :] = 0
    return values


def logits_at_once(config: configs.Config, parameters: dict, tokens: np.ndarray) -> np.ndarray:
    """(t, VP) of one sequence, by the function that `evaluate` is made of."""
    function = transformer.forward(config, "whole", transformer.Dim(1, "b"), transformer.Dim(len(tokens), "t"))
    logits = run(function, {**parameters, "tokens": tokens[None], "targets": tokens[None]})["logits"][0]
    cap = config.model.logit_softcap
    return cap * np.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize("name", VARIATIONS)
def test_tokens_in_pieces_give_the_logits_of_the_whole(name):
    config, rng = config_of(name), np.random.default_rng(3)
    parameters = random_parameters(config, rng)
    function = transformer.build_generation(config).function("decode")
    lengths = (21, 9)
    texts = [rng.integers(0, config.model.vocab_size, n) for n in lengths]
    state = next(t for op in function.ops() for t in op.outputs.values() if t.name == "keys")
    layers, heads, room, channels = (d.size for d in state.stacked)
    caches = {key: rng.normal(size=(layers, 2, heads, room, channels)) for key in ("keys", "values")}
    # Sequence 1 stands before sequence 0 in the cache's order of calls; both prompts in one call, then a token of each, ...
    calls = [[(1, range(0, 4)), (0, range(0, 7))], [(0, range(7, 8)), (1, range(4, 5))], [(1, range(5, 9))]]
    calls += [[(0, range(p, p + 1))] for p in range(8, 20)] + [[(0, range(20, 21))]]
    got = [np.zeros((n, config.model.padded_vocab_size)) for n in lengths]
    for call in calls:
        rows = [(sequence, position) for sequence, positions in call for position in positions]
        inputs = {
            "tokens": np.array([texts[s][p] for s, p in rows]),
            "sequences": np.array([s for s, _ in rows]),
            "positions": np.array([p for _, p in rows]),
            "rows": np.arange(len(rows))[::-1],
        }
        values = run(function, {**parameters, **caches, **inputs})
        for (s, p), logits in zip(rows[::-1], values[function.outputs[0].name], strict=True):
            got[s][p] = logits
    for text, logits in zip(texts, got, strict=True):
        np.testing.assert_allclose(logits, logits_at_once(config, parameters, text), rtol=0, atol=1e-12)


def test_every_switch_of_the_model_is_varied():
    """A field of [model] that is new belongs into the table above, unless it changes training alone."""
    usual = config_of("gpt2").model
    without = {"norm_epsilon", "rope_factor", "rope_low_frequency_factor", "rope_high_frequency_factor"}
    without |= {"rope_original_seq_len", "z_loss", "label_smoothing", "zero_projections", "qk_norm_weight", *SIZES}
    varied = {
        f.name
        for name in VARIATIONS
        for f in dataclasses.fields(configs.ModelConfig)
        if getattr(config_of(name).model, f.name) != getattr(usual, f.name)
    }
    assert {f.name for f in dataclasses.fields(configs.ModelConfig)} - varied - without == set()
