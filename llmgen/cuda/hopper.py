"""Matrix products on Hopper (templates/cuda/gemm_sm90.j2): which tile, order and parts of the sum each one gets.

What was measured (measured_*.toml) comes first; for other shapes a model of cycles chooses. Before both, where a `tuned` table
is given (--tuned), what `llmgen tune` found.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

MEASURED = ("measured_h100.toml", "measured_h200.toml")  # what was measured, as `llmgen tune --export` writes it
STEP = 64  # of k
SHARED_LIMIT = 232448  # bytes of a block
SCRATCH_LIMIT = 128 << 20  # bytes for the parts of a weight gradient
MULTIPROCESSORS = 132
LEAST_STEPS = 16  # of a part of k
MULTIPLICATIONS = 2048  # of one multiprocessor in a cycle
L2_BYTES = 35.5  # that the L2 cache gives each multiprocessor in a cycle, when all ask
# What it costs to store a tile, compared with plain bf16.
STORES = {"linear_forward": 1, "linear_gelu_forward": 3, "linear_backward_input": 1, "linear_backward_input_gelu": 2}
WEIGHT_GRADIENT = "linear_backward_weight"
PRODUCTS = {"linear_backward_input_gelu": "gelu_input_gradient_sm90", WEIGHT_GRADIENT: "weight_gradient_sm90"}
BY_K = {  # function -> whether k is contiguous in memory in a, and in b
    "linear_forward": (True, True),
    "linear_gelu_forward": (True, True),
    "linear_backward_input": (True, False),
    "linear_backward_input_gelu": (True, False),
    WEIGHT_GRADIENT: (False, False),
}


@dataclass(frozen=True)
class Tile:
    """How a block computes: see the head of the template."""

    pingpong: bool
    consumers: int  # warpgroups that multiply
    rows: int  # of one consumer
    columns: int
    cluster_m: int
    cluster_n: int
    stages: int  # of the ring
    buffers: int  # of each consumer, for 64 x 64 values of out
    transposed: bool = False  # of a weight gradient: rows of the tile are columns of out

    @property
    def name(self) -> str:
        kind = ("Transposed" if self.transposed else "") + ("Pingpong" if self.pingpong else "Joint")
        return f"{kind}{self.tile_rows}x{self.columns}_{self.cluster_m}x{self.cluster_n}_{self.stages}_{self.buffers}"

    @property
    def tile_rows(self) -> int:
        return self.rows if self.pingpong else self.rows * self.consumers

    def sides(self, m, n) -> tuple:
        """What belongs to the rows and columns of out (m, n), as the tile's rows and columns have it; or the other way."""
        return (n, m) if self.transposed else (m, n)

    def product(self, function: str) -> str:
        """The C++ function that does it, up to the first template argument that is left open."""
        return f"{PRODUCTS.get(function, 'matmul_sm90')}<{self.name}, "

    def loaded_columns(self, function: str) -> int:
        """Of b: where its columns are contiguous in memory, they come in blocks of 64."""
        return self.columns if BY_K[function][1] else -(-self.columns // 64) * 64

    def shared_bytes(self, function: str) -> int:
        """As SHARED of the template, where out is bf16 in lines of 128 bytes."""
        blocks = self.loaded_columns(function)
        out = 0 if function == WEIGHT_GRADIENT else self.consumers * self.buffers * 64 * 64 * 2
        barriers = 16 * (self.consumers * self.buffers + self.stages)
        return 1024 + self.stages * (self.tile_rows + blocks) * 128 + out + barriers


@dataclass(frozen=True)
class Choice:
    tile: Tile
    parts: int = 1  # of k
    apart: bool = False  # the parts are stored by themselves and summed by another kernel, instead of added in turn


def _pingpong(columns: int, stages: int, buffers: int, rows: int = 128) -> Tile:
    return Tile(True, 2, rows, columns, 2, 1, stages, buffers)


# For products whose result leaves through shared memory, and for weight gradients, which store from registers.
TILES = (
    _pingpong(192, 4, 4),
    _pingpong(192, 4, 3),
    _pingpong(160, 4, 4),
    _pingpong(160, 4, 3),
    Tile(False, 2, 128, 192, 1, 2, 3, 3),
    Tile(False, 2, 128, 160, 1, 2, 3, 3),
    Tile(False, 2, 128, 128, 1, 2, 4, 2),
    Tile(False, 2, 64, 64, 1, 1, 8, 2),
    Tile(False, 1, 64, 64, 1, 1, 8, 2),
)
WEIGHT_TILES = (
    _pingpong(192, 5, 2),
    _pingpong(160, 5, 2),
    Tile(False, 3, 64, 192, 2, 1, 4, 2),
    Tile(False, 3, 64, 192, 1, 2, 4, 2),
    Tile(False, 3, 64, 160, 1, 2, 4, 2),
    Tile(False, 2, 128, 192, 1, 2, 4, 2),
    Tile(False, 2, 128, 160, 1, 2, 4, 2),
    Tile(False, 2, 128, 128, 1, 2, 4, 2),
    Tile(False, 2, 128, 192, 1, 2, 4, 2, transposed=True),
    Tile(False, 2, 128, 160, 1, 2, 4, 2, transposed=True),
    Tile(False, 3, 64, 160, 1, 2, 4, 2, transposed=True),
    Tile(False, 1, 64, 64, 1, 1, 8, 2),
)


def takes(c: int, oc: int) -> bool:
    """Whether TMA can see all the matrices: rows of a multiple of 16 bytes."""
    return c % 8 == 0 and oc % 8 == 0


def candidates(function: str, m: int, n: int, k: int) -> list[Choice]:
    """What is worth trying for a product (m, n) of sums of k terms."""
    if function != WEIGHT_GRADIENT:
        return [Choice(tile) for tile in TILES]
    found = []
    for tile in WEIGHT_TILES:
        for parts in range(1, max(1, min(32, -(-k // STEP) // LEAST_STEPS)) + 1):
            found.append(Choice(tile, parts))
            if parts > 2 and 4 * parts * m * n <= SCRATCH_LIMIT:
                found.append(Choice(tile, parts, apart=True))
    return found


def cycles(function: str, m: int, n: int, k: int, choice: Choice) -> float:
    """A block's cycles, to about a tenth: what its units multiply or load, and of their stores what nothing hides."""
    tile, parts = choice.tile, choice.parts
    m, n = tile.sides(m, n)
    wide, high = tile.columns * tile.cluster_n, tile.tile_rows * tile.cluster_m
    units = -(-m // high) * -(-n // wide) * parts
    each = -(-units // (MULTIPROCESSORS // (tile.cluster_m * tile.cluster_n)))  # units of one block, one behind the other
    steps = -(-k // STEP) / parts
    multiplied = tile.tile_rows * tile.columns * STEP / MULTIPLICATIONS
    loaded = tile.loaded_columns(function) / tile.cluster_m + tile.tile_rows / tile.cluster_n
    main = steps * max((1.07 if tile.pingpong else 1.05) * multiplied, loaded * STEP * 2 / L2_BYTES)
    of_weights = (3.0 if choice.apart else 2.0 + 0.5 * parts) * (1.5 if tile.transposed else 1)  # float by float
    store = tile.tile_rows * tile.columns / 8 * STORES.get(function, of_weights)
    total = 2500.0  # the start of the pipeline
    if tile.pingpong:
        total += max(each * main + store, each / 2 * (main + store)) + 1500
    else:
        total += each * (main + 0.75 * store + 800)
    return total + (4000 + 4 * m * n * (parts + 1) / 1500 if choice.apart else 0)


def nearest(table: Mapping, function: str, n: int, c: int, oc: int):
    """The choice for the nearest number of rows, if that is near; else None. table: (function, c, oc) -> [(n, choice)]."""
    near = [(abs(math.log(n / rows)), choice) for rows, choice in table.get((function, c, oc), ())]
    distance, choice = min(near, key=lambda x: x[0], default=(math.inf, None))
    return choice if distance < math.log(2.5) else None


def choose(function: str, n: int, c: int, oc: int, tuned: Mapping | None = None) -> Choice:
    """For a layer of n rows: as tuned or measured for about so many rows; else by the model."""
    found = nearest(tuned or {}, function, n, c, oc) or nearest(measured(), function, n, c, oc)
    return found or by_model(function, n, c, oc)


def by_model(function: str, n: int, c: int, oc: int) -> Choice:
    m, n, k = {WEIGHT_GRADIENT: (oc, c, n)}.get(function, (n, oc, c) if BY_K[function][1] else (n, c, oc))
    return min(candidates(function, m, n, k), key=lambda choice: cycles(function, m, n, k, choice))


@functools.cache
def measured() -> dict[tuple[str, int, int], list[tuple[int, Choice]]]:
    """(function, c, oc) -> choices by their number of rows, fastest of those tried."""
    found: dict = {}
    for name in MEASURED:
        for shape, choices in read_table(_shipped(name)).items():
            found.setdefault(shape, []).extend(choices)
    return found


def _shipped(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def read_table(text: str) -> dict[tuple[str, int, int], list[tuple[int, Choice]]]:
    """What a table in the form of MEASURED says."""
    table = tomllib.loads(text)
    tiles = {name: Tile(**tile) for name, tile in table["tiles"].items()}
    found: dict = {}
    for row in table["products"]:
        choice = Choice(tiles[row["tile"]], row.get("parts", 1), row.get("apart", False))
        found.setdefault((row["function"], row["c"], row["oc"]), []).append((row["n"], choice))
    return found


def write_table(comment: str, rows: Sequence[tuple[str, int, int, int, Choice]]) -> str:
    """The same table as text. rows: function, n, c, oc, choice."""
    shipped = [tomllib.loads(_shipped(name))["tiles"] for name in MEASURED]
    names = {Tile(**tile): name for tiles in shipped for name, tile in tiles.items()}
    lines = [f"# {line}".rstrip() for line in comment.splitlines()] + ["", "products = ["]
    for function, n, c, oc, choice in rows:
        name = names.setdefault(choice.tile, choice.tile.name)
        parts = f", parts = {choice.parts}" if function == WEIGHT_GRADIENT else ""
        apart = ", apart = true" if choice.apart else ""
        lines.append(f'    {{ function = "{function}", n = {n}, c = {c}, oc = {oc}, tile = "{name}"{parts}{apart} }},')
    lines.append("]")
    for tile in dict.fromkeys(choice.tile for *_, choice in rows):
        stated = {key: value for key, value in asdict(tile).items() if key != "transposed" or value}
        lines += ["", f"[tiles.{names[tile]}]", *(f"{key} = {str(value).lower()}" for key, value in stated.items())]
    return "\n".join(lines) + "\n"


def scratch_bytes(function: str, n: int, c: int, oc: int, choice: Choice) -> int:
    """Parts of a weight gradient that are stored apart, and sums of columns."""
    if function != WEIGHT_GRADIENT:
        return 0
    tile, weights = choice.tile, choice.parts * oc * c if choice.apart else 0
    _, along_c = tile.sides(tile.tile_rows, tile.columns)
    return 4 * (weights + choice.parts * -(-c // along_c) * oc)


def turns(function: str, c: int, oc: int, choice: Choice) -> int:
    """Counters: one for 16 rows of each tile of a weight gradient whose parts are added in turn."""
    if function != WEIGHT_GRADIENT or choice.parts == 1 or choice.apart:
        return 0
    rows, columns = choice.tile.sides(oc, c)
    return -(-rows // 16) * -(-columns // choice.tile.columns)


def options(tiles: Iterable[Tile]) -> dict:
    """What the template needs: the tiles in use, and their widths."""
    ordered = sorted(set(tiles), key=lambda tile: (not tile.pingpong, -tile.tile_rows, -tile.columns, tile.name))
    columns = sorted({tile.columns for tile in ordered})
    return {"tiles": ordered, "columns": columns, "transposed": any(tile.transposed for tile in ordered)}
