"""The CUDA program: planned, rendered, compiled; verified on the emulator, and where there is a GPU (marker `gpu`) on that.

On a GPU it is also trained twice, and checked by compute-sanitizer.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import emulator
import numpy as np
import pytest
from command import fails, succeeds

from llmgen import config as configs
from llmgen import plan, program, render, verify
from llmgen.cuda import architecture
from llmgen.formats import tokens

SMALL = {"num_layers": 2, "num_heads": 2, "channels": 64, "vocab_size": 257, "max_seq_len": 64, "batch_size": 2, "seq_len": 48}
SLOW = pytest.mark.slow
ARCHITECTURES = (
    "sm_80",
    *(pytest.param(name, marks=SLOW) for name in ("sm_86", "sm_89", "sm_90")),
    "sm_90a",
)  # CI: all, golden

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(architecture.present() is None, reason="no NVIDIA GPU")]


def small(**overrides) -> configs.Config:
    return configs.load("gpt2-nano", target="cuda", overrides={**SMALL, **overrides})


def test_the_plan_states_every_byte():
    made = plan.make(configs.load("gpt2-124m", target="cuda", overrides={"batch_size": 64}), "cuda", arch="sm_90a")
    memory = made.memory
    values = made.parameter_values
    assert (memory.parameters, memory.gradients, memory.optimizer) == (2 * values, 4 * values, 10 * values)
    assert memory.total(1) < 30.6e9, "torch.compile's peak for the same micro-batch"
    assert all(p.offset % 128 == 0 and p.stride % 128 == 0 for p in made.parameters), "256 bytes, in bf16 too"
    source = render.source(made)
    allocated = [int(n) for n in re.findall(r"= \((?:floatX|int16_t|float|char|int) \*\)allocate_tensors\((\d+)\)", source)]
    assert sum(allocated) == memory.total(1)


def test_the_precision_of_the_residual_stream_is_a_choice():
    wide = plan.make(small(residual_precision="fp32"), "cuda", arch="sm_80")
    types = {b.name: b.dtype for b in wide.forward_backward.buffers}
    assert types["residual"] == types["residual2"] == types["dresidual"] == "f32"
    assert types["ln1"] == types["qkv"] == types["dfc"] == "bf16" and types["ln1_mean"] == types["losses"] == "f32"
    narrow = plan.make(small(), "cuda", arch="sm_80")
    types = {b.name: b.dtype for b in narrow.forward_backward.buffers}
    assert types["residual"] == types["dresidual"] == "bf16"
    assert {b.dtype for b in plan.make(small(precision="fp32"), "cuda").forward_backward.buffers} == {"f32"}


def test_architectures():
    assert architecture.resolve("sm_80,sm_86", "bf16").flags == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_86,code=sm_86",
    )
    assert architecture.resolve("sm_90a", "bf16").flags == ("-gencode=arch=compute_90a,code=sm_90a",)
    assert architecture.resolve("sm_75", "fp32").least == 750


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    build = ["build", "--config", "gpt2-nano", "--target", "cuda", "--no-compile", "--out", "out"]
    assert "sm_70 has no bfloat16" in fails(1, *build, "--arch", "sm_70", cwd=tmp_path)
    assert "is not known" in fails(1, *build, "--arch", "hopper", cwd=tmp_path)
    assert "stands alone" in fails(1, *build, "--arch", "sm_80,sm_90a", cwd=tmp_path)
    assert "bf16 or fp32" in fails(1, *build, "--set", "residual_precision=fp8", cwd=tmp_path)
    assert not (tmp_path / "out" / "train_gpt2.cu").exists()


def test_without_nvcc_the_source_is_left_and_the_line_says_how(tmp_path):
    build = ["build", "--config", "gpt2-nano", "--target", "cuda", "--arch", "sm_80", "--out", "out"]
    line = fails(1, *build, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "NVCC": "/nowhere/nvcc"})
    assert "NVCC" in line


def test_the_largest_batch_that_fits(tmp_path):
    (line,) = succeeds("plan", "--config", "gpt2-124m", "--target", "cuda", "--memory", "24GB", cwd=tmp_path)
    batch = int(re.match(r"largest batch_size: (\d+) ", line)[1])
    load = {size: configs.load("gpt2-124m", target="cuda", overrides={"batch_size": size}) for size in (batch, batch + 1)}
    fits, exceeds = (plan.make(load[size], "cuda").memory.total(1) for size in (batch, batch + 1))
    assert fits <= 24e9 < exceeds


@needs_nvcc
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_compiles_without_a_warning_and_links_the_runtime_alone(tmp_path, monkeypatch, arch, precision):
    monkeypatch.setenv("NVCC", "nvcc -Werror all-warnings")
    built = program.build(small(precision=precision), "cuda", "native", arch, tmp_path)
    assert not re.search(r"\s-l", built.compile_line)
    linked = subprocess.run(["ldd", built.program], capture_output=True, text=True).stdout
    assert not re.search("cublas|cudnn|libcuda", linked)


@needs_nvcc
@pytest.mark.parametrize(
    "overrides",
    [
        {"precision": "fp32", "channels": 99, "num_heads": 3, "head_size": 33, "vocab_size": 101},
        {"recompute": "cheap", "optimizer": "muon", "residual_precision": "fp32"},
        {"family": "gemma", "num_kv_heads": 1, "attention_window": [0, 8], "logit_softcap": 30.0},
        pytest.param({"family": "llama", "num_kv_heads": 1}, marks=SLOW),
        pytest.param({"family": "qwen3"}, marks=SLOW),
        pytest.param({"family": "speedrun"}, marks=SLOW),
    ],
    ids=lambda overrides: " ".join(f"{key}={value}" for key, value in overrides.items()),
)
def test_other_models_compile(tmp_path, monkeypatch, overrides):
    monkeypatch.setenv("NVCC", "nvcc -Werror all-warnings -O1")
    program.build(family(**overrides), "cuda", "native", "sm_80", tmp_path)


def family(**overrides) -> configs.Config:
    """A small model of a family, by the fields that a config file would say."""
    fields = {**SMALL, **overrides}
    name = fields.pop("family", "gpt2")
    raw = {"family": name, "model": {}, "program": {}, "train": {}}
    for key, value in fields.items():
        raw[configs.table_of(key)][key] = value
    raw["program"].setdefault("precision", "bf16")
    return configs.from_tables("small", raw, "a test", "cuda")


# ---- on a GPU


class OnGpu:
    pytestmark = needs_gpu


def verified(config: configs.Config, emulated: bool = False) -> list[str]:
    lines = []

    def build(config, folder: Path) -> Path:
        if not emulated:
            return program.build(config, "cuda", "native", None, folder).program
        built = program.build(config, "cuda", "native", "sm_80", folder, compile=False)
        emulator.compile(built.source, folder / "emulated")
        return folder / "emulated"

    passed = verify.verify(config, build, lines.append)
    print("\n".join(lines))
    assert passed, "\n".join(lines)
    return lines


@pytest.mark.skipif(not emulator.available(), reason="the emulator is for g++ on x86-64 Linux")
@pytest.mark.parametrize(
    "overrides",
    [
        {"precision": "bf16", "family": "gemma", "num_kv_heads": 1, "attention_window": [0, 8], "logit_softcap": 30.0},
        {"precision": "fp32", "family": "qwen3", "num_kv_heads": 1, "recompute": "cheap"},
    ],
    ids=lambda overrides: " ".join(f"{key}={value}" for key, value in overrides.items()),
)
def test_a_model_is_right_on_the_emulator(overrides):
    verified(family(**{"channels": 16, "seq_len": 21, "max_seq_len": 32, **overrides}), emulated=True)


class TestVerified(OnGpu):
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize(
        "overrides",
        [
            {},
            {"seq_len": 37, "batch_size": 3},
            {"channels": 100, "num_heads": 5, "vocab_size": 101},
            {"channels": 99, "num_heads": 3},
            {"channels": 160},
            {"channels": 512, "num_heads": 4, "seq_len": 64, "batch_size": 8, "vocab_size": 3000},
            {"residual_precision": "fp32"},
            {"recompute": "cheap"},
            {"optimizer": "muon"},
            {"family": "llama", "num_kv_heads": 1},
            {"family": "gemma", "num_kv_heads": 1, "attention_window": [0, 8], "logit_softcap": 30.0},
            {"family": "qwen3"},
            {"family": "speedrun"},
        ],
        ids=lambda overrides: " ".join(f"{key}={value}" for key, value in overrides.items()) or "small",
    )
    def test_a_model(self, overrides, precision):
        verified(family(precision=precision, **overrides))


class TestRuns(OnGpu):
    def data(self, folder: Path, config: configs.Config, samples: int = 8) -> list[str]:
        count = samples * config.program.batch_size * config.program.seq_len + 1
        text = np.random.default_rng(3).integers(config.model.vocab_size, size=count)
        tokens.write(folder / "text.bin", text, config.model.vocab_size)
        return ["--train-data", "text.bin", "--val-data", "text.bin", "--val-steps", "2"]

    def test_the_same_run_twice_gives_the_same_bits(self, tmp_path):
        config = small(channels=128, seq_len=64)
        built = program.build(config, "cuda", "native", None, tmp_path)
        data = self.data(tmp_path, config)
        for name in ("a", "b"):
            command = [built.program.resolve(), *data, "--steps", "20", "--save", f"{name}.bin", "--sample-every", "20"]
            result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
            assert result.returncode == 0 and not result.stderr, result.stderr
        assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
        planned = plan.make(config, "cuda").memory.total(1)
        assert f"memory: {planned} bytes" in result.stdout

    def test_micro_batches_add_up(self, tmp_path):
        """A step of four micro-batches equals one of four times the batch, but for rounding."""
        losses = []
        for batch_size in (2, 8):
            config = small(batch_size=batch_size, precision="fp32", total_batch_size=8 * 48)
            folder = tmp_path / str(batch_size)
            built = program.build(config, "cuda", "native", None, folder)
            data = self.data(folder, small(batch_size=8))
            command = [built.program.resolve(), *data, "--steps", "5", "--log-dir", "log"]
            assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
            lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
            losses.append([line["loss"] for line in lines if "loss" in line])
        assert np.allclose(*losses, rtol=0, atol=1e-5)

    def test_too_large_a_batch_is_told_what_would_fit(self, tmp_path):
        config = small(batch_size=1 << 17, seq_len=64, channels=512, num_heads=8, num_layers=8)
        built = program.build(config, "cuda", "native", None, tmp_path)
        command = [built.program.resolve(), *self.data(tmp_path, config, samples=2), "--steps", "1"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        needs, free, batch = map(
            int, re.search(r"needs (\d+) bytes.* has (\d+) free.*--batch-size (\d+)", result.stderr).groups()
        )
        fits = plan.make(config.replace(batch_size=batch, total_batch_size=0), "cuda").memory.total(1)
        assert needs == plan.make(config, "cuda").memory.total(1) and 0.9 * free < fits <= free

    @pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
    @pytest.mark.parametrize(
        "overrides",
        [{"precision": "bf16"}, {"precision": "fp32"}, {"precision": "bf16", "channels": 128}],
        ids=["bf16", "fp32", "bf16, heads of 64 channels"],
    )
    def test_sanitizers_find_nothing(self, tmp_path, tool, overrides):
        if not shutil.which("compute-sanitizer"):
            pytest.skip("no compute-sanitizer")
        config = small(seq_len=40, **overrides)
        built = program.build(config, "cuda", "native", None, tmp_path)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(built.program.resolve())]
        data = self.data(tmp_path, config, samples=3)
        result = subprocess.run([*command, *data, "--steps", "2"], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:]
