"""The packed row of a token: NH heads of queries, then NKV of keys, then NKV of values, each of HS channels."""

import numpy as np


def split(x, num_heads, num_kv_heads):
    """(b, t, (nh + 2 nkv) hs) -> q (b, nh, t, hs), k and v (b, nkv, t, hs)."""
    b, t, _ = x.shape
    heads = x.reshape(b, t, num_heads + 2 * num_kv_heads, -1).transpose(0, 2, 1, 3)
    return np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)


def join(q, k, v):
    """The way back."""
    heads = np.concatenate([q, k, v], axis=1).transpose(0, 2, 1, 3)
    return heads.reshape(*heads.shape[:2], -1)
