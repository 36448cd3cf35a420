"""multiply: out = a * b, the gate of a gated MLP. scale: out = inp * factor, a constant. Any shape."""

from llmgen.graph import Kind, Step
from llmgen.ops.add import Pairwise


class Multiply(Pairwise):
    function = "multiply_forward"
    template = "multiply"

    def backward(self, op, d):
        a, b = op.inputs["a"], op.inputs["b"]
        return [Step(MULTIPLY, {"a": d["out"], "b": b}, {"out": a}), Step(MULTIPLY, {"a": d["out"], "b": a}, {"out": b})]

    def reference(self, op, x):
        return {"out": x["a"] * x["b"]}


class Scale(Kind):
    function = "scale_forward"
    template = "scale"
    outputs = ("out",)
    inputs = ("inp",)
    signature = ("out", "inp", "factor", "n")
    in_place = {"out": ("inp",)}

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def sizes(self, op):
        return {"n": op.inputs["inp"].count, "factor": op.attrs["factor"]}

    def backward(self, op, d):
        return [Step(SCALE, {"inp": d["out"]}, {"out": op.inputs["inp"]}, op.attrs)]

    def flops(self, op):
        return op.inputs["inp"].count.size

    def reference(self, op, x):
        return {"out": x["inp"] * op.attrs["factor"]}


MULTIPLY = Multiply()
SCALE = Scale()
