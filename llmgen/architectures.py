"""HuggingFace's architectures: what their config.json says in fields of [model], and what their tensors are called.

Each is a row of a table. Reading and writing go by the same row; that an architecture can express a model is found out by
writing its config.json and reading it back.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmgen import config as configs
from llmgen.config import Config, ModelConfig
from llmgen.errors import UserError
from llmgen.formats import weights

ACTIVATIONS = {  # theirs -> ours; where several mean the same, the first is written
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout")
LLAMA3 = {  # theirs, in rope_scaling or rope_parameters -> ours
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_frequency_factor",
    "high_freq_factor": "rope_high_frequency_factor",
    "original_max_position_embeddings": "rope_original_seq_len",
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Architecture:
    name: str  # the class with a head, as in config.json's `architectures`
    model_type: str
    family: str
    fields: dict[str, tuple[str, ...]]  # theirs -> ours, all of the same value
    defaults: dict[str, object]  # theirs, where config.json is silent; None lets ours follow from others
    says: dict[str, object]  # fields of [model] that are always so
    tensors: dict[str, tuple[str, ...]]  # ours -> theirs, {} the layer; of several, the rows stand one after the other
    prefix: str  # of all tensors but the head
    only: dict[str, tuple] = field(default_factory=dict)  # what config.json must say: what computes the same; first the default
    activations: dict[str, str] = field(default_factory=lambda: ACTIVATIONS)
    windows: str = ""  # which layers sliding_window is for: "all", "above" max_window_layers, "even", or "": there is none
    embedding_scale: bool = False  # embeddings are multiplied by sqrt(channels)
    norm_offset: float = 0.0  # a norm multiplies by this plus its weight
    transposed: tuple[str, ...] = ()  # ours; theirs are (in, out)

    @property
    def bare(self) -> str:
        """The class without a head."""
        return self.name.replace("LMHeadModel", "Model").replace("ForCausalLM", "Model")

    def offset(self, name: str) -> float:
        """What our tensor has more than theirs."""
        return self.norm_offset if name.startswith("ln") else 0.0


_GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    family="gpt2",
    fields={
        "n_layer": ("num_layers",),
        "n_head": ("num_heads",),
        "n_embd": ("channels",),
        "vocab_size": ("vocab_size",),
        "n_positions": ("max_seq_len",),
        "n_inner": ("mlp_channels",),
        "activation_function": ("activation",),
        "layer_norm_epsilon": ("norm_epsilon",),
        "tie_word_embeddings": ("tie_embeddings",),
    },
    defaults={
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    says={},
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    tensors={
        "wte": ("wte.weight",),
        "wpe": ("wpe.weight",),
        "ln1w": ("h.{}.ln_1.weight",),
        "ln1b": ("h.{}.ln_1.bias",),
        "qkvw": ("h.{}.attn.c_attn.weight",),
        "qkvb": ("h.{}.attn.c_attn.bias",),
        "attprojw": ("h.{}.attn.c_proj.weight",),
        "attprojb": ("h.{}.attn.c_proj.bias",),
        "ln2w": ("h.{}.ln_2.weight",),
        "ln2b": ("h.{}.ln_2.bias",),
        "fcw": ("h.{}.mlp.c_fc.weight",),
        "fcb": ("h.{}.mlp.c_fc.bias",),
        "fcprojw": ("h.{}.mlp.c_proj.weight",),
        "fcprojb": ("h.{}.mlp.c_proj.bias",),
        "lnfw": ("ln_f.weight",),
        "lnfb": ("ln_f.bias",),
        "headw": ("lm_head.weight",),
    },
    prefix="transformer.",
    transposed=("qkvw", "attprojw", "fcw", "fcprojw"),
)

_LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    family="llama",
    fields={
        "num_hidden_layers": ("num_layers",),
        "num_attention_heads": ("num_heads",),
        "num_key_value_heads": ("num_kv_heads",),
        "head_dim": ("head_size",),
        "hidden_size": ("channels",),
        "intermediate_size": ("mlp_channels",),
        "vocab_size": ("vocab_size",),
        "max_position_embeddings": ("max_seq_len",),
        "rms_norm_eps": ("norm_epsilon",),
        "hidden_act": ("activation",),
        "attention_bias": ("qkv_bias", "projection_bias"),
        "tie_word_embeddings": ("tie_embeddings",),
    },
    defaults={
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    },
    says={"norm": "rmsnorm", "norm_bias": False, "position": "rope", "mlp": "gated", "mlp_bias": False},
    only={"mlp_bias": (False,), "partial_rotary_factor": (None, 1.0)},
    tensors={
        "wte": ("embed_tokens.weight",),
        "ln1w": ("layers.{}.input_layernorm.weight",),
        "qkvw": tuple(f"layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"),
        "qkvb": tuple(f"layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"),
        "attprojw": ("layers.{}.self_attn.o_proj.weight",),
        "attprojb": ("layers.{}.self_attn.o_proj.bias",),
        "ln2w": ("layers.{}.post_attention_layernorm.weight",),
        "gatew": ("layers.{}.mlp.gate_proj.weight",),
        "fcw": ("layers.{}.mlp.up_proj.weight",),
        "fcprojw": ("layers.{}.mlp.down_proj.weight",),
        "lnfw": ("norm.weight",),
        "headw": ("lm_head.weight",),
    },
    prefix="model.",
)


def _like(base: Architecture, without: tuple[str, ...] = (), **changes) -> Architecture:
    """An architecture that differs from another in some rows: dicts are joined, and `without` leaves keys of theirs out."""
    for name in ("fields", "defaults", "says", "only", "tensors"):
        joined = getattr(base, name) | changes.pop(name, {})
        changes[name] = {key: value for key, value in joined.items() if key not in without}
    return dataclasses.replace(base, **changes)


_MISTRAL = _like(
    _LLAMA,
    without=("attention_bias",),
    name="MistralForCausalLM",
    model_type="mistral",
    family="mistral",
    defaults={
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    says={"qkv_bias": False, "projection_bias": False},
    windows="all",
)
_QWEN2 = _like(
    _LLAMA,
    without=("attention_bias",),
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    family="qwen2",
    defaults={
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    says={"qkv_bias": True, "projection_bias": False},
    windows="above",
)
_QWEN3 = _like(
    _QWEN2,
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    family="qwen3",
    fields={"attention_bias": ("qkv_bias", "projection_bias")},
    defaults={"attention_bias": False, "head_dim": 128},
    says={"qk_norm": True},
    tensors={"qnormw": ("layers.{}.self_attn.q_norm.weight",), "knormw": ("layers.{}.self_attn.k_norm.weight",)},
)
_GEMMA_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu", "gelu": "gelu", "relu": "relu", "silu": "silu"}  # "gelu" is the tanh form
_GEMMA = _like(
    _LLAMA,
    name="GemmaForCausalLM",
    model_type="gemma",
    family="gemma",
    defaults={
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    only={"hidden_activation": (None, "gelu_pytorch_tanh"), "use_bidirectional_attention": (None, False)},
    activations=_GEMMA_ACTIVATIONS,
    embedding_scale=True,
    norm_offset=1.0,
)
_GEMMA2 = _like(
    _GEMMA,
    without=("hidden_act",),
    name="Gemma2ForCausalLM",
    model_type="gemma2",
    fields={
        "hidden_activation": ("activation",),
        "query_pre_attn_scalar": ("attention_scale",),
        "attn_logit_softcapping": ("attention_softcap",),
        "final_logit_softcapping": ("logit_softcap",),
    },
    defaults={
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    only={"hidden_activation": tuple(_GEMMA_ACTIVATIONS)},
    says={"norm_position": "sandwich"},
    tensors={
        "ln1postw": ("layers.{}.post_attention_layernorm.weight",),
        "ln2w": ("layers.{}.pre_feedforward_layernorm.weight",),
        "ln2postw": ("layers.{}.post_feedforward_layernorm.weight",),
    },
    windows="even",
)

ARCHITECTURES = (_GPT2, _LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA, _GEMMA2)


class Inexpressible(Exception):
    """An architecture's config.json has no value for this field of ours."""


# config.json -> [model]


def read(given: dict, path: Path, note: Callable[[str], None] | None = None) -> tuple[Architecture, dict]:
    """The architecture of a config.json and the tables of a TOML file that says the same.

    path is for messages; note is called with a line for what is ignored. Raises UserError for what cannot be expressed.
    """

    def refuse(key: str, value, wanted: str):
        raise UserError(f"{path}: {key} = {json.dumps(value)} cannot be expressed; only {wanted} can")

    architecture = _architecture(given, path, refuse)
    for key, values in {**architecture.only, "quantization_config": (None,)}.items():
        if given.get(key, values[0]) not in values:
            refuse(key, given[key], " or ".join(json.dumps(value) for value in values))
    kinds = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
    model = dict(architecture.says)
    for theirs, ours in architecture.fields.items():
        value = given.get(theirs, architecture.defaults[theirs])
        if ours[0] == "activation":
            if value not in architecture.activations:
                refuse(theirs, value, " or ".join(json.dumps(name) for name in architecture.activations))
            value = architecture.activations[value]
        elif value is None and (architecture.defaults[theirs] is None or theirs.endswith("softcapping")):
            continue  # off, or it follows from others
        elif kinds[ours[0]] is bool and type(value) is not bool:
            refuse(theirs, value, "true or false")
        elif kinds[ours[0]] is int and (type(value) is not int or value < 1):
            refuse(theirs, value, "a positive whole number")
        elif kinds[ours[0]] is float and (type(value) not in (int, float) or not value > 0):
            refuse(theirs, value, "a positive number")
        if ours[0] == "attention_scale":
            value = value**-0.5
        model |= dict.fromkeys(ours, value)
    if architecture.says.get("position") == "rope":
        model |= _read_rope(given, architecture, refuse)
    if architecture.windows:
        model["attention_window"] = _read_windows(given, architecture, model["num_layers"], refuse)
    if architecture.embedding_scale:
        model["embedding_scale"] = math.sqrt(model["channels"])
    dropouts = [f"{key} = {given[key]}" for key in DROPOUTS if given.get(key)]
    if note and dropouts:
        note(f"{path}: dropout is ignored ({', '.join(dropouts)}); llmgen trains without")
    program = {"seq_len": min(configs.ProgramConfig.seq_len, model["max_seq_len"])}
    return architecture, {"family": architecture.family, "model": model, "program": program}


def _architecture(given: dict, path: Path, refuse) -> Architecture:
    names = given.get("architectures") or []
    if "model_type" not in given and not names:
        raise UserError(f"{path}: names neither model_type nor architectures; it is not a model's config.json")
    for architecture in ARCHITECTURES:
        known = (architecture.name, architecture.bare)
        if given.get("model_type", architecture.model_type) != architecture.model_type:
            continue
        if "model_type" in given and any(name not in known for name in names):
            refuse("architectures", names, json.dumps([architecture.name]))
        if all(name in known for name in names):
            return architecture
    if "model_type" in given:
        refuse("model_type", given["model_type"], _either([a.model_type for a in ARCHITECTURES]))
    refuse("architectures", names, _either([a.name for a in ARCHITECTURES]))


def _either(names: list[str]) -> str:
    quoted = [json.dumps(name) for name in names]
    return ", ".join(quoted[:-1]) + " or " + quoted[-1]


def _read_rope(given: dict, architecture: Architecture, refuse) -> dict:
    """Older files have rope_theta and rope_scaling, newer ones (transformers 5) all of it in rope_parameters."""
    newer = given.get("rope_parameters") or {}
    key = "rope_parameters" if newer else "rope_scaling"
    said = newer or given.get("rope_scaling") or {}
    if not isinstance(said, dict) or any(isinstance(value, dict) for value in said.values()):
        refuse(key, said, "one object for all layers")
    kind = said.get("rope_type", said.get("type", "default"))
    theta = said.get("rope_theta", given.get("rope_theta", architecture.defaults["rope_theta"]))
    if said.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(f"{key}.partial_rotary_factor", said["partial_rotary_factor"], "1.0")
    if type(theta) not in (int, float) or not theta > 0:
        refuse("rope_theta", theta, "a positive number")
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind != "llama3":
        refuse(f"{key}.rope_type", kind, '"default" or "llama3"')
    scaling = {}
    for theirs, ours in LLAMA3.items():
        value = said.get(theirs)
        if type(value) not in (int, float) or not value > 0:
            refuse(f"{key}.{theirs}", value, "a positive number")
        scaling[ours] = int(value) if ours == "rope_original_seq_len" else float(value)
    return {"rope_theta": float(theta), "rope_scaling": "llama3", **scaling}


def _read_windows(given: dict, architecture: Architecture, layers: int, refuse) -> list[int]:
    window = given.get("sliding_window", architecture.defaults["sliding_window"])
    if window is None or (architecture.windows == "above" and not given.get("use_sliding_window", False)):
        return [0]
    if type(window) is not int or window < 1:
        refuse("sliding_window", window, "a positive whole number")
    first = given.get("max_window_layers", architecture.defaults.get("max_window_layers"))
    usual = {"all": lambda i: True, "above": lambda i: i >= first, "even": lambda i: i % 2 == 0}[architecture.windows]
    slides = [usual(i) for i in range(layers)]
    if given.get("layer_types") and architecture.windows != "all":
        kinds = given["layer_types"]
        if len(kinds) != layers or any(kind not in (SLIDING, FULL) for kind in kinds):
            refuse("layer_types", kinds, f'"{SLIDING}" or "{FULL}" for each of {layers} layers')
        slides = [kind == SLIDING for kind in kinds]
    pattern = [window if slide else 0 for slide in slides]
    for n in range(1, layers + 1):  # the shortest that, repeated, gives all of them
        if all(pattern[i] == pattern[i % n] for i in range(layers)):
            return pattern[:n]
    return pattern


# [model] -> config.json


def write(architecture: Architecture, model: ModelConfig) -> dict:
    """The config.json of a model, without what is said of its files. Raises Inexpressible."""
    written = {"architectures": [architecture.name], "model_type": architecture.model_type}
    for theirs, ours in architecture.fields.items():
        value = getattr(model, ours[0])
        if ours[0] == "activation":
            value = next((name for name, meant in architecture.activations.items() if meant == value), None)
            if value is None:
                raise Inexpressible(ours[0])
        elif ours[0] == "attention_scale":
            value = (value or model.head_size**-0.5) ** -2
            value = round(value) if abs(value - round(value)) < 1e-6 else value
        elif theirs.endswith("softcapping"):
            value = value or None
        written[theirs] = value
    written |= {key: values[0] for key, values in architecture.only.items() if values[0] is not None and key not in written}
    if architecture.says.get("position") == "rope":
        written["rope_theta"] = model.rope_theta
        written["rope_scaling"] = None
        if model.rope_scaling == "llama3":
            written["rope_scaling"] = {
                "rope_type": "llama3",
                **{theirs: getattr(model, ours) for theirs, ours in LLAMA3.items()},
            }
    if architecture.windows:
        written |= _write_windows(architecture, model)
    dropouts = DROPOUTS[:3] if architecture.model_type == "gpt2" else DROPOUTS[3:4]
    return written | dict.fromkeys(dropouts, 0.0)


def _write_windows(architecture: Architecture, model: ModelConfig) -> dict:
    pattern = [model.attention_window[i % len(model.attention_window)] for i in range(model.num_layers)]
    windows = set(pattern) - {0}
    if len(windows) > 1:
        raise Inexpressible("attention_window")
    window = windows.pop() if windows else None
    if architecture.windows == "all":
        return {"sliding_window": window}
    written = {"sliding_window": window, "layer_types": [SLIDING if w else FULL for w in pattern]}
    if architecture.windows == "even":
        return written | {"sliding_window": window or model.max_seq_len}
    first = next((i for i, w in enumerate(pattern) if w), model.num_layers)
    return written | {"use_sliding_window": window is not None, "max_window_layers": first}


def of(config: Config, where: str) -> Architecture:
    """The architecture that expresses a model, its family's own before others. Raises UserError naming what none can say."""
    found = []
    for architecture in sorted(ARCHITECTURES, key=lambda a: a.family != config.family):
        lacking = _lacking(architecture, config.model)
        if not lacking:
            return architecture
        found.append((len(lacking), architecture.name, lacking))
    _, name, lacking = min(found)
    values = ", ".join(f"{field} = {configs.toml_value(getattr(config.model, field))}" for field in lacking)
    raise UserError(f"{where}: no architecture of HuggingFace's says all of this model; {name} lacks {values}")


def _lacking(architecture: Architecture, model: ModelConfig) -> list[str]:
    """Fields of ours that the architecture's config.json cannot say as they are."""
    try:
        given = write(architecture, model)
    except Inexpressible as error:
        return [str(error)]
    try:
        _, tables = read(given, Path("config.json"))
        back = configs.from_tables("back", tables, "config.json").model
    except UserError:
        return list(weights.mathematics(model))
    ours, theirs = weights.mathematics(model), weights.mathematics(back)
    return [name for name, value in {**theirs, **ours}.items() if not _same(ours.get(name), theirs.get(name))]


def _same(a, b) -> bool:
    return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b


# Tensors.


@dataclass(frozen=True)
class Part:
    """Where one of their tensors stands in ours."""

    name: str  # ours
    start: int  # values from the beginning of ours, layers counted
    shape: tuple[int, ...]  # theirs
    rest: int  # values of padding behind it


def parts(architecture: Architecture, model: ModelConfig, shapes: weights.Shapes) -> dict[str, Part]:
    """Their name, without the prefix -> its place in ours; in the order of our files."""
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    found = {}
    for name, stacked in shapes.items():
        theirs = architecture.tensors[name]
        layers, shape = (stacked[0], stacked[1:]) if "{}" in theirs[0] else (1, stacked)
        rows = [shape[0]] if len(theirs) == 1 else [n * model.head_size for n in heads]
        rest = 0
        if name in ("wte", "headw"):
            rows, rest = [model.vocab_size], (shape[0] - model.vocab_size) * shape[1]
        for layer in range(layers):
            start = layer * math.prod(shape)
            for their_name, n in zip(theirs, rows, strict=True):
                each = (n, *shape[1:])
                found[their_name.format(layer)] = Part(
                    name, start, each[::-1] if name in architecture.transposed else each, rest
                )
                start += math.prod(each)
    return found
