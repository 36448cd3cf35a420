"""Causal self-attention without a T x T buffer (Dao et al. 2022, arXiv:2205.14135):

out[q] = sum over k <= q of softmax(Q[q] . K[k] / sqrt(HS)) V[k], for each head.
qkv (b, t, 3*c) holds all of Q, then K, then V, each head's HS channels together; out (b, t, c); lse (b, NH, t) is the
logarithm of the softmax's denominator, all the backward needs.
"""

import numpy as np

from llmgen.graph import Kind, Step


def heads(x, num_heads):
    """(b, t, parts*c) -> one array (b, num_heads, t, hs) for each part of c channels."""
    b, t, _ = x.shape
    hs = x.shape[2] // 3 // num_heads
    return tuple(x.reshape(b, t, 3, num_heads, hs).transpose(2, 0, 3, 1, 4))


def probabilities(q, k):
    """The causal softmax (b, num_heads, t, t) and its log-sum-exp (b, num_heads, t)."""
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    t = scores.shape[-1]
    scores = np.where(np.tri(t, dtype=bool), scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    lse = top[..., 0] + np.log(np.exp(scores - top).sum(axis=-1))
    return np.exp(scores - lse[..., None]), lse


class Attention(Kind):
    function = "attention_forward"
    template = "attention"
    outputs = ("out", "lse")
    inputs = ("qkv",)
    signature = ("out", "lse", "qkv", "b", "t")

    def infer(self, inputs, attrs):
        b, t, _ = inputs["qkv"].shape
        channels = attrs["channels"]
        return {"out": ((b, t, channels), "f32"), "lse": ((b, attrs["num_heads"], t), "f32")}

    def sizes(self, op):
        b, t, _ = op.inputs["qkv"].shape
        return {"b": b, "t": t}

    def backward(self, op, d):
        inputs = {"dout": d["out"], "qkv": op.inputs["qkv"], "out": op.outputs["out"], "lse": op.outputs["lse"]}
        return [Step(ATTENTION_BACKWARD, inputs, {"dqkv": op.inputs["qkv"]}, op.attrs)]

    def flops(self, op):
        sizes = self.sizes(op)
        return 2 * sizes["b"].size * sizes["t"].size ** 2 * op.attrs["channels"].size

    def reference(self, op, x):
        q, k, v = heads(x["qkv"], op.attrs["num_heads"].size)
        p, lse = probabilities(q, k)
        out = (p @ v).transpose(0, 2, 1, 3)
        return {"out": out.reshape(*out.shape[:2], -1), "lse": lse}


class AttentionBackward(Kind):
    """dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)) / sqrt(HS), dQ = dS K, dK = dS^T Q."""

    function = "attention_backward"
    template = "attention"
    outputs = ("dqkv",)
    inputs = ("dout", "qkv", "out", "lse")
    signature = ("dqkv", "dout", "out", "lse", "qkv", "b", "t")

    def infer(self, inputs, attrs):
        return {"dqkv": (inputs["qkv"].shape, "f32")}

    sizes = Attention.sizes

    def flops(self, op):
        return ATTENTION.flops(op) * 5 // 2

    def reference(self, op, x):
        num_heads = op.attrs["num_heads"].size
        q, k, v = heads(x["qkv"], num_heads)
        p, _ = probabilities(q, k)
        b, _, t, hs = q.shape
        dout = x["dout"].reshape(b, t, num_heads, hs).transpose(0, 2, 1, 3)
        dv = p.swapaxes(-1, -2) @ dout
        dp = dout @ v.swapaxes(-1, -2)
        ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / np.sqrt(hs)
        dqkv = np.stack([ds @ k, ds.swapaxes(-1, -2) @ q, dv])  # (3, b, num_heads, t, hs)
        return {"dqkv": dqkv.transpose(1, 3, 0, 2, 4).reshape(x["qkv"].shape)}


ATTENTION = Attention()
ATTENTION_BACKWARD = AttentionBackward()
