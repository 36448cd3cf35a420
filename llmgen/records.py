"""Files with many documents: JSON lines and Parquet tables, a document in each row's text field.

- `.jsonl` and `.ndjson`, with `.gz` behind or not: an object a line. `.parquet`: a table; needs pyarrow (`llmgen[data]`).
- Rows stream through: no more than one row group, or one line, is held at a time.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator

from llmgen.errors import UserError

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
PARQUET = (".parquet",)


def has_records(path: str) -> bool:
    return path.lower().endswith((*JSON_LINES, *PARQUET))


def texts(path: str, field: str, errors: str, done: Callable[[int], None]) -> Iterator[str]:
    """The text of each row. done: called with the bytes of the file that have been read since.

    errors: strict refuses what is not Unicode, replace lets it pass. Raises UserError with the row that is wrong.
    """
    rows = _parquet if path.lower().endswith(PARQUET) else _json_lines
    for number, text in enumerate(rows(path, field, errors, done), 1):
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can say
            if errors == "strict":
                where = f"row {number} of its '{field}'"
                raise UserError(f"{path}: {where} is not valid Unicode; use --errors replace to let it pass") from None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text


def _json_lines(path: str, field: str, errors: str, done: Callable[[int], None]) -> Iterator[str]:
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.lower().endswith(".gz") else raw as file:
            before = 0
            for number, line in enumerate(file, 1):
                done(raw.tell() - before)
                before = raw.tell()
                if not line.strip():
                    continue
                where = f"{path}: line {number}"
                try:
                    row = json.loads(line.decode("utf-8", errors))
                except UnicodeDecodeError as error:
                    raise UserError(f"{where} is not UTF-8 ({error.reason}); use --errors replace to let it pass") from None
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{where} is not JSON: {getattr(error, 'msg', error)}; a line must be one object") from None
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise UserError(f"{where} has no text in '{field}'{_fields(row)}")
                yield row[field]
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _fields(row) -> str:
    names = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
    return f"; --text-field {' or '.join(names[:4])} would work" if names else "; a line must be an object with one"


def _parquet(path: str, field: str, errors: str, done: Callable[[int], None]) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs the library pyarrow: pip install 'llmgen[data]'") from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise UserError(f"{path}: has no column '{field}'; --text-field {' or '.join(names[:4])} would work")
        kind = file.schema_arrow.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(f"{path}: column '{field}' holds {kind}, not text; choose another with --text-field")
        size, groups = os.path.getsize(path), file.metadata.num_row_groups
        for group in range(groups):
            for batch in file.iter_batches(1024, [group], [field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
            done(size * (group + 1) // groups - size * group // groups)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from None
