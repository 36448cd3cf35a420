"""The wheel holds all that is needed: installed in a fresh environment, it works from any folder."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llmgen import config, plan, render

ROOT = Path(__file__).parent.parent


def pip(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an environment that has the wheel, and its dependencies from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    own = importlib.util.find_spec("hatchling") is not None
    built = pip("wheel", "--no-deps", *(["--no-build-isolation"] if own else []), "--wheel-dir", folder, ROOT)
    if built.returncode and not own and "hatchling" in built.stdout + built.stderr:
        pytest.skip("the build backend hatchling is neither installed nor to be had")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("llmgen-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    done = pip("--python", scripts / "python", "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def run(command: list, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result
    return result.stdout


def test_the_wheel_is_used_and_not_the_checkout(installed, tmp_path):
    show = "import llmgen.render as r; print(r.__file__); print(r.templates_folder())"
    module, templates = map(Path, run([installed / "python", "-c", show], tmp_path).splitlines())
    assert templates == module.parent / "templates"
    assert ROOT not in module.parents and installed.parent in module.parents
    files = {path.relative_to(templates) for path in templates.rglob("*") if path.is_file()}
    assert files == {path.relative_to(ROOT / "templates") for path in (ROOT / "templates").rglob("*") if path.is_file()}


def test_the_wheel_works_from_another_folder(installed, tmp_path):
    assert "gpt2-124m" in run([installed / "llmgen", "configs"], tmp_path)
    assert run([installed / "python", "-m", "llmgen", "--version"], tmp_path).startswith("llmgen ")
    run([installed / "llmgen", "build", "--cpu", "x86-64-v3", "--no-compile"], tmp_path)
    made = (tmp_path / "generated" / "gpt2-nano" / "train_gpt2.c").read_text()
    assert made == render.source(plan.make(config.load("gpt2-nano"), "c", "x86-64-v3"))
