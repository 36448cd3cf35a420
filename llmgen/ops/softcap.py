"""out = cap * tanh(inp / cap), any shape. In training the cross-entropy does it itself: this one is for generation."""

import numpy as np

from llmgen.graph import Kind


class Softcap(Kind):
    function = "softcap_forward"
    template = "softcap"
    outputs = ("out",)
    inputs = ("inp",)
    signature = ("out", "inp", "cap", "n")
    in_place = {"out": ("inp",)}

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def sizes(self, op):
        return {"n": op.inputs["inp"].count, "cap": op.attrs["cap"]}

    def flops(self, op):
        return 10 * op.inputs["inp"].count.size

    def reference(self, op, x):
        return {"out": op.attrs["cap"] * np.tanh(x["inp"] / op.attrs["cap"])}


SOFTCAP = Softcap()
