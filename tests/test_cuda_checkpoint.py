"""Checkpoints and recompute of whole CUDA programs: bf16 with master weights, and fp32 programs that go on."""

import json
import subprocess
from pathlib import Path

import cuda_programs
import numpy as np
import pytest

from llmgen import config as configs
from llmgen import plan, render
from llmgen.formats import tokens, training_state

SMALL = {"num_layers": 2, "num_heads": 2, "channels": 32, "vocab_size": 101, "max_seq_len": 16, "batch_size": 2, "seq_len": 16}


def build(folder: Path, name: str, device: str, **overrides) -> Path:
    config = configs.load("gpt2-nano", target="cuda", overrides={"precision": "bf16", **SMALL, **overrides})
    source = folder / f"{name}.cu"
    made = plan.make(config, "cuda", arch=cuda_programs.arch(device))
    source.write_text(render.source(made))
    cuda_programs.compile(source, folder / name, device, made.profile)
    return folder / name


@pytest.fixture(scope="module")
def bf16(tmp_path_factory, device) -> Path:
    return build(tmp_path_factory.mktemp("bf16"), "train", device)


@pytest.fixture
def run(tmp_path):
    tokens.write(tmp_path / "text.bin", np.random.default_rng(5).integers(0, 101, 9 * 32 + 1), 101)

    def run(program: Path, logs: str, steps: int, *more) -> list[str]:
        flags = ["--train-data", "text.bin", "--val-data", "text.bin", "--val-steps", "1", "-v", "3", "--shuffle", "-sl", "9"]
        command = [program, *flags, "--steps", steps, "--log-dir", logs, "--save", f"{logs}.bin", *more]
        result = subprocess.run([str(word) for word in command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0 and result.stderr == "", result
        return result.stdout.splitlines()

    return run


def losses(folder: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("val_loss")) for row in rows]


def test_a_bf16_run_goes_on_from_its_master_weights_to_the_same_bits(bf16, run, tmp_path):
    run(bf16, "alone", 6)
    run(bf16, "whole", 6, "--checkpoint-every", 3)
    assert (tmp_path / "alone.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes(), "a checkpoint changes nothing"
    run(bf16, "parts", 3, "--checkpoint-every", 3)
    lines = run(bf16, "parts", 6, "--resume", "--checkpoint-every", 3)
    assert any(line.startswith("resumed after step 3 ") for line in lines)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert training_state.steps(tmp_path / "parts") == [3, 6]
    for whole, parts in zip(*(training_state.paths(tmp_path / logs, 6) for logs in ("whole", "parts")), strict=True):
        assert whole.read_bytes() == parts.read_bytes()
    model, state, _ = training_state.paths(tmp_path / "whole", 6)
    assert np.fromfile(model, np.int32, 2)[1] == 5, "the model is in bf16"
    assert np.fromfile(state, np.int32, 5)[4] == 1 and state.stat().st_size > 5.5 * model.stat().st_size


def test_precisions_go_on_from_one_another(bf16, run, tmp_path):
    """bf16 on a GPU to fp32 on the CPU, which has the master weights to begin with, and back."""
    source = render.source(plan.make(configs.load("gpt2-nano", overrides=SMALL)))
    (tmp_path / "train.c").write_text(source)
    subprocess.run(["gcc", "-O1", "-march=x86-64-v3", "train.c", "-lm", "-o", "plain"], cwd=tmp_path, check=True)
    plain = tmp_path / "plain"
    run(bf16, "whole", 6)
    run(bf16, "parts", 3, "--checkpoint-every", 3)
    run(plain, "parts", 5, "--checkpoint-every", 1, "--resume")
    lines = run(bf16, "parts", 6, "--resume", "--save-dtype", "fp32")
    assert any(line.startswith("resumed after step 5 ") for line in lines)
    seen, want = (np.array([row[1] for row in losses(tmp_path / logs) if row[1]]) for logs in ("parts", "whole"))
    assert (seen[:3] == want[:3]).all() and seen == pytest.approx(want, rel=5e-3)


def test_recompute_changes_no_bit(bf16, device, run, tmp_path):
    run(bf16, "none", 3)
    run(build(tmp_path, "program", device, recompute="block"), "block", 3)
    assert (tmp_path / "none.bin").read_bytes() == (tmp_path / "block.bin").read_bytes()
    assert losses(tmp_path / "none") == losses(tmp_path / "block")


def test_cheap_recompute_changes_no_bit_in_fp32(device, run, tmp_path):
    """In bf16 GELU's argument is kept rounded, and its value made again from that."""
    for how in ("none", "cheap"):
        run(build(tmp_path, f"program-{how}", device, precision="fp32", recompute=how), how, 3)
    assert (tmp_path / "none.bin").read_bytes() == (tmp_path / "cheap.bin").read_bytes()
    assert losses(tmp_path / "none") == losses(tmp_path / "cheap")
