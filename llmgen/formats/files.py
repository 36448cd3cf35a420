"""What all binary files share: the header of 256 int32, and writing that never leaves half a file.

- Header: 256 little-endian int32 (1,024 bytes). [0] is the magic number, [1] the version, unused entries are 0.
- A regular file is written as `.NAME.tmp` beside it, synced, then renamed; a failure removes the temporary.
- A target that exists and is not a regular file (a device, a FIFO) is written in place.
- Every failure is one UserError that names the file and the reason.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llmgen.errors import UserError

HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
MAGIC = {  # what a file is -> its first int32
    "weights": 20240326,
    "debug state": 20240327,
    "tokenizer": 20240328,
    "uint16 tokens": 20240520,
    "evaluation": 20240522,
    "optimizer state": 20240527,
    "uint32 tokens": 20240801,
    "Llama weights": 20240803,
    "described weights": 20261101,
}

_HINTS = {
    errno.ENOSPC: "; free some space or write elsewhere",
    errno.EDQUOT: "; free some space or write elsewhere",
    errno.EFBIG: "; raise the limit on file sizes (ulimit -f) or write elsewhere",
    errno.ENOENT: "; make its folder first",
    errno.ENOTDIR: "; a file stands where a folder is needed",
    errno.EACCES: "; choose a place you may write to",
    errno.EROFS: "; choose a place you may write to",
    errno.EISDIR: "; name a file, not a folder",
}


def header(*fields: int) -> bytes:
    """The 1,024 bytes of a header that begins with these int32."""
    ints = np.zeros(HEADER_INTS, "<i4")
    ints[: len(fields)] = fields
    return ints.tobytes()


def read_header(path: str | os.PathLike, *kinds: str) -> tuple[np.ndarray, int]:
    """The header of a file of one of these kinds (keys of MAGIC), and the file's length in bytes.

    Raises UserError if the file cannot be read, is shorter than a header or begins with another magic number.
    """
    with reading(path) as file:
        length = os.fstat(file.fileno()).st_size
        raw = file.read(HEADER_BYTES)
    expected = " or ".join(f"{MAGIC[kind]} ({kind})" for kind in kinds)
    if len(raw) < 4:
        raise UserError(f"{path}: is {length} bytes, too short to hold {kinds[0]}; write the file again")
    ints = np.frombuffer(raw[: len(raw) // 4 * 4], "<i4")
    if ints[0] not in [MAGIC[kind] for kind in kinds]:
        other = next((kind for kind, magic in MAGIC.items() if magic == ints[0]), None)
        found = f"{ints[0]} ({other})" if other else f"{ints[0]}"
        raise UserError(f"{path}: magic number {found}, expected {expected}; name a file of the right kind")
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{path}: is {length} bytes, shorter than its {HEADER_BYTES}-byte header; write the file again")
    return ints, length


def check_length(path: str | os.PathLike, length: int, expected: int, why: str) -> None:
    """Raises UserError unless the file is as long as its header says."""
    if length != expected:
        verdict = "it is cut short" if length < expected else "it holds more than it should"
        raise UserError(f"{path}: is {length} bytes, expected {expected} ({why}); {verdict}, write the file again")


@contextmanager
def reading(path: str | os.PathLike) -> Iterator:
    """Opens a regular file for reading, unbuffered. Raises UserError if it cannot be opened or read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            what = "a folder" if os.path.isdir(path) else "not a regular file"
            raise UserError(f"{path}: is {what}; name a file")
        with open(path, "rb", buffering=0) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_values(path: str | os.PathLike, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """`count` values from byte `offset` on, in fresh memory (a map would keep what was read resident)."""
    values = np.empty(count, dtype)
    with reading(path) as file:
        file.seek(offset)
        rest = memoryview(values).cast("B")
        while rest.nbytes:
            got = file.readinto(rest)
            if not got:
                raise UserError(f"{path}: ends {rest.nbytes} bytes early; write the file again")
            rest = rest[got:]
    return values


class Output:
    """One file on its way to `path`. `write` appends; nothing is at `path` before `commit`, unless it is a device."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.temporary: str | None = None
        self._file = None
        with self._reported():
            target = os.fspath(path)
            try:
                regular = stat.S_ISREG(os.stat(target).st_mode)
            except FileNotFoundError:
                regular = True
            if os.path.isdir(target):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if regular:
                self._target = os.path.realpath(target)  # a link stays, what it points to is replaced
                folder, name = os.path.split(self._target)
                temporary = os.path.join(folder, f".{name}.tmp")
                if os.path.lexists(temporary):
                    os.unlink(temporary)
                self._file = open(temporary, "xb", buffering=0)  # noqa: SIM115
                self.temporary = temporary
            else:
                self._file = open(target, "wb", buffering=0)  # noqa: SIM115

    def write(self, data) -> None:
        """Appends bytes or a contiguous array."""
        with self._reported():
            rest = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
            while rest.nbytes:
                rest = rest[self._file.write(rest) :]

    def finish(self) -> None:
        """Syncs and closes; nothing more can be written."""
        if self._file is None:
            return
        with self._reported():
            file, self._file = self._file, None
            with file:
                if self.temporary:
                    os.fsync(file.fileno())

    def amend(self, data: bytes, length: int) -> None:
        """After `finish`: cuts the file to `length` bytes and replaces the first ones. Regular files only."""
        if not self.temporary:
            raise UserError(f"{self.path}: is not a regular file; remove it or write elsewhere")
        with self._reported(), open(self.temporary, "r+b", buffering=0) as file:
            file.truncate(length)
            file.write(data)
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Puts the file in its place."""
        self.finish()
        if self.temporary:
            with self._reported():
                os.replace(self.temporary, self._target)
                self.temporary = None

    def discard(self) -> None:
        """Removes what was written, if it is not in its place yet."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.temporary:
            os.unlink(self.temporary)
            self.temporary = None

    @contextmanager
    def _reported(self):
        try:
            yield
        except OSError as error:
            hint = _HINTS.get(error.errno, "")
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}{hint}") from None


@contextmanager
def replacing_all() -> Iterator[Callable[[str | os.PathLike], Output]]:
    """Several files that appear together: yields a function that opens one; all are committed at the end, or none."""
    outputs: list[Output] = []

    def open_output(path):
        outputs.append(Output(path))
        return outputs[-1]

    try:
        yield open_output
        for output in outputs:
            output.finish()
        for output in outputs:
            output.commit()
    finally:
        for output in outputs:
            output.discard()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Output]:
    """One file, complete at the end of the block or not there at all."""
    with replacing_all() as open_output:
        yield open_output(path)


@contextmanager
def folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder made with its parents; if the block fails, those that were made and are empty are removed."""
    path = Path(path)
    made = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file stands where a folder is needed" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"{path}: the folder cannot be made: {reason}; choose another place") from None
    try:
        yield path
    except BaseException:
        for p in made:
            try:
                p.rmdir()
            except OSError:
                break
        raise
