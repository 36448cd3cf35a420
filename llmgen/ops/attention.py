"""Causal self-attention without a T x T buffer (Dao et al. 2022, arXiv:2205.14135):

out[q] = sum over visible k of softmax(score(q, k)) V[k] with score = scale * Q[q] . K[k], for each head; with a softcap
score = cap * tanh(score / cap). Visible are k <= q, and with a window also k > q - window.
qkv (b, t, (NH + 2*NKV)*HS) holds the heads of Q, then K, then V; NH / NKV query heads share one of K and V
(Ainslie et al. 2023, arXiv:2305.13245). out (b, t, NH*HS); lse (b, NH, t) is the logarithm of the softmax's denominator.
"""

import numpy as np

from llmgen.graph import Kind, Step
from llmgen.ops import heads


class _Head:
    """What forward and backward compute alike, all heads at once: (b, nh, t, ...)."""

    def __init__(self, op, x):
        self.attrs = op.attrs
        self.counts = (op.attrs["num_heads"].size, op.attrs["num_kv_heads"].size)
        self.group = self.counts[0] // self.counts[1]
        q, k, v = heads.split(x["qkv"], *self.counts)
        self.q, self.k, self.v = q, np.repeat(k, self.group, axis=1), np.repeat(v, self.group, axis=1)
        scores = op.attrs["scale"] * (self.q @ self.k.swapaxes(-1, -2))
        cap = op.attrs["softcap"]
        self.slope = 1.0  # derivative of the softcap
        if cap:
            tanh = np.tanh(scores / cap)
            scores, self.slope = cap * tanh, 1 - tanh**2
        t = scores.shape[-1]
        age = np.arange(t)[:, None] - np.arange(t)
        visible = age >= 0
        if x["window"] is not None and x["window"] > 0:
            visible &= age < x["window"]
        scores = np.where(visible, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        self.lse = top[..., 0] + np.log(np.exp(scores - top).sum(axis=-1))
        self.p = np.exp(scores - self.lse[..., None])

    def shared(self, d):
        """Sums the gradients of the query heads that share a head of K or V."""
        b, _, t, hs = d.shape
        return d.reshape(b, self.counts[1], self.group, t, hs).sum(axis=2)


def work(op) -> int:
    """Query-key pairs, counted as half of all for causality; a window is not counted off."""
    b, t, _ = op.inputs["qkv"].shape
    return b.size * op.attrs["num_heads"].size * t.size**2 // 2


class Attention(Kind):
    function = "attention_forward"
    template = "attention"
    outputs = ("out", "lse")
    inputs = ("qkv", "window")
    signature = ("out", "lse", "qkv", "window", "b", "t")
    optional = ("window",)

    def infer(self, inputs, attrs):
        b, t, _ = inputs["qkv"].shape
        return {"out": ((b, t, attrs["channels"]), "f32"), "lse": ((b, attrs["num_heads"], t), "f32")}

    def sizes(self, op):
        b, t, _ = op.inputs["qkv"].shape
        return {"b": b, "t": t}

    def backward(self, op, d):
        inputs = {"dout": d["out"], **op.inputs, **op.outputs}
        return [Step(ATTENTION_BACKWARD, inputs, {"dqkv": op.inputs["qkv"]}, op.attrs)]

    def flops(self, op):
        return 4 * work(op) * op.attrs["head_size"].size

    def reference(self, op, x):
        h = _Head(op, x)
        out = (h.p @ h.v).transpose(0, 2, 1, 3)
        return {"out": out.reshape(*out.shape[:2], -1), "lse": h.lse}


class AttentionBackward(Kind):
    """dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)) * scale, dQ = dS K, dK = dS^T Q; a softcap adds its slope to dS."""

    function = "attention_backward"
    template = "attention"
    outputs = ("dqkv",)
    inputs = ("dout", "out", "lse", "qkv", "window")
    signature = ("dqkv", "dout", "out", "lse", "qkv", "window", "b", "t")
    optional = ("window",)

    def infer(self, inputs, attrs):
        return {"dqkv": (inputs["qkv"].shape, "f32")}

    sizes = Attention.sizes

    def flops(self, op):
        return 10 * work(op) * op.attrs["head_size"].size

    def reference(self, op, x):
        h = _Head(op, x)
        b, _, t, hs = h.q.shape
        dout = x["dout"].reshape(b, t, h.counts[0], hs).transpose(0, 2, 1, 3)
        dv = h.p.swapaxes(-1, -2) @ dout
        dp = dout @ h.v.swapaxes(-1, -2)
        ds = h.p * (dp - (h.p * dp).sum(axis=-1, keepdims=True)) * h.slope * op.attrs["scale"]
        return {"dqkv": heads.join(ds @ h.k, h.shared(ds.swapaxes(-1, -2) @ h.q), h.shared(dv))}


ATTENTION = Attention()
ATTENTION_BACKWARD = AttentionBackward()
