"""The examples run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmgen import config, flags

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


def test_a_model_writes_with_and_without_python(example):
    lines = example("generate.sh", "2")
    assert "prompt 1 of 2:" in lines and "prompt 2 of 2:" in lines
    assert sum(line.startswith("read ") and "| generated " in line for line in lines) == 2


def test_a_stopped_run_goes_on_to_the_same_bits(example, tmp_path):
    lines = example("resume.sh", "90")
    assert lines[-1] == "the same model, bit for bit"
    assert any(re.fullmatch(r"stopped with exit status 143: stopped after step \d+", line) for line in lines)


def test_two_runs_in_one_plot(example, tmp_path):
    pytest.importorskip("matplotlib")
    lines = example("compare-runs.sh", "20")
    assert lines[-2].startswith("gpt2: step 20, loss ") and lines[-1].startswith("modern: step 20, loss ")
    assert (tmp_path / "work" / "curves.png").is_file()


def test_the_fineweb_recipe_asks_for_what_there_is(tmp_path):
    """Nothing is downloaded or trained: the commands are written down instead, and each flag is looked up."""
    for name in ("hf", "llmgen"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/said\n')
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "fineweb" / "text").mkdir(parents=True)
    subprocess.run([EXAMPLES / "fineweb-gpt2-124m.sh"], cwd=tmp_path, env=env, check=True)
    said = [shlex.split(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert [words[:2] for words in said] == [["hf", "download"], *(["llmgen", w] for w in ("export-tokens", "run", "plot"))]
    given = [word for word in said[2][said[2].index("--") :] if word.startswith("--") and word != "--"]
    known = {f"--{flag.name}" for flag in flags.program_flags(config.load("gpt2-124m", target="cuda"))}
    assert set(given) <= known and len(given) == len(set(given)) > 10
    made = config.load("gpt2-124m", target="cuda").program
    assert 524288 % (made.batch_size * made.seq_len) == 0 and 19073 == 10**10 // 524288
