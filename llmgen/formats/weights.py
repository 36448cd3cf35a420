"""Weights files, in two layouts: llm.c's, where its header can say what the model is, else our own.

llm.c's (`LLMC`), for models that are GPT-2 but for their sizes:

- Header (256 int32): [0] magic 20240326, [1] version, [2] max_seq_len, [3] vocab_size, [4] num_layers, [5] num_heads,
  [6] channels, [7] padded_vocab_size (vocab_size rounded up to 128).
- Version 3 holds float32, version 5 bfloat16 (all tensors).

Our own (`OWN`), which describes itself:

- Header (256 int32): [0] magic 20261101, [1] version 1, [2] bytes of the text, [3] number of tensors.
- A text, which is TOML: a line `key = value` for the family, the type of the values, every field of [model], and every
  tensor with its shape; then newlines up to a multiple of 64 bytes.

Behind either stand the tensors back to back, each stacked over the layers, in the order of the parameter table, to the
file's end. Names and shapes come from the graph (`llmgen.models.parameter_shapes`): a dict name -> stacked shape in file
order, such as qkvw: (L, 3*C, C). Rows of the vocabulary beyond vocab_size are zero.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llmgen import config as configs
from llmgen.config import Config, ModelConfig
from llmgen.errors import UserError
from llmgen.formats import files

LLMC, OWN = "weights", "described weights"  # kinds of files.MAGIC
VERSIONS = {"fp32": 3, "bf16": 5}  # llm.c's
OWN_VERSION = 1
HEADER_FIELDS = (
    "max_seq_len",
    "vocab_size",
    "num_layers",
    "num_heads",
    "channels",
    "padded_vocab_size",
)  # of llm.c's header, from [2] on
ITEM_BYTES = {"fp32": 4, "bf16": 2}
TEXT_ALIGNMENT = 64
TEXT_LIMIT = 1 << 20  # bytes; a longer text is damage
CHUNK = 1 << 22  # values converted at a time

# Fields of [model] that change the loss or the first weights, but not what weights compute.
OF_TRAINING = ("z_loss", "label_smoothing", "zero_projections")

Shapes = Mapping[str, tuple[int, ...]]


def mathematics(model: ModelConfig) -> dict:
    """The fields that decide what weights compute, as they count: those that another choice leaves without effect, and
    those of training alone, are not there. Two models compute the same from the same tensors if these are equal."""
    model = configs.filled(model)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig) if f.name not in OF_TRAINING}
    fields["attention_scale"] = float(f"{model.attention_scale or 1 / math.sqrt(model.head_size):.12g}")
    window = model.attention_window
    pattern = tuple(window[layer % len(window)] for layer in range(model.num_layers))
    fields["attention_window"] = pattern if any(pattern) else (0,)
    scaled = ("rope_factor", "rope_low_frequency_factor", "rope_high_frequency_factor", "rope_original_seq_len")
    without_effect = {
        "max_seq_len": model.position != "learned",
        "rope_theta": model.position != "rope",
        "rope_fraction": model.position != "rope",
        "rope_scaling": model.position != "rope",
        **dict.fromkeys(scaled, model.position != "rope" or model.rope_scaling != "llama3"),
        "qk_norm_weight": not model.qk_norm,
    }
    return {name: value for name, value in fields.items() if not without_effect.get(name)}


def layout(model: ModelConfig) -> str:
    """LLMC where its header says all there is to say, so that the parameters are its 16 tensors; else OWN."""
    sizes = {name: getattr(model, name) for name in HEADER_FIELDS if name != "padded_vocab_size"}
    return LLMC if mathematics(model) == mathematics(ModelConfig(**sizes)) else OWN


@dataclass(frozen=True)
class Header:
    """What stands before the tensors."""

    kind: str  # LLMC or OWN
    dtype: str  # fp32 or bf16
    tables: dict  # of a TOML file that describes the model
    shapes: dict[str, tuple[int, ...]] | None  # of the tensors, where the file says them
    bytes: int


def described(config: Config, shapes: Shapes, dtype: str) -> list[tuple[str, str, bool]]:
    """The lines of the text in our own layout: key, value, and whether a program must be built with the same value."""
    fixed = mathematics(config.model)
    lines = [("family", f'"{config.family}"', False), ("dtype", f'"{dtype}"', False)]
    for name, value in dataclasses.asdict(configs.filled(config.model)).items():
        lines.append((f"model.{name}", configs.toml_value(value), name in fixed))
    lines += [(f"tensors.{name}", configs.toml_value(shape), True) for name, shape in shapes.items()]
    return lines


def described_bytes(config: Config, shapes: Shapes) -> int:
    """Length of the text, with the newlines behind it."""
    length = sum(len(f"{key} = {value}\n") for key, value, _ in described(config, shapes, "fp32"))
    return -(-length // TEXT_ALIGNMENT) * TEXT_ALIGNMENT


def file_bytes(shapes: Shapes, dtype: str = "fp32", text_bytes: int = 0) -> int:
    """Length of a weights file. text_bytes: `described_bytes` in our own layout, 0 in llm.c's."""
    return files.HEADER_BYTES + text_bytes + sum(map(math.prod, shapes.values())) * ITEM_BYTES[dtype]


def header(config: Config, shapes: Shapes, dtype: str) -> bytes:
    """What stands before the tensors of a model."""
    model = config.model
    if layout(model) == LLMC:
        return files.header(files.MAGIC[LLMC], VERSIONS[dtype], *(getattr(model, name) for name in HEADER_FIELDS))
    text = "".join(f"{key} = {value}\n" for key, value, _ in described(config, shapes, dtype))
    size = described_bytes(config, shapes)
    return files.header(files.MAGIC[OWN], OWN_VERSION, size, len(shapes)) + text.encode().ljust(size, b"\n")


def read_header(path: str | os.PathLike) -> Header:
    """The header, checked by itself. Raises UserError."""
    ints, length = files.read_header(path, LLMC, OWN)
    return _llmc_header(path, ints) if ints[0] == files.MAGIC[LLMC] else _own_header(path, ints, length)


def _llmc_header(path: str | os.PathLike, ints: np.ndarray) -> Header:
    dtype = next((name for name, version in VERSIONS.items() if version == ints[1]), None)
    if dtype is None:
        known = " or ".join(f"{version} ({name})" for name, version in VERSIONS.items())
        raise UserError(f"{path}: weights version {ints[1]}, expected {known}; export it again with export-weights")
    fields = {name: int(value) for name, value in zip(HEADER_FIELDS, ints[2:], strict=False)}
    for name, value in fields.items():
        if value < 1:
            raise UserError(f"{path}: header says {name} = {value}; write the file again")
    said = fields.pop("padded_vocab_size")
    padded = ModelConfig(**fields).padded_vocab_size
    if said != padded:
        raise UserError(
            f"{path}: header says padded_vocab_size = {said}, expected {padded} for "
            f"vocab_size = {fields['vocab_size']}; export it again with export-weights"
        )
    return Header(LLMC, dtype, {"family": "gpt2", "model": fields}, None, files.HEADER_BYTES)


def _own_header(path: str | os.PathLike, ints: np.ndarray, length: int) -> Header:
    if ints[1] != OWN_VERSION:
        raise UserError(f"{path}: weights version {ints[1]}, expected {OWN_VERSION}; export it again with export-weights")
    size = int(ints[2])
    if not 0 < size <= min(TEXT_LIMIT, length - files.HEADER_BYTES):
        raise UserError(f"{path}: header says that {size} bytes of text follow; it is damaged or half copied")
    raw = files.read_values(path, np.dtype("u1"), files.HEADER_BYTES, size).tobytes()
    try:
        tables = configs.tomllib.loads(raw.decode())
        dtype, shapes = tables.pop("dtype"), {name: tuple(shape) for name, shape in tables.pop("tensors").items()}
        known = dtype in ITEM_BYTES and len(shapes) == ints[3]
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known or not all(type(n) is int and n > 0 for shape in shapes.values() for n in shape):
        raise UserError(f"{path}: its text does not say what the tensors are; it is damaged, write the file again")
    return Header(OWN, dtype, tables, shapes, files.HEADER_BYTES + size)


def config_tables(path: str | os.PathLike) -> dict:
    """The tables of a TOML file that describes these weights. Raises UserError, also for a wrong length."""
    from llmgen import models

    header = read_header(path)
    tables = dict(header.tables)
    longest = tables.get("model", {}).get("max_seq_len")
    if isinstance(longest, int):
        tables["program"] = {"seq_len": max(1, min(configs.ProgramConfig.seq_len, longest))}
    config = configs.from_tables("weights", tables, os.fspath(path))
    read(path, models.parameter_shapes(config))
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
    tensors = Tensors(path, shapes, header.dtype, header.bytes)
    if header.shapes is not None:
        for name in {**header.shapes, **shapes}:
            if header.shapes.get(name) != shapes.get(name):
                found, wanted = (s.get(name, "not there") for s in (header.shapes, shapes))
                raise UserError(f"{path}: tensor {name} is {found}, expected {wanted}; are these the weights of this model?")
    sizes = [f"{name} {value}" for name, value in header.tables["model"].items() if name in HEADER_FIELDS]
    files.check_length(path, os.stat(path).st_size, tensors.end, f"{header.dtype}, {', '.join(sizes)}")
    return tensors


def write(
    path: str | os.PathLike,
    config: Config,
    shapes: Shapes,
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str = "fp32",
) -> None:
    """Writes a weights file, tensor by tensor.

    tensors: (name, float array) in the order of `shapes`; a tensor may come in several pieces, its rows in order. bf16
    rounds to nearest even. Raises UserError if the file cannot be written, ValueError if the tensors are not those of
    `shapes`.
    """
    with files.replacing(path) as output:
        output.write(header(config, shapes, dtype))
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
