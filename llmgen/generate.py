"""`llmgen generate`: builds the program that generates for a weights file, encodes the prompts, runs it."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmgen import config as configs
from llmgen import generation, program, runner, tokenization
from llmgen.config import BYTE_VOCABULARY, GPT2_VOCABULARY, Config
from llmgen.errors import UserError
from llmgen.formats import files, tokenizer, weights
from llmgen.tokenization import Tokenizer


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the program is built for."""

    target: str = "c"
    precision: str | None = None  # bf16 for a GPU and fp32 for a processor, where nothing is said
    cpu: str = "native"  # as --cpu says, for target c
    arch: str | None = None  # as --arch says, for target cuda


def generate(
    model: str,
    prompts: Sequence[str],
    prompts_file: str | None,
    tokenizer_name: str | None,
    machine: Machine,
    out: str | None,
    flags: Sequence[str],
) -> int:
    """Goes on from the prompts, and from each line of `prompts_file` that is not empty. Returns the exit status.

    tokenizer_name: as `--tokenizer` has it; None takes the one that the size of the vocabulary says. flags: of the program.
    Raises UserError.
    """
    config = config_of(model, machine)
    texts = [*prompts, *(_lines(prompts_file) if prompts_file else ())]
    if prompts_file and not texts:
        raise UserError(f"{prompts_file}: no prompt; write one a line")
    with tempfile.TemporaryDirectory(prefix="llmgen-") as folder:
        given = ["--load", os.path.abspath(model), *_encoded(config, texts, tokenizer_name, Path(folder)), *flags]
        where = (machine.target, machine.cpu, machine.arch)
        built = program.build_generation(config, *where, out or program.cached_folder(config, *where))
        return runner.run(built.program, given, follow=False)


def config_of(model: str, machine: Machine) -> Config:
    """What a weights file says of itself, for a machine, under a name that depends on that alone. Raises UserError."""
    if machine.arch and machine.target == "c":
        raise UserError(f"--arch {machine.arch} is for target cuda; --cpu chooses the processor of target c")
    precision = machine.precision or {"c": "fp32", "cuda": "bf16"}[machine.target]
    tables = weights.config_tables(model)
    tables["program"] = {**tables.get("program", {}), "precision": precision}
    config = configs.from_tables("weights", tables, model, machine.target)
    return dataclasses.replace(config, name=f"{config.family}-{generation.hash_of(config)}")


def tokenizer_of(config: Config, name: str | None, source: str) -> Tokenizer:
    """The tokenizer of that name, else the one that a vocabulary of this size belongs to. Raises UserError."""
    known = {BYTE_VOCABULARY: "bytes", GPT2_VOCABULARY: "gpt2"}
    name = name or known.get(config.model.vocab_size)
    if name is None:
        raise UserError(
            f"{source}: of its {config.model.vocab_size} tokens nothing is known; name the tokenizer with --tokenizer: "
            "gpt2, bytes, a folder with a tokenizer.json, or a table that export-tokens wrote"
        )
    made = tokenization.load_tokenizer(name)
    if made.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{name}: has {made.vocab_size} tokens, but the model only {config.model.vocab_size}; name the model's tokenizer"
        )
    return made


def _encoded(config: Config, texts: Sequence[str], name: str | None, folder: Path) -> list[str]:
    """Flags that name the tokenizer's table and the prompts, as files in `folder`.

    Of a table alone the program itself encodes, as GPT-2 does.
    """
    if name and _is_table(name):
        return ["--tokenizer", os.path.abspath(name), *(f"--prompt={text}" for text in texts)]
    made = tokenizer_of(config, name, "--model")
    table, ids = folder / "tokenizer.bin", folder / "prompts.txt"
    tokenizer.write(table, [text[: tokenizer.MAX_BYTES] for text in made.table], made.end_of_text)
    given = ["--tokenizer", str(table)]
    if texts:
        ids.write_text("".join(" ".join(map(str, _ids(made, text))) + "\n" for text in texts))
        given += ["--prompt-tokens", str(ids)]
    return given


def _ids(made: Tokenizer, text: str) -> list[int]:
    """Of a prompt; a text that has nothing begins with an end-of-text, as the documents of the training did."""
    return [*made.before_prompt, *made.encode(text).tolist()] or [made.end_of_text]


def _is_table(name: str) -> bool:
    path = Path(name)
    if not path.is_file():
        return False
    with files.reading(path) as file:
        return file.read(4) == files.header(tokenizer.MAGIC)[:4]


def _lines(path: str) -> list[str]:
    with files.reading(path) as file:
        data = file.readall()
    try:
        return [line for line in data.decode().split("\n") if line]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert it") from None
