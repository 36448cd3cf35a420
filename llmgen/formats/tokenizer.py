"""Tokenizer tables, which turn ids back into bytes, in llm.c's layout (version 2 written, 1 and 2 read).

- Header (256 int32): [0] magic 20240328, [1] version, [2] vocab_size, [3] the end-of-text id (version 1 has none: it is
  50256 of GPT-2's 50257).
- Then for each id one byte of length (1 to 255) and that many bytes, to the end of the file.
"""

import os
from collections.abc import Sequence

from llmgen.errors import UserError
from llmgen.formats import files

MAGIC = files.MAGIC["tokenizer"]
VERSION = 2
MAX_BYTES = 255  # of one token
VERSION_1 = (50257, 50256)  # vocab_size and end-of-text that version 1 implies


def read(path: str | os.PathLike) -> tuple[list[bytes], int]:
    """The bytes of each id, and the end-of-text id. Raises UserError."""
    ints, length = files.read_header(path, "tokenizer")
    version, count, end_of_text = (int(value) for value in ints[1:4])
    if version not in (1, 2):
        raise UserError(f"{path}: tokenizer version {version}, expected 1 or 2; export it again with export-tokens")
    if version == 1:
        end_of_text = VERSION_1[1]
        if count != VERSION_1[0]:
            raise UserError(f"{path}: version 1 holds {VERSION_1[0]} tokens, not {count}; export it again with export-tokens")
    if not 0 <= end_of_text < count:
        raise UserError(f"{path}: header says {count} tokens and end-of-text {end_of_text}; export it again with export-tokens")
    with files.reading(path) as file:
        data = file.read()[files.HEADER_BYTES :]
    table, at = [], 0
    for token in range(count):
        size = data[at] if at < len(data) else 0
        if size == 0 or at + 1 + size > len(data):
            why = "has no bytes" if at < len(data) and size == 0 else f"is past the end of the file ({length} bytes)"
            raise UserError(f"{path}: token {token} of {count} {why}; export it again with export-tokens")
        table.append(data[at + 1 : at + 1 + size])
        at += 1 + size
    files.check_length(path, length, files.HEADER_BYTES + at, f"{count} tokens")
    return table, end_of_text


def write(path: str | os.PathLike, table: Sequence[bytes], end_of_text: int) -> None:
    """Writes version 2. Raises UserError if the file cannot be written, ValueError for a token that does not fit."""
    with files.replacing(path) as output:
        output.write(encode(table, end_of_text))


def encode(table: Sequence[bytes], end_of_text: int) -> bytes:
    """The whole file's bytes."""
    for token, text in enumerate(table):
        if not 1 <= len(text) <= MAX_BYTES:
            raise ValueError(f"token {token} has {len(text)} bytes; 1 to {MAX_BYTES} fit")
    body = b"".join(bytes([len(text)]) + text for text in table)
    return files.header(MAGIC, VERSION, len(table), end_of_text) + body
