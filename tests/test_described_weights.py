"""A program of another architecture than GPT-2: it writes and reads weights that describe themselves."""

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llmgen import config as configs
from llmgen import plan, render
from llmgen.formats import debug_state, files, tokens, weights

SIZES = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "channels": 32, "vocab_size": 101, "max_seq_len": 16}


def described(**model) -> configs.Config:
    tables = {"family": "llama", "model": {**SIZES, **model}, "program": {"batch_size": 2, "seq_len": 8}}
    return configs.from_tables("llama", tables, "llama")


CONFIG = described()
PLAN = plan.make(CONFIG, "c", "x86-64-v2")
SHAPES = {p.name: tuple(d.size for d in p.tensor.stacked) for p in PLAN.parameters}


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "train_llama.c").write_text(render.source(PLAN))
    strict = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsanitize=address,undefined"]
    command = ["gcc", *strict, *PLAN.profile.flags, "train_llama.c", "-lm", "-o", "train_llama"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "train_llama"


@pytest.fixture
def run(program, tmp_path):
    def run(*flags) -> subprocess.CompletedProcess:
        command = [str(word) for word in (program, "--steps", 0, "--sample-length", 0, *flags)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


def succeeds(result) -> list[str]:
    assert result.returncode == 0 and result.stderr == "", result
    return result.stdout.splitlines()


def fails(result, *words: str) -> None:
    assert result.returncode == 1 and result.stderr.startswith("train_llama: ") and result.stderr.count("\n") == 1, result
    for word in words:
        assert word in result.stderr, result.stderr


def write(path: Path, config=CONFIG, dtype: str = "fp32") -> Path:
    rng = np.random.default_rng(0)
    shapes = {p.name: tuple(d.size for d in p.tensor.stacked) for p in plan.make(config).parameters}
    pieces = ((name, rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items())
    weights.write(path, config, shapes, pieces, dtype)
    return path


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_program_and_command_write_the_same_bytes(run, tmp_path, dtype):
    write(tmp_path / "model.bin", dtype=dtype)
    lines = succeeds(run("--load", "model.bin", "--save", "saved.bin", "--save-dtype", dtype))
    assert (tmp_path / "saved.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()
    assert ("model.bin: bf16, converted to fp32" in lines) == (dtype == "bf16")
    assert configs.load(str(tmp_path / "saved.bin")).model == CONFIG.model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 3}, ["model.num_layers is 3", "built for 2", "llmgen build --config"]),
        ({"rope_theta": 5e5}, ["model.rope_theta is 500000.0", "built for 10000.0"]),
        ({"activation": "gelu"}, ['model.activation is "gelu"', 'built for "silu"']),
        ({"attention_window": [4]}, ["model.attention_window is [4]", "built for [0]"]),
        ({"tie_embeddings": True}, ["model.tie_embeddings is true"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_of_another_model_are_refused_by_the_field(run, tmp_path, changes, words):
    write(tmp_path / "model.bin", described(**changes))
    fails(run("--load", "model.bin"), "model.bin", *words)


def test_what_only_training_uses_may_differ(run, tmp_path):
    write(tmp_path / "model.bin", described(z_loss=1e-3, label_smoothing=0.1, zero_projections=True, max_seq_len=999))
    succeeds(run("--load", "model.bin"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"model.num_heads = 4", b"model.num_haeds = 4", ["model.num_heads is not said"]),
        (b'dtype = "fp32"', b'dtype = "fp64"', ['its values are "fp64"']),
        (b'dtype = "fp32"', b'dtype = "bf16"', ["bytes, but its header asks for"]),
        (struct.pack("<2i", 20261101, 1), struct.pack("<2i", 20261101, 7), ["version 7"]),
        (struct.pack("<2i", 20261101, 1), struct.pack("<2i", 20240326, 3), ["magic number is 20240326, not 20261101"]),
        (b"tensors.wte = [128, 32]", b"tensors.wte = [128, 33]", ["tensors.wte is [128, 33]"]),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else "",
)
def test_damaged_weights_are_refused(run, tmp_path, old, new, words):
    path = write(tmp_path / "model.bin")
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    fails(run("--load", "model.bin"), "model.bin", *words)


@pytest.mark.parametrize("size", [-1, 0, 2**30, 2**31 - 1])
def test_a_text_of_impossible_length_is_refused(run, tmp_path, size):
    path = write(tmp_path / "model.bin")
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<i", size) + data[12:])
    fails(run("--load", "model.bin"), "model.bin", f"{size} bytes of text")
    path.write_bytes(data[:1500])
    fails(run("--load", "model.bin"), "model.bin", "too early")


def test_a_debug_state_says_its_sizes(run, tmp_path):
    write(tmp_path / "model.bin")
    tokens.write(tmp_path / "train.bin", np.arange(17), 101)
    succeeds(run("--load", "model.bin", "--train-data", "train.bin", "--debug-state", "state.bin"))
    ints, _ = files.read_header(tmp_path / "state.bin", "debug state")
    assert ints[:8].tolist() == [20240327, 3, 2, 8, 101, 128, len(SHAPES), 0]
    state = debug_state.read(tmp_path / "state.bin", 101, SHAPES)
    assert np.isfinite(state.loss) and state.logits.shape == (2, 8, 101)
