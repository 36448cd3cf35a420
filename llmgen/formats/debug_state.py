"""Debug states: one forward and backward pass to compare with, in llm.c's layout (version 2) or with sizes (version 3).

- Header (256 int32): [0] magic 20240327, [1] version, [2] B, [3] T; in version 3 also [4] V, [5] padded V, [6] number of
  tensors. Version 2 goes with weights in llm.c's layout, version 3 with those in our own.
- Then inputs (B, T) int32, targets (B, T) int32, logits (B, T, V) float32 without the vocabulary's padding, the loss
  (one float32), and the gradients, float32, in the order and shapes of the weights file, vocabulary rows padded.

The reader takes the vocabulary size and the shapes from the weights the state belongs to.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llmgen.errors import UserError
from llmgen.formats import files, weights

MAGIC = files.MAGIC["debug state"]
VERSIONS = {weights.LLMC: 2, weights.OWN: 3}  # by the layout of the weights


@dataclass(frozen=True)
class DebugState:
    inputs: np.ndarray  # (B, T) int32
    targets: np.ndarray  # (B, T) int32
    logits: np.ndarray  # (B, T, V) float32
    loss: float
    gradients: weights.Tensors  # name -> float32, stacked over the layers

    @property
    def batch_size(self) -> int:
        return self.inputs.shape[0]

    @property
    def seq_len(self) -> int:
        return self.inputs.shape[1]


def sizes(vocab_size: int, shapes: weights.Shapes) -> dict[str, int]:
    """What version 3 says from header entry 4 on."""
    return {"V": vocab_size, "padded V": shapes["wte"][0], "number of tensors": len(shapes)}


def file_bytes(batch_size: int, seq_len: int, vocab_size: int, shapes: weights.Shapes) -> int:
    """Length of a debug state."""
    return _gradients_offset(batch_size, seq_len, vocab_size) + 4 * sum(map(math.prod, shapes.values()))


def read(path: str | os.PathLike, vocab_size: int, shapes: weights.Shapes) -> DebugState:
    """A debug state of a model with this vocabulary and these parameters. Arrays are maps of the file.

    Raises UserError if it is not one, or its length does not fit.
    """
    ints, length = files.read_header(path, "debug state")
    if ints[1] not in VERSIONS.values():
        known = " or ".join(map(str, VERSIONS.values()))
        raise UserError(f"{path}: debug state version {ints[1]}, expected {known}; write it again with --debug-state")
    b, t = int(ints[2]), int(ints[3])
    if b < 1 or t < 1:
        raise UserError(f"{path}: header says B = {b}, T = {t}; write it again with --debug-state")
    if ints[1] == VERSIONS[weights.OWN]:
        for at, (what, wanted) in enumerate(sizes(vocab_size, shapes).items(), 4):
            if ints[at] != wanted:
                raise UserError(f"{path}: header says {what} = {ints[at]}, expected {wanted}; does it belong to these weights?")
    why = f"B {b}, T {t}, vocab_size {vocab_size}, {len(shapes)} gradients; does it belong to these weights?"
    files.check_length(path, length, file_bytes(b, t, vocab_size, shapes), why)
    targets, logits = files.HEADER_BYTES + 4 * b * t, files.HEADER_BYTES + 8 * b * t
    gradients = _gradients_offset(b, t, vocab_size)
    return DebugState(
        inputs=np.asarray(np.memmap(path, "<i4", "r", files.HEADER_BYTES, (b, t))),
        targets=np.asarray(np.memmap(path, "<i4", "r", targets, (b, t))),
        logits=np.asarray(np.memmap(path, "<f4", "r", logits, (b, t, vocab_size))),
        loss=float(files.read_values(path, np.dtype("<f4"), gradients - 4, 1)[0]),
        gradients=weights.Tensors(path, shapes, offset=gradients),
    )


def write(
    path: str | os.PathLike,
    inputs: np.ndarray,
    targets: np.ndarray,
    logits: np.ndarray,
    loss: float,
    shapes: weights.Shapes,
    gradients: Iterable[tuple[str, np.ndarray]],
    layout: str = weights.LLMC,
) -> None:
    """Writes a debug state. inputs, targets: (B, T); logits: (B, T, V); gradients as the tensors of `weights.write`.

    layout: of the weights it belongs to.

    Raises UserError if the file cannot be written, ValueError if the arrays do not fit together.
    """
    b, t = inputs.shape
    if targets.shape != (b, t) or logits.ndim != 3 or logits.shape[:2] != (b, t):
        raise ValueError(f"inputs {inputs.shape}, targets {targets.shape} and logits {logits.shape} do not fit together")
    with files.replacing(path) as output:
        said = sizes(logits.shape[2], shapes).values() if layout == weights.OWN else ()
        output.write(files.header(MAGIC, VERSIONS[layout], b, t, *said))
        output.write(np.ascontiguousarray(inputs, "<i4"))
        output.write(np.ascontiguousarray(targets, "<i4"))
        output.write(np.ascontiguousarray(logits, "<f4"))
        output.write(np.array([loss], "<f4"))
        weights.write_tensors(output, shapes, gradients, "fp32")


def _gradients_offset(b: int, t: int, vocab_size: int) -> int:
    return files.HEADER_BYTES + 8 * b * t + 4 * b * t * vocab_size + 4
