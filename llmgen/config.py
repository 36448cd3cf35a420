"""Config: what a user says about a model, checked, in frozen dataclasses of plain fields.

- A config comes from a preset's name, a TOML file, a HuggingFace folder or a weights file (see `load`).
- `[program.c]` and `[program.cuda]` override `[program]` for their target; overrides from the command line come last.
- Every impossible config is refused here, with one line that says why and what would work.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from llmgen.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

TARGETS = ("c", "cuda")
VOCABULARY_MULTIPLE = 128  # vocabulary rows are padded to a multiple of this
LR_SCHEDULES = ("constant", "linear", "cosine", "wsd")
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class ModelConfig:
    num_layers: int
    num_heads: int
    channels: int
    vocab_size: int
    max_seq_len: int

    @property
    def head_size(self) -> int:
        return self.channels // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True)
class ProgramConfig:
    """What is fixed when the source is generated."""

    batch_size: int = 4  # sequences in a training micro-batch
    seq_len: int = 64  # tokens in each of them
    precision: str = "fp32"


@dataclass(frozen=True)
class TrainConfig:
    """Defaults of the generated program's flags."""

    steps: int = -1  # -1 is one epoch
    total_batch_size: int = 0  # tokens in an optimizer step; 0 is one micro-batch
    learning_rate: float = 3e-4
    lr_schedule: str = "cosine"
    warmup_steps: int = 0
    final_lr_fraction: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    grad_clip: float = 1.0
    val_every: int = 20
    val_steps: int = 20
    sample_every: int = 0
    sample_length: int = 64
    shuffle: bool = False
    seed: int = 1337


@dataclass(frozen=True)
class Config:
    name: str  # names the output folder
    family: str  # names the program: train_<family>
    model: ModelConfig
    program: ProgramConfig = field(default_factory=ProgramConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict:
        """The resolved fields, as they would stand in a TOML file."""
        tables = {table: dataclasses.asdict(getattr(self, table)) for table in TABLES}
        return {"family": self.family, **tables}

    def to_toml(self) -> str:
        lines = [f'family = "{self.family}"']
        for table in TABLES:
            lines += ["", f"[{table}]"]
            lines += [f"{key} = {_toml_value(value)}" for key, value in self.to_dict()[table].items()]
        return "\n".join(lines) + "\n"

    @property
    def hash(self) -> str:
        """Eight hex digits that change when any field does; the name is not part of it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]

    def replace(self, **fields) -> "Config":
        """A config with some fields changed, by their bare names, checked again."""
        tables = {table: getattr(self, table) for table in TABLES}
        for key, value in fields.items():
            table = table_of(key)
            tables[table] = dataclasses.replace(tables[table], **{key: value})
        return dataclasses.replace(self, **tables)


TABLES = {"model": ModelConfig, "program": ProgramConfig, "train": TrainConfig}
FAMILIES = ("gpt2",)


def field_names(table: str) -> list[str]:
    return [f.name for f in dataclasses.fields(TABLES[table])]


def table_of(key: str) -> str:
    """The table a bare field name stands in. Raises UserError with the nearest name for an unknown one."""
    for table in TABLES:
        if key in field_names(table):
            return table
    known = [name for table in TABLES for name in field_names(table)]
    raise UserError(f"unknown field '{key}'{_nearest(key, known)}")


def presets() -> list[str]:
    """Names of the presets, smallest model first."""
    names = [f.name.removesuffix(".toml") for f in resources.files("llmgen.configs").iterdir() if f.name.endswith(".toml")]
    return sorted(names, key=lambda name: _size_key(load(name).model))


def _size_key(model: ModelConfig) -> int:
    return model.num_layers * model.channels**2 * 12 + model.vocab_size * model.channels


def load(source: str | None, *, target: str = "c", overrides: dict | None = None) -> Config:
    """Read and check a config.

    source: a preset's name, a TOML file, a HuggingFace folder (its config.json) or a weights file of ours (its header);
    None is gpt2-nano. overrides: bare field names to values (`--set`), applied last.
    Raises UserError.
    """
    source = source or "gpt2-nano"
    path = Path(source)
    if source.endswith(".toml"):
        name, raw = path.stem, _read_toml(path)
    elif "/" not in source and resources.files("llmgen.configs").joinpath(source + ".toml").is_file():
        name = source
        raw = tomllib.loads(resources.files("llmgen.configs").joinpath(source + ".toml").read_text())
    elif path.is_dir():
        from llmgen import huggingface

        name, raw = path.resolve().name, huggingface.config_tables(path)
    elif path.is_file():
        from llmgen.formats import weights

        name, raw = path.stem, weights.config_tables(path)
    else:
        names = [f.name.removesuffix(".toml") for f in resources.files("llmgen.configs").iterdir()]
        hint = _nearest(source, names) or f"; presets: {', '.join(presets())}"
        raise UserError(f"config '{source}' is neither a preset nor an existing file or folder{hint}")
    return from_tables(name, raw, source, target, overrides or {})


def from_tables(name: str, raw: dict, source: str, target: str = "c", overrides: dict | None = None) -> Config:
    """Build a Config from the tables of a TOML file. `source` is named in error messages."""
    overrides = overrides or {}
    unknown = [key for key in raw if key not in ("family", *TABLES)]
    if unknown:
        raise UserError(f"{source}: unknown table or key '{unknown[0]}'{_nearest(unknown[0], ['family', *TABLES])}")
    family = raw.get("family")
    if family not in FAMILIES:
        raise UserError(f"{source}: family = {family!r} is not known; use one of: {', '.join(FAMILIES)}")
    values = {}
    for table in TABLES:
        given = raw.get(table, {})
        if not isinstance(given, dict):
            raise UserError(f"{source}: [{table}] must be a table")
        values[table] = {key: value for key, value in given.items() if not (table == "program" and key in TARGETS)}
        if table == "program":
            for other in TARGETS:  # both are checked, the target's own one counts
                special = given.get(other, {})
                if not isinstance(special, dict):
                    raise UserError(f"{source}: [program.{other}] must be a table")
                _check_keys(special, table, f"{source}: [program.{other}]")
                if other == target:
                    values[table] |= special
        _check_keys(values[table], table, f"{source}: [{table}]")
    for key, value in overrides.items():
        values[table_of(key)][key] = value
    tables = {}
    for table, kind in TABLES.items():
        for f in dataclasses.fields(kind):
            if f.name in values[table]:
                values[table][f.name] = _typed(f, values[table][f.name], f"{source}: {f.name}")
            elif f.default is dataclasses.MISSING:
                raise UserError(f"{source}: [{table}] lacks '{f.name}'")
        tables[table] = kind(**values[table])
    config = Config(name, family, **tables)
    check(config, target, source)
    plain = from_tables(name, raw, source, target) if overrides else config
    return config if config == plain else dataclasses.replace(config, name=f"{name}-{config.hash}")


def check(config: Config, target: str, source: str) -> None:
    """Refuse what cannot be built or trained, saying what would work. Raises UserError."""

    def refuse(message: str):
        raise UserError(f"{source}: {message}")

    model, program, train = config.model, config.program, config.train
    for name in ("num_layers", "num_heads", "channels", "max_seq_len"):
        if getattr(model, name) < 1:
            refuse(f"{name} = {getattr(model, name)} must be at least 1")
    if model.vocab_size < 2:
        refuse(f"vocab_size = {model.vocab_size} must be at least 2")
    for name in ("batch_size", "seq_len"):
        if getattr(program, name) < 1:
            refuse(f"{name} = {getattr(program, name)} must be at least 1")
    if model.channels % model.num_heads:
        heads = [h for h in range(1, model.channels + 1) if model.channels % h == 0]
        near = sorted(heads, key=lambda h: abs(h - model.num_heads))[:2]
        down = model.channels // model.num_heads * model.num_heads
        channels = [c for c in (down, down + model.num_heads) if c > 0]
        refuse(
            f"channels = {model.channels} is not divisible by num_heads = {model.num_heads}; "
            f"num_heads = {_either(sorted(near))} or channels = {_either(channels)} would work"
        )
    if program.seq_len > model.max_seq_len:
        refuse(
            f"seq_len = {program.seq_len} exceeds max_seq_len = {model.max_seq_len}; "
            f"lower seq_len to {model.max_seq_len} or raise max_seq_len"
        )
    for name in ("num_layers", "channels", "vocab_size", "max_seq_len"):
        if getattr(model, name) > INT_MAX // 8:
            refuse(f"{name} = {getattr(model, name)} is too large; at most {INT_MAX // 8} is supported")
    if program.batch_size * program.seq_len > INT_MAX // 8:
        most = max(INT_MAX // 8 // program.seq_len, 1)
        refuse(
            f"batch_size * seq_len = {program.batch_size * program.seq_len} tokens in a micro-batch is too many; "
            f"batch_size = {most} would work"
        )
    precisions = {"c": ("fp32",), "cuda": ("bf16", "fp32")}[target]
    if program.precision not in precisions:
        refuse(f'precision = "{program.precision}" is not supported with target {target}; use {_either(precisions)}')
    if not train.learning_rate >= 0:
        refuse(f"learning_rate = {train.learning_rate} must not be negative")
    if not train.weight_decay >= 0:
        refuse(f"weight_decay = {train.weight_decay} must not be negative")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(train, name) < 1:
            refuse(f"{name} = {getattr(train, name)} must be at least 0 and below 1")
    if not train.epsilon > 0:
        refuse(f"epsilon = {train.epsilon} must be positive")
    if not train.grad_clip >= 0:
        refuse(f"grad_clip = {train.grad_clip} must not be negative; 0 turns clipping off")
    if train.steps < -1:
        refuse(f"steps = {train.steps} must be -1 (one epoch), 0 or more")
    if train.lr_schedule not in LR_SCHEDULES:
        refuse(f'lr_schedule = "{train.lr_schedule}" is not known; use {_either(LR_SCHEDULES)}')
    if not 0 <= train.final_lr_fraction <= 1:
        refuse(f"final_lr_fraction = {train.final_lr_fraction} must be from 0 to 1")
    counts = ("total_batch_size", "warmup_steps", "val_every", "val_steps", "sample_every", "sample_length", "seed")
    for name in counts:
        if getattr(train, name) < 0:
            refuse(f"{name} = {getattr(train, name)} must not be negative")
    micro_batch = program.batch_size * program.seq_len
    if train.total_batch_size % micro_batch:
        refuse(
            f"total_batch_size = {train.total_batch_size} is not a multiple of batch_size * seq_len = {micro_batch}; "
            f"{train.total_batch_size // micro_batch * micro_batch + micro_batch} would work"
        )


def parse_overrides(pairs: tuple[str, ...]) -> dict:
    """`--set key=value` arguments as a dict: the value as TOML, else a string. Raises UserError."""
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: expected key=value")
        table_of(key.strip())
        try:
            overrides[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key.strip()] = text
    return overrides


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _check_keys(given: dict, table: str, where: str) -> None:
    for key in given:
        if key not in field_names(table):
            raise UserError(f"{where} has no field '{key}'{_nearest(key, field_names(table))}")


def _typed(f: dataclasses.Field, value, where: str):
    """The value as the field's type. A whole number passes for a float; nothing else is converted."""
    if f.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not f.type:
        kind = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[f.type]
        raise UserError(f"{where} = {value!r} must be {kind}")
    if f.type is float and not math.isfinite(value):
        raise UserError(f"{where} = {value!r} must be finite")
    return value


def _toml_value(value) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else json.dumps(value)


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _either(values) -> str:
    return " or ".join(str(v) for v in values)
