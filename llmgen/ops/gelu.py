"""GELU in the tanh form (Hendrycks, Gimpel 2016, arXiv:1606.08415):

out = inp/2 (1 + tanh(u)) with u = sqrt(2/pi) (inp + 0.044715 inp^3). Any shape.
"""

import numpy as np

from llmgen.graph import Kind, Step

SCALE = np.sqrt(2 / np.pi)
CUBIC = 0.044715


def gelu(x):
    return 0.5 * x * (1 + np.tanh(SCALE * (x + CUBIC * x**3)))


def gelu_derivative(x):
    tanh = np.tanh(SCALE * (x + CUBIC * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * SCALE * (1 + 3 * CUBIC * x**2)


class Gelu(Kind):
    function = "gelu_forward"
    template = "gelu"
    outputs = ("out",)
    inputs = ("inp",)
    signature = ("out", "inp", "n")
    in_place = {"out": ("inp",)}

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def sizes(self, op):
        return {"n": op.inputs["inp"].count}

    def backward(self, op, d):
        return [Step(GELU_BACKWARD, {"dout": d["out"], "inp": op.inputs["inp"]}, {"dinp": op.inputs["inp"]})]

    def flops(self, op):
        return 10 * op.inputs["inp"].count.size

    def reference(self, op, x):
        return {"out": gelu(x["inp"])}


class GeluBackward(Kind):
    function = "gelu_backward"
    template = "gelu"
    outputs = ("dinp",)
    inputs = ("dout", "inp")
    signature = ("dinp", "dout", "inp", "n")
    in_place = {"dinp": ("dout",)}

    def infer(self, inputs, attrs):
        return {"dinp": (inputs["inp"].shape, "f32")}

    def sizes(self, op):
        return {"n": op.inputs["inp"].count}

    def flops(self, op):
        return 18 * op.inputs["inp"].count.size

    def reference(self, op, x):
        return {"dinp": x["dout"] * gelu_derivative(x["inp"])}


GELU = Gelu()
GELU_BACKWARD = GeluBackward()
