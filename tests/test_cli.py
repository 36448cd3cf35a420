"""The llmgen command: what each command prints, its exit status, and one line on stderr for whatever is wrong."""

import json
import os
import subprocess
import sys
import time

import pytest
from command import fails, llmgen, succeeds

from llmgen import config

TINY = ("--set", "num_layers=1", "--set", "channels=16", "--set", "num_heads=2", "--set", "max_seq_len=64")


def test_help_is_there_at_once(tmp_path):
    """Under 0.3 s, of which we count what this process uses: the wall clock is also that of others."""
    seconds = []
    for _ in range(3):
        before = os.times()
        lines = succeeds("--help", cwd=tmp_path)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(used)
    assert min(seconds) < 0.3
    commands = ("configs", "plan", "build", "run", "export-tokens", "export-weights", "import-weights", "verify")
    for command in commands:
        assert any(line.split()[:1] == [command] for line in lines), command
        assert succeeds(command, "--help", cwd=tmp_path)[0].startswith("Usage: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name a command"),
        (("nonsense",), "nonsense"),
        (("--nonsense",), "--nonsense"),
        (("plan", "--nonsense"), "--nonsense"),
        (("plan", "more"), "more"),
        (("plan", "--config"), "--config"),
        (("plan", "--batch-size", "four"), "--batch-size"),
        (("plan", "--target", "tpu"), "--target"),
        (("run", "--steps", "3"), "behind --"),
        (("export-tokens", "--out", "x"), "SOURCE"),
        (("export-tokens", "x"), "--out"),
        (("export-weights", "--out", "x"), "SOURCE"),
        (("import-weights", "--out", "x"), "FILE"),
        (("plot", "--out", "x"), "RUN"),
        (("doctor", "more"), "more"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_wrong_use_is_one_line_and_status_2(tmp_path, words, said):
    assert said in fails(2, *words, cwd=tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "--config", "gpt2-124"), "did you mean 'gpt2-124m'?"),
        (("build", "--config", "none.toml"), "none.toml: no such file"),
        (("run", "--config", "nothing"), "presets: gpt2-nano"),
        (("configs", "--show", "nothing"), "no preset 'nothing'"),
        (("plan", "--set", "num_layer=3"), "did you mean 'num_layers'?"),
        (("plan", "--set", "num_layers"), "expected key=value"),
        (("verify", "--set", "num_heads=3"), "num_heads = 2 or 4"),
        (("plan", "--seq-len", "257"), "max_seq_len = 256"),
        (("plan", "--precision", "bf16"), "use fp32"),
        (("plan", "--cpu", "z80"), "x86-64-v3"),
        (("plan", "--memory", "lots"), "24GB"),
        (("plan", "--memory", "1MB"), "batch_size = 1 needs"),
        (("build", "--no-compile", "--out", "file/out"), "file/out"),
        (("export-tokens", "none.txt", "--out", "x"), "none.txt"),
        (("export-tokens", "file", "--tokenizer", "bytes", "--out", "file"), "file"),
        (("export-weights", "./none", "--out", "x"), "none"),
        (("export-weights", "file", "--out", "x", "--dtype", "fp64"), "fp32 or bf16"),
        (("import-weights", "none.bin", "--out", "x"), "none.bin: no such file"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_what_cannot_be_done_is_one_line_and_status_1(tmp_path, words, said):
    (tmp_path / "file").write_text("here")
    assert said in fails(1, *words, cwd=tmp_path)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "here"


def test_a_full_stdout_is_one_line(tmp_path):
    command = [sys.executable, "-m", "llmgen", "configs"]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "llmgen: stdout: No space left on device\n"


def test_configs_lists_the_presets_and_shows_one_as_toml(tmp_path):
    lines = succeeds("configs", cwd=tmp_path)
    assert [line.split()[0] for line in lines[2:]] == config.presets()
    (tmp_path / "mine.toml").write_text("\n".join(succeeds("configs", "--show", "gpt2-124m", cwd=tmp_path)))
    assert config.load(str(tmp_path / "mine.toml")).hash == config.load("gpt2-124m").hash


def test_plan_prints_a_table_json_or_the_largest_batch(tmp_path):
    text = "\n".join(succeeds("plan", cwd=tmp_path))
    made = json.loads("\n".join(succeeds("plan", "--json", cwd=tmp_path)))
    for row in made["parameters"] + made["activations"]:
        assert row["name"] in text
    assert f"{made['memory']['total']:,}" in text
    (line,) = succeeds("plan", "--memory", "1GB", cwd=tmp_path)
    largest = int(line.split()[2])
    totals = []
    for size in (largest, largest + 1):
        lines = succeeds("plan", "--batch-size", size, "--json", cwd=tmp_path)
        totals.append(json.loads("\n".join(lines))["memory"]["total"])
    assert totals[0] <= 1_000_000_000 < totals[1]


def test_build_prints_source_compile_line_and_program(tmp_path):
    source, line, program = succeeds("build", *TINY, "--out", "a/b", cwd=tmp_path, env={"CFLAGS": "-O1"})
    assert (source, program) == ("a/b/train_gpt2.c", "a/b/train_gpt2")
    assert "-fopenmp" in line and source in line
    result = subprocess.run([tmp_path / program, "--version"], capture_output=True, text=True)
    assert result.returncode == 0


def test_the_default_folder_has_the_hash_behind_its_name_if_a_field_is_overridden(tmp_path):
    def folder(*words) -> str:
        source = succeeds("build", "--no-compile", *words, cwd=tmp_path)[0]
        assert (tmp_path / source).is_file() and source.endswith("/train_gpt2.c")
        return source.removesuffix("/train_gpt2.c")

    changed = config.load("gpt2-nano", overrides={"num_layers": 2}).hash
    (tmp_path / "mine.toml").write_text(config.load("gpt2-nano").to_toml())
    assert folder() == "generated/gpt2-nano"
    assert folder("--set", "num_layers=2") == f"generated/gpt2-nano-{changed}"
    assert folder("--config", "mine.toml") == "generated/mine"
    assert folder("--config", "mine.toml", "--set", "num_layers=2") == f"generated/mine-{changed}"
    assert sorted(os.listdir(tmp_path / "generated" / "mine")) == ["train_gpt2.c"]


def test_without_a_compiler_the_source_is_left_and_the_line_says_how_to_go_on(tmp_path):
    said = fails(1, "build", "--cpu", "x86-64-v3", "--out", "out", cwd=tmp_path, env={"PATH": str(tmp_path), "CC": ""})
    assert "out/train_gpt2.c" in said and "gcc -O3 -std=gnu11 -march=x86-64-v3 -fopenmp train_gpt2.c -lm -o train_gpt2" in said
    assert os.listdir(tmp_path / "out") == ["train_gpt2.c"]
    assert "CC=none" in fails(1, "build", "--out", "out", cwd=tmp_path, env={"CC": "none"})


def test_a_failing_compiler_is_one_line_that_names_the_file_with_its_words(tmp_path):
    said = fails(1, "build", "--out", "out", cwd=tmp_path, env={"CFLAGS": "-no-such-flag"})
    assert "out/train_gpt2.log" in said
    assert "no-such-flag" in (tmp_path / "out" / "train_gpt2.log").read_text()


def test_run_builds_once_trains_and_returns_the_programs_status(tmp_path):
    env = {"CFLAGS": "-O1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "text").write_text("to be or not to be, that is the question\n" * 500)
    succeeds("export-tokens", "text", "--tokenizer", "bytes", "--out", "data", cwd=tmp_path)
    run = ["run", *TINY, "--out", "out", "--", "--train-data", "data/train_*.bin", "--val-data", "data/val_*.bin"]
    lines = succeeds(*run, "--steps", "5", cwd=tmp_path, env=env)
    assert len([line for line in lines if line.startswith("step ")]) == 5
    assert any(line.startswith("val loss ") for line in lines) and "sample at step 5:" in lines
    assert {"model.bin", "metrics.jsonl"} <= set(os.listdir(tmp_path / "out"))
    made = (tmp_path / "out" / "train_gpt2").stat().st_mtime_ns
    result = llmgen(*run, "--steps", "many", cwd=tmp_path, env=env)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    result = llmgen(*run[:-4], "--train-data", "none.bin", cwd=tmp_path, env=env)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "none.bin" in result.stderr
    assert (tmp_path / "out" / "train_gpt2").stat().st_mtime_ns == made
    assert not (tmp_path / "cache").exists(), "the built-in corpus is made only where no data is named"


def test_run_with_nothing_said_prepares_the_builtin_corpus(tmp_path):
    env = {"CFLAGS": "-O1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    started = time.monotonic()
    result = llmgen("run", *TINY, "--", "--steps", "2", "--val-steps", "1", cwd=tmp_path, env=env)
    assert result.returncode == 0, result
    assert "step 2/2 " in result.stdout and "sample at step 2:" in result.stdout
    assert os.listdir(tmp_path / "cache") == ["llmgen"]
    assert time.monotonic() - started < 120


def test_run_trains_on_the_built_in_corpus_as_the_config_says(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'family = "gpt2"\n[model]\nnum_layers = 1\nnum_heads = 1\nchannels = 16\nvocab_size = 257\nmax_seq_len = 64\n'
        "[program]\nbatch_size = 2\nseq_len = 16\n[train]\nsteps = 3\nsample_length = 5\n"
    )
    lines = succeeds("run", "--config", "mine.toml", cwd=tmp_path, env={"CFLAGS": "-O1"})
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 3 and steps[0].startswith("step 1/3 ") and "lr 7.50e-07" in steps[0], "the warmup is the recipe's"
    assert any(line.startswith("sample at step 3") for line in lines)


def test_the_architecture_of_a_gpu_is_refused_for_c(tmp_path):
    assert "--cpu" in fails(1, "plan", "--arch", "sm_80", cwd=tmp_path)
