"""The CUDA program that generates, on the emulator and on a GPU: what it computes and writes, against the float64 reference."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import cuda_kernels
import cuda_programs
import emulator
import numpy as np
import pytest
from command import fails, succeeds
from test_decode import logits_at_once, random_parameters

from llmgen import config as configs
from llmgen import generation, models, program, render
from llmgen.formats import tokenizer, weights
from llmgen.models import transformer

emulated = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64 Linux")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")

SIZES = {"num_layers": 2, "num_heads": 4, "channels": 32, "vocab_size": 101, "max_seq_len": 150}
# Rows of 99 values fit no vector load, so the general products serve all rows; a window of 5 begins within a part of the cache
# and, late in a text of 150, within its second one.
MODELS = {
    "gpt2": ("gpt2", {}),
    "odd": ("gpt2", {"channels": 99, "num_heads": 3, "activation": "relu", "tie_embeddings": False}),
    "llama": ("llama", {"num_kv_heads": 2, "mlp_channels": 48}),
    "qwen3": ("qwen3", {"num_kv_heads": 1, "head_size": 12, "rope_fraction": 0.5, "mlp_channels": 40, "qkv_bias": True}),
    "gemma": (
        "gemma",
        {
            "num_kv_heads": 2,
            "attention_window": [5, 0],
            "attention_softcap": 2.0,
            "logit_softcap": 3.0,
            "norm_position": "sandwich",
            "mlp_channels": 48,
        },
    ),
}


def config_of(name: str, precision: str, **program) -> configs.Config:
    family, said = MODELS[name]
    raw = {"family": family, "model": {**SIZES, **said}, "program": {"seq_len": 16, "precision": precision, **program}}
    return configs.from_tables("small", raw, name, "cuda")


@dataclass(frozen=True)
class Program:
    path: Path
    config: configs.Config
    parameters: dict[str, np.ndarray]  # as the program has them, in float64

    def ids(self, prompts: list[list[int]], *flags, end_of_text: int = 0) -> list[list[int]]:
        """What it writes behind each prompt."""
        folder = self.path.parent
        (folder / "prompts.txt").write_text("".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts))
        tokenizer.write(folder / "ids.bin", [f"{i} ".encode() for i in range(self.config.model.vocab_size)], end_of_text)
        given = ["--load", "model.bin", "--tokenizer", "ids.bin", "--prompt-tokens", "prompts.txt", "--quiet", *flags]
        return [[int(word) for word in line.split()] for line in self.run(*given).splitlines()]

    def run(self, *flags) -> str:
        (self.path.parent / "logits").unlink(missing_ok=True)
        command = [self.path, *map(str, flags)]
        environment = {**os.environ, "LOGITS": "logits"}
        done = subprocess.run(command, cwd=self.path.parent, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0 and done.stderr == "", done
        return done.stdout

    @property
    def logits(self) -> np.ndarray:
        """Those from which the last run drew, in the order in which it did: (draws, V)."""
        return np.fromfile(self.path.parent / "logits", np.float32).reshape(-1, self.config.model.vocab_size)


def build(config: configs.Config, folder: Path, device: str) -> Program:
    """The program of a random model; it leaves the logits in a file besides."""
    made = generation.make(config, "cuda", arch=cuda_programs.arch(device))
    source = render.generation(made)
    head = "static int draw_token(const Settings *s, const float *logits, double coin) {\n"
    assert head in source
    keep = 'FILE *kept = fopen(getenv("LOGITS"), "ab"); fwrite(logits, sizeof(float), V, kept); fclose(kept);\n'
    (folder / "generate.cu").write_text(source.replace(head, head + keep))
    cuda_programs.compile(folder / "generate.cu", folder / "generate", device, made.profile)
    values = random_parameters(config, np.random.default_rng(1))
    values = {name: np.asarray(array, np.float32) for name, array in values.items()}
    weights.write(folder / "model.bin", config, models.parameter_shapes(config), values.items())
    precision = config.program.precision
    return Program(
        folder / "generate",
        config,
        {name: cuda_kernels.rounded(array, precision).astype(np.float64) for name, array in values.items()},
    )


def prompts_of(config: configs.Config, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, config.model.vocab_size, n).tolist() for n in lengths]


def references(made: Program, prompt: list[int], written: list[int]) -> np.ndarray:
    """The reference's logits for each token of `written`, after those before it."""
    config = made.config
    logits = logits_at_once(config, made.parameters, np.array([*prompt, *written][:-1]))
    return logits[len(prompt) - 1 :, : config.model.vocab_size]


# A prompt of 133 is read in pieces of 64, the last of 5 tokens, and goes over the end of a part of the cache.
@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in MODELS), ("gpt2", "bf16"), ("gemma", "bf16")])
def test_logits_and_tokens_are_those_of_the_reference(name, precision, device, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "DECODED_TOKENS", 64)
    made = build(config_of(name, precision), tmp_path, device)
    for length, count in ((1, 4), (9, 3), (133, 3)):
        (prompt,) = prompts_of(made.config, length)
        (written,) = made.ids([prompt], "--temperature", 0, "--tokens", count, "--stop", 0)
        wanted = references(made, prompt, written)
        if precision == "fp32":
            np.testing.assert_allclose(made.logits, wanted, rtol=0, atol=2e-4)
            assert written == wanted.argmax(axis=1).tolist()
        else:  # a rounding to bf16 errs by 2^-9; so do a few dozen in a row
            error = np.abs(made.logits - wanted).max() / np.abs(wanted).max()
            assert error < 0.04, error
            assert written == made.logits.argmax(axis=1).tolist()


def test_the_residual_stream_may_be_wider(device, tmp_path):
    made = build(config_of("llama", "bf16", residual_precision="fp32"), tmp_path, device)
    (prompt,) = prompts_of(made.config, 19)
    (written,) = made.ids([prompt], "--temperature", 0, "--tokens", 3, "--stop", 0)
    wanted = references(made, prompt, written)
    assert np.abs(made.logits - wanted).max() / np.abs(wanted).max() < 0.03


@pytest.fixture(scope="module")
def small(tmp_path_factory, device):
    return build(config_of("llama", "bf16"), tmp_path_factory.mktemp("small"), device)


def test_what_is_written_does_not_depend_on_the_batch(small):
    prompts = prompts_of(small.config, 3, 1, 20, 5, 2, 2, 2, 4, 2, 3, 1)
    drawn = ("--tokens", 3, "--temperature", 1.3, "--top-k", 50, "--stop", 0)
    together = small.ids(prompts, *drawn)
    assert len({tuple(text) for text in together}) > 8 and {len(text) for text in together} == {3}
    assert small.ids(prompts, *drawn, "--batch", 2) == together
    assert small.ids(prompts[:1], *drawn) == together[:1]
    assert small.ids(prompts[:1], *drawn, "--seed", 2) != together[:1]


def test_a_text_ends_at_the_end_of_text_and_where_its_context_is_full(small):
    (prompt,) = prompts_of(small.config, 3)
    (free,) = small.ids([prompt], "--tokens", 6, "--temperature", 2, "--stop", 0)
    end = free[4]
    assert small.ids([prompt], "--tokens", 6, "--temperature", 2, end_of_text=end)[0] == free[: free.index(end)]
    (long,) = prompts_of(small.config, small.config.model.max_seq_len - 4)
    assert len(small.ids([long], "--tokens", 99, "--stop", 0)[0]) == 4


def test_it_says_what_it_did(small):
    (small.path.parent / "prompts.txt").write_text("1 2 3\n")
    text = small.run("--load", "model.bin", "--tokens", 2, "--stop", 0, "--prompt-tokens", "prompts.txt")
    figures = r"read \d+ tokens in [\d.]+ ms, [\d.]+ tok/s \| generated 2 in [\d.]+ ms, [\d.]+ tok/s \| gpu: \S.*"
    assert re.fullmatch(figures, text.splitlines()[-1])


@emulated
def test_no_thread_races_another(tmp_path, monkeypatch):
    monkeypatch.setenv("EMULATOR_RACES", "1")
    made = build(config_of("gemma", "bf16"), tmp_path, "emulator")
    (prompt,) = prompts_of(made.config, 20)
    assert len(made.ids([prompt], "--tokens", 2, "--stop", 0)[0]) == 2


def test_the_plan_of_a_gpu():
    made = generation.make(config_of("gemma", "bf16"), "cuda", arch="sm_80")
    decode = {t.name: t.dtype for op in made.graph.function("decode").ops() for t in op.outputs.values()}
    assert decode["keys"] == decode["values"] == decode["qkv"] == "bf16"
    assert decode["logits"] == decode["logits_capped"] == decode["lnf_rstd"] == "f32"
    assert generation.make(config_of("gemma", "fp32"), "cuda", arch="sm_75").item_size == 4
    assert generation.make(config_of("gpt2", "bf16"), "cuda", arch="sm_90a").profile.name == "sm_90", "portable kernels"
    a, b = (config_of("gpt2", precision) for precision in ("bf16", "fp32"))
    assert generation.hash_of(a, "cuda") != generation.hash_of(b, "cuda")


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("gpt2", {"precision": "bf16"}),
        ("odd", {"precision": "bf16", "residual_precision": "fp32"}),
        ("gemma", {"precision": "bf16"}),
        ("qwen3", {"precision": "fp32"}),
    ],
)
def test_it_compiles_without_a_warning(tmp_path, monkeypatch, name, program):
    monkeypatch.setenv("NVCC", "nvcc -Werror all-warnings -O1")
    built = compiled(config_of(name, **program), tmp_path)
    assert not re.search(r"\s-l", built.compile_line)


def compiled(config: configs.Config, folder: Path) -> program.Built:
    return program.build_generation(config, "cuda", "native", "sm_80", folder)


def test_the_commands(tmp_path):
    on_gpu = ("--target", "cuda", "--arch", "sm_80")
    lines = succeeds("build", "--config", "gpt2-nano", "--generate", *on_gpu, "--no-compile", "--out", "a", cwd=tmp_path)
    assert lines[0] == "a/generate_gpt2.cu" and lines[1].endswith("-arch=sm_80 generate_gpt2.cu -o generate_gpt2cu")
    assert "bfloat16" in (tmp_path / "a" / "generate_gpt2.cu").read_text().split("\n")[0]

    config = config_of("gpt2", "bf16")
    values = random_parameters(config, np.random.default_rng(1)).items()
    shapes = models.parameter_shapes(config)
    weights.write(tmp_path / "model.bin", config, shapes, ((name, array.astype(np.float32)) for name, array in values))
    tokenizer.write(tmp_path / "ids.bin", [b"a"] * 101, 0)
    generate = ("generate", "--model", "model.bin", "--tokenizer", "ids.bin", *on_gpu)
    nowhere = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "NVCC": "/nowhere/nvcc"}
    assert "NVCC" in fails(1, *generate, cwd=tmp_path, env=nowhere)
    (source,) = (tmp_path / "cache").rglob("*.cu")
    assert source.parent.name.endswith("-sm_80-bf16")
    assert "is for target cuda" in fails(1, "generate", "--model", "model.bin", "--arch", "sm_80", cwd=tmp_path)
    assert "fp8" in fails(1, *generate, "--precision", "fp8", cwd=tmp_path)
