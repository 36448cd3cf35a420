"""out[b, t] = inp[b, t] + wpe[t]: learned positions. inp, out (b, t, c), wpe (rows, c) with rows >= t.

With `positions` (n), out[i] = inp[i] + wpe[positions[i]] for inp, out (n, c): generation says where each token stands.
"""

import numpy as np

from llmgen.graph import Kind, Step


class PositionEmbedding(Kind):
    function = "position_embedding_forward"
    template = "position_embedding"
    outputs = ("out",)
    inputs = ("inp", "wpe", "positions")
    signature = ("out", "inp", "wpe", "positions", "n", "b", "t", "c")
    optional = ("positions", "n", "b", "t")
    in_place = {"out": ("inp",)}

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def sizes(self, op):
        return dict(zip("nc" if "positions" in op.inputs else "btc", op.inputs["inp"].shape, strict=True))

    def backward(self, op, d):
        step = Step(
            POSITION_EMBEDDING_BACKWARD,
            {"dout": d["out"]},
            {"dwpe": op.inputs["wpe"]},
            {"rows": op.inputs["wpe"].shape[0]},
        )
        return [Step(same=d["out"], to=(op.inputs["inp"],)), step]

    def flops(self, op):
        return op.outputs["out"].count.size

    def reference(self, op, x):
        at = np.arange(x["inp"].shape[1]) if x.get("positions") is None else x["positions"]
        return {"out": x["inp"] + x["wpe"][at]}


class PositionEmbeddingBackward(Kind):
    function = "position_embedding_backward"
    template = "position_embedding"
    outputs = ("dwpe",)
    inputs = ("dout",)
    signature = ("dwpe", "dout", "rows", "b", "t", "c", "accumulate")

    def infer(self, inputs, attrs):
        return {"dwpe": ((attrs["rows"], inputs["dout"].shape[-1]), "f32")}

    def sizes(self, op):
        return {"rows": op.attrs["rows"], **dict(zip("btc", op.inputs["dout"].shape, strict=True))}

    def flops(self, op):
        return op.inputs["dout"].count.size

    def reference(self, op, x):
        dwpe = np.zeros((op.attrs["rows"].size, x["dout"].shape[-1]))
        dwpe[: x["dout"].shape[1]] = x["dout"].sum(axis=0)
        return {"dwpe": dwpe}


POSITION_EMBEDDING = PositionEmbedding()
POSITION_EMBEDDING_BACKWARD = PositionEmbeddingBackward()
