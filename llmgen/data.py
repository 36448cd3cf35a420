"""Text to token shards, and the built-in corpus.

- A document is a file, or a row of a JSON lines or Parquet file; end-of-text stands before each. Files come in byte order
  of their paths.
- Validation: whole documents, chosen by a hash of their path below the source (of a row `#` and its number behind, but never
  the first row of a file); of a single document, its last tokens.
- Text streams through in pieces, cut only where the tokenizer has a boundary whatever stands on either side, so the ids
  equal those of encoding the whole document (see `llmgen.tokenization`). Memory does not grow with the input.
- The same sources give the same bytes. All files of an export appear together, or none does.
"""

import codecs
import hashlib
import os
import re
import shutil
import stat
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmgen import records
from llmgen.errors import UserError
from llmgen.formats import files, tokens
from llmgen.formats import tokenizer as tokenizer_table
from llmgen.tokenization import Tokenizer, load_tokenizer

BLOCK = 1 << 20  # bytes read at a time; also about the length of a piece
MAX_UNCUT = 1 << 24  # characters held while waiting for a place to cut
MAX_SHARDS = 10**6  # what six digits count

Progress = Callable[[int, int], None]  # bytes done, bytes in all (0 if unknown)


@dataclass(frozen=True)
class Document:
    path: str
    name: str  # path below its source, with slashes: the same wherever the source lies; #12 behind it for its row 12
    bytes: int  # 0 if unknown (a pipe)
    row: int = 0  # of a file with many documents, counted from 1


@dataclass(frozen=True)
class Export:
    documents: int
    train_tokens: int
    val_tokens: int
    train_files: list[Path]
    val_files: list[Path]
    tokenizer_file: Path
    vocab_size: int
    end_of_text: int
    removed: int  # shards of an earlier export that this one does not have

    def summary(self) -> str:
        """What was written, a line for each split."""
        lines = [f"{self.documents} document{'s' * (self.documents != 1)}, vocab_size {self.vocab_size}"]
        for split, count, paths in (
            ("train", self.train_tokens, self.train_files),
            ("val", self.val_tokens, self.val_files),
        ):
            named = f": {paths[0]}{' ...' if len(paths) > 1 else ''}" if paths else ""
            lines.append(f"{split}: {count} tokens in {len(paths)} file{'s' * (len(paths) != 1)}{named}")
        lines.append(f"tokenizer: {self.tokenizer_file}")
        if self.removed:
            lines.append(f"removed {self.removed} file{'s' * (self.removed != 1)} of an earlier export")
        return "\n".join(lines)


def export_tokens(
    sources: Iterable[str],
    tokenizer: str = "gpt2",
    out: str | os.PathLike = "tokens",
    val_fraction: float = 0.05,
    shard_size: int = 100_000_000,
    errors: str = "strict",
    progress: Progress | None = None,
    text_field: str = "text",
) -> Export:
    """Encodes text files and folders into `out`/train_%06d.bin, val_%06d.bin and tokenizer.bin.

    tokenizer: gpt2, bytes, a folder with a tokenizer.json, or such a file. val_fraction: in [0, 1). shard_size: tokens
    in a file. errors: strict refuses bytes that are not UTF-8, replace lets them pass as U+FFFD. text_field: where the text
    of a row of JSON lines or Parquet stands. Shards of an earlier export that are not written again are removed from `out`.
    Raises UserError.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} must be at least 0 and below 1")
    if not 1 <= shard_size <= tokens.MAX_TOKENS:
        raise UserError(f"--shard-size {shard_size} must be from 1 to {tokens.MAX_TOKENS}, the most a token file can count")
    if errors not in ("strict", "replace"):
        raise UserError(f"--errors {errors} is not known; use strict or replace")
    documents = find_documents(sources, out)
    chosen = load_tokenizer(tokenizer)
    return export_documents(documents, chosen, out, val_fraction, shard_size, errors, progress, text_field)


def export_documents(
    documents: list[Document],
    chosen: Tokenizer,
    out: str | os.PathLike,
    val_fraction: float = 0.05,
    shard_size: int = 100_000_000,
    errors: str = "strict",
    progress: Progress | None = None,
    text_field: str = "text",
) -> Export:
    """`export_tokens` of these documents, in this order. Raises UserError."""
    with files.folder(out) as folder, files.replacing_all() as open_output:
        table = open_output(folder / "tokenizer.bin")
        table.write(table_bytes(chosen))
        dtype = tokens.token_dtype(chosen.vocab_size)
        train = _Shards(open_output, folder, "train", shard_size, dtype)
        val = _Shards(open_output, folder, "val", shard_size, dtype)
        whole = [document for document in documents if not records.has_records(document.path)]
        held = zip(whole, choose_validation([document.name for document in whole], val_fraction), strict=True)
        in_val = {document.path for document, is_held in held if is_held}
        count, end_of_text = 0, np.array([chosen.end_of_text])
        for document, ids in _encoded(_texts(documents, text_field, errors, progress), chosen):
            count += ids is None
            is_held = document.path in in_val or (document.row > 1 and _place(document.name) < val_fraction * 2**64)
            (val if is_held else train).write(end_of_text if ids is None else ids)
        train.close()
        if val.total == 0:
            train.move_tail(int(train.total * val_fraction), val)
        val.close()
    removed = _remove_stale(folder, {*train.paths, *val.paths})
    return Export(
        documents=count,
        train_tokens=train.total,
        val_tokens=val.total,
        train_files=train.paths,
        val_files=val.paths,
        tokenizer_file=folder / "tokenizer.bin",
        vocab_size=chosen.vocab_size,
        end_of_text=chosen.end_of_text,
        removed=removed,
    )


def table_bytes(chosen: Tokenizer) -> bytes:
    """The tokenizer table's file. Tokens too long for the format are cut: the table only prints samples."""
    return tokenizer_table.encode([text[: tokenizer_table.MAX_BYTES] for text in chosen.table], chosen.end_of_text)


def find_documents(sources: Iterable[str], out: str | os.PathLike | None = None) -> list[Document]:
    """Every file of the sources, folders walked to the bottom (but `out`), in byte order of their paths.

    Raises UserError for a source that does not exist, and if there is no file at all.
    """
    sources = [os.fspath(source) for source in sources]
    found: dict[str, Document] = {}  # by absolute path: a file named twice is one document
    out = os.path.realpath(out) if out is not None else None

    def add(path: str, name: str, status: os.stat_result) -> None:
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        found.setdefault(os.path.abspath(path), Document(path, name.replace(os.sep, "/"), size))

    def failed(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    for source in sources:
        try:
            status = os.stat(source)
        except FileNotFoundError:
            raise UserError(f"{source}: no such file or folder") from None
        except OSError as error:
            failed(error)
        if not stat.S_ISDIR(status.st_mode):
            add(source, os.path.basename(source), status)
            continue
        for folder, subfolders, names in os.walk(source, onerror=failed):
            subfolders[:] = [name for name in subfolders if os.path.realpath(os.path.join(folder, name)) != out]
            for name in names:
                path = os.path.join(folder, name)
                try:
                    status = os.stat(path)
                except OSError as error:
                    failed(error)
                if stat.S_ISREG(status.st_mode):
                    add(path, os.path.relpath(path, source), status)
    if not found:
        raise UserError(f"{', '.join(sources) or 'no source'}: no files there; name text files or folders with some")
    return sorted(found.values(), key=lambda document: os.fsencode(document.path))


def choose_validation(names: list[str], fraction: float) -> list[bool]:
    """Which documents are held out: those whose name's hash falls below the fraction.

    With several documents and a fraction above 0, at least one is held out and at least one is not; a single one is not
    (its last tokens are).
    """
    if fraction == 0 or len(names) < 2:
        return [False] * len(names)
    hashes = [_place(name) for name in names]
    chosen = [value < fraction * 2**64 for value in hashes]
    if not any(chosen):
        chosen[hashes.index(min(hashes))] = True
    if all(chosen):
        chosen[hashes.index(max(hashes))] = False
    return chosen


def _place(name: str) -> int:
    """Where a document's name falls from 0 to 2^64 - 1, evenly."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")


def read_text(document: Document, errors: str, done: Callable[[int], None]) -> Iterator[str]:
    """A file's text in blocks, decoded as UTF-8. Raises UserError with the byte offset of what is not UTF-8."""
    try:
        with open(document.path, "rb", buffering=0) as file:
            offset, rest = 0, b""  # offset: of rest, the first bytes of a character whose others are still to come
            while True:
                block = file.read(BLOCK)
                data = rest + block
                try:
                    text, used = codecs.utf_8_decode(data, errors, not block)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{document.path}: byte {offset + error.start} is not UTF-8 ({error.reason}); "
                        "use --errors replace to let it pass"
                    ) from None
                offset, rest = offset + used, data[used:]
                done(len(block))
                if text:
                    yield text
                if not block:
                    return
    except OSError as error:
        raise UserError(f"{document.path}: cannot be read: {error.strerror or error}") from None


def pieces(blocks: Iterable[str], cut: re.Pattern | None, path: str) -> Iterator[str]:
    """The text of the blocks in pieces that end where `cut` matches (nowhere if None), at most MAX_UNCUT characters
    each. Raises UserError if a longer one cannot be cut."""
    held = ""
    for block in blocks:
        searched = max(len(held) - 2, 0)  # a cut is seen with the two characters behind it
        held += block
        if cut is not None and (found := cut.match(held, searched)) and found.end():
            yield held[: found.end()]
            held = held[found.end() :]
        if len(held) > MAX_UNCUT:
            raise UserError(
                f"{path}: more than {MAX_UNCUT} characters with no place where this tokenizer's text can be cut; "
                "split the file, or use --tokenizer bytes"
            )
    if held:
        yield held


def _texts(
    documents: list[Document], text_field: str, errors: str, progress: Progress | None
) -> Iterator[tuple[Document, Iterable[str]]]:
    """Each document, rows one by one, with its text in blocks."""
    total, done = sum(document.bytes for document in documents), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for document in documents:
        if not records.has_records(document.path):
            yield document, read_text(document, errors, advance)
            continue
        for row, text in enumerate(records.texts(document.path, text_field, errors, advance), 1):
            yield Document(document.path, f"{document.name}#{row}", 0, row), [text]


def _encoded(
    texts: Iterable[tuple[Document, Iterable[str]]], chosen: Tokenizer
) -> Iterator[tuple[Document, np.ndarray | None]]:
    """Each document's ids in order, behind a None for its beginning; pieces are encoded by several threads, a few ahead."""
    workers = min(os.cpu_count() or 1, 16)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Document, Future | None]] = deque()
        try:
            for document, blocks in texts:
                waiting.append((document, None))
                for text in pieces(blocks, chosen.cut, document.path):
                    waiting.append((document, pool.submit(chosen.encode, text)))
                    while len(waiting) > 2 * workers:
                        yield _finished(waiting)
            while waiting:
                yield _finished(waiting)
        finally:
            for _, result in waiting:
                if isinstance(result, Future):
                    result.cancel()


def _finished(waiting: deque) -> tuple[Document, np.ndarray | None]:
    document, result = waiting.popleft()
    return document, result.result() if isinstance(result, Future) else result


class _Shards:
    """The shards of one split, filled one after the other."""

    def __init__(self, open_output, folder: Path, split: str, shard_size: int, dtype: np.dtype):
        self.open_output, self.folder, self.split = open_output, folder, split
        self.shard_size, self.dtype = shard_size, dtype
        self.outputs: list[files.Output] = []
        self.total = 0

    @property
    def paths(self) -> list[Path]:
        return [output.path for output in self.outputs]

    def write(self, ids: np.ndarray) -> None:
        ids = ids.astype(self.dtype)
        while ids.size:
            used = self.total % self.shard_size
            if used == 0:
                self._next()
            part = ids[: self.shard_size - used]
            self.outputs[-1].write(part)
            self.total += part.size
            ids = ids[part.size :]

    def close(self) -> None:
        """Ends the last shard, whose header was written as if it were full."""
        if self.outputs:
            self.outputs[-1].finish()
            self._cut(self.total)

    def move_tail(self, count: int, other: "_Shards") -> None:
        """Moves the last tokens of a closed split to another one, in blocks."""
        at, end = self.total - count, self.total
        while at < end:
            shard, start = divmod(at, self.shard_size)
            part = min(BLOCK, self.shard_size - start, end - at)
            offset = files.HEADER_BYTES + start * self.dtype.itemsize
            other.write(files.read_values(self.outputs[shard].temporary, self.dtype, offset, part))
            at += part
        self._cut(end - count)

    def _next(self) -> None:
        if self.outputs:
            self.outputs[-1].finish()
        if len(self.outputs) == MAX_SHARDS:
            raise UserError(f"--shard-size {self.shard_size} gives more than {MAX_SHARDS} files; raise it")
        self.outputs.append(self.open_output(self.folder / f"{self.split}_{len(self.outputs):06d}.bin"))
        self.outputs[-1].write(tokens.header(self.shard_size, self.dtype))

    def _cut(self, total: int) -> None:
        """Keeps the first `total` tokens."""
        keep = -(-total // self.shard_size)
        for output in self.outputs[keep:]:
            output.discard()
        del self.outputs[keep:]
        self.total = total
        if total % self.shard_size:
            count = total % self.shard_size
            header = tokens.header(count, self.dtype)
            self.outputs[-1].amend(header, files.HEADER_BYTES + count * self.dtype.itemsize)


def _remove_stale(folder: Path, written: set[Path]) -> int:
    """Removes shards of an earlier export, which a trainer's pattern would mix with this one's."""
    stale = [path for path in folder.iterdir() if re.fullmatch(r"(train|val)_\d{6}\.bin", path.name)]
    stale = [path for path in stale if path not in written]
    for path in stale:
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"{path}: an earlier export's shard cannot be removed: {error.strerror}") from None
    return len(stale)


@contextmanager
def terminal_progress(label: str) -> Iterator[Progress | None]:
    """A progress bar on stderr for `export_tokens`, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    start, shown = time.monotonic(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < 0.1:
            return
        shown = now
        rate = done / max(now - start, 1e-9) / 1e6
        part = f"{'#' * (30 * done // total):<30} {100 * done // total:3d}%" if total else f"{done / 1e6:.0f} MB"
        left = f", {(total - done) / 1e6 / rate:.0f} s left" if total and rate else ""
        sys.stderr.write(f"\r{label} {part} {rate:.1f} MB/s{left}\x1b[K")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def corpus_documents() -> list[Document]:
    """The running Python's standard library sources, sorted, without tests and site packages."""
    root = sysconfig.get_paths()["stdlib"]
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    documents = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skipped)
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path):
                documents.append(Document(path, os.path.relpath(path, root).replace(os.sep, "/"), os.path.getsize(path)))
    if not documents:
        raise UserError(f"{root}: no sources of the standard library there; name your own text with --train-data")
    return sorted(documents, key=lambda document: os.fsencode(document.name))


def builtin_corpus(
    cache_dir: str | os.PathLike | None = None, tokenizer: str = "bytes", progress: Progress | None = None
) -> Path:
    """A folder with the token shards of the built-in corpus, exported once and kept.

    cache_dir: where, `$XDG_CACHE_HOME/llmgen` if None. tokenizer: gpt2 or bytes. The folder's name holds Python's
    version, and a hash of the tokenizer's name and all the text, so that another Python or a patched library gets its
    own. Raises UserError.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    documents = corpus_documents()
    content = hashlib.sha256(f"1\n{tokenizer}\n".encode())  # 1: of the way the corpus is made
    try:
        for document in documents:
            data = Path(document.path).read_bytes()
            content.update(os.fsencode(document.name) + b"\n%d\n" % len(data) + data)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    version = ".".join(map(str, sys.version_info[:3]))
    folder = cache / f"python-{version}-{tokenizer}-{content.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    with files.folder(cache):
        try:
            building = tempfile.mkdtemp(prefix=".building-", dir=cache)
        except OSError as error:
            raise UserError(f"{cache}: cannot be written: {error.strerror}; set XDG_CACHE_HOME elsewhere") from None
        try:
            done = Path(building, "done")
            export_documents(documents, load_tokenizer(tokenizer), done, errors="replace", progress=progress)
            try:
                os.rename(done, folder)
            except OSError as error:
                if not folder.is_dir():  # else another process was first
                    raise UserError(f"{folder}: cannot be written: {error.strerror}; set XDG_CACHE_HOME elsewhere") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/llmgen`, where reusable things are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base and os.path.isabs(base) else Path.home() / ".cache") / "llmgen"
