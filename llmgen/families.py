"""What a family's name, and some choices, say about [model] where the file is silent."""

_LLAMA = {
    "norm": "rmsnorm",
    "norm_bias": False,
    "position": "rope",
    "activation": "silu",
    "mlp": "gated",
    "qkv_bias": False,
    "projection_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
}
TITLES = {"gpt2": "GPT-2", "gpt3": "GPT-3", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
TITLES |= {"gemma": "Gemma", "speedrun": "a modern GPT"}

# What a family's name says about [model], where the file is silent.
DEFAULTS = {
    "gpt2": {},
    "gpt3": {},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": {**_LLAMA, "qkv_bias": True, "norm_epsilon": 1e-6, "rope_theta": 1e6},
    "qwen3": {**_LLAMA, "qk_norm": True, "norm_epsilon": 1e-6, "rope_theta": 1e6, "head_size": 128},
    "gemma": {**_LLAMA, "activation": "gelu", "norm_epsilon": 1e-6, "tie_embeddings": True},
    "speedrun": {
        **_LLAMA,
        "norm_weight": False,
        "activation": "relu_squared",
        "mlp": "plain",
        "qk_norm": True,
        "qk_norm_weight": False,
        "logit_softcap": 15.0,
        "zero_projections": True,
    },
}

# A choice that leaves no room for a bias: field, value -> the fields that follow from it unless they are said.
_IMPLIED = {
    ("norm", "rmsnorm"): {"norm_bias": False},
    ("norm_weight", False): {"norm_bias": False},
    ("norm_position", "sandwich"): {"norm_bias": False},
    ("mlp", "gated"): {"mlp_bias": False},
}


def defaults(family: str, said: dict) -> dict:
    """Fields of [model] by the family and by what is said."""
    fields = dict(DEFAULTS[family])
    for (name, value), implied in _IMPLIED.items():
        if (fields | said).get(name) == value:
            fields |= implied
    return fields
