"""HuggingFace models to our weights and back; `llmgen.architectures` knows their configs and names.

- A source is a folder (config.json, model.safetensors or its shards), a `.safetensors` file, or a hub id. An existing
  path wins; a name that begins with `/` or `.` never goes to the hub. `HF_ENDPOINT` and the hub's cache are honoured.
- Pickles are never opened. Every tensor is expected by name and shape; anything else is refused by name.
- Tensors stream through, one at a time and large ones in blocks: memory does not grow with the model's depth.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmgen import architectures, models, tokenizer_files
from llmgen.architectures import Architecture, Part
from llmgen.config import BYTE_VOCABULARY, GPT2_VOCABULARY, Config, ModelConfig, from_tables
from llmgen.errors import UserError
from llmgen.formats import debug_state, files, weights

HEAD = "lm_head.weight"
BLOCK = 1 << 22  # values of a large tensor read at a time
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # of safetensors; bf16 as its bits
# Causal masks and rotary frequencies that old files hold.
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def config_tables(source: str | os.PathLike, note: Callable[[str], None] | None = None) -> dict:
    """The tables of a TOML file for a model's config.json. source: the file, or the folder it is in.

    note: called with a line for what is ignored. Raises UserError for a config that cannot be expressed.
    """
    return _read_config(Path(source), note)[1]


def _read_config(path: Path, note: Callable[[str], None] | None) -> tuple[Architecture, dict]:
    path = path / "config.json" if path.is_dir() else path
    return architectures.read(_read_json(path), path, note)


def export_weights(
    source: str,
    out: str | os.PathLike,
    dtype: str = "fp32",
    config: Config | None = None,
    note: Callable[[str], None] = print,
) -> Config:
    """Converts a hub id, a folder or a `.safetensors` file to a weights file. Returns the model's config.

    dtype: fp32, or bf16 (rounded to nearest even). config: instead of the config.json beside the weights. note: called
    with a line for what is ignored. Raises UserError.
    """
    if dtype not in weights.VERSIONS:
        raise UserError(f"--dtype {dtype} is not known; use {' or '.join(weights.VERSIONS)}")
    folder, shards = locate(source, with_config=config is None)
    if config is None:
        if not (folder / "config.json").is_file():
            raise UserError(f"{source}: there is no config.json beside it; put it there or name one with --config")
        architecture, tables = _read_config(folder / "config.json", note)
        config = from_tables(Path(source).resolve().name.removesuffix(".safetensors"), tables, str(folder / "config.json"))
    else:
        architecture = architectures.of(config, config.name)
    shapes = models.parameter_shapes(config)
    parts = architectures.parts(architecture, config.model, shapes)
    stored = open_safetensors(shards, architecture.prefix)
    _check_tensors(source, stored, architecture, parts)
    if config.model.tie_embeddings:
        _check_head(source, stored, stored[architecture.tensors["wte"][0]])
    weights.write(out, config, shapes, _converted(stored, architecture, parts), dtype)
    return config


def import_weights(
    file: str | os.PathLike, out: str | os.PathLike, state: str | os.PathLike | None = None, tokenizer: str | None = None
) -> list[Path]:
    """Converts a weights file to a folder that `transformers` loads; returns the files written.

    They are config.json, generation_config.json and model.safetensors, in the file's own precision, and a tokenizer's files
    if one is named, or known by the size of the vocabulary. state: a debug state of these weights, whose gradients become
    gradients.safetensors, float32, under the same names. Raises UserError.
    """
    config = from_tables(Path(file).stem, weights.config_tables(file), os.fspath(file))
    architecture = architectures.of(config, os.fspath(file))
    shapes = models.parameter_shapes(config)
    parts = architectures.parts(architecture, config.model, shapes)
    tensors = weights.read(file, shapes)
    gradients = debug_state.read(state, config.model.vocab_size, shapes).gradients if state is not None else None
    tokenizer = tokenizer or tokenizer_files.known(config.model)
    own, end_of_text = tokenizer_files.of(tokenizer, config.model) if tokenizer else ({}, None)
    special = _special_ids(config.model) if end_of_text is None else _special(end_of_text)
    with files.folder(out) as folder, files.replacing_all() as open_output:
        written = {
            "config.json": _to_json(_config_json(architecture, config.model, tensors.dtype, special)),
            "generation_config.json": _to_json({"_from_model_config": True, **special}),
            **own,
        }
        for name, data in written.items():
            open_output(folder / name).write(data)
        _write_safetensors(open_output(folder / SINGLE), architecture, parts, tensors)
        names = [*written, SINGLE]
        if gradients is not None:
            names.append("gradients.safetensors")
            plain = dataclasses.replace(architecture, norm_offset=0.0)
            _write_safetensors(open_output(folder / names[-1]), plain, parts, gradients)
        return [folder / name for name in names]


# The source: a folder, a file or the hub.


def locate(source: str, with_config: bool = True) -> tuple[Path, list[Path]]:
    """The folder of config.json, and the safetensors files, fetched from the hub if need be. Raises UserError."""
    source = os.fspath(source)
    path = Path(source)
    if path.is_dir():
        return path, _files_of_folder(source, lambda name: path / name if (path / name).is_file() else None)
    if path.exists():
        if source.endswith(PICKLES) and not _is_ours(path):
            raise UserError(f"{source}: is a pickle, which can run code when opened; {_SAVE_HINT}")
        if not source.endswith(".safetensors"):
            what = "is a weights file of ours already" if _is_ours(path) else "is no .safetensors file"
            raise UserError(f"{source}: {what}; name a hub id, a folder or a .safetensors file")
        return path.parent, [path]
    if source.startswith(("/", ".")) or source.endswith((".safetensors", *PICKLES)):
        raise UserError(f"{source}: no such file or folder")
    return _from_hub(source, with_config)


_SAVE_HINT = "load it where you trust it and save it with save_pretrained(folder, safe_serialization=True)"


def _is_ours(path: Path) -> bool:
    with files.reading(path) as file:
        return file.read(4) in [files.header(files.MAGIC[kind])[:4] for kind in (weights.LLMC, weights.OWN)]


def _files_of_folder(source: str, get: Callable[[str], Path | None]) -> list[Path]:
    """The safetensors files of a model. get: a file's path by its name, None if there is none."""
    single = get(SINGLE)
    if single is not None:
        return [single]
    index = get(INDEX)
    if index is not None:
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise UserError(f"{source}: {INDEX} has no weight_map from tensors to files")
        shards = []
        for name in sorted(set(named.values())):
            if "/" in name or os.sep in name or not name.endswith(".safetensors"):
                raise UserError(f"{source}: {INDEX} names {name!r}, which is not a safetensors file of the folder")
            shard = get(name)
            if shard is None:
                raise UserError(f"{source}: has no {name}, which {INDEX} names")
            shards.append(shard)
        return shards
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin"):
        if get(name) is not None:
            raise UserError(f"{source}: has only a pickle ({name}), which can run code when opened; {_SAVE_HINT}")
    raise UserError(f"{source}: has neither {SINGLE} nor {INDEX}")


def _from_hub(source: str, with_config: bool) -> tuple[Path, list[Path]]:
    import sys

    import huggingface_hub
    from huggingface_hub import errors

    huggingface_hub.logging.set_verbosity_error()  # stderr holds one line, and only for a failure
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()

    unreachable: list[Exception] = []  # whether there is such a file could not be asked

    def get(name: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(source, name))
        except errors.LocalEntryNotFoundError as error:  # no network, and not in the cache; also an EntryNotFoundError
            unreachable.append(error)
            return None
        except errors.EntryNotFoundError:
            return None

    try:
        config = get("config.json")
        if config is None and with_config:
            raise (
                unreachable[0] if unreachable else UserError(f"{source}: has no config.json on the hub; name one with --config")
            )
        try:
            shards = _files_of_folder(source, get)
        except UserError:
            if unreachable:
                raise unreachable[0] from None
            raise
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(f"{source}: the hub wants an accepted licence; accept it there and log in with hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{source}: neither an existing path nor a model on the hub (a private one needs hf auth login)"
        ) from None
    except errors.HFValidationError:
        raise UserError(f"{source}: neither an existing path nor a hub id such as openai-community/gpt2") from None
    except Exception as error:  # every version of the client has its own network errors
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(f"{source}: cannot be fetched from the hub: {reason}") from None
    return (config or shards[0]).parent, shards


# safetensors: 8 bytes of header length, a JSON header, the tensors.


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    path: Path
    name: str  # as in the file
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` values from value `start` on, as a flat float array."""
        stored = np.dtype(DTYPES[self.dtype])
        values = files.read_values(self.path, stored, self.offset + start * stored.itemsize, count)
        return weights.bf16_to_fp32(values) if self.dtype == "BF16" else values


def open_safetensors(paths: list[Path], prefix: str) -> dict[str, Stored]:
    """The tensors of these files by name, without the prefix. The library checks each header. Raises UserError."""
    import safetensors

    tensors: dict[str, Stored] = {}
    for path in paths:
        with files.reading(path):
            pass
        try:
            with safetensors.safe_open(path, framework="np"):
                pass
        except Exception as error:
            raise UserError(f"{path}: is not a safetensors file: {str(error).splitlines()[0]}") from None
        with files.reading(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES and not BUFFERS.fullmatch(name.removeprefix(prefix)):
                known = ", ".join(DTYPES)
                raise UserError(f"{path}: tensor {name} has type {entry['dtype']}; only {known} can be converted")
            key = name.removeprefix(prefix)
            if key in tensors:
                raise UserError(f"{path}: tensor {name} is there twice (as {tensors[key].name} in {tensors[key].path})")
            offset = 8 + length + entry["data_offsets"][0]
            tensors[key] = Stored(path, name, entry["dtype"], tuple(entry["shape"]), offset)
    return tensors


def _write_safetensors(
    output: files.Output, architecture: Architecture, parts: Mapping[str, Part], tensors: weights.Tensors
) -> None:
    """All tensors under their names there, in the precision of `tensors`, one layer's tensor at a time."""
    dtype = {"fp32": "F32", "bf16": "BF16"}[tensors.dtype]
    item = np.dtype(DTYPES[dtype]).itemsize
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for theirs, part in parts.items():
        end = at + math.prod(part.shape) * item
        name = theirs if theirs == HEAD else architecture.prefix + theirs
        header[name] = {"dtype": dtype, "shape": part.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    output.write(len(text).to_bytes(8, "little") + text)
    for part in parts.values():
        count, offset = math.prod(part.shape), architecture.offset(part.name)
        if part.name in architecture.transposed:
            output.write(np.ascontiguousarray(tensors.stored(part.name, part.start, count).reshape(part.shape[::-1]).T))
            continue
        for start in range(0, count, BLOCK):
            values = tensors.stored(part.name, part.start + start, min(BLOCK, count - start))
            output.write(_shifted(values, -offset, tensors.dtype) if offset else values)


def _shifted(values: np.ndarray, offset: float, dtype: str) -> np.ndarray:
    """Stored values plus a number, stored alike."""
    if dtype == "fp32":
        return values + np.float32(offset)
    return weights.fp32_to_bf16(weights.bf16_to_fp32(values) + np.float32(offset))


# Tensors.


def _check_tensors(source: str, stored: dict[str, Stored], architecture: Architecture, parts: Mapping[str, Part]) -> None:
    for name in stored:
        if name not in parts and name != HEAD and not BUFFERS.fullmatch(name):
            theirs = stored[name].name
            raise UserError(f"{source}: tensor {theirs} is not part of this {architecture.name}; does its config.json fit?")
    for name, part in parts.items():
        if name not in stored:
            raise UserError(f"{source}: tensor {name} is missing; does its config.json fit?")
        if stored[name].shape != part.shape:
            raise UserError(
                f"{source}: tensor {stored[name].name} has shape {stored[name].shape}, expected {part.shape}; "
                "does its config.json fit?"
            )


def _check_head(source: str, stored: dict[str, Stored], embedding: Stored) -> None:
    """The head, where the file holds it though it is tied, must be the token embedding."""
    head = stored.get(HEAD)
    if head is None:
        return
    same = head.shape == embedding.shape
    count = math.prod(embedding.shape) if same else 0
    for start in range(0, count, BLOCK):
        part = min(BLOCK, count - start)
        same = same and np.array_equal(head.read(start, part), embedding.read(start, part), equal_nan=True)
    if not same:
        raise UserError(
            f"{source}: {head.name} differs from {embedding.name}, though the config ties them; "
            "say tie_word_embeddings = false in config.json to keep both"
        )


def _converted(
    stored: dict[str, Stored], architecture: Architecture, parts: Mapping[str, Part]
) -> Iterator[tuple[str, np.ndarray]]:
    """(our name, values) in our order: the layers of a tensor one after the other, large ones in blocks."""
    for theirs, part in parts.items():
        count, offset = math.prod(part.shape), np.float32(architecture.offset(part.name))
        if part.name in architecture.transposed:
            yield part.name, stored[theirs].read(0, count).reshape(part.shape).T
            continue
        for start in range(0, count, BLOCK):
            values = stored[theirs].read(start, min(BLOCK, count - start))
            yield part.name, values.astype(np.float32, copy=False) + offset if offset else values
        if part.rest:
            yield part.name, np.zeros(part.rest, np.float32)


# JSON.


def _config_json(architecture: Architecture, model: ModelConfig, dtype: str, special: dict) -> dict:
    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    return {**architectures.write(architecture, model), **special, "torch_dtype": dtypes[dtype]}


def _special_ids(model: ModelConfig) -> dict:
    """End-of-text of the two vocabularies that we know by their size. (Their default is GPT-2's, whatever the size.)"""
    return _special(model.vocab_size - 1 if model.vocab_size in (BYTE_VOCABULARY, GPT2_VOCABULARY) else None)


def _special(end_of_text: int | None) -> dict:
    return {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": None}


def _to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_json(path: Path) -> dict:
    with files.reading(path) as file:
        data = file.readall()
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
