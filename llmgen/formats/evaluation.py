"""Evaluation files: examples of multiple choice, in llm.c's layout.

- Header (256 int32): [0] magic 20240522, [1] version 1, [2] number of examples, [3] bytes of the longest one.
- Then uint16, for each example: 65535, its bytes in all (below 65,536), its index, the number of the right ending, the
  number of endings, then the context and each ending: the number of its tokens, and the tokens.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmgen.errors import UserError
from llmgen.formats import files

KIND = "evaluation"
VERSION = 1
BEGIN = 65535
LARGEST = 65535  # of anything in it


@dataclass(frozen=True)
class Example:
    context: Sequence[int]
    endings: Sequence[Sequence[int]]
    right: int  # which of the endings


def encode(example: Example, index: int) -> np.ndarray:
    """An example as it stands in the file. Raises ValueError, in words, for one that does not fit."""
    parts = [example.context, *example.endings]
    if not all(len(part) for part in parts):
        raise ValueError("its context or one of its endings is empty")
    if not 0 <= example.right < len(example.endings):
        raise ValueError(f"its label is {example.right}, but it has {len(example.endings)} endings")
    values = [BEGIN, 0, index % BEGIN, example.right, len(example.endings)]
    for part in parts:
        values += [len(part), *map(int, part)]
    values[1] = 2 * len(values)
    if values[1] > LARGEST:
        raise ValueError(f"it takes {values[1]} bytes, but {LARGEST} fit")
    if max(max(part) for part in parts) >= BEGIN:
        raise ValueError(f"a token is not below {BEGIN}: the vocabulary is too large for this layout")
    return np.array(values, "<u2")


def write(path: str | os.PathLike, examples: Sequence[np.ndarray]) -> None:
    """Writes examples that `encode` made. Raises UserError if the file cannot be written."""
    longest = max((example.nbytes for example in examples), default=0)
    with files.replacing(path) as output:
        output.write(files.header(files.MAGIC[KIND], VERSION, len(examples), longest))
        for example in examples:
            output.write(example)


def read(path: str | os.PathLike) -> list[Example]:
    """The examples of a file. Raises UserError."""
    ints, length = files.read_header(path, KIND)
    if ints[1] != VERSION:
        raise UserError(f"{path}: evaluation file of version {ints[1]}, expected {VERSION}; export it again with export-eval")
    values = files.read_values(path, np.dtype("<u2"), files.HEADER_BYTES, (length - files.HEADER_BYTES) // 2).tolist()
    found, at = [], 0
    try:
        for _ in range(int(ints[2])):
            begin, size, _, right, endings = values[at : at + 5]
            end, at, parts = at + size // 2, at + 5, []
            for _ in range(endings + 1):
                parts.append(values[at + 1 : at + 1 + values[at]])
                at += 1 + values[at]
            if begin != BEGIN or at != end:
                raise ValueError
            found.append(Example(parts[0], parts[1:], right))
    except (ValueError, IndexError):
        raise UserError(f"{path}: example {len(found)} is damaged; export it again with export-eval") from None
    files.check_length(path, length, files.HEADER_BYTES + 2 * at, f"{len(found)} examples")
    return found
