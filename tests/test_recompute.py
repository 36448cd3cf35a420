"""What is computed again instead of kept: the same bits, less memory, and the plan says at what price."""

import json
import subprocess

import numpy as np
import pytest
from command import fails, succeeds

from llmgen import config, plan, program, reference, verify
from llmgen.formats import tokens

SMALL = {"num_layers": 3, "channels": 24, "vocab_size": 101, "max_seq_len": 16, "batch_size": 2, "seq_len": 13}
MODELS = {
    "gpt2": {"num_heads": 2},
    "grouped, gated, windowed": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 6,
        "norm": "rmsnorm",
        "norm_bias": False,
        "norm_position": "sandwich",
        "position": "rope",
        "mlp": "gated",
        "mlp_bias": False,
        "activation": "silu",
        "qk_norm": True,
        "attention_window": [5, 0],
        "attention_softcap": 20.0,
        "tie_embeddings": False,
    },
    "relu squared, muon": {"num_heads": 3, "activation": "relu_squared", "optimizer": "muon", "residual_scale": 0.5},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_program_that_recomputes_ends_with_the_bits_of_one_that_keeps(tmp_path, monkeypatch, model):
    monkeypatch.setenv("CFLAGS", "-O1")
    tokens.write(tmp_path / "train.bin", np.random.default_rng(1).integers(0, 101, 10 * 26 + 1), 101)
    models, outputs = [], []
    for how in ("none", "cheap", "block"):
        built = program.build(
            config.load("gpt2-nano", overrides={**SMALL, **model, "recompute": how}), "c", "native", None, tmp_path / how
        )
        flags = ["--train-data", "train.bin", "--steps", "5", "-d", "52", "--val-every", "0", "--save", f"{how}.bin"]
        done = subprocess.run([built.program.resolve(), *flags], cwd=tmp_path, check=True, capture_output=True, text=True)
        models.append((tmp_path / f"{how}.bin").read_bytes()[1024 + 8192 :])  # behind what describes the model
        outputs.append(done.stdout)
    assert models[0] == models[1] == models[2]
    kept, cheap, block = (int(out.split("memory: ")[1].split()[0]) for out in outputs)
    assert block < cheap < kept


@pytest.mark.parametrize("how", ["cheap", "block"])
def test_the_graph_that_recomputes_gives_the_same_gradients(how):
    """In the float64 reference, of the graph before any fusion: nothing is read that is not there."""
    made = [plan.make(config.load("gpt2-nano", overrides={**SMALL, "num_heads": 2, "recompute": h})) for h in ("none", how)]
    values = verify.random_parameters(made[0].graph, 1)
    rng = np.random.default_rng(2)
    inputs = {name: rng.integers(0, 101, (2, 13)) for name in ("tokens", "targets")} | {"loss_scale": 1 / 26}
    results = [reference.run(m.graph.function("forward_backward"), {**values, **inputs}) for m in made]
    for p in made[0].graph.parameters:
        assert (results[0]["d" + p.name] == results[1]["d" + p.name]).all()


def test_block_keeps_what_a_block_is_handed_and_nothing_else():
    made = {
        how: plan.make(config.load("gpt2-124m", overrides={"seq_len": 1024, "recompute": how})) for how in ("none", "block")
    }
    kept = [b.name for b in made["block"].forward_backward.buffers if b.slots]
    assert kept == ["residual"]
    held, before = (made[how].memory.activations + made[how].memory.arena for how in ("block", "none"))
    assert held < before / 2
    assert made["block"].flops == made["none"].flops and made["none"].again_flops == 0
    assert 0.1 < made["block"].again_flops / made["block"].flops < 0.35


def test_the_plan_states_price_and_gain(tmp_path):
    (line,) = [line for line in succeeds("plan", "--set", "recompute=block", cwd=tmp_path) if line.startswith("recompute")]
    assert line.startswith('recompute = "block": ') and "% more flops; activations and arena take " in line
    assert not [line for line in succeeds("plan", cwd=tmp_path) if line.startswith("recompute")]
    made = json.loads("\n".join(succeeds("plan", "--set", "recompute=block", "--json", cwd=tmp_path)))
    plain = json.loads("\n".join(succeeds("plan", "--json", cwd=tmp_path)))
    assert made["flops_per_token"] == plain["flops_per_token"] and made["recompute_flops_per_token"] > 0


def test_where_the_batch_does_not_fit_recompute_is_proposed(tmp_path):
    command = ["plan", "--config", "gpt2-124m", "--seq-len", 1024, "--memory", "12GB", "--batch-size"]
    assert len(succeeds(*command, 4, cwd=tmp_path)) == 1
    lines = succeeds(*command, 32, cwd=tmp_path)
    assert lines[0].startswith("largest batch_size: ") and len(lines) == 3
    assert lines[1].startswith("with --set recompute=cheap: ") and " does not fit with " in lines[1]
    largest = int(lines[2].removeprefix("with --set recompute=block: ").split(";")[0])
    assert " 32 fits with " in lines[2] and largest >= 32
    for size, fits in ((largest, True), (largest + 1, False)):
        command[-1:] = ["--set", "recompute=block", "--json", "--batch-size"]
        made = json.loads("\n".join(succeeds(*[w for w in command if w not in ("--memory", "12GB")], size, cwd=tmp_path)))
        assert (made["memory"]["total"] <= 12e9) == fits
        command[-4:] = ["--batch-size"]
    message = fails(1, "plan", "--config", "gpt2-124m", "--seq-len", 1024, "--memory", "2.2GB", cwd=tmp_path)
    assert "use --set recompute=" in message
