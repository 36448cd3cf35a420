"""The generated program against the float64 reference: logits, loss, every gradient, then the losses of optimizer steps.

Weights are random throughout (norm weights 1 + N(0, 0.1), biases N(0, 0.05)): at the usual initialisation biases are 0 and
norm weights 1, and a swapped or dropped one would go unseen.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmgen import models, reference, runner
from llmgen.config import Config
from llmgen.errors import UserError
from llmgen.formats import debug_state, tokens, weights
from llmgen.graph import Graph
from llmgen.ops.cross_entropy import capped

# bf16 keeps 8 bits: a value is off by up to 2^-9 of itself each time it is rounded, and some dozen roundings add up.
GRADIENT_LIMIT = {"fp32": 1e-4, "bf16": 3e-2}
LOGITS_LIMIT = {"fp32": 1e-5, "bf16": 2e-2}
LOSS_LIMIT = {"fp32": 1e-5, "bf16": 5e-3}
# AdamW divides a gradient by its own size: of one that is 0 but for rounding, a small epsilon makes a whole step, any way.
EPSILON = 1e-5
SMALL = 20_000_000  # parameters up to which ten optimizer steps are compared; two beyond


@dataclass(frozen=True)
class Row:
    name: str
    shape: tuple[int, ...]
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # false for NaN

    def __str__(self) -> str:
        shape = f"({', '.join(map(str, self.shape))})"
        return f"{self.name:<12} {shape:<22} {self.error:9.2e}  limit {self.limit:.0e}  {'ok' if self.ok else 'FAILED'}"


def random_parameters(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    """float32 values for every parameter; rows of padded vocabulary are zero."""
    rng = np.random.default_rng(seed)
    values = {}
    for p in graph.parameters:
        shape = tuple(d.size for d in p.stacked)
        noise = rng.standard_normal(shape, dtype=np.float32)
        if len(p.shape) == 1:
            values[p.name] = 1 + 0.1 * noise if p.name.endswith("w") else 0.05 * noise
        else:
            values[p.name] = noise * np.float32(0.5 / shape[-1] ** 0.5)
    return values


def clear_padding(values: dict[str, np.ndarray], graph: Graph, vocab_size: int) -> None:
    for p in graph.parameters:
        if p.shape[0].expr == "VP":
            values[p.name][vocab_size:] = 0


def error(got: np.ndarray, want: np.ndarray, floor: float = 0.0) -> float:
    """Norm of the difference, relative to the norm of `want` or to `floor` if that is larger."""
    return float(np.linalg.norm(np.subtract(got, want).ravel()) / max(np.linalg.norm(want.ravel()), floor, 1e-300))


def shortened(config: Config) -> Config | None:
    """The config with two layers, where float64 parameters and gradients would take over half the free memory."""
    shapes = models.parameter_shapes(config)
    needed = 2 * 8 * sum(int(np.prod(shape)) for shape in shapes.values())
    free = _free_memory()
    if config.model.num_layers <= 2 or not free or needed <= free // 2:
        return None
    return config.replace(num_layers=2)


def _free_memory() -> int:
    """Bytes, or 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):
            return 0


def verify(config: Config, build: Callable[[Config, Path], Path], say: Callable[[str], None], seed: int = 0) -> bool:
    """Build the program of a config and compare it. `build` compiles a config into a folder and returns the program.

    `say` gets one line a tensor and the verdict. Returns whether all is well.
    """
    short = shortened(config)
    if short:
        say(f"{config.name} in float64 would exceed half the free memory: verified with num_layers = 2")
        config = short
    graph = models.build(config)
    parameters = random_parameters(graph, seed)
    clear_padding(parameters, graph, config.model.vocab_size)
    if config.program.precision == "bf16":  # weights that bf16 can hold: then the program computes with the same ones
        parameters = {name: weights.bf16_to_fp32(weights.fp32_to_bf16(p)) for name, p in parameters.items()}
    shapes = models.parameter_shapes(config)
    batch = config.program.batch_size * config.program.seq_len
    count = sum(p.size for p in parameters.values())
    steps = 10 if count <= SMALL else 2
    rng = np.random.default_rng(seed + 1)
    text = rng.integers(0, config.model.vocab_size, steps * batch + 1)
    with tempfile.TemporaryDirectory(prefix="llmgen-verify-") as folder:
        folder = Path(folder)
        program = build(config, folder)
        weights.write(folder / "model.bin", config, shapes, parameters.items())
        tokens.write(folder / "train.bin", text, config.model.vocab_size)
        inputs = ["--load", "model.bin", "--train-data", "train.bin"]
        _run(program, folder, [*inputs, "--debug-state", "state.bin"])
        state = debug_state.read(folder / "state.bin", config.model.vocab_size, shapes)
        rows = _compare_state(config, graph, parameters, text, state)
        for row in rows:
            say(str(row))
        settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "grad_clip": 1.0, "epsilon": EPSILON}
        given = ["--lr", "1e-3", "--weight-decay", "0.1", "--grad-clip", "1.0", "--epsilon", str(EPSILON), "--val-every", "0"]
        _run(program, folder, [*inputs, *given, "--steps", str(steps), "--log-dir", "log"])
        lines = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    rows.append(_compare_steps(config, graph, parameters, text, lines, settings))
    say(str(rows[-1]))
    worst = max(rows, key=lambda row: (not row.ok, row.error / row.limit))
    passed = all(row.ok for row in rows)
    say(f"verify: {'ok' if passed else 'FAILED'} ({'worst ' if passed else ''}{worst.name} {worst.error:.1e})")
    return passed


def _compare_state(config, graph, parameters, text, state) -> list[Row]:
    b, t = config.program.batch_size, config.program.seq_len
    inputs, targets = text[:-1][: b * t].reshape(b, t), text[1:][: b * t].reshape(b, t)
    precision = config.program.precision
    values = {"tokens": inputs, "targets": targets, "loss_scale": 1.0 / (b * t)}
    values |= {name: p.astype(np.float64) for name, p in parameters.items()}
    keep = {"logits"}
    want = reference.run(graph.function("forward_backward"), values, keep)
    logits = capped(want["logits"][..., : config.model.vocab_size], config.model.logit_softcap)
    loss = want["losses"].mean()
    rows = [
        Row("logits", logits.shape, error(state.logits, logits), LOGITS_LIMIT[precision]),
        Row("loss", (), abs(float(state.loss) - loss), LOSS_LIMIT[precision]),
    ]
    whole = np.sqrt(sum(np.sum(want["d" + name] ** 2) for name in parameters))
    for name in parameters:
        wanted = want["d" + name]
        off = error(np.asarray(state.gradients[name]), wanted, 1e-4 * whole)
        rows.append(Row("d" + name, wanted.shape, off, GRADIENT_LIMIT[precision]))
    return rows


def _compare_steps(config, graph, parameters, text, lines, settings) -> Row:
    b, t = config.program.batch_size, config.program.seq_len
    losses = [line["loss"] for line in lines if "loss" in line]
    current = {name: p.astype(np.float64) for name, p in parameters.items()}
    moments = tuple({name: np.zeros_like(p) for name, p in current.items()} for _ in range(2))
    worst = 0.0
    for i, got in enumerate(losses):
        piece = text[i * b * t : (i + 1) * b * t + 1]
        batch = (piece[:-1].reshape(b, t), piece[1:].reshape(b, t))
        want, _ = reference.training_step(graph, current, moments, [batch], step=i + 1, **settings)
        worst = max(worst, abs(got - want) if np.isfinite(got) else np.inf)
    return Row(f"{len(losses)} steps", (len(losses),), worst, LOSS_LIMIT[config.program.precision])


def _run(program: Path, folder: Path, arguments: list[str]) -> None:
    result = subprocess.run(
        [program.resolve(), *arguments], cwd=folder, env=runner.environment(), capture_output=True, text=True
    )
    if result.returncode:
        reason = result.stderr.strip().splitlines()
        raise UserError(f"{program}: exit status {result.returncode}: {reason[-1] if reason else 'no message'}")
