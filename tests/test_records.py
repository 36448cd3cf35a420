"""JSON lines and Parquet to token shards: a row is a document, what is wrong is one line with its place."""

import gzip
import json
from pathlib import Path

import pytest
from command import fails, succeeds

from llmgen import data
from llmgen.errors import UserError
from llmgen.formats import tokens

END = 256
ROWS = ["hello", "", "Grüße, 世界", "line one\nline two", "x" * 3000] + [f"row {i}" for i in range(200)]


def ids(paths) -> list[int]:
    return [int(i) for path in paths for i in tokens.read(path)]


def encoded(rows) -> list[int]:
    return [i for row in rows for i in (END, *row.encode())]


def json_lines(path: Path, rows=ROWS, field="text") -> Path:
    text = "".join(json.dumps({"id": i, field: row}, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def parquet(path: Path, rows=ROWS, **options) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(rows))), "text": rows}), path, row_group_size=70, **options)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "A.JSONL", "a.parquet"])
def test_each_row_is_a_document_with_end_of_text_before_it(tmp_path, name):
    source = (parquet if name.endswith("parquet") else json_lines)(tmp_path / name)
    made = data.export_tokens([source], "bytes", tmp_path / "out", val_fraction=0)
    assert ids(made.train_files) == encoded(ROWS) and made.documents == len(ROWS)
    seen = []
    data.export_tokens([source], "bytes", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (source.stat().st_size, source.stat().st_size)


@pytest.mark.parametrize("make", [json_lines, parquet])
def test_whole_rows_are_held_out_the_same_ones_wherever_the_file_lies(tmp_path, make):
    suffix = {"json_lines": "jsonl", "parquet": "parquet"}[make.__name__]
    found = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        make(tmp_path / folder / f"a.{suffix}")
        made = data.export_tokens([tmp_path / folder], "bytes", tmp_path / "out", val_fraction=0.2)
        found.append((ids(made.train_files), ids(made.val_files)))
    train, val = found[0]
    assert found[0] == found[1] and len(train) + len(val) == len(encoded(ROWS))
    held = bytes(i if i < 256 else 0 for i in val).split(b"\0")[1:]
    assert 20 < len(held) < 60 and set(held) <= {row.encode() for row in ROWS}
    one = data.export_tokens([make(tmp_path / f"one.{suffix}", ["only one row of text"])], "bytes", tmp_path / "out2", 0.25)
    assert (one.train_tokens, one.val_tokens) == (16, 5), "of one document its last tokens"


def test_rows_and_plain_files_are_exported_together(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    json_lines(source / "b.jsonl", ["one", "two"])
    (source / "a.txt").write_text("first")
    (source / "c.txt").write_text("last")
    made = data.export_tokens([source], "bytes", tmp_path / "out", val_fraction=0)
    assert ids(made.train_files) == encoded(["first", "one", "two", "last"]) and made.documents == 4


def test_the_command_takes_the_name_of_the_field(tmp_path):
    json_lines(tmp_path / "a.jsonl", ["good"], field="content")
    command = ["export-tokens", "a.jsonl", "--tokenizer", "bytes", "--out", "out", "--val-fraction", "0"]
    message = fails(1, *command, cwd=tmp_path)
    assert "a.jsonl: line 1 has no text in 'text'" in message and "--text-field content would work" in message
    assert succeeds(*command, "--text-field", "content", cwd=tmp_path)[0].startswith("1 document,")
    assert ids([tmp_path / "out" / "train_000000.bin"]) == encoded(["good"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        (b'{"text": "a"}\n["b"]\n', ["line 2", "no text in 'text'", "object"]),
        (b'{"text": 5, "body": "x"}\n', ["line 1", "--text-field body"]),
        (b'{"text": "\xff"}\n', ["line 1", "not UTF-8", "--errors replace"]),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', ["row 2", "not valid Unicode", "--errors replace"]),
        (b"[" * 100_000, ["line 1", "not JSON"]),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        data.export_tokens([tmp_path / "a.jsonl"], "bytes", tmp_path / "out")
    for word in ("a.jsonl", *words):
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_not_unicode_passes_on_demand(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xff"}\n\n{"text": "\\ud800b"}\n')
    made = data.export_tokens([tmp_path / "a.jsonl"], "bytes", tmp_path / "out", 0, errors="replace")
    assert ids(made.train_files) == encoded(["a�", "�b"])


def test_a_parquet_file_that_is_wrong_is_named(tmp_path):
    good = parquet(tmp_path / "good.parquet")
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-100])
    for source, field, words in (
        ("cut.parquet", "text", "cannot be read as Parquet"),
        ("good.parquet", "body", "has no column 'body'; --text-field id or text would work"),
        ("good.parquet", "id", "column 'id' holds int64, not text"),
    ):
        with pytest.raises(UserError, match=words):
            data.export_tokens([tmp_path / source], "bytes", tmp_path / "out", text_field=field)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match=r"cut.jsonl.gz: cannot be read"):
        data.export_tokens([tmp_path / "cut.jsonl.gz"], "bytes", tmp_path / "out")


def test_parquet_without_its_library_says_what_to_install(tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ImportError")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    command = ["export-tokens", "a.parquet", "--tokenizer", "bytes", "--out", "out"]
    root = str(Path(data.__file__).parent.parent)
    assert "pip install 'llmgen[data]'" in fails(1, *command, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{root}"})
