"""Checkpoints: the weights, the state beside them, and the mark that both are whole. Names and layout are llm.c's.

- Of step 40, in the log folder: `model_00000040.bin`, a weights file; `state_00000040_00000.bin`, the state of process 0; and
  `DONE_00000040`, written last: the checksums of both as 16 hex digits, a line each. llm.c leaves that file empty.
- State: header (256 int32) with magic 20240527, version 2, and `ENTRIES`; then the first and the second moments, float32, in
  the order and shapes of the weights file; the master weights the same way, if entry 4 is 1; then 128 losses and 128 norms,
  float64, in a ring. llm.c's version 1 ends with the state of a shuffle instead; ours follows from seed and position.
"""

import os
from pathlib import Path

import numpy as np

from llmgen.errors import UserError
from llmgen.formats import files, weights

VERSION = 2
RECENT = 128
ENTRIES = {  # entry of the header -> its first int32
    "processes": 2,
    "master_weights": 4,
    "shuffle": 5,  # from here on of 64 bits, but for the step
    "step": 10,
    "seed": 20,
    "shard": 30,  # of the next sample, and which one of the shard it is
    "sample": 32,
    "samples": 40,  # taken since the first step; from here on the entries are ours
    "losses": 42,  # seen since the first step: the newest stands at (losses - 1) % 128
    "norms": 44,
    "batch_size": 46,
    "seq_len": 48,
    "total_batch_size": 50,
    "data_tokens": 52,  # in the samples of the training data
}
_INT32 = ("processes", "master_weights", "step")


def paths(folder: str | os.PathLike, step: int) -> tuple[Path, Path, Path]:
    """Model, state and mark of a step's checkpoint."""
    folder = Path(folder)
    return folder / f"model_{step:08d}.bin", folder / f"state_{step:08d}_00000.bin", folder / f"DONE_{step:08d}"


def steps(folder: str | os.PathLike) -> list[int]:
    """Of all checkpoints in a folder, whole or not."""
    names = [path.name.removeprefix("DONE_") for path in Path(folder).glob("DONE_*")]
    return sorted(int(name) for name in names if name.isdigit())


def checksum(path: str | os.PathLike) -> int:
    """The sum, modulo 2^64, over the 64-bit words (the last filled with zeros) of mix(word ^ mix(place)), and mix(length).
    mix is the finaliser of SplitMix64, a permutation: no change of one word goes unseen."""
    with files.reading(path) as file:
        data = file.readall()
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
    parts = (words ^ _mix(np.arange(len(words), dtype=np.uint64)), np.array([len(data)], np.uint64))
    return sum(int(_mix(part).sum(dtype=np.uint64)) for part in parts) % 2**64


def is_whole(folder: str | os.PathLike, step: int) -> bool:
    """Whether the checksums of a step's checkpoint hold."""
    model, state, done = paths(folder, step)
    try:
        return done.read_text().split() == [f"{checksum(path):016x}" for path in (model, state)]
    except (OSError, UserError, UnicodeDecodeError):
        return False


def read(path: str | os.PathLike, shapes: weights.Shapes) -> tuple[dict[str, int], list[weights.Tensors], np.ndarray]:
    """The header's entries; the first and second moments and, where kept, the master weights; losses and norms (2, 128).

    Raises UserError.
    """
    ints, length = files.read_header(path, "optimizer state")
    if ints[1] != VERSION:
        raise UserError(f"{path}: training state version {ints[1]}, expected {VERSION}; it is of another trainer")
    entries = {name: int(ints[at] if name in _INT32 else ints[at : at + 2].view("<i8")[0]) for name, at in ENTRIES.items()}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    kinds = 3 if entries["master_weights"] else 2
    files.check_length(path, length, files.HEADER_BYTES + 4 * kinds * count + 16 * RECENT, f"{count} parameters")
    tensors = []
    for kind in range(kinds):
        flat = files.read_values(path, np.dtype("<f4"), files.HEADER_BYTES + 4 * kind * count, count)
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
        parts = zip(shapes.items(), np.split(flat, ends), strict=True)
        tensors.append({name: part.reshape(shape) for (name, shape), part in parts})
    recent = files.read_values(path, np.dtype("<f8"), length - 16 * RECENT, 2 * RECENT)
    return entries, tensors, recent.reshape(2, RECENT)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
