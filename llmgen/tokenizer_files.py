"""A tokenizer as the files that `transformers` loads: copied from a folder, or written for gpt2 and bytes."""

import itertools
import json
from pathlib import Path

from llmgen import tokenization
from llmgen.config import BYTE_VOCABULARY, GPT2_VOCABULARY, ModelConfig
from llmgen.errors import UserError
from llmgen.formats import files
from llmgen.tokenization import END_OF_TEXT, Tokenizer

# What a folder's tokenizer consists of; a model's own files are not among them.
NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
NAMES += ("vocab.json", "merges.txt", "tokenizer.model")


def known(model: ModelConfig) -> str | None:
    """The tokenizer that a vocabulary of this size belongs to, if it is on this machine."""
    if model.vocab_size == BYTE_VOCABULARY:
        return "bytes"
    if model.vocab_size == GPT2_VOCABULARY and tokenization.packaged_ranks() is not None:
        return "gpt2"
    return None


def of(name: str, model: ModelConfig) -> tuple[dict[str, bytes], int]:
    """File name -> content, and the end-of-text id. name: as `--tokenizer` has it. Raises UserError."""
    tokenizer = tokenization.load_tokenizer(name)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{name}: has {tokenizer.vocab_size} tokens, but the model only {model.vocab_size}; name the model's own"
        )
    written = _byte_level(tokenizer, model) if name in ("gpt2", "bytes") else _copied(Path(name), tokenizer)
    return written, tokenizer.end_of_text


def _copied(path: Path, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Of a folder, all; of a tokenizer.json, that alone."""
    found = {}
    for source in [path / name for name in NAMES if (path / name).is_file()] if path.is_dir() else [path]:
        with files.reading(source) as file:
            found[source.name if path.is_dir() else "tokenizer.json"] = file.readall()
    if "tokenizer_config.json" not in found:
        found["tokenizer_config.json"] = _config(tokenizer.table[tokenizer.end_of_text].decode(errors="replace"))
    return found


def _byte_level(tokenizer: Tokenizer, model: ModelConfig) -> dict[str, bytes]:
    """Byte-level BPE, with the pre-tokenizer of GPT-2, from the table of tokens: a token's rank is its id."""
    letter = {byte: char for char, byte in tokenization.byte_alphabet().items()}

    def written(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    ranks = {token: number for number, token in enumerate(tokenizer.table) if number != tokenizer.end_of_text}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": tokenizer.end_of_text, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {written(token): number for token, number in ranks.items()} | {END_OF_TEXT: tokenizer.end_of_text},
            "merges": [f"{written(a)} {written(b)}" for a, b in _merges(ranks)],
        },
    }
    text = json.dumps(description, ensure_ascii=False, indent=1) + "\n"
    return {"tokenizer.json": text.encode(), "tokenizer_config.json": _config(END_OF_TEXT, model.max_seq_len)}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes is joined from: what is left of it when it is encoded without itself."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            least, at = min(joined)
            assert least < rank, token
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def _config(end_of_text: str, longest: int | None = None) -> bytes:
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end_of_text, "eos_token": end_of_text}
    said |= {"unk_token": end_of_text, "clean_up_tokenization_spaces": False}
    if longest is not None:
        said["model_max_length"] = longest
    return (json.dumps(said, indent=2) + "\n").encode()
