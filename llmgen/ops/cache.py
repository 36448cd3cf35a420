"""Attention with a cache of keys and values, for generation: a token is computed once, and later ones look back at it.

A call takes n tokens of any sequences: token i stands at positions[i] of sequence sequences[i]. Tokens of one sequence come
in their order, and what stands before them is in the cache. keys, values (NKV, CACHE, HS) are what is kept of one sequence;
here, in numpy, a sequence's number is the first index.
"""

import numpy as np

from llmgen.graph import Kind
from llmgen.ops import heads


class CacheAppend(Kind):
    """keys[sequences[i], :, positions[i]] = the keys of token i, and values alike. qkv (n, (NH + 2*NKV)*HS)."""

    function = "cache_append"
    template = "cached_attention"
    outputs = ("keys", "values")
    inputs = ("qkv", "sequences", "positions", "keys", "values")
    signature = ("keys", "values", "qkv", "sequences", "positions", "n")

    def sizes(self, op):
        return {"n": op.inputs["qkv"].shape[0]}

    def reference(self, op, x):
        _, k, v = heads.split(x["qkv"][None], op.attrs["num_heads"].size, op.attrs["num_kv_heads"].size)
        keys, values = x["keys"].copy(), x["values"].copy()
        for i, at in enumerate(zip(x["sequences"], x["positions"], strict=True)):
            keys[at[0], :, at[1]], values[at[0], :, at[1]] = k[0, :, i], v[0, :, i]
        return {"keys": keys, "values": values}


class CachedAttention(Kind):
    """Each token's attention to its sequence, itself the last: see `llmgen.ops.attention`. out (n, NH*HS)."""

    function = "cached_attention"
    template = "cached_attention"
    outputs = ("out",)
    inputs = ("qkv", "keys", "values", "window", "sequences", "positions")
    signature = ("out", "qkv", "keys", "values", "window", "sequences", "positions", "n")
    optional = ("window",)

    def infer(self, inputs, attrs):
        return {"out": ((inputs["qkv"].shape[0], attrs["channels"]), "f32")}

    sizes = CacheAppend.sizes

    def flops(self, op):
        """Of the longest sequences that the cache holds."""
        keys = op.inputs["keys"].shape[1].size
        return 4 * op.inputs["qkv"].shape[0].size * keys * op.attrs["num_heads"].size * op.attrs["head_size"].size

    def reference(self, op, x):
        nh, nkv, cap = op.attrs["num_heads"].size, op.attrs["num_kv_heads"].size, op.attrs["softcap"]
        q, _, _ = heads.split(x["qkv"][None], nh, nkv)
        out = []
        for i, (sequence, position) in enumerate(zip(x["sequences"], x["positions"], strict=True)):
            first = max(0, position + 1 - x["window"]) if x["window"] is not None and x["window"] > 0 else 0
            k, v = (np.repeat(x[name][sequence, :, first : position + 1], nh // nkv, axis=0) for name in ("keys", "values"))
            scores = op.attrs["scale"] * np.einsum("hc,htc->ht", q[0, :, i], k)
            scores = cap * np.tanh(scores / cap) if cap else scores
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out.append(np.einsum("ht,htc->hc", p / p.sum(axis=-1, keepdims=True), v).reshape(-1))
        return {"out": np.array(out)}


CACHE_APPEND = CacheAppend()
CACHED_ATTENTION = CachedAttention()
