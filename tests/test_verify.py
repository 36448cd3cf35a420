"""`llmgen verify` over ordinary, awkward and random configs, and on programs that are wrong: it must notice."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmgen import cli, cpu, models, plan, program, verify
from llmgen import config as configs

STRICT = "-O1 -Wall -Wextra -Wpedantic -Werror"
TINY = {"num_layers": 2, "num_heads": 2, "channels": 16, "vocab_size": 101, "max_seq_len": 12, "batch_size": 2, "seq_len": 9}


@pytest.fixture
def verified(tmp_path, monkeypatch):
    """Verifies a config with warnings as errors and returns its lines."""
    monkeypatch.setenv("CFLAGS", STRICT)

    def verified(profile: str = "native", **overrides) -> list[str]:
        config = configs.load("gpt2-nano", overrides={**TINY, **overrides})
        lines = []

        def build(config, folder: Path) -> Path:
            return program.build(config, "c", profile, None, folder).program

        passed = verify.verify(config, build, lines.append)
        report = "\n".join([f"{overrides} for {profile}", *lines])
        assert lines[-1].startswith("verify: ok (worst " if passed else "verify: FAILED ("), report
        assert passed, report
        return lines

    return verified


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64-static")),
    reason="needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static",
)
@pytest.mark.parametrize("overrides", [{}, {"channels": 160, "seq_len": 37, "max_seq_len": 64}], ids=["tiny", "wider"])
def test_the_program_is_right_on_arm64(overrides):
    """Cross-compiled, and run by QEMU, on two threads."""
    lines = []

    def build(config, folder: Path) -> Path:
        source = program.build(config, "c", "armv8-a", None, folder, compile=False).source
        flags = [*STRICT.split(), "-O2", "-std=gnu11", "-fopenmp", "-static", *cpu.resolve("armv8-a").flags]
        subprocess.run(["aarch64-linux-gnu-gcc", *flags, source, "-lm", "-o", folder / "arm"], check=True)
        (folder / "run").write_text(f'#!/bin/sh\nOMP_NUM_THREADS=2 exec qemu-aarch64-static {folder / "arm"} "$@"\n')
        (folder / "run").chmod(0o755)
        return folder / "run"

    config = configs.load("gpt2-nano", overrides={**TINY, **overrides})
    assert verify.verify(config, build, lines.append), "\n".join(lines)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"channels": 10, "num_heads": 2},
        {"channels": 160, "num_heads": 2},
        {"seq_len": 37, "max_seq_len": 37},
        {"seq_len": 37, "max_seq_len": 64, "batch_size": 3},
        {"vocab_size": 2},
        {"vocab_size": 128},
        {"vocab_size": 257, "channels": 100, "num_heads": 5},
        {"num_layers": 1},
        {"num_heads": 1},
        {"num_layers": 1, "num_heads": 1, "channels": 5, "batch_size": 1, "seq_len": 1, "max_seq_len": 1},
        {"num_layers": 1, "num_heads": 1, "channels": 1},
        {"batch_size": 1, "seq_len": 150, "max_seq_len": 200},
    ],
    ids=lambda overrides: " ".join(f"{key}={value}" for key, value in overrides.items()) or "tiny",
)
def test_awkward_shapes_are_right(verified, overrides):
    lines = verified(**overrides)
    assert lines[0].startswith("logits") and lines[1].startswith("loss") and lines[-2].startswith("10 steps")
    assert len(lines) == 2 + 16 + 2


def runnable_profiles() -> list[str]:
    """The processor profiles that this machine can run."""
    native = cpu.resolve("native").name
    x86 = [profile.name for profile in cpu.PROFILES if profile.name.startswith("x86")]
    return x86[: x86.index(native) + 1] if native in x86 else [native]


def random_overrides(seed: int) -> tuple[str, dict]:
    """A profile, and a config of any shape, small enough for the float64 reference to be quick."""
    rng = np.random.default_rng(seed)

    def draw(low, high):  # small values as likely as large ones
        return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))

    # Of two channels, a norm leaves the sign: the gradient behind it is a difference of equal numbers, true in float64 only.
    heads, t = draw(1, 8), draw(1, 100)
    head_size = max(draw(1, 90), -(-4 // heads))
    overrides = {
        "num_layers": draw(1, 4),
        "num_heads": heads,
        "channels": heads * head_size,
        "vocab_size": draw(2, 700),
        "batch_size": draw(1, 6),
        "seq_len": t,
        "max_seq_len": t + int(rng.integers(0, 40)),
    }
    return str(rng.choice(runnable_profiles())), overrides


@pytest.mark.parametrize("seed", range(10), ids="seed {}".format)
def test_random_configs_are_right(verified, seed):
    profile, overrides = random_overrides(seed)
    verified(profile, **overrides)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 210), ids="seed {}".format)
def test_many_random_configs_are_right(verified, seed):
    profile, overrides = random_overrides(seed)
    verified(profile, **overrides)


def random_switches(seed: int) -> tuple[str, dict]:
    """A profile, and a combination of the architecture's choices that goes together."""
    rng = np.random.default_rng(seed)

    def either(*choices):
        return choices[rng.integers(len(choices))]

    kv_heads, group, layers = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    head_size, position = 2 * int(rng.integers(2, 12)), either("learned", "rope", "rope", "none")
    norm, mlp, norm_position = either("layernorm", "rmsnorm"), either("plain", "gated"), either("pre", "pre", "sandwich")
    biased = norm == "layernorm" and norm_position == "pre"
    norm_weight = either(True, True, False)
    overrides = {
        "num_layers": layers,
        "num_kv_heads": kv_heads,
        "num_heads": kv_heads * group,
        "head_size": head_size,
        "channels": either(kv_heads * group * head_size, int(rng.integers(8, 50))),
        "mlp_channels": int(rng.integers(8, 80)),
        "vocab_size": int(rng.integers(20, 300)),
        "batch_size": int(rng.integers(1, 4)),
        "seq_len": int(rng.integers(2, 60)),
        "max_seq_len": 64,
        "norm": norm,
        "norm_weight": norm_weight,
        "norm_bias": biased and norm_weight and either(True, False),
        "norm_position": norm_position,
        "norm_epsilon": either(1e-5, 1e-6),
        "position": position,
        "rope_theta": either(1e4, 5e5),
        "rope_fraction": 2 * int(rng.integers(1, head_size // 2 + 1)) / head_size,
        "rope_scaling": either("none", "llama3"),
        "rope_original_seq_len": 32,
        "activation": either("gelu", "gelu_exact", "relu", "relu_squared", "silu"),
        "mlp": mlp,
        "mlp_bias": mlp == "plain" and either(True, False),
        "qkv_bias": either(True, False),
        "projection_bias": either(True, False),
        "qk_norm": either(True, False),
        "qk_norm_weight": either(True, False),
        "attention_window": either((0,), (5,), (1,), (9, 0)[:layers], (70,)),
        "attention_softcap": either(0.0, 0.0, 3.0),
        "attention_scale": either(0.0, 0.4),
        "tie_embeddings": either(True, False),
        "logit_softcap": either(0.0, 0.0, 4.0),
        "embedding_scale": either(1.0, 3.0),
        "residual_scale": either(1.0, 0.5),
        "z_loss": either(0.0, 0.0, 1e-2),
        "label_smoothing": either(0.0, 0.0, 0.1),
        "optimizer": either("adamw", "adamw", "muon"),
    }
    return str(rng.choice(runnable_profiles())), overrides


@pytest.mark.parametrize("seed", range(10), ids="seed {}".format)
def test_random_combinations_of_the_switches_are_right(verified, seed):
    profile, overrides = random_switches(seed)
    verified(profile, **overrides)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 210), ids="seed {}".format)
def test_many_random_combinations_of_the_switches_are_right(verified, seed):
    profile, overrides = random_switches(seed)
    verified(profile, **overrides)


# programs that are wrong


def replace_in_calls(made: plan.Plan, function: str, old: str, new: str) -> plan.Plan:
    """The plan with one tensor taken for another in the calls of a function."""

    def changed(call):
        return dataclasses.replace(call, arguments=tuple(a.replace(old, new) for a in call.arguments))

    before = getattr(made, function)
    blocks = tuple(dataclasses.replace(b, calls=tuple(map(changed, b.calls))) for b in before.blocks)
    assert blocks != before.blocks, f"no call of {function} takes {old}"
    return dataclasses.replace(made, **{function: dataclasses.replace(before, blocks=blocks)})


def without_decay(made: plan.Plan) -> plan.Plan:
    return dataclasses.replace(made, parameters=tuple(dataclasses.replace(p, decay=False) for p in made.parameters))


def takes(old: str, new: str):
    return lambda made: replace_in_calls(made, "forward_backward", old, new)


MISTAKES = {  # what is wrong -> how it is made, and the first row that shows it
    "a norm takes another one's weight": (takes("params.ln1w", "params.ln2w"), "logits"),
    "a layer takes another one's bias": (takes("params.attprojb", "params.fcprojb"), "logits"),
    "a gradient goes elsewhere": (takes("grads.ln2b", "grads.ln1b"), "dln2b"),
    "nothing decays": (without_decay, "10 steps"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_program_fails_by_name_and_with_status_1(mistake, monkeypatch, capsys):
    spoil, first = MISTAKES[mistake]
    make = plan.make
    monkeypatch.setattr(plan, "make", lambda *arguments: spoil(make(*arguments)))
    monkeypatch.setenv("CFLAGS", "-O1")
    settings = [f"--set={key}={value}" for key, value in TINY.items()]
    monkeypatch.setattr(sys, "argv", ["llmgen", "verify", *settings])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 1 and lines[-1].startswith("verify: FAILED (")
    failed = [line for line in lines[:-1] if line.endswith("FAILED")]
    assert failed[0].startswith(f"{first} "), lines
    assert any(lines[-1].startswith(f"verify: FAILED ({line.split('  ')[0]} ") for line in failed)


# a model that does not fit in memory


def test_what_is_too_large_in_float64_is_verified_with_two_layers(verified, monkeypatch):
    three = configs.load("gpt2-nano", overrides={**TINY, "num_layers": 3})
    values = sum(int(np.prod(shape)) for shape in models.parameter_shapes(three).values())
    needed = 2 * 8 * values  # parameters and gradients
    monkeypatch.setattr(verify, "_free_memory", lambda: 2 * needed)
    assert verified(num_layers=3)[0].startswith("logits")
    monkeypatch.setattr(verify, "_free_memory", lambda: 2 * needed - 1)
    lines = verified(num_layers=3)
    assert "verified with num_layers = 2" in lines[0]
    (row,) = [line for line in lines if line.startswith("dqkvb ")]
    assert "(2, 48)" in row
