"""Runs the llmgen command as a user would, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def llmgen(*words, cwd: Path, env: dict | None = None) -> subprocess.CompletedProcess:
    """`python -m llmgen WORDS` with its output as text. `env` adds to the environment."""
    command = [sys.executable, "-m", "llmgen", *map(str, words)]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", timeout=600)


def succeeds(*words, cwd: Path, env: dict | None = None) -> list[str]:
    """The lines of its stdout."""
    result = llmgen(*words, cwd=cwd, env=env)
    assert result.returncode == 0 and result.stderr == "", result
    return result.stdout.splitlines()


def fails(status: int, *words, cwd: Path, env: dict | None = None) -> str:
    """The one line of its stderr, without a traceback."""
    result = llmgen(*words, cwd=cwd, env=env)
    assert result.returncode == status, result
    assert result.stderr.startswith("llmgen: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr.strip()
