"""Activations, element by element, any shape: gelu (tanh form, Hendrycks, Gimpel 2016, arXiv:1606.08415), gelu_exact,
relu, relu_squared (So et al. 2021, arXiv:2109.08668), silu.
"""

import math

import numpy as np

from llmgen.graph import Kind, Step

GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715
_erf = np.vectorize(math.erf, otypes=[float])


def gelu(x):
    return 0.5 * x * (1 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3)))


def gelu_derivative(x):
    tanh = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x**2)


def gelu_exact(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def gelu_exact_derivative(x):
    return 0.5 * (1 + _erf(x / math.sqrt(2))) + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def silu(x):
    return x / (1 + np.exp(-x))


def silu_derivative(x):
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


class Activation(Kind):
    outputs = ("out",)
    inputs = ("inp",)
    signature = ("out", "inp", "n")
    in_place = {"out": ("inp",)}

    def __init__(self, name, value, derivative, flops):
        self.function, self.template = f"{name}_forward", name
        self.value, self.cost = value, flops
        self.derivative = ActivationBackward(name, derivative, 2 * flops)

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def sizes(self, op):
        return {"n": op.inputs["inp"].count}

    def backward(self, op, d):
        return [Step(self.derivative, {"dout": d["out"], "inp": op.inputs["inp"]}, {"dinp": op.inputs["inp"]})]

    def flops(self, op):
        return self.cost * op.inputs["inp"].count.size

    def reference(self, op, x):
        return {"out": self.value(x["inp"])}


class ActivationBackward(Kind):
    outputs = ("dinp",)
    inputs = ("dout", "inp")
    signature = ("dinp", "dout", "inp", "n")
    in_place = {"dinp": ("dout",)}

    def __init__(self, name, value, flops):
        self.function, self.template = f"{name}_backward", name
        self.value, self.cost = value, flops

    def infer(self, inputs, attrs):
        return {"dinp": (inputs["inp"].shape, "f32")}

    sizes = Activation.sizes
    flops = Activation.flops

    def reference(self, op, x):
        return {"dinp": x["dout"] * self.value(x["inp"])}


GELU = Activation("gelu", gelu, gelu_derivative, 10)
GELU_EXACT = Activation("gelu_exact", gelu_exact, gelu_exact_derivative, 20)
RELU = Activation("relu", lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float), 1)
RELU_SQUARED = Activation("relu_squared", lambda x: np.maximum(x, 0) ** 2, lambda x: 2 * np.maximum(x, 0), 2)
SILU = Activation("silu", silu, silu_derivative, 10)
ACTIVATIONS = {"gelu": GELU, "gelu_exact": GELU_EXACT, "relu": RELU, "relu_squared": RELU_SQUARED, "silu": SILU}
