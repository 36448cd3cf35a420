"""The examples run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmgen import config

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(tmp_path):
    """Runs an example in a folder of its own, with this llmgen on the path."""
    shim = tmp_path / "bin" / "llmgen"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmgen "$@"\n')
    shim.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()

    def example(name: str, *words) -> list[str]:
        command = [str(word) for word in (EXAMPLES / name, *words)]
        env = os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}", "CFLAGS": "-O1"}
        result = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, errors="replace", timeout=300)
        assert result.returncode == 0 and result.stderr == "", result
        return result.stdout.splitlines()

    return example


def test_every_example_config_is_one():
    for path in EXAMPLES.glob("*.toml"):
        assert config.load(str(path)).name == path.stem


def test_training_on_ones_own_text(example, tmp_path):
    (tmp_path / "text").write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(3000)))
    lines = example("train-on-your-text.sh", tmp_path / "text", "--", "--steps", "2", "--val-steps", "1")
    assert any(line.startswith("step 2/2 ") for line in lines) and "sample at step 2:" in lines
    assert (tmp_path / "work" / "own-text" / "model.bin").is_file()


def test_fine_tuning_a_huggingface_model_and_going_back(example, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    small = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64)
    before = transformers.GPT2LMHeadModel(small)
    before.save_pretrained(tmp_path / "hf")
    (tmp_path / "text").write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(3000)))
    flags = ["--steps", "2", "--val-steps", "1", "--sample-length", "5"]
    example("fine-tune-huggingface.sh", tmp_path / "hf", tmp_path / "text", "--", *flags)
    after = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "work" / "fine-tuned" / "model")
    changed = (after.transformer.wpe.weight - before.transformer.wpe.weight).abs().max().item()
    assert 0 < changed <= 2 * 3.01e-5, "two steps of AdamW at 3e-5"
    assert torch.isfinite(after.lm_head.weight).all()
