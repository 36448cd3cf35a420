"""Writes the committed sources under generated/ anew: `python tests/update_golden.py`. Look at the diff before committing."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whichever llmgen is installed

from llmgen import config, generation, plan, render  # noqa: E402

FOLDER = ROOT / "generated" / "gpt2-124m"
GOLDEN = {  # path -> preset, target, --cpu or --arch
    FOLDER / "train_gpt2.c": ("gpt2-124m", "c", "x86-64-v3"),
    FOLDER / "train_gpt2.cu": ("gpt2-124m", "cuda", "sm_80"),
    FOLDER / "generate_gpt2.c": ("gpt2-124m", "c", "x86-64-v3"),
    FOLDER / "generate_gpt2.cu": ("gpt2-124m", "cuda", "sm_80"),
}


def rendered(path: Path) -> str:
    """What the committed source should be."""
    name, target, machine = GOLDEN[path]
    if path.name.startswith("generate"):
        return render.generation(generation.make(config.load(name, target=target), target, machine, machine))
    return render.source(plan.make(config.load(name, target=target), target, machine, machine))


if __name__ == "__main__":
    for path in GOLDEN:
        text = rendered(path)
        changed = not path.is_file() or path.read_text() != text
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'updated' if changed else 'unchanged'}, {text.count(chr(10))} lines")
