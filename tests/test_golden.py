"""The committed sources are what the generator writes, wherever it runs, and no compiler finds fault with them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import update_golden
from command import succeeds

from llmgen import config, plan, render

GPT2 = update_golden.ROOT / "generated" / "gpt2-124m" / "train_gpt2.c"
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")


@pytest.mark.parametrize("path", update_golden.GOLDEN, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_committed_source_is_rendered_again_byte_for_byte(path):
    same = path.read_bytes() == update_golden.rendered(path).encode()  # compared here: a diff of 2,000 lines helps nobody
    assert same, "the templates or the generator changed: run python tests/update_golden.py and look at the diff"


def test_the_source_depends_on_config_target_and_cpu_alone(tmp_path):
    (tmp_path / "home").mkdir()
    environment = {
        "HOME": str(tmp_path / "home"),
        "USER": "somebody",
        "CC": "clang",
        "CFLAGS": "-g",
        "OMP_NUM_THREADS": "7",
        "PYTHONHASHSEED": "12345",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
    }
    build = ["build", "--config", "gpt2-124m", "--cpu", "x86-64-v3", "--no-compile", "--out", "out"]
    succeeds(*build, cwd=tmp_path, env=environment)
    assert (tmp_path / "out" / "train_gpt2.c").read_bytes() == GPT2.read_bytes()


@pytest.mark.parametrize("path", update_golden.GOLDEN, ids=lambda path: path.name)
def test_a_source_reads_as_if_written_by_hand(path):
    text = path.read_text()
    lines = text.split("\n")
    assert not re.search(r"{{|{%|{#|%}|\t| \n|\n\n\n\n", text), "traces of a template"
    assert max(map(len, lines)) <= 128
    most = {"train_gpt2.c": 2800, "train_gpt2.cu": 4000, "generate_gpt2.c": 1800, "generate_gpt2.cu": 2400}
    assert len(lines) <= most[path.name]
    assert text.startswith(f"/* {path.name}: ") and text.isascii()


def test_the_compile_line_at_its_top_compiles_it(tmp_path):
    (line,) = re.findall(r"^ \* Compile:  (gcc .*)$", GPT2.read_text(), re.M)
    shutil.copy(GPT2, tmp_path)
    result = subprocess.run([*shlex.split(line), *STRICT], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert (tmp_path / "train_gpt2").is_file()


# Each compiler meets each standard, with and without OpenMP, with and without -march, in every pair of the three.
MATRIX = [
    (compiler, *options)
    for compiler in ("gcc", "clang")
    for options in (
        ("gnu11", "-fopenmp", "-march=x86-64-v3", "-O1"),
        ("gnu11", "", "", "-O1"),
        ("c11", "-fopenmp", "", "-O1"),
        ("c11", "", "-march=x86-64-v3", "-O1"),
        ("gnu11", "-fopenmp", "-march=x86-64-v3", "-Ofast"),
    )
]


@pytest.mark.parametrize(("compiler", "standard", "openmp", "march", "speed"), MATRIX, ids=lambda word: word or "without")
def test_no_compiler_warns(tmp_path, compiler, standard, openmp, march, speed):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    options = [f"-std={standard}", *filter(None, [openmp, march, speed])]
    command = [compiler, *options, *STRICT, "-c", str(GPT2), "-o", str(tmp_path / "train_gpt2.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    if openmp and "omp.h" in result.stderr:
        pytest.skip(f"{compiler} has no OpenMP here")
    notes = re.findall("note: (.*)", result.stderr)
    assert result.returncode == 0 and (not result.stderr or (notes and not march)), result.stderr
    # Where wide vectors are emulated, gcc notes once how they would be passed; none are: what takes one is inlined.
    assert all(note.startswith("the ABI for passing parameters with") for note in notes), result.stderr


def test_sanitizers_find_nothing_in_a_run_of_nano(tmp_path):
    from llmgen.formats import tokens

    nano = config.load("gpt2-nano", overrides={"batch_size": 2, "seq_len": 40})  # sanitizers take their time
    (tmp_path / "train_gpt2.c").write_text(render.source(plan.make(nano, "c", "native")))
    sanitize = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    profile = plan.make(nano, "c", "native").profile
    compile = ["gcc", "-std=gnu11", *sanitize, *profile.flags, "-fopenmp", "train_gpt2.c", "-lm", "-o", "train_gpt2"]
    subprocess.run(compile, cwd=tmp_path, check=True)
    text = Path(__file__).read_bytes()
    tokens.write(tmp_path / "text.bin", list(text), nano.model.vocab_size)
    data = ["--train-data", "text.bin", "--val-data", "text.bin", "--val-steps", "1"]
    for more in (
        [
            "--steps",
            "2",
            "--sample-every",
            "1",
            "--sample-length",
            "80",
            "--shuffle",
            "--save",
            "model.bin",
            "--log-dir",
            "log",
        ],
        ["--load", "model.bin", "--debug-state", "state.bin"],
    ):
        result = subprocess.run([tmp_path / "train_gpt2", *data, *more], cwd=tmp_path, capture_output=True, timeout=300)
        assert result.returncode == 0 and result.stderr == b"", result.stderr.decode()
