"""Matrix products of the CUDA kernels: which tile and how many parts each one gets (templates/cuda/gemm.j2; on Hopper those
that TMA can take go to templates/cuda/gemm_sm90.j2, see hopper.py).

Plain functions of integers. What comes out is `options["products"]` for the templates, and bytes of scratch for the plan.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from llmgen import ops
from llmgen.config import Config
from llmgen.cuda import hopper
from llmgen.cuda.architecture import Architecture
from llmgen.graph import Graph, Op

KiB = 1 << 10
LAYOUTS = {  # function -> the product's layout, and its rows, columns and terms of n, c, oc
    "linear_forward": lambda n, c, oc: (n, oc, c),
    "linear_gelu_forward": lambda n, c, oc: (n, oc, c),
    "linear_backward_input": lambda n, c, oc: (n, c, oc),
    "linear_backward_input_gelu": lambda n, c, oc: (n, c, oc),
    "linear_backward_weight": lambda n, c, oc: (oc, c, n),
}
PRODUCTS = {"linear_backward_input_gelu": "gelu_input_gradient", "linear_backward_weight": "weight_gradient"}  # else matmul
CLASSIFIERS = {
    "classifier_forward": ("linear_forward",),
    "classifier_forward_backward": ("linear_forward", "linear_backward_input", "linear_backward_weight"),
}
SCRATCH_LIMIT = 128 << 20  # bytes for the parts of a weight gradient
SUM_PARTS = 64  # of the rows, for the sums of columns: as column_sums in gemm.j2
LEAST_TERMS = 256  # in a part: fewer do not pay for the start of the pipeline


@dataclass(frozen=True)
class Tile:
    """What a block computes.

    speed: TFLOP/s of one multiprocessor full of such blocks on long sums, as measured on an H100; their relations count.
    overhead: of a tile beside its sums, in the terms that could be summed meanwhile; the GELU gradient's epilogue takes longer.
    """

    rows: int
    columns: int
    depth: int  # of a step of k
    stages: int
    warps_m: int
    warps_n: int
    blocks: int  # on one multiprocessor
    speed: float
    overhead: int
    gelu_overhead: int

    @property
    def name(self) -> str:
        return f"Tile{self.rows}x{self.columns}"

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        return 2 * self.stages * self.depth * (self.rows + self.columns)

    def product(self, function: str) -> str:
        """The C++ function that does it, up to the first template argument that is left open."""
        return f"{PRODUCTS.get(function, 'matmul')}<{self.name}, "


@dataclass(frozen=True)
class FloatTile:
    """The same for products of floats, on tiles of side x side."""

    side: int
    blocks: int
    speed: float
    overhead: int

    gelu_overhead = property(lambda self: self.overhead)
    rows = property(lambda self: self.side)
    columns = property(lambda self: self.side)
    depth = 16

    def product(self, function: str) -> str:
        return f"{PRODUCTS.get(function, 'matmul')}_f32<{self.side}, "


TILES = (
    Tile(128, 256, 32, 4, 2, 4, blocks=1, speed=3.9, overhead=220, gelu_overhead=800),
    Tile(128, 128, 32, 3, 2, 2, blocks=2, speed=3.5, overhead=150, gelu_overhead=490),
    Tile(64, 64, 64, 3, 2, 2, blocks=3, speed=2.3, overhead=60, gelu_overhead=200),
)
FLOAT_TILES = (
    FloatTile(128, blocks=2, speed=0.31, overhead=20),
    FloatTile(64, blocks=6, speed=0.31, overhead=20),
)
BANDWIDTH = 2.0  # TB/s, of the sums over parts


@dataclass(frozen=True)
class Shape:
    """A call of one of the functions above."""

    function: str
    n: int
    c: int
    oc: int

    @property
    def product(self) -> tuple[int, int, int]:
        """Rows and columns of the result, terms of each sum."""
        return LAYOUTS[self.function](self.n, self.c, self.oc)

    def aligned(self, precision: str) -> bool:
        """Whether the rows of all its matrices are multiples of 16 bytes."""
        values = 8 if precision == "bf16" else 4
        return self.c % values == 0 and self.oc % values == 0


def shapes(graph: Graph) -> list[Shape]:
    """The products of a program, those inside the classifier included."""
    return list(uses(graph))


def uses(graph: Graph) -> dict[Shape, Op]:
    """The same, each with the first op that does it."""
    found: dict = {}
    for op in (op for function in graph.functions for op in function.ops()):
        name = op.kind.function
        if name in LAYOUTS:
            sizes = op.kind.sizes(op)
            n, c, oc = sizes["n"].size, sizes["c"].size, sizes["oc"].size
        elif name in CLASSIFIERS:
            n, (oc, c) = op.outputs["logits"].shape[0].size, (d.size for d in op.inputs["weight"].shape)
        for function in CLASSIFIERS.get(name, (name,) if name in LAYOUTS else ()):
            found.setdefault((function, c, oc), (Shape(function, n, c, oc), op))
    return dict(found.values())


def stores_slopes(graph: Graph) -> bool:
    """Whether the slope of a GELU is kept for the backward, in place of its input (passes/fusion.py)."""
    return any(op.kind is ops.LINEAR_GELU_SLOPE for function in graph.functions for op in function.ops())


@dataclass(frozen=True)
class Choice:
    tile: Tile | FloatTile
    parts: int  # of the sums


@dataclass(frozen=True)
class Rule:
    """A line of a function: where `when` (C, empty for always) holds, this computes it.

    parts: of a weight gradient (on Hopper also how they are summed), else 0.
    """

    when: str
    product: str
    aligned: str
    parts: int | str = 0


def choose(shape: Shape, precision: str, multiprocessors: int, tuned: Mapping | None = None) -> Choice:
    """As tuned for about so many rows; else the fastest by the model."""
    if precision == "bf16" and not shape.aligned(precision):
        return Choice(TILES[-1], 1)
    found = hopper.nearest(tuned or {}, shape.function, shape.n, shape.c, shape.oc)
    return found or min(
        candidates(shape, precision), key=lambda choice: (_seconds(shape, choice, multiprocessors), choice.parts)
    )


def candidates(shape: Shape, precision: str) -> list[Choice]:
    """What may compute it, where its rows are aligned."""
    tiles = TILES if precision == "bf16" else FLOAT_TILES
    return [Choice(tile, parts) for tile in tiles for parts in range(1, _parts_limit(shape) + 1)]


def _seconds(shape: Shape, choice: Choice, multiprocessors: int) -> float:
    """By a simple model: whole waves of blocks, and a pass over memory for the sum of the parts."""
    m, n, k = shape.product
    tile, parts = choice.tile, choice.parts
    tiles = -(-m // tile.rows) * -(-n // tile.columns)
    slots = multiprocessors * tile.blocks
    overhead = tile.gelu_overhead if shape.function == "linear_backward_input_gelu" else tile.overhead
    terms = -(-k // (parts * tile.depth)) * tile.depth + overhead
    waves = -(-tiles * parts // slots)
    seconds = waves * tile.blocks * 2 * tile.rows * tile.columns * terms / (tile.speed * 1e12)
    if parts > 1:
        seconds += 3e-6 + 4 * m * n * (2 * parts + 1) / (BANDWIDTH * 1e12)
    return seconds


def _parts_limit(shape: Shape) -> int:
    m, n, k = shape.product
    if shape.function != "linear_backward_weight":
        return 1
    return max(1, min(32, k // LEAST_TERMS, SCRATCH_LIMIT // (4 * m * n)))


def by_tma(shape: Shape, precision: str, wgmma: bool) -> bool:
    """Whether the Hopper kernels compute it. wgmma: whether there are such."""
    return wgmma and precision == "bf16" and shape.aligned(precision)


def chosen(
    shape: Shape, precision: str, multiprocessors: int, wgmma: bool = False, tuned: Mapping | None = None
) -> Choice | hopper.Choice:
    """What computes it. tuned: what --tuned found for these kernels, as hopper.nearest takes it."""
    if by_tma(shape, precision, wgmma):
        return hopper.choose(shape.function, shape.n, shape.c, shape.oc, tuned)
    return choose(shape, precision, multiprocessors, None if wgmma else tuned)


def turns(shape: Shape, choice: Choice | hopper.Choice) -> int:
    """Counters that a function needs."""
    return hopper.turns(shape.function, shape.c, shape.oc, choice) if isinstance(choice, hopper.Choice) else 0


def scratch_bytes(shape: Shape, choice: Choice | hopper.Choice) -> int:
    """What a function needs of the device memory that all kernels share: parts of a weight gradient, and sums of columns."""
    if isinstance(choice, hopper.Choice):
        return hopper.scratch_bytes(shape.function, shape.n, shape.c, shape.oc, choice)
    if shape.function == "linear_backward_weight":
        weights = choice.parts * shape.oc * shape.c if choice.parts > 1 else 0
        return 4 * max(weights, SUM_PARTS * shape.oc)
    if shape.function == "linear_backward_input_gelu":
        sums = -(-shape.n // choice.tile.rows) * choice.tile.warps_m if isinstance(choice.tile, Tile) else 0
        return 4 * (SUM_PARTS + sums) * shape.c
    return 0


@dataclass(frozen=True)
class Head:
    """The classifier's products with the softmax in their epilogues (templates/cuda/ops/classifier.j2).

    shape: of the input gradient of a chunk of logits, as it would be without.
    tiles: of the forward and of the input gradient.
    scratch: the first float that the weight gradient leaves free.
    """

    shape: Shape
    tiles: tuple[hopper.Tile, hopper.Tile]
    scratch: int

    forward = property(lambda self: self.tiles[0].name)
    input_gradient = property(lambda self: self.tiles[1].name)

    @property
    def scratch_bytes(self) -> int:
        """Up to the end of the rows' factors and the parts of their sums."""
        return 4 * (self.scratch + self.shape.n * (1 + -(-self.shape.oc // self.tiles[0].columns)))


def head(graph: Graph, config: Config, machine: Architecture) -> Head | None:
    """Of a program that trains on Hopper, where the loss is the plain one."""
    model, precision, wgmma = config.model, config.program.precision, machine.uses_wgmma(config.program.precision)
    found = [
        shape
        for shape, op in uses(graph).items()
        if (shape.function, op.kind.function) == ("linear_backward_input", "classifier_forward_backward")
    ]
    if not found or not by_tma(found[0], precision, wgmma) or model.logit_softcap or model.label_smoothing or model.z_loss:
        return None
    shapes = [replace(found[0], function=function) for function in CLASSIFIERS["classifier_forward_backward"]]
    forward, inputs, weights = (chosen(s, precision, machine.multiprocessors, wgmma, machine.tuned) for s in shapes)
    return Head(found[0], (forward.tile, inputs.tile), scratch_bytes(shapes[-1], weights) // 4)


def options(
    shapes: Iterable[Shape],
    precision: str,
    multiprocessors: int,
    wgmma: bool = False,
    tuned: Mapping | None = None,
    head: Head | None = None,
) -> dict:
    """What the templates need: `tiles`, and for each function its rules.

    Rules look at c and oc alone, so that they serve any number of rows. Without a shape of a function: rules for any shape.
    """
    found: dict = {"tiles": [*head.tiles] if head else []}
    shapes = [shape for shape in shapes if not head or shape != head.shape]
    for function in LAYOUTS:
        groups: dict = {}
        for shape in (s for s in shapes if s.function == function):
            choice = chosen(shape, precision, multiprocessors, wgmma, tuned)
            parts: int | str = choice.parts
            if isinstance(choice, hopper.Choice):
                parts = f"{choice.parts}, {'APART' if choice.apart else 'IN_TURN'}"
            if function != "linear_backward_weight":
                parts = 0
            conditions = groups.setdefault((choice.tile, shape.aligned(precision), parts), [])
            conditions.append(f"c == {shape.c} && oc == {shape.oc}")
        found[function] = _rules(function, groups) if groups else any_shape(function, precision)
        found["tiles"] += [tile for tile, *_ in groups] if shapes else TILES
    found["hopper"] = hopper.options(tile for tile in found["tiles"] if isinstance(tile, hopper.Tile))
    found["tiles"] = [tile for tile in TILES if tile in found["tiles"]] if precision == "bf16" else []
    return found


def _rules(function: str, groups: dict) -> list[Rule]:
    """One rule for each kernel; the one with the most shapes comes last and needs no condition."""
    ordered = sorted(groups.items(), key=lambda item: len(item[1]))
    rules = []
    for i, ((tile, aligned, parts), conditions) in enumerate(ordered):
        when = " || ".join(f"({c})" for c in conditions) if len(conditions) > 1 else conditions[0]
        when = "" if i == len(ordered) - 1 else when
        rules.append(Rule(when, tile.product(function), "true" if aligned else "false", parts))
    return rules


def any_shape(function: str, precision: str) -> list[Rule]:
    """Rules that fit every c and oc: for functions that are compiled before their shapes are known."""
    values, tiles = (8, TILES) if precision == "bf16" else (4, FLOAT_TILES)
    large, small = tiles[0].product(function), tiles[-1].product(function)
    parts = 1 if function == "linear_backward_weight" else 0
    return [
        Rule(f"c % {values} || oc % {values}", small, "false", parts),
        Rule("c <= 64 || oc <= 64", small, "true", parts),
        Rule("", large, "true", parts),
    ]
