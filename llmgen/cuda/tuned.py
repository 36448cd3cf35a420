"""What `llmgen tune` found here: the fastest kernel of each matrix product, in a file that only --tuned and tune read.

`$XDG_CACHE_HOME/llmgen/tuned.json`: a list of results, each of one GPU, one toolkit, one family of kernels and one shape.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from llmgen import data, toolchain
from llmgen.cuda import architecture, hopper, products
from llmgen.cuda.architecture import Architecture
from llmgen.errors import UserError
from llmgen.formats import files

VERSION = 1


@dataclass(frozen=True)
class Result:
    gpu: str  # as the driver names it
    toolkit: str  # 13.0
    kernels: str  # see `family`
    function: str
    n: int
    c: int
    oc: int
    tile: dict  # its fields, or of the portable kernels its name
    parts: int
    apart: bool
    milliseconds: float

    @property
    def key(self) -> tuple:
        return self.gpu, self.toolkit, self.kernels, self.function, self.n, self.c, self.oc

    @property
    def choice(self) -> products.Choice | hopper.Choice | None:
        """None: a tile that this version of llmgen does not have."""
        if self.kernels == "wgmma":
            return hopper.Choice(hopper.Tile(**self.tile), self.parts, self.apart)
        tiles = products.TILES if self.kernels == "mma" else products.FLOAT_TILES
        found = next((tile for tile in tiles if _named(tile) == self.tile), None)
        return products.Choice(found, self.parts) if found else None


def result(gpu: str, toolkit: str, kernels: str, shape: products.Shape, choice, milliseconds: float) -> Result:
    tile = asdict(choice.tile) if kernels == "wgmma" else _named(choice.tile)
    apart = getattr(choice, "apart", False)
    where = gpu, toolkit, kernels, shape.function, shape.n, shape.c, shape.oc
    return Result(*where, tile, choice.parts, apart, milliseconds)


def _named(tile: products.Tile | products.FloatTile) -> dict:
    return {"rows": tile.rows, "columns": tile.columns}


def family(machine: Architecture, precision: str) -> str:
    """Which kernels are chosen from: those by wgmma, by mma.sync, or of floats."""
    return "floats" if precision != "bf16" else "wgmma" if machine.is_hopper else "mma"


def path() -> Path:
    return data.default_cache() / "tuned.json"


def read() -> list[Result]:
    """What is known; nothing if the file is not there. Raises UserError if it is damaged."""
    if not path().exists():
        return []
    with files.reading(path()) as file:
        text = file.read()
    try:
        table = json.loads(text)
        if table["version"] != VERSION:
            raise ValueError(f"version {table['version']}, expected {VERSION}")
        return [_checked(row) for row in table["results"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path()}: is damaged ({type(error).__name__}: {why}); remove it and run llmgen tune again") from None


def _checked(row: dict) -> Result:
    found = Result(**row)
    types = {str: str, int: int, bool: bool, float: (int, float), dict: dict}
    for f in fields(Result):
        value = getattr(found, f.name)
        if not isinstance(value, types[f.type]) or (f.type is int and (isinstance(value, bool) or value < 1)):
            raise ValueError(f"{f.name} = {value!r}")
    if found.function not in products.LAYOUTS or found.kernels not in ("wgmma", "mma", "floats"):
        raise ValueError(f"{found.function} by {found.kernels}")
    if found.kernels == "wgmma":
        for name, value in asdict(found.choice.tile).items():
            if type(value) is not hopper.Tile.__annotations__[name]:
                raise ValueError(f"{name} = {value!r} of a tile")
        if found.choice.tile.shared_bytes(found.function) > hopper.SHARED_LIMIT:
            raise ValueError("a tile that does not fit in shared memory")
    return found


def keep(results: Iterable[Result]) -> None:
    """Puts results beside those that are there, or in their place. Raises UserError."""
    merged = {r.key: r for r in read()} | {r.key: r for r in results}
    rows = ",\n".join("  " + json.dumps(asdict(merged[key])) for key in sorted(merged))
    with files.folder(path().parent), files.replacing(path()) as output:
        output.write(f'{{"version": {VERSION}, "results": [\n{rows}\n]}}\n'.encode())


def table(
    results: Sequence[Result], gpu: str, toolkit: str, kernels: str
) -> dict[tuple[str, int, int], list[tuple[int, object]]]:
    """Of one GPU, toolkit and family: (function, c, oc) -> [(n, choice)]."""
    found: dict = {}
    for r in results:
        if (r.gpu, r.toolkit, r.kernels) == (gpu, toolkit, kernels) and r.choice:
            found.setdefault((r.function, r.c, r.oc), []).append((r.n, r.choice))
    return found


def here() -> tuple[str, str]:
    """The GPU that is present, and the toolkit. Raises UserError if there is none."""
    gpu = architecture.gpu_name()
    if gpu is None:
        raise UserError("--tuned takes what llmgen tune found on the GPU that is present, but there is none; leave it out")
    compiler = toolchain.find_nvcc()
    if compiler is None:
        raise UserError("--tuned takes what llmgen tune found with the CUDA toolkit here, but there is no nvcc; leave it out")
    return gpu, "{}.{}".format(*toolchain.nvcc_version(compiler))


def machine(arch: str | None, precision: str) -> Architecture:
    """The architecture that --arch names, with what was tuned for it on the GPU that is present. Raises UserError."""
    resolved = architecture.resolve(arch, precision)
    return Architecture(resolved.names, table(read(), *here(), family(resolved, precision)))


def exported(gpu: str, toolkit: str) -> str:
    """The Hopper kernels' results in the form of hopper.MEASURED."""
    order = list(products.LAYOUTS)
    rows = [r for r in read() if (r.gpu, r.toolkit, r.kernels) == (gpu, toolkit, "wgmma")]
    rows.sort(key=lambda r: (order.index(r.function), -r.n, r.c, r.oc))
    comment = (
        f"The fastest of the candidates of hopper.py for each product, on {gpu} (CUDA {toolkit}): medians of bursts\n"
        "at the power limit, random normal data, by llmgen tune. function, n, c, oc as in hopper.choose."
    )
    return hopper.write_table(comment, [(r.function, r.n, r.c, r.oc, r.choice) for r in rows])
