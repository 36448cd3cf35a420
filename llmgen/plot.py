"""Loss curves of runs in one figure, for eyes and for papers. Needs matplotlib, the extra `llmgen[plot]`."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from llmgen import metrics
from llmgen.errors import UserError
from llmgen.formats import files

SUFFIXES = (".png", ".svg", ".pdf")
AXES = {"step": "optimizer steps", "tokens": "training tokens", "hours": "hours of computing"}


def plot(runs: Sequence[str], out: str | os.PathLike, axis: str = "step", smooth: float | None = None) -> str:
    """Training losses, smoothed with the raw ones pale behind, and validation losses as dots joined by a line.

    smooth: over how many steps; a fiftieth of the longest run if None, 1 is not at all. Returns a line a run: its last
    losses. Raises UserError.
    """
    if Path(out).suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out}: end it in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if smooth is not None and not smooth >= 1:
        raise UserError(f"--smooth {smooth:g} must be 1 (not at all) or more steps")
    made = [metrics.read(run) for run in runs]
    names = _names(made, runs)
    try:
        import matplotlib
    except ImportError:
        raise UserError("plot needs the library matplotlib: pip install 'llmgen[plot]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "svg.hashsalt": "llmgen",  # else each file would differ
        "pdf.fonttype": 42,
    }
    span = smooth or max(1.0, max(len(run.rows) for run in made) / 50)
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(6, 3.7), layout="constrained")
        lowest, firsts = [], []
        for i, (run, name) in enumerate(zip(made, names, strict=True)):
            color, places = f"C{i % 10}", run.place(axis)
            if run.rows:
                x, y = [places[row["step"]] for row in run.rows], [row["loss"] for row in run.rows]
                smoothed = metrics.smooth(y, span)
                if span > 1:
                    axes.plot(x, y, color=color, alpha=0.2, linewidth=0.6)
                axes.plot(x, smoothed, color=color, linewidth=1.4, label=f"{name}, training")
                lowest.append(min(y))
                firsts.append(smoothed[len(smoothed) // 50])
            seen = [row for row in run.validations if "val_loss" in row and row["step"] in places]
            if seen:
                x, y = [places[row["step"]] for row in seen], [row["val_loss"] for row in seen]
                axes.plot(x, y, "o--", color=color, markersize=3, linewidth=0.9, label=f"{name}, validation")
                lowest.append(min(y))
        if firsts:  # the first steps fall so steeply that the rest would be flat
            top = max(firsts)
            axes.set_ylim(min(lowest) - 0.05 * (top - min(lowest)), top + 0.1 * max(top - min(lowest), 1e-6))
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel("loss (nats per token)")
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.legend()
        buffer = io.BytesIO()
        suffix = Path(out).suffix.lower()[1:]
        stamp = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
        figure.savefig(buffer, format=suffix, dpi=200, metadata=stamp)
        pyplot.close(figure)
    with files.replacing(out) as output:
        output.write(buffer.getvalue())
    return "\n".join(_summary(run, name, span) for run, name in zip(made, names, strict=True))


def _names(made: list[metrics.Run], runs: Sequence[str]) -> list[str]:
    """What each run is called: its folder, or all of its path where two folders are called the same."""
    names = [run.name for run in made]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, runs, strict=True)]


def _summary(run: metrics.Run, name: str, span: float) -> str:
    parts = []
    if run.rows:
        last = metrics.smooth([row["loss"] for row in run.rows], span)[-1]
        parts.append(f"step {run.rows[-1]['step']}, loss {last:.4f} (mean over the last {span:.0f})")
    seen = [row["val_loss"] for row in run.validations if "val_loss" in row]
    if seen:
        parts.append(f"val loss {seen[-1]:.4f}, lowest {min(seen):.4f}")
    return f"{name}: {'; '.join(parts)}"
