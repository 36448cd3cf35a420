"""Token shards, in llm.c's two layouts.

- Header (256 int32): [0] magic, [1] version, [2] number of tokens (at most 2^31 - 1).
- uint16 tokens: magic 20240520, version 1. uint32 tokens: magic 20240801, version 7.
- Then the tokens, to the end of the file.
"""

import os

import numpy as np

from llmgen.errors import UserError
from llmgen.formats import files

MAX_TOKENS = 2**31 - 1
LAYOUTS = {  # name of the kind -> version, type of a token
    "uint16 tokens": (1, np.dtype("<u2")),
    "uint32 tokens": (7, np.dtype("<u4")),
}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where the vocabulary fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def header(count: int, dtype: np.dtype) -> bytes:
    """The header of a shard of `count` tokens. Raises UserError for more than MAX_TOKENS."""
    if count > MAX_TOKENS:
        raise UserError(f"a token file holds at most {MAX_TOKENS} tokens, not {count}; lower the shard size")
    kind, version = next((kind, version) for kind, (version, kept) in LAYOUTS.items() if kept == dtype)
    return files.header(files.MAGIC[kind], version, count)


def read(path: str | os.PathLike) -> np.ndarray:
    """The tokens of a shard, a read-only map of the file: uint16 or uint32, (count,). Raises UserError."""
    ints, length = files.read_header(path, *LAYOUTS)
    version, dtype = next(layout for kind, layout in LAYOUTS.items() if files.MAGIC[kind] == ints[0])
    if ints[1] != version:
        raise UserError(f"{path}: token file version {ints[1]}, expected {version}; export it again with export-tokens")
    count = int(ints[2])
    if count < 0:
        raise UserError(f"{path}: header says {count} tokens; export it again with export-tokens")
    files.check_length(path, length, files.HEADER_BYTES + count * dtype.itemsize, f"{count} tokens of {dtype.name}")
    if count == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", files.HEADER_BYTES, (count,)))


def write(path: str | os.PathLike, ids: np.ndarray, vocab_size: int) -> None:
    """Writes one shard. Raises UserError if it cannot be written, ValueError for an id outside the vocabulary."""
    ids = np.asarray(ids)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {vocab_size}")
    dtype = token_dtype(vocab_size)
    with files.replacing(path) as output:
        output.write(header(ids.size, dtype))
        output.write(np.ascontiguousarray(ids, dtype))
