"""add: out = a + b, the residual connection. copy: out = inp. zero: out = 0, shaped as attribute "like". Any shape."""

import numpy as np

from llmgen.graph import Kind, Step


class Pairwise(Kind):
    """out is made of a and b, element by element."""

    outputs = ("out",)
    inputs = ("a", "b")
    signature = ("out", "a", "b", "n")
    in_place = {"out": ("a", "b")}

    def infer(self, inputs, attrs):
        return {"out": (inputs["a"].shape, "f32")}

    def sizes(self, op):
        return {"n": op.inputs["a"].count}

    def flops(self, op):
        return op.inputs["a"].count.size


class Add(Pairwise):
    function = "add_forward"
    template = "add"

    def backward(self, op, d):
        return [Step(same=d["out"], to=(op.inputs["a"], op.inputs["b"]))]

    def reference(self, op, x):
        return {"out": x["a"] + x["b"]}


class Copy(Kind):
    function = "copy_forward"
    template = "copy"
    outputs = ("out",)
    inputs = ("inp",)
    signature = ("out", "inp", "n")

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def sizes(self, op):
        return {"n": op.inputs["inp"].count}

    def backward(self, op, d):
        return [Step(same=d["out"], to=(op.inputs["inp"],))]

    def reference(self, op, x):
        return {"out": x["inp"].copy()}


class Zero(Kind):
    function = "zero"
    template = "zero"
    outputs = ("out",)
    signature = ("out", "n")

    def infer(self, inputs, attrs):
        return {"out": (attrs["like"].shape, "f32")}

    def sizes(self, op):
        return {"n": op.outputs["out"].count}

    def reference(self, op, x):
        return {"out": np.zeros(op.attrs["like"].sizes)}


ADD = Add()
COPY = Copy()
ZERO = Zero()
