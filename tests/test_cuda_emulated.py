"""Whole CUDA programs, compiled for the emulator and verified against the float64 reference."""

import subprocess
from pathlib import Path

import emulator
import numpy as np
import pytest

from llmgen import config as configs
from llmgen import plan, render, verify
from llmgen.formats import tokens

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64 Linux")
SMALL = {"num_layers": 2, "num_heads": 2, "channels": 64, "vocab_size": 257, "max_seq_len": 64, "batch_size": 2, "seq_len": 48}
slow = pytest.mark.slow


def small(**overrides) -> configs.Config:
    return configs.load("gpt2-nano", target="cuda", overrides={"precision": "bf16", **SMALL, **overrides})


def build(config: configs.Config, folder: Path, arch: str = "sm_80") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "train.cu"
    source.write_text(render.source(plan.make(config, "cuda", arch=arch)))
    emulator.compile(source, folder / "train")
    return folder / "train"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"precision": "fp32", "channels": 99, "num_heads": 3, "vocab_size": 101},
        pytest.param({"channels": 100, "num_heads": 5, "vocab_size": 101, "seq_len": 37, "batch_size": 3}, marks=slow),
        pytest.param({"residual_precision": "fp32", "recompute": "cheap"}, marks=slow),
        pytest.param({"optimizer": "muon"}, marks=slow),
    ],
    ids=lambda overrides: " ".join(f"{key}={value}" for key, value in overrides.items()) or "small",
)
def test_a_program_is_verified(overrides, arch):
    if arch == "sm_90a" and overrides.get("precision") == "fp32":
        pytest.skip("in float32 Hopper has the kernels of sm_80")
    lines: list[str] = []
    passed = verify.verify(small(**overrides), lambda config, folder: build(config, folder, arch), lines.append)
    assert passed, "\n".join(lines)


def test_a_program_with_hoppers_attention_is_verified():
    lines: list[str] = []
    heads_of_64 = small(num_layers=1, channels=128, max_seq_len=150, seq_len=150)
    assert verify.verify(heads_of_64, lambda config, folder: build(config, folder, "sm_90a"), lines.append), "\n".join(lines)


def test_the_order_of_threads_changes_no_bit(tmp_path):
    config = small(num_layers=1)
    program = build(config, tmp_path)
    text = np.random.default_rng(3).integers(config.model.vocab_size, size=4 * 2 * 48 + 1)
    tokens.write(tmp_path / "text.bin", text, config.model.vocab_size)
    saved = set()
    for seed in ("1", "2"):
        command = [
            program,
            "--train-data",
            "text.bin",
            "--val-data",
            "text.bin",
            "--val-steps",
            "1",
            "--steps",
            "3",
            "--save",
            "a.bin",
        ]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"EMULATOR_SEED": seed})
        assert result.returncode == 0, result.stdout + result.stderr
        saved.add((tmp_path / "a.bin").read_bytes())
    assert len(saved) == 1
