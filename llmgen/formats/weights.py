"""Weights files, in llm.c's layout.

- Header (256 int32): [0] magic 20240326, [1] version, [2] max_seq_len, [3] vocab_size, [4] num_layers, [5] num_heads,
  [6] channels, [7] padded_vocab_size (vocab_size rounded up to 128).
- Version 3 holds float32, version 5 bfloat16 (all tensors).
- Then the tensors back to back, each stacked over the layers, in the order of the parameter table, to the file's end.

Names and shapes come from the graph (`llmgen.models.parameter_shapes`): a dict name -> stacked shape in file order,
such as qkvw: (L, 3*C, C). Rows of the vocabulary beyond vocab_size are zero.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llmgen.errors import UserError
from llmgen.formats import files

MAGIC = files.MAGIC["weights"]
VERSIONS = {"fp32": 3, "bf16": 5}
HEADER_FIELDS = (
    "max_seq_len",
    "vocab_size",
    "num_layers",
    "num_heads",
    "channels",
    "padded_vocab_size",
)  # from [2] on
CHUNK = 1 << 22  # values converted at a time

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Header:
    dtype: str  # fp32 or bf16
    max_seq_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int
    padded_vocab_size: int

    @property
    def item_bytes(self) -> int:
        return {"fp32": 4, "bf16": 2}[self.dtype]


def file_bytes(shapes: Shapes, dtype: str = "fp32") -> int:
    """Length of a weights file."""
    return files.HEADER_BYTES + sum(map(math.prod, shapes.values())) * {"fp32": 4, "bf16": 2}[dtype]


def header_fields(model, dtype: str = "fp32") -> tuple[int, ...]:
    """The used int32 of the header. model: anything with the fields of HEADER_FIELDS (a ModelConfig, a Header)."""
    return (MAGIC, VERSIONS[dtype], *(getattr(model, name) for name in HEADER_FIELDS))


def read_header(path: str | os.PathLike) -> Header:
    """The header, checked by itself. Raises UserError."""
    ints, _ = files.read_header(path, "weights")
    dtype = next((name for name, version in VERSIONS.items() if version == ints[1]), None)
    if dtype is None:
        known = " or ".join(f"{version} ({name})" for name, version in VERSIONS.items())
        raise UserError(f"{path}: weights version {ints[1]}, expected {known}; export it again with export-weights")
    header = Header(dtype, *(int(value) for value in ints[2 : 2 + len(HEADER_FIELDS)]))
    for name in HEADER_FIELDS:
        if getattr(header, name) < 1:
            raise UserError(f"{path}: header says {name} = {getattr(header, name)}; write the file again")
    padded = -(-header.vocab_size // 128) * 128
    if header.padded_vocab_size != padded:
        raise UserError(
            f"{path}: header says padded_vocab_size = {header.padded_vocab_size}, expected {padded} for "
            f"vocab_size = {header.vocab_size}; export it again with export-weights"
        )
    return header


def config_tables(path: str | os.PathLike) -> dict:
    """The tables of a TOML file that describes these weights. Raises UserError, also for a wrong length."""
    from llmgen import config, models

    header = read_header(path)
    fields = [name for name in HEADER_FIELDS if name != "padded_vocab_size"]
    tables = {
        "family": "gpt2",
        "model": {name: getattr(header, name) for name in fields},
        "program": {"seq_len": min(config.ProgramConfig.seq_len, header.max_seq_len)},
    }
    read(path, models.parameter_shapes(config.from_tables("weights", tables, os.fspath(path))))
    return tables


class Tensors(Mapping):
    """Tensors back to back in a file, by name. Nothing is read before it is asked for.

    `tensors[name]` is a read-only float32 array of the stacked shape: a map of the file, or for bf16 a converted copy.
    """

    def __init__(self, path: str | os.PathLike, shapes: Shapes, dtype: str = "fp32", offset: int = files.HEADER_BYTES):
        self.path, self.shapes, self.dtype = path, dict(shapes), dtype
        self._stored = np.dtype({"fp32": "<f4", "bf16": "<u2"}[dtype])
        self.offsets = {}  # bytes from the start of the file
        for name, shape in self.shapes.items():
            self.offsets[name] = offset
            offset += math.prod(shape) * self._stored.itemsize
        self.end = offset

    def __getitem__(self, name: str) -> np.ndarray:
        array = np.memmap(self.path, self._stored, "r", self.offsets[name], self.shapes[name])
        return bf16_to_fp32(array) if self.dtype == "bf16" else np.asarray(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def stored(self, name: str, start: int, count: int) -> np.ndarray:
        """`count` values from value `start` of a tensor on, as stored (uint16 holds bf16), in fresh memory."""
        offset = self.offsets[name] + start * self._stored.itemsize
        return files.read_values(self.path, self._stored, offset, count)


def read(path: str | os.PathLike, shapes: Shapes) -> Tensors:
    """The tensors of a weights file, whose length is checked. Raises UserError."""
    header = read_header(path)
    tensors = Tensors(path, shapes, header.dtype)
    sizes = ", ".join(f"{name} {getattr(header, name)}" for name in HEADER_FIELDS)
    files.check_length(path, os.stat(path).st_size, tensors.end, f"{header.dtype}, {sizes}")
    return tensors


def write(
    path: str | os.PathLike,
    model,
    shapes: Shapes,
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str = "fp32",
) -> None:
    """Writes a weights file, tensor by tensor.

    model: a ModelConfig. tensors: (name, float array) in the order of `shapes`; a tensor may come in several pieces,
    its rows in order. bf16 rounds to nearest even. Raises UserError if the file cannot be written, ValueError if the
    tensors are not those of `shapes`.
    """
    with files.replacing(path) as output:
        output.write(files.header(*header_fields(model, dtype)))
        write_tensors(output, shapes, tensors, dtype)


def write_tensors(output: files.Output, shapes: Shapes, tensors: Iterable[tuple[str, np.ndarray]], dtype: str) -> None:
    """Appends tensors, which may come in pieces, back to back. Raises ValueError if they are not those of `shapes`."""
    missing = {name: math.prod(shape) for name, shape in shapes.items()}
    order = iter(shapes)
    current = None
    for name, array in tensors:
        if name != current:
            if (current is not None and missing[current]) or name != next(order, None):
                raise ValueError(f"tensor '{name}' follows '{current}' out of order or too early")
            current = name
        missing[name] -= array.size
        if missing[name] < 0:
            raise ValueError(f"tensor '{name}' has more than the {math.prod(shapes[name])} values of {shapes[name]}")
        flat = np.ascontiguousarray(array).reshape(-1)
        for start in range(0, flat.size, CHUNK):
            values = flat[start : start + CHUNK].astype("<f4", copy=False)
            output.write(fp32_to_bf16(values) if dtype == "bf16" else values)
    if any(missing.values()):
        raise ValueError(f"tensor '{next(name for name, count in missing.items() if count)}' is not complete")


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits (uint16): exact, the bits become the upper half."""
    return (np.asarray(bits).astype("<u4") << np.uint32(16)).view("<f4")


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) of float32 values, rounded to nearest, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    quiet = bits | np.uint32(0x400000)  # of a NaN: the payload's lower half may be all there is
    return (np.where(np.isnan(values), quiet, rounded) >> np.uint32(16)).astype("<u2")
