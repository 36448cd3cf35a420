"""`llmgen tune`: tries the kernels that could compute each matrix product of a config, on the GPU that is present.

- A program for each function of products (templates/tune.cu.j2) holds its kernels with all their tiles; the shapes are told to
  it, so it serves every config. It computes what each product must be by a plain kernel; a candidate is timed only after all of
  its results were found right, twice.
- All candidates are timed once; the best, and what llmgen would take anyway, then in several rounds, in shuffled order, each
  time for long enough that the card is at its power limit: what is fastest cool may not be in a training step.
- A candidate that fails or is wrong is reported and left out. If it faults or hangs, its tile is left out from then on, and the
  program is started again. Winners are kept as soon as a product is done.
"""

import contextlib
import math
import os
import random
import select
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmgen import data, program, render, toolchain
from llmgen.bench import write_table
from llmgen.config import Config
from llmgen.cuda import architecture, hopper, products, tuned
from llmgen.cuda.architecture import Architecture
from llmgen.cuda.products import Shape
from llmgen.errors import UserError
from llmgen.formats import files
from llmgen.plan import Plan

Choice = products.Choice | hopper.Choice
BURST = 60.0  # milliseconds of one measurement: the card's clock follows its power within that time, as in a training step
WARM_UP = 200.0  # milliseconds before the first of a product
SHORT = 0.02  # milliseconds of a call that does not bring the card to its power limit: of such, SHORT_CALLS are measured
SHORT_CALLS = 100
FINALISTS = 10  # that go into the rounds
WORTH = 1.01  # so much faster a candidate must be to take the place of what ships
PATIENCE = 30.0  # seconds for an answer


@dataclass(frozen=True)
class Product:
    """A product of a program, and which of its optional tensors are there. wide: what it writes is of the residual's type."""

    shape: Shape
    bias: bool = False
    addend: bool = False
    kept: bool = False  # what GELU's backward wants of the forward
    sums: bool = False
    wide: bool = False

    @property
    def title(self) -> str:
        s = self.shape
        return f"{s.function} {s.n} x {s.c} x {s.oc}"


@dataclass(frozen=True)
class Tuned:
    product: Product
    model: Choice  # what the model of costs would take
    shipped: Choice  # what llmgen takes without --tuned
    times: dict[Choice, list[float]]  # milliseconds, of the finalists
    failed: int

    @property
    def winner(self) -> Choice:
        best = min(self.times, key=self.median)
        known = self.shipped in self.times and self.median(self.shipped) <= WORTH * self.median(best)
        return self.shipped if known else best

    def median(self, choice: Choice) -> float:
        return statistics.median(self.times[choice])


def tune(
    config: Config,
    arch: str | None,
    rounds: int,
    out: str | os.PathLike | None,
    export: str | os.PathLike | None,
    compile_only: bool,
    write: Callable[[str], None],
) -> None:
    """Tune a config's products and keep what was found. Raises UserError."""
    plan = program.plan(config, "cuda", "native", arch)
    machine, precision = plan.profile, config.program.precision
    kernels = tuned.family(machine, precision)
    if export and kernels != "wgmma":
        raise UserError("--export writes the table of the Hopper kernels in bf16; use --arch sm_90a and --precision bf16")
    found = of_plan(plan)
    if not found:
        raise UserError(f"{config.name}: none of its products has rows of a multiple of 16 bytes: there is nothing to choose")
    if not compile_only:
        if architecture.gpu_name() is None:
            raise UserError("tune measures on an NVIDIA GPU, and there is none here; --compile-only prepares its programs")
        tuned.read()  # a damaged one is to be known now
    started = time.monotonic()
    programs = build(plan, {p.shape.function for p in found}, Path(out) if out else data.default_cache() / "tune")
    write(f"{len(programs)} programs for {machine.name}: {time.monotonic() - started:.0f} s")
    if compile_only:
        for path in programs.values():
            write(str(path))
        return
    started, done, where = time.monotonic(), [], ("", "")
    for function, path in programs.items():
        with Tuner(path) as tuner:
            where = tuner.toolkit_and_gpu()
            for product in (p for p in found if p.shape.function == function):
                made = one(tuner, product, plan, rounds, write)
                if made:
                    done.append(made)
                    result = tuned.result(where[1], where[0], kernels, product.shape, made.winner, made.median(made.winner))
                    tuned.keep([result])
    write(f"{config.name}, {kernels} kernels, {where[1]}, CUDA {where[0]}, {rounds} rounds: {time.monotonic() - started:.0f} s")
    write("")
    report(done, write)
    write("")
    write(f"{len(done)} of {len(found)} products are kept in {tuned.path()}; --tuned uses them")
    if export:
        with files.replacing(export) as output:
            output.write(tuned.exported(where[1], where[0]).encode())
        write(str(export))
    if not done:
        raise UserError("no candidate of any product could be run; what each said stands above")


def of_plan(plan: Plan) -> list[Product]:
    """The products where there is something to choose."""
    precision, found = plan.config.program.precision, []
    for shape, op in products.uses(plan.graph).items():
        if not shape.aligned(precision):
            continue
        bias, addend, kept = "bias" in op.inputs, "addend" in op.inputs, bool({"pre", "slope"} & op.outputs.keys())
        sums = "dsum" in op.outputs or "dbias" in op.outputs
        written = op.tensor("out") or op.tensor("dinp")
        if op.kind.function in products.CLASSIFIERS:
            bias, written = False, op.outputs.get("dinp") if shape.function == "linear_backward_input" else None
        wide = precision == "bf16" and written is not None and written.dtype == "f32"
        found.append(Product(shape, bias, addend, kept, sums, wide))
    return found


# ---- candidates


def tiles(function: str, kernels: str) -> list:
    """All tiles that a function may be tried with: the place here is a tile's number in the program."""
    if kernels == "mma":
        return list(products.TILES)
    if kernels == "floats":
        return list(products.FLOAT_TILES)
    weights = function == hopper.WEIGHT_GRADIENT
    shipped = [
        choice.tile
        for (name, _, _), choices in hopper.measured().items()
        if (name == hopper.WEIGHT_GRADIENT) == weights
        for _, choice in choices
    ]
    every = dict.fromkeys([*(hopper.WEIGHT_TILES if weights else hopper.TILES), *shipped])
    return [tile for tile in every if tile.shared_bytes(function) <= hopper.SHARED_LIMIT]


def candidates(shape: Shape, kernels: str) -> list[Choice]:
    if kernels != "wgmma":
        return products.candidates(shape, "bf16" if kernels == "mma" else "fp32")
    m, n, k = shape.product
    usual = hopper.candidates(shape.function, m, n, k)
    also = [hopper.Choice(tile) for tile in tiles(shape.function, kernels)]
    return [choice for choice in dict.fromkeys([*usual, *also]) if choice.tile in tiles(shape.function, kernels)]


def expected(shape: Shape, machine: Architecture, precision: str) -> tuple[Choice, Choice]:
    """What the model of costs takes, and what llmgen takes as it ships."""
    arguments = precision, machine.multiprocessors, machine.uses_wgmma(precision)
    shipped = products.chosen(shape, *arguments)
    if products.by_tma(shape, precision, machine.uses_wgmma(precision)):
        return hopper.by_model(shape.function, shape.n, shape.c, shape.oc), shipped
    return shipped, shipped


# ---- the programs


def source(function: str, plan: Plan) -> str:
    """The program that tries the kernels of a function: its tiles by their numbers, parts as it is told."""
    machine, precision = plan.profile, plan.config.program.precision
    kernels = tuned.family(machine, precision)
    parts: int | str = 0
    if function == "linear_backward_weight":
        parts = "tried_parts, tried_apart" if kernels == "wgmma" else "tried_parts"
    every = tiles(function, kernels)
    rules = [products.Rule(f"tried_tile == {i}", tile.product(function), "true", parts) for i, tile in enumerate(every)]
    options = {
        function: rules,
        "tiles": every if kernels == "mma" else [],
        "hopper": hopper.options(every if kernels == "wgmma" else ()),
    }
    return render.tuner(function, plan, options)


def build(plan: Plan, functions: set[str], folder: Path) -> dict[str, Path]:
    """Function -> its program; several are compiled at a time, those that are up to date not again. Raises UserError."""
    machine, program = plan.profile, plan.config.program
    numbers = f"{program.precision}_{program.residual_precision}"
    made = {}
    for function in (name for name in products.LAYOUTS if name in functions):
        path = folder / f"tune_{function}_{machine.name.replace(',', '_')}_{numbers}.cu"
        text = source(function, plan)
        if not path.is_file() or path.read_text() != text:
            with files.folder(folder), files.replacing(path) as output:
                output.write(text.encode())
        made[function] = path

    def compile(path: Path) -> Path:
        return toolchain.compile(path, path.with_suffix(""), "cuda", machine).program.resolve()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
        return dict(zip(made, pool.map(compile, made.values()), strict=True))


class Failed(Exception):
    """What a program says of a candidate that did not work."""


class Lost(Failed):
    """Its end: it faulted or did not answer."""


class Tuner:
    """A program that is told one line at a time and answers each with one. It is started when needed, and again if it ends."""

    def __init__(self, path: Path):
        self._path, self._process, self._product, self._rest = path, None, "", b""
        self.lost: set = set()  # tiles that ended it

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def toolkit_and_gpu(self) -> tuple[str, str]:
        """Raises UserError if it finds no GPU."""
        try:
            return self._start()
        except Failed as failed:
            raise UserError(f"{self._path}: {failed}; nvidia-smi should list a GPU that it is compiled for") from None

    def product(self, product: Product, scratch: int, turns: int) -> None:
        """What is tried after this, with room for kernels that need so much; a program that is started again is told first.
        Raises Failed."""
        shape, p = product.shape, product
        there = map(int, (p.bias, p.addend, p.kept, p.sums, p.wide))
        line = " ".join(map(str, ["product", shape.n, shape.c, shape.oc, *there, scratch, turns]))
        self._product = ""
        self.ask(line)
        self._product = line

    def candidate(self, what: str, tile: int, choice: Choice, *more: int) -> float:
        """`check` or `time` one, its tile by its number: the figure in the answer. Raises Failed."""
        words = [what, tile, choice.parts, int(getattr(choice, "apart", False)), *more]
        return float(self.ask(" ".join(map(str, words))).split()[1])

    def ask(self, line: str) -> str:
        """The answer. Raises Failed with why there is none."""
        if self._process is None:
            self._start()
            if self._product:
                self._told(self._product)
        return self._told(line)

    def _start(self) -> tuple[str, str]:
        self._stop()
        self._rest = b""
        self._process = subprocess.Popen([self._path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        toolkit, _, gpu = self._answer().removeprefix("gpu ").partition(" ")
        return toolkit, gpu

    def _told(self, line: str) -> str:
        with contextlib.suppress(BrokenPipeError):  # there is no answer then
            self._process.stdin.write(line.encode() + b"\n")
        return self._answer()

    def _answer(self) -> str:
        end = time.monotonic() + PATIENCE
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            got = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not got:
                self._process.kill()
                status = self._process.wait()
                self._stop()
                raise Lost(f"the program ended with status {status}" if ready else f"no answer in {PATIENCE:.0f} s")
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        text = line.decode(errors="replace")
        if text.startswith("died "):
            self._stop()
            raise Lost(text.removeprefix("died "))
        if text.startswith("failed "):
            raise Failed(text.removeprefix("failed "))
        return text

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


# ---- the search


def one(tuner: Tuner, product: Product, plan: Plan, rounds: int, write: Callable[[str], None]) -> Tuned | None:
    """Try all candidates of a product. None: none works."""
    machine, precision, shape = plan.profile, plan.config.program.precision, product.shape
    kernels = tuned.family(machine, precision)
    numbers = {tile: i for i, tile in enumerate(tiles(shape.function, kernels))}
    model, shipped = expected(shape, machine, precision)
    every = dict.fromkeys([shipped, model, *candidates(shape, kernels)])
    every = [choice for choice in every if choice.tile in numbers and choice.tile not in tuner.lost]
    scratch = max((products.scratch_bytes(shape, choice) for choice in every), default=0)
    turns = max((products.turns(shape, choice) for choice in every), default=0)
    try:
        tuner.product(product, scratch, turns)
    except Failed as failed:
        write(f"{product.title}: cannot be tried: {failed}")
        return None

    def ask(what: str, choice: Choice, *more) -> float | None:
        try:
            return tuner.candidate(what, numbers[choice.tile], choice, *more)
        except Failed as failed:
            write(f"{product.title}: {named(choice)} is left out: {failed}")
            if isinstance(failed, Lost):
                tuner.lost.add(choice.tile)
            return None

    first: dict[Choice, float] = {}
    for choice in every:
        if choice.tile in tuner.lost:
            continue
        milliseconds = ask("time", choice, 1) if ask("check", choice) is not None else None
        if milliseconds is not None:
            first[choice] = milliseconds
    finalists = [*sorted(first, key=first.get)[:FINALISTS], *(choice for choice in (model, shipped) if choice in first)]
    times: dict[Choice, list[float]] = {choice: [] for choice in finalists}
    order, dice = list(times), random.Random(0)
    if order:
        ask("time", order[0], _calls(WARM_UP, first[order[0]]))
    for _ in range(rounds):
        dice.shuffle(order)
        for choice in list(order):
            if choice.tile in tuner.lost:
                continue
            milliseconds = ask("time", choice, _calls(BURST, first[choice]))
            if milliseconds is None:
                order.remove(choice)
            else:
                times[choice].append(milliseconds)
    times = {choice: found for choice, found in times.items() if len(found) == rounds}
    if not times:
        write(f"{product.title}: no candidate works")
        return None
    return Tuned(product, model, shipped, times, len(every) - len(first))


def _calls(milliseconds: float, each: float) -> int:
    return math.ceil(milliseconds / each) if each > SHORT else SHORT_CALLS


def named(choice: Choice) -> str:
    name = choice.tile.name if hasattr(choice.tile, "name") else f"Tile{choice.tile.rows}x{choice.tile.columns}"
    if choice.parts == 1:
        return name
    return f"{name} / {choice.parts}" + " apart" * getattr(choice, "apart", False)


def report(done: Sequence[Tuned], write: Callable[[str], None]) -> None:
    """The table. spread: from the fastest to the slowest round of the winner; gain: over what ships."""
    rows = []
    for t in done:
        m, n, k = t.product.shape.product
        best, times = t.median(t.winner), t.times[t.winner]

        def of(choice: Choice, t=t) -> list[str]:
            return [named(choice), f"{t.median(choice):.4f}" if choice in t.times else "failed"]

        gain = f"{t.median(t.shipped) / best - 1:.1%}" if t.shipped in t.times else ""
        tflops = 2e-9 * m * n * k / best
        figures = [f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.2g}", f"{(max(times) - min(times)) / best:.1%}", gain]
        rows.append([t.product.title, *of(t.model), *of(t.shipped), *of(t.winner), *figures, str(t.failed)])
    head = ["product, n x c x oc", "model", "ms", "shipped", "ms", "winner", "ms", "TFLOP/s", "spread", "gain", "failed"]
    write_table(head, rows, write)
