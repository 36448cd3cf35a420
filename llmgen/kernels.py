"""The kernels' section of a generated C source: its templates, their options, and which helpers it needs."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from llmgen.config import ModelConfig
from llmgen.cpu import Profile
from llmgen.cuda import attention, products
from llmgen.cuda.architecture import Architecture
from llmgen.generation import GenerationPlan
from llmgen.models import transformer
from llmgen.plan import Plan

# What ops are made of; the products' epilogue uses gelu. On Hopper some things are added, and some take the place of others.
PRELUDE = {
    "c": ("c/vector.j2", "c/ops/gelu.j2", "c/gemm.j2"),
    "cuda": ("cuda/ptx.j2", "cuda/reduce.j2", "cuda/halves.j2", "cuda/ops/gelu.j2", "cuda/gemm.j2"),
}


def templates(
    ops: Iterable[str],
    target: str = "c",
    machine: Profile | Architecture | None = None,
    precision: str = "fp32",
    model: ModelConfig | None = None,
) -> list[str]:
    """Template names in the order of the source, for the op templates in the order of their first use."""
    prelude, names = list(PRELUDE[target]), list(ops)
    if target == "cuda" and "cached_attention" in names:
        names.insert(names.index("cached_attention"), "attention")  # what the cache's kernels for prompts are made of
    if target == "cuda" and machine.uses_wgmma(precision):
        prelude[1:1] = ["cuda/ptx_sm90.j2", "cuda/tensor_map.j2"]
        prelude.append("cuda/gemm_sm90.j2")
        if model and model.head_size in attention.HOPPER_HEAD_SIZES:
            names = ["attention_sm90" if name == "attention" else name for name in names]
    return list(dict.fromkeys([*prelude, *(f"{target}/ops/{name}.j2" for name in names)]))


def gpu_options(plan: Plan | GenerationPlan) -> dict:
    """What the CUDA templates choose by besides: number formats and the architecture."""
    model, program, machine = plan.config.model, plan.config.program, plan.profile
    shapes, wgmma = products.shapes(plan.graph), machine.uses_wgmma(program.precision)
    head = products.head(plan.graph, plan.config, machine)
    if isinstance(plan, GenerationPlan):  # few rows have a kernel of their own
        shapes = [s for s in shapes if s.n > transformer.DECODED_ROWS or not s.aligned(program.precision)]
    return {
        "precision": program.precision,
        "residual": program.residual_precision if program.precision == "bf16" else "fp32",
        "arch": machine.name,
        "hopper": wgmma,
        "head_size": model.head_size,
        "fused_attention": attention.fused_items(model.head_size, program.seq_len, model.num_heads // model.num_kv_heads),
        "least_arch": machine.least,
        "head": head,
        "slopes": products.stores_slopes(plan.graph),
        "products": products.options(shapes, program.precision, machine.multiprocessors, wgmma, machine.tuned, head),
    }


def options(model: ModelConfig, evaluation_tokens: int | None = None, *, cached: bool = False) -> dict:
    """What the op templates choose by: names of widths in C, and the switches of the model.

    evaluation_tokens: that `evaluate` takes at most, where that can be fewer than the model's longest sequence.
    cached: rows are tokens at positions of their own, with a cache of keys and values.
    """
    plain = model.num_heads * model.head_size == model.channels
    grouped = model.num_kv_heads != model.num_heads
    return {
        "head": None,
        "slopes": False,
        "fused_attention": 0,
        "cached": cached,
        "positions": "CONTEXT" if cached else "MAXT",
        "attention": "C" if plain else "NH * HS",
        "attention_shape": "C" if plain else "NH*HS",
        "qkv": "3 * C" if plain and not grouped else "QKV",
        "qkv_shape": "3*C" if plain and not grouped else "QKV",
        "kv_heads": "NKV" if grouped else "NH",
        "grouped": grouped,
        "longest": "MAXT" if model.max_seq_len <= (evaluation_tokens or model.max_seq_len) else "EVAL_TOKENS",
        "window": any(model.attention_window),
        "attention_softcap": model.attention_softcap,
        "attention_scale": model.attention_scale,
        "logit_softcap": model.logit_softcap,
        "label_smoothing": model.label_smoothing,
        "z_loss": model.z_loss,
        "loss": bool(model.label_smoothing or model.z_loss),
        "norm_weight": model.norm_weight,
        "norm_bias": model.norm_bias,
        "qk_norm_weight": model.qk_norm_weight,
        "rope": {
            "theta": model.rope_theta,
            "scaling": model.rope_scaling,
            "factor": model.rope_factor,
            "low": model.rope_low_frequency_factor,
            "high": model.rope_high_frequency_factor,
            "length": model.rope_original_seq_len,
        },
    }


def with_helpers(functions: Iterable[str], names: Iterable[str], folder: Path, render: Callable[[frozenset], str]) -> frozenset:
    """The functions and the helpers they need, of those that the templates emit on demand (`"name" in functions`).

    render: the text of the section with a set of functions. What it names, it needs.
    """
    known = {found for name in names for found in re.findall(r'"(\w+)" in functions', (folder / name).read_text())}
    needed = frozenset(functions)
    while True:
        text = re.sub(r"/\*.*?\*/", "", render(needed), flags=re.S)
        named = known & set(re.findall(r"\w+", text))
        if named <= needed:
            return needed
        needed |= named
