"""The flags of the generated program: the one table from which its settings, parser, defaults and help are rendered.

- `program_flags(config)` gives the table with the config's `[train]` as defaults.
- A flag's `field` is its name in the C struct Settings and, where it has one, in `[train]`.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from llmgen.config import INT_MAX, Config
from llmgen.errors import UserError

C_TYPES = {"text": "const char", "texts": "Texts", "integer": "int", "switch": "int", "real": "double"}
WIDTH = 120  # columns of the generated source


@dataclass(frozen=True)
class Flag:
    name: str  # without the dashes
    short: str  # llm.c's letter, or ""
    kind: str  # "text", "texts": given several times, "integer", "real", or "switch": on without a value, or with 0 or 1
    metavar: str
    help: str
    field: str = ""  # the name with underscores, unless said
    default: str | int | float | None = None
    minimum: float = 0


FLAGS = (
    Flag("load", "e", "text", "FILE", "weights to begin with, fp32 or bf16; without it they come from --seed"),
    Flag("save", "", "text", "FILE", "where the final model goes"),
    Flag("save-dtype", "", "text", "TYPE", "fp32 or bf16, for --save"),
    Flag("train-data", "i", "text", "GLOB", "token shards to train on, taken in order"),
    Flag("val-data", "j", "text", "GLOB", "token shards to validate on"),
    Flag("eval-data", "", "text", "FILE", "multiple-choice examples to answer whenever it validates"),
    Flag("tokenizer", "", "text", "FILE", "table of the tokens' texts, to print samples"),
    Flag("log-dir", "o", "text", "DIR", "made if need be; gets metrics.jsonl and checkpoints"),
    Flag("steps", "x", "integer", "N", "optimizer steps; -1 is one epoch, 0 trains nothing", minimum=-1),
    Flag("total-batch-size", "d", "integer", "N", "tokens in an optimizer step: whole micro-batches"),
    Flag("batch-size", "b", "integer", "N", "sequences in a micro-batch: fixed when the program is built", minimum=1),
    Flag("seq-len", "t", "integer", "N", "tokens in a sequence: fixed when the program is built", minimum=1),
    Flag("lr", "l", "real", "X", "learning rate", field="learning_rate"),
    Flag("lr-schedule", "k", "text", "NAME", "constant, linear, cosine or wsd: how the rate falls"),
    Flag("warmup-steps", "u", "integer", "N", "steps in which the rate rises from 0"),
    Flag("final-lr-fraction", "q", "real", "X", "the rate of the last step, as a part of --lr"),
    Flag("weight-decay", "c", "real", "X", "decay of the tensors of rank 2 and more, embeddings included"),
    Flag("beta1", "", "real", "X", "AdamW: memory of the mean of the gradients"),
    Flag("beta2", "", "real", "X", "AdamW: memory of their squares"),
    Flag("epsilon", "", "real", "X", "AdamW: added to the root of their squares"),
    Flag("grad-clip", "", "real", "X", "largest norm of the gradients; 0 is off"),
    Flag("val-every", "v", "integer", "N", "validate every N steps, at the first and the last; 0 is never"),
    Flag("val-steps", "m", "integer", "N", "batches in a validation, always the same ones"),
    Flag("sample-every", "s", "integer", "N", "print a sample every N steps and at the last; 0 is never"),
    Flag("sample-length", "g", "integer", "N", "tokens in a sample"),
    Flag("prompt-tokens", "", "text", "FILE", "token ids, as numbers with spaces between, that samples go on from"),
    Flag("temperature", "", "real", "X", "of samples; 0 takes the most probable token", default=1.0),
    Flag("shuffle", "", "switch", "0|1", "take the training data in an order of its own each epoch, by --seed"),
    Flag("seed", "", "integer", "N", "of the first weights, the samples and the shuffling"),
    Flag("overfit-batch", "a", "switch", "0|1", "train on the first batch again and again"),
    Flag("checkpoint-every", "n", "integer", "N", "write a checkpoint to --log-dir every N steps and at the end; 0 is never"),
    Flag("checkpoint-keep", "nk", "integer", "K", "keep the latest K checkpoints; 0 keeps all"),
    Flag("checkpoint-major", "nm", "integer", "N", "keep those of every N-th step for good; 0 is none"),
    Flag("resume", "y", "switch", "0|1", "go on from the latest checkpoint in --log-dir, if there is one", default=False),
    Flag("skip-loss-z", "sl", "real", "X", "no update where the loss is X deviations above the last 128; 0 is off"),
    Flag("skip-norm-z", "sg", "real", "X", "the same for the norm of the gradients"),
    Flag("debug-state", "", "text", "FILE", "write logits, loss and gradients of the first step here; train nothing"),
)

GENERATION_FLAGS = tuple(
    dataclasses.replace(flag, field=flag.field or flag.name.replace("-", "_"))
    for flag in (
        Flag("load", "e", "text", "FILE", "weights, fp32 or bf16"),
        Flag("tokenizer", "", "text", "FILE", "table of the tokens' texts; without it bytes are text, other tokens numbers"),
        Flag("prompt", "p", "texts", "TEXT", "text to go on from; without any prompt a text begins from nothing"),
        Flag("prompts", "", "text", "FILE", "the same, a line each"),
        Flag("prompt-tokens", "", "text", "FILE", "the same as token ids: numbers with spaces between, a prompt a line"),
        Flag("tokens", "n", "integer", "N", "most tokens that a prompt goes on for", default=128),
        Flag("temperature", "t", "real", "X", "divides the logits; 0 takes the most probable token", default=1.0),
        Flag("top-k", "k", "integer", "N", "draw from the N most probable tokens; 0 is all", default=0),
        Flag("top-p", "", "real", "X", "draw from the most probable tokens that have this probability in all", default=1.0),
        Flag("seed", "s", "integer", "N", "of what is drawn", default=1337),
        Flag("batch", "b", "integer", "N", "prompts that are worked on side by side", default=16, minimum=1),
        Flag("stop", "", "switch", "0|1", "end a text at the end-of-text token", default=1),
        Flag("quiet", "q", "switch", "0|1", "print what is generated, without prompts and figures", default=0),
        Flag("encode", "", "text", "FILE", "print the ids of this text's tokens, a line each; generate nothing"),
    )
)


def program_flags(config: Config) -> tuple[Flag, ...]:
    """The flags with their fields and defaults filled in. Raises UserError where a default does not fit a C int."""
    defaults = dataclasses.asdict(config.train)
    defaults["save_dtype"] = config.program.precision
    defaults |= {"batch_size": config.program.batch_size, "seq_len": config.program.seq_len}
    defaults["total_batch_size"] = config.train.total_batch_size or config.program.batch_size * config.program.seq_len
    flags = []
    for flag in FLAGS:
        field = flag.field or flag.name.replace("-", "_")
        default = defaults.get(field, flag.default)
        if flag.kind == "integer" and default > INT_MAX:
            raise UserError(f"{config.name}: {field} = {default} is too large; at most {INT_MAX} is supported")
        flags.append(dataclasses.replace(flag, field=field, default=default))
    return tuple(flags)


def c_members(flags: Sequence[Flag]) -> str:
    """The members of the C struct Settings: a declaration for each type."""
    lines = []
    for kind, c_type in C_TYPES.items():
        star = "*" if kind == "text" else ""
        names = [star + flag.field for flag in flags if flag.kind == kind]
        if not names:
            continue
        lines.append(wrapped([c_type, *(name + "," for name in names[:-1]), names[-1] + ";"], 8))
    return "\n".join(lines)


def c_defaults(flags: Sequence[Flag]) -> str:
    """The initialiser of a Settings, in the order of its members; what is not there is NULL."""

    def literal(flag: Flag) -> str:
        if flag.kind == "text":
            return json.dumps(flag.default)
        return repr(int(flag.default) if flag.kind == "switch" else flag.default)

    given = [flag for kind in C_TYPES for flag in flags if flag.kind == kind and flag.default is not None]
    return wrapped([f".{flag.field} = {literal(flag)}," for flag in given], 4)


def c_rows(flags: Sequence[Flag]) -> str:
    """The rows of the C table of flags: name, short name, argument, type, member, least value, help."""
    lines = []
    for flag in flags:
        short = f"-{flag.short}" if flag.short else ""
        head = f'{{ "--{flag.name}", "{short}", "{flag.metavar}", {flag.kind.upper()}, '
        head += f"offsetof(Settings, {flag.field}), {flag.minimum},"
        one = f'    {head} "{flag.help}" }},'
        lines += [one] if len(one) <= WIDTH else [f"    {head}", f'      "{flag.help}" }},']
    return "\n".join(lines)


def wrapped(pieces: Sequence[str], hanging: int = 4) -> str:
    """The pieces on indented lines, broken between them."""
    lines = ["   "]
    for piece in pieces:
        if len(lines[-1]) + 1 + len(piece) > WIDTH:
            lines.append(" " * (hanging - 1))
        lines[-1] += " " + piece
    return "\n".join(lines)
