"""Compiles whole CUDA programs for where a test runs: the emulator, or the GPU that is present."""

from pathlib import Path

import emulator

from llmgen import toolchain
from llmgen.cuda import architecture


def arch(device: str) -> str | None:
    """What the source is rendered for."""
    return "sm_80" if device == "emulator" else architecture.present()


def compile(source: Path, to: Path, device: str, profile: architecture.Architecture) -> None:
    """profile: the plan's, what the source is rendered for."""
    if device == "emulator":
        emulator.compile(source, to)
    else:
        toolchain.compile(source, to, "cuda", profile)
