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

from llmgen import families
from llmgen.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

TARGETS = ("c", "cuda")
BYTE_VOCABULARY = 257  # every byte, and end-of-text
GPT2_VOCABULARY = 50257
VOCABULARY_MULTIPLE = 128  # vocabulary rows are padded to a multiple of this
ALWAYS_STATED = ("batch_size", "seq_len", "precision")  # in the generated source, whatever the defaults are
RECOMPUTES = ("none", "cheap", "block")
OPTIMIZERS = ("adamw", "muon")
LR_SCHEDULES = ("constant", "linear", "cosine", "wsd")
INT_MAX = 2**31 - 1


NORMS = ("layernorm", "rmsnorm")
NORM_POSITIONS = ("pre", "sandwich")
POSITIONS = ("learned", "rope", "none")
ROPE_SCALINGS = ("none", "llama3")
ACTIVATIONS = ("gelu", "gelu_exact", "relu", "relu_squared", "silu")
MLPS = ("plain", "gated")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. What is not said takes the family's default, and where that is silent GPT-2's."""

    num_layers: int
    num_heads: int
    channels: int
    vocab_size: int
    max_seq_len: int
    num_kv_heads: int = 0  # heads of keys and values, shared by groups of query heads; 0 is num_heads
    head_size: int = 0  # 0 is channels / num_heads
    mlp_channels: int = 0  # 0 is 4 * channels
    norm: str = "layernorm"
    norm_epsilon: float = 1e-5
    norm_weight: bool = True
    norm_bias: bool = True
    norm_position: str = "pre"  # sandwich: a second norm behind attention and MLP, before the residual add
    position: str = "learned"
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # part of each head's channels that is rotated
    rope_scaling: str = "none"  # llama3: low frequencies are slowed down by rope_factor
    rope_factor: float = 8.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_seq_len: int = 8192
    activation: str = "gelu"  # gelu is the tanh form
    mlp: str = "plain"  # gated: activation(gate) * fc
    qkv_bias: bool = True
    projection_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False  # RMS norm of each head's query and key
    qk_norm_weight: bool = True
    attention_window: tuple[int, ...] = (0,)  # positions a token sees, its own included; 0 is all; repeated over layers
    attention_softcap: float = 0.0  # cap * tanh(score / cap); 0 is off
    attention_scale: float = 0.0  # of the scores; 0 is 1 / sqrt(head_size)
    tie_embeddings: bool = True
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add to the residual stream
    zero_projections: bool = False  # projections into the residual stream begin at zero
    z_loss: float = 0.0  # adds z_loss * log(sum(exp(logits)))^2 to the loss
    label_smoothing: float = 0.0

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True)
class ProgramConfig:
    """What is fixed when the source is generated."""

    batch_size: int = 4  # sequences in a training micro-batch
    seq_len: int = 64  # tokens in each of them
    precision: str = "fp32"
    residual_precision: str = "bf16"  # of the residual stream, where precision is bf16
    recompute: str = "none"  # cheap: the backward computes norms and activations again; block: all of a block
    optimizer: str = "adamw"  # muon: for the matrices of the layers, AdamW for the rest


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
    overfit_batch: bool = False
    checkpoint_every: int = 0
    checkpoint_keep: int = 0
    checkpoint_major: int = 0
    skip_loss_z: float = 0.0
    skip_norm_z: float = 0.0


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

    def stated(self) -> dict:
        """As `to_dict`, without what follows from the family and the defaults of [train]."""
        model = _resolved(self.model, families.DEFAULTS[self.family])
        usual = {"model": model, "program": ProgramConfig(), "train": TrainConfig()}
        tables = {"family": self.family}
        for table, kind in TABLES.items():
            values, default = getattr(self, table), usual[table]
            tables[table] = {
                f.name: getattr(values, f.name)
                for f in dataclasses.fields(kind)
                if f.name in ALWAYS_STATED
                or f.default is dataclasses.MISSING
                or getattr(values, f.name) != getattr(default, f.name)
            }
        return {key: value for key, value in tables.items() if value}

    def to_toml(self, tables: dict | None = None) -> str:
        """As a TOML file: all fields that are not the family's, or the given tables."""
        tables = tables or {**self.stated(), "train": dataclasses.asdict(self.train)}
        lines = [f'family = "{self.family}"']
        for table in (table for table in TABLES if table in tables):
            lines += ["", f"[{table}]"]
            lines += [f"{key} = {toml_value(value)}" for key, value in tables[table].items()]
        return "\n".join(lines) + "\n"

    @property
    def hash(self) -> str:
        """Eight hex digits that change when any field does; the name is not part of it."""
        return hashlib.sha256(json.dumps(self.stated(), sort_keys=True).encode()).hexdigest()[:8]

    def replace(self, **fields) -> "Config":
        """A config with some fields changed, by their bare names, checked again."""
        tables = {table: getattr(self, table) for table in TABLES}
        for key, value in fields.items():
            table = table_of(key)
            tables[table] = dataclasses.replace(tables[table], **{key: value})
        return dataclasses.replace(self, **tables)


TABLES = {"model": ModelConfig, "program": ProgramConfig, "train": TrainConfig}


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
    from llmgen import models

    names = [f.name.removesuffix(".toml") for f in resources.files("llmgen.configs").iterdir() if f.name.endswith(".toml")]
    return sorted(names, key=lambda name: models.count(load(name)))


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
    """Build and check a Config from the tables of a TOML file. `source` is named in error messages."""
    config = _built(name, raw, source, target, overrides or {})
    check(config, target, source)
    if not overrides:
        return config
    try:
        plain = _built(name, raw, source, target, {})
    except UserError:  # it is whole only with the overrides
        plain = None
    return config if config == plain else dataclasses.replace(config, name=f"{name}-{config.hash}")


def _built(name: str, raw: dict, source: str, target: str, overrides: dict) -> Config:
    unknown = [key for key in raw if key not in ("family", *TABLES)]
    if unknown:
        raise UserError(f"{source}: unknown table or key '{unknown[0]}'{_nearest(unknown[0], ['family', *TABLES])}")
    family = raw.get("family")
    if family not in families.DEFAULTS:
        raise UserError(f"{source}: family = {family!r} is not known; use one of: {', '.join(families.DEFAULTS)}")
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
    values["model"] = families.defaults(family, values["model"]) | values["model"]
    tables = {}
    for table, kind in TABLES.items():
        for f in dataclasses.fields(kind):
            if f.name in values[table]:
                values[table][f.name] = _typed(f, values[table][f.name], f"{source}: {f.name}")
            elif f.default is dataclasses.MISSING:
                raise UserError(f"{source}: [{table}] lacks '{f.name}'")
        tables[table] = kind(**values[table])
    _check_head_size(tables["model"], source)
    tables["model"] = filled(tables["model"])
    return Config(name, family, **tables)


def filled(model: ModelConfig) -> ModelConfig:
    """With the sizes that follow from others."""
    if min(model.num_heads, model.channels) < 1:
        return model  # refused by check
    follows = {
        "num_kv_heads": model.num_kv_heads or model.num_heads,
        "head_size": model.head_size or model.channels // model.num_heads,
        "mlp_channels": model.mlp_channels or 4 * model.channels,
    }
    return dataclasses.replace(model, **follows)


def _resolved(model: ModelConfig, defaults: dict) -> ModelConfig:
    """The model of the same required sizes with nothing said beside a family's defaults."""
    sizes = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING}
    return filled(ModelConfig(**sizes, **defaults))


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
    for name in ("num_kv_heads", "head_size", "mlp_channels"):
        if getattr(model, name) < 0:
            refuse(f"{name} = {getattr(model, name)} must be at least 1")
    _check_choices(model, refuse)
    if program.seq_len > model.max_seq_len:
        refuse(
            f"seq_len = {program.seq_len} exceeds max_seq_len = {model.max_seq_len}; "
            f"lower seq_len to {model.max_seq_len} or raise max_seq_len"
        )
    for name in ("num_layers", "channels", "vocab_size", "max_seq_len", "mlp_channels"):
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
    if program.residual_precision not in ("bf16", "fp32"):
        refuse(f'residual_precision = "{program.residual_precision}" is not known; use bf16 or fp32')
    if program.recompute not in RECOMPUTES:
        refuse(f'recompute = "{program.recompute}" is not known; use {_either(RECOMPUTES)}')
    if program.optimizer not in OPTIMIZERS:
        refuse(f'optimizer = "{program.optimizer}" is not known; use {_either(OPTIMIZERS)}')
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
    checkpoints = ("checkpoint_every", "checkpoint_keep", "checkpoint_major")
    for name in (*counts, *checkpoints, "skip_loss_z", "skip_norm_z"):
        if getattr(train, name) < 0:
            refuse(f"{name} = {getattr(train, name)} must not be negative")
    micro_batch = program.batch_size * program.seq_len
    if train.total_batch_size % micro_batch:
        refuse(
            f"total_batch_size = {train.total_batch_size} is not a multiple of batch_size * seq_len = {micro_batch}; "
            f"{train.total_batch_size // micro_batch * micro_batch + micro_batch} would work"
        )


def _check_head_size(model: ModelConfig, source: str) -> None:
    """Where no head size is said, the heads share the channels evenly. Raises UserError."""
    if model.head_size or min(model.channels, model.num_heads) < 1 or model.channels % model.num_heads == 0:
        return
    heads = [h for h in range(1, model.channels + 1) if model.channels % h == 0]
    near = sorted(heads, key=lambda h: abs(h - model.num_heads))[:2]
    down = model.channels // model.num_heads * model.num_heads
    channels = [c for c in (down, down + model.num_heads) if c > 0]
    raise UserError(
        f"{source}: channels = {model.channels} is not divisible by num_heads = {model.num_heads}; "
        f"num_heads = {_either(sorted(near))} or channels = {_either(channels)} would work"
    )


def _check_choices(model: ModelConfig, refuse) -> None:
    """The switches of the architecture, alone and together."""
    for name, known in (
        ("norm", NORMS),
        ("norm_position", NORM_POSITIONS),
        ("position", POSITIONS),
        ("rope_scaling", ROPE_SCALINGS),
        ("activation", ACTIVATIONS),
        ("mlp", MLPS),
    ):
        value = getattr(model, name)
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            refuse(f'{name} = "{value}" is not known; use {_either(near or known)}')
    if model.num_heads % model.num_kv_heads:
        fits = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        refuse(
            f"num_heads = {model.num_heads} is not a multiple of num_kv_heads = {model.num_kv_heads}; "
            f"num_kv_heads = {_either(sorted(fits, key=lambda n: abs(n - model.num_kv_heads))[:2])} would work"
        )
    if model.norm == "rmsnorm" and model.norm_bias:
        refuse('norm = "rmsnorm" has no bias; set norm_bias = false')
    if model.norm_bias and not model.norm_weight:
        refuse("norm_bias = true needs norm_weight = true")
    if model.norm_position == "sandwich" and model.norm_bias:
        refuse('norm_position = "sandwich" needs norm_bias = false: the second norms have no bias')
    if model.mlp == "gated" and model.mlp_bias:
        refuse('mlp = "gated" needs mlp_bias = false: a gated MLP has no biases')
    if model.position == "rope":
        rotated = model.head_size * model.rope_fraction
        if not 0 < model.rope_fraction <= 1 or rotated != int(rotated) or int(rotated) % 2:
            near = max(2, round(rotated / 2) * 2)
            hint = f"; rope_fraction = {near / model.head_size:g} rotates {near}" if near <= model.head_size else ""
            refuse(
                f"rope_fraction = {model.rope_fraction:g} of head_size = {model.head_size} must be an even number "
                f"of channels{hint or '; use an even head_size'}"
            )
    for name in ("norm_epsilon", "rope_theta", "rope_factor", "embedding_scale", "residual_scale"):
        if not getattr(model, name) > 0:
            refuse(f"{name} = {getattr(model, name)} must be positive")
    for name in ("attention_softcap", "attention_scale", "logit_softcap", "z_loss", "label_smoothing"):
        if not getattr(model, name) >= 0:
            refuse(f"{name} = {getattr(model, name)} must not be negative")
    if model.label_smoothing >= 1:
        refuse(f"label_smoothing = {model.label_smoothing} must be below 1")
    if model.rope_scaling == "llama3" and not model.rope_high_frequency_factor > model.rope_low_frequency_factor > 0:
        refuse("rope_high_frequency_factor must be above rope_low_frequency_factor, and that above 0")
    if model.rope_original_seq_len < 1:
        refuse(f"rope_original_seq_len = {model.rope_original_seq_len} must be at least 1")
    if not model.attention_window or min(model.attention_window) < 0:
        refuse(f"attention_window = {list(model.attention_window)} must be numbers of positions, 0 for all of them")
    if len(model.attention_window) > model.num_layers:
        refuse(f"attention_window names {len(model.attention_window)} layers, more than num_layers = {model.num_layers}")


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
    if f.type == tuple[int, ...]:
        listed = value if isinstance(value, list | tuple) else [value]
        if any(type(item) is not int for item in listed):
            raise UserError(f"{where} = {value!r} must be a whole number or a list of them")
        return tuple(listed)
    if type(value) is not f.type:
        kind = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[f.type]
        raise UserError(f"{where} = {value!r} must be {kind}")
    if f.type is float and not math.isfinite(value):
        raise UserError(f"{where} = {value!r} must be finite")
    return value


def toml_value(value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value)


def _nearest(word: str, known) -> str:
    def likeness(other: str) -> tuple:  # of two as close, the one that begins alike
        return difflib.SequenceMatcher(None, other, word).ratio(), [a == b for a, b in zip(word, other, strict=False)]

    close = difflib.get_close_matches(word, list(known))
    return f"; did you mean '{max(close, key=likeness)}'?" if close else ""


def _either(values) -> str:
    return " or ".join(str(v) for v in values)
