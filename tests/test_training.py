# ruff: noqa: F811
"""Schedules and accumulation: what the program says it does, against the formula and against a program of another batch."""

import json
import math
import subprocess

import numpy as np
import pytest
from test_program import BT, data, program, run, succeeds, text  # noqa: F401

from llmgen import config as configs
from llmgen import plan, render
from llmgen.formats import debug_state, tokens

RATE, WARMUP, FINAL = 3e-3, 7, 0.1


def scheduled(name: str, step: int, steps: int) -> float:
    """As llm.c has it, where steps count from 0."""
    i, low = step - 1, RATE * FINAL
    if name == "constant":
        return RATE
    if i < WARMUP:
        return RATE * (i + 1) / WARMUP
    part = (i - WARMUP) / (steps - WARMUP)
    if name == "linear":
        return RATE - part * (RATE - low)
    if name == "cosine":
        return low + 0.5 * (1 + math.cos(math.pi * part)) * (RATE - low)
    steady = 0.8 * steps
    return RATE if i < steady else low + (1 - math.sqrt((i - steady) / (steps - steady))) * (RATE - low)


@pytest.mark.parametrize("name", configs.LR_SCHEDULES)
def test_each_schedule_is_its_formula_at_every_step(run, data, tmp_path, name):
    flags = ["--lr", RATE, "--lr-schedule", name, "--warmup-steps", WARMUP, "--final-lr-fraction", FINAL]
    succeeds(run("--train-data", data, "--steps", 60, *flags, "--log-dir", "log"))
    rows = [json.loads(line) for line in (tmp_path / "work" / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    for row in rows:
        assert row["lr"] == pytest.approx(scheduled(name, row["step"], 60), rel=1e-7)


@pytest.mark.parametrize("model", [{}, {"norm": "rmsnorm", "norm_bias": False, "position": "rope", "mlp_bias": False}])
def test_four_micro_batches_of_two_are_one_batch_of_eight(tmp_path, model):
    made = {}
    rng = np.random.default_rng(3)
    for batch_size in (2, 8):
        small = {"num_layers": 2, "num_heads": 2, "channels": 32, "vocab_size": 257, "max_seq_len": 32, "seq_len": 24}
        made[batch_size] = plan.make(configs.load("gpt2-nano", overrides={**small, **model, "batch_size": batch_size}))
        (tmp_path / f"{batch_size}.c").write_text(render.source(made[batch_size]))
        command = ["gcc", "-O1", *made[batch_size].profile.flags, f"{batch_size}.c", "-lm", "-o", str(batch_size)]
        subprocess.run(command, cwd=tmp_path, check=True)
    tokens.write(tmp_path / "data.bin", rng.integers(0, 257, 8 * 24 + 1), 257)
    states, shapes = {}, {p.name: tuple(d.size for d in p.tensor.stacked) for p in made[2].parameters}
    for batch_size in (2, 8):
        flags = ["--train-data", "data.bin", "-d", str(8 * 24), "--debug-state", f"{batch_size}.bin"]
        subprocess.run([tmp_path / str(batch_size), *flags], cwd=tmp_path, check=True, capture_output=True)
        states[batch_size] = debug_state.read(tmp_path / f"{batch_size}.bin", 257, shapes)
    assert states[2].loss == pytest.approx(states[8].loss, abs=1e-6)
    everything = math.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in states[8].gradients.values()))
    for name, want in states[8].gradients.items():
        error = np.linalg.norm((states[2].gradients[name] - want).ravel().astype(np.float64))
        assert error <= 1e-5 * max(np.linalg.norm(want), 1e-4 * everything), name


def test_a_total_batch_is_what_a_step_takes(run, data, tmp_path):
    for micro_batches in (1, 3):
        succeeds(run("--train-data", data, "--steps", 2, "-d", micro_batches * BT, "--log-dir", str(micro_batches)))
    rows = (tmp_path / "work" / "3" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[0])
    assert row["tokens_per_second"] * row["ms"] / 1e3 == pytest.approx(3 * BT, rel=1e-6)
