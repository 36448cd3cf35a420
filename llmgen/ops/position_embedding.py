"""out[b, t] = inp[b, t] + wpe[t]: learned positions. inp, out (b, t, c), wpe (rows, c) with rows >= t."""

import numpy as np

from llmgen.graph import Kind, Step


class PositionEmbedding(Kind):
    function = "position_embedding_forward"
    template = "position_embedding"
    outputs = ("out",)
    inputs = ("inp", "wpe")
    signature = ("out", "inp", "wpe", "b", "t", "c")
    in_place = {"out": ("inp",)}

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def sizes(self, op):
        return dict(zip("btc", op.inputs["inp"].shape, strict=True))

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
        return {"out": x["inp"] + x["wpe"][: x["inp"].shape[1]]}


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
