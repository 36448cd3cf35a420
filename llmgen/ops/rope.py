"""Rotary positions (Su et al. 2021, arXiv:2104.09864) of queries and keys, in HuggingFace's half-split order:

with r rotated channels of a head, channels i and i + r/2 (i < r/2) turn by the angle position * frequency[i].
inp, out (b, t, (NH + 2*NKV)*HS); cos, sin (MAXT, r/2), computed once. With `positions` (n), inp and out are (n, ...), and
row i stands at positions[i]: so generation has it.
"""

import math

import numpy as np

from llmgen.graph import Kind, Step
from llmgen.ops import heads


def frequencies(attrs: dict) -> np.ndarray:
    """theta^(-2i/r) for i < r/2, with Llama 3's scaling of the low ones (its `rope_scaling` "llama3")."""
    half = attrs["half"].size
    plain = attrs["theta"] ** (-np.arange(half) / half)
    if attrs["scaling"] == "none":
        return plain
    wavelength = 2 * math.pi / plain
    low, high, length = attrs["low_frequency_factor"], attrs["high_frequency_factor"], attrs["original_seq_len"]
    kept = np.clip((length / wavelength - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / attrs["factor"]


def rotated(x, cos, sin):
    """x (..., t, hs); cos, sin (t, r/2)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def turned(op, inp, direction, positions=None):
    """inp (b, t, (NH + 2*NKV)*HS) with its queries and keys rotated."""
    angles = (np.arange(inp.shape[1]) if positions is None else positions)[:, None] * frequencies(op.attrs)
    cos, sin = np.cos(angles), np.sin(angles) * direction
    q, k, v = heads.split(inp, op.attrs["num_heads"].size, op.attrs["num_kv_heads"].size)
    return heads.join(rotated(q, cos, sin), rotated(k, cos, sin), v)


class Rope(Kind):
    function = "rope_forward"
    template = "rope"
    outputs = ("out",)
    inputs = ("inp", "cos", "sin", "positions")
    signature = ("out", "inp", "cos", "sin", "positions", "n", "b", "t")
    optional = ("positions", "n", "b", "t")
    in_place = {"out": ("inp",)}
    tables = ("rope_tables", ("cos", "sin"))

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def sizes(self, op):
        *rows, _ = op.inputs["inp"].shape
        return dict(zip("n" if "positions" in op.inputs else "bt", rows, strict=True))

    def backward(self, op, d):
        inputs = {"dout": d["out"], "cos": op.inputs["cos"], "sin": op.inputs["sin"]}
        return [Step(ROPE_BACKWARD, inputs, {"dinp": op.inputs["inp"]}, op.attrs)]

    def flops(self, op):
        return 3 * op.inputs["inp"].count.size

    def reference(self, op, x):
        if x.get("positions") is None:
            return {"out": turned(op, x["inp"], 1)}
        return {"out": turned(op, x["inp"][None], 1, x["positions"])[0]}


class RopeBackward(Kind):
    """The rotation by the opposite angle."""

    function = "rope_backward"
    template = "rope"
    outputs = ("dinp",)
    inputs = ("dout", "cos", "sin")
    signature = ("dinp", "dout", "cos", "sin", "b", "t")
    in_place = {"dinp": ("dout",)}
    tables = Rope.tables

    def infer(self, inputs, attrs):
        return {"dinp": (inputs["dout"].shape, "f32")}

    def sizes(self, op):
        b, t, _ = op.inputs["dout"].shape
        return {"b": b, "t": t}

    def flops(self, op):
        return 3 * op.inputs["dout"].count.size

    def reference(self, op, x):
        return {"dinp": turned(op, x["dout"], -1)}


ROPE = Rope()
ROPE_BACKWARD = RopeBackward()
