"""The encoder in C against tiktoken: the same ids, whatever the text."""

import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from llmgen import characters, data, generation, render, tokenization
from llmgen import config as configs
from llmgen.formats import tokenizer

WHITE = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u3000\u200b\ufeff\u180e\x1c"
ENDINGS = ("'s", "'t", "'ll", "'LL", "'", "''re", " '", "'ve", "'d'm", "’s")


def stretches(pattern: str) -> tuple[int, ...]:
    """As `llmgen.characters` has them, by asking tiktoken for each character whether it matches."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    asked = tiktoken.Encoding("asked", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    lengths, begin, inside = [], 0, False
    for number in range(0x110000):
        surrogate = 0xD800 <= number < 0xE000
        if (not surrogate and bool(asked.encode_ordinary(chr(number)))) != inside:
            lengths.append(number - begin)
            begin, inside = number, not inside
    return tuple(lengths)


@pytest.mark.parametrize(("name", "pattern"), [("LETTERS", r"\p{L}"), ("NUMBERS", r"\p{N}"), ("SPACES", r"\s")])
def test_the_classes_of_characters_are_those_of_tiktoken(name, pattern):
    assert getattr(characters, name) == stretches(pattern)
    assert max(getattr(characters, name)) < 1 << 16  # they are uint16 in the C


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The tokenizer, and the program's encoder as a function from bytes to ids."""
    folder = tmp_path_factory.mktemp("encoder")
    known = tokenization.gpt2_tokenizer()
    tokenizer.write(folder / "tokenizer.bin", known.table, known.end_of_text)
    plan = generation.make(configs.load("gpt2-124m"), "c", "native")
    (folder / "generate.c").write_text(render.generation(plan))
    command = ["gcc", "-O1", *plan.profile.flags, "generate.c", "-lm", "-o", "generate"]
    subprocess.run(command, cwd=folder, check=True)

    def encode(text: bytes, table: str = "tokenizer.bin") -> subprocess.CompletedProcess:
        (folder / "text.txt").write_bytes(text)
        command = [folder / "generate", "--tokenizer", table, "--encode", "text.txt"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    return known, encode, folder


def ids(encoded: subprocess.CompletedProcess) -> np.ndarray:
    assert encoded.returncode == 0 and encoded.stderr == "", encoded.stderr
    return np.array(encoded.stdout.split(), np.int64)


def check(encoder, text: str) -> None:
    known, encode, _ = encoder
    assert np.array_equal(ids(encode(text.encode())), known.encode(text)), repr(text[:200])


def test_the_sources_of_the_standard_library(encoder):
    text = "".join(Path(document.path).read_bytes().decode(errors="replace") for document in data.corpus_documents())
    assert len(text) > 5_000_000
    check(encoder, text)


def random_text(rng: random.Random, length: int) -> str:
    """Characters of all planes, much white space, contractions, words."""

    def some() -> str:
        kind = rng.random()
        if kind < 0.25:
            number = rng.randrange(0x110000)
            return chr(number) if not 0xD800 <= number < 0xE000 else "x"
        if kind < 0.5:
            return rng.choice(WHITE)
        if kind < 0.6:
            return rng.choice(ENDINGS)
        return chr(rng.randrange(0x20, 0x7F) if kind < 0.8 else rng.randrange(0x80, 0x3000))

    return "".join(some() for _ in range(length))


def test_random_unicode(encoder):
    rng = random.Random(1)
    for _ in range(10):
        check(encoder, random_text(rng, 20_000))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  ",
        "\n",
        "a ",
        "a  ",
        "  a",
        "'",
        "''s",
        " 's",
        "x's 'S",
        "\0\0",
        "<|endoftext|>",
        "  \n\n  x",
        "\n x",
        "\t\tx",
    ]
    + ["1 2  3", "x\u3000 y", "é" * 1000, "a" * 50_000, " " * 50_000 + "x", "!" * 3000, "ab" * 20_000, "\r\n" * 9],
    ids=lambda text: repr(text[:12]),
)
def test_awkward_texts(encoder, text):
    check(encoder, text)


@pytest.mark.parametrize("bad", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80", b"\xf4\x90\x80\x80"])
def test_what_is_not_utf8_is_refused_with_its_place(encoder, bad):
    _, encode, _ = encoder
    refused = encode(b"fine" + bad)
    place = 5 if bad.startswith(b"a") else 4
    assert refused.returncode == 1 and refused.stderr == f"generate_gpt2: byte {place} of the text is not UTF-8; convert it\n"


def test_a_byte_without_a_token_is_refused(encoder):
    _, encode, folder = encoder
    tokenizer.write(folder / "letters.bin", [bytes([b]) for b in range(97, 123)] + [b"ab", b"<end>"], 27)
    assert ids(encode(b"abab", "letters.bin")).tolist() == [26, 26]
    refused = encode(b"abA", "letters.bin")
    assert refused.returncode == 1 and "byte 65 of the text: the tokenizer has no token for it" in refused.stderr
