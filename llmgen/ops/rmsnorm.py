"""Root-mean-square norm (Zhang, Sennrich 2019, arXiv:1910.07467) over the last axis:

out = inp * rstd * weight with rstd = 1 / sqrt(mean(inp^2) + epsilon). inp, out (..., c); rstd (...); weight may be absent.
"""

import numpy as np

from llmgen.graph import Kind, Step, product


def rms_forward(inp, weight, epsilon):
    rstd = 1 / np.sqrt((inp**2).mean(axis=-1) + epsilon)
    xhat = inp * rstd[..., None]
    return (xhat if weight is None else xhat * weight), rstd


def rms_backward(dout, inp, rstd, weight):
    """dinp, and dweight summed over all rows."""
    xhat = inp * rstd[..., None]
    g = dout if weight is None else dout * weight
    dinp = (g - xhat * (g * xhat).mean(axis=-1, keepdims=True)) * rstd[..., None]
    return dinp, (dout * xhat).sum(tuple(range(dout.ndim - 1)))


class RmsNorm(Kind):
    function = "rmsnorm_forward"
    template = "rmsnorm"
    outputs = ("out", "rstd")
    inputs = ("inp", "weight")
    signature = ("out", "rstd", "inp", "weight", "n", "c")
    optional = ("weight",)

    def infer(self, inputs, attrs):
        shape = inputs["inp"].shape
        return {"out": (shape, "f32"), "rstd": (shape[:-1], "f32")}

    def sizes(self, op):
        shape = op.inputs["inp"].shape
        return {"n": product(shape[:-1]), "c": shape[-1]}

    def backward(self, op, d):
        inputs = {"dout": d["out"], **op.inputs, "rstd": op.outputs["rstd"]}
        gives = {"dinp": op.inputs["inp"]}
        if "weight" in op.inputs:
            gives["dweight"] = op.inputs["weight"]
        return [Step(RMSNORM_BACKWARD, inputs, gives)]

    def flops(self, op):
        return 4 * op.inputs["inp"].count.size

    def reference(self, op, x):
        out, rstd = rms_forward(x["inp"], x["weight"], op.attrs["epsilon"])
        return {"out": out, "rstd": rstd}


class RmsNormBackward(Kind):
    """With xhat = inp * rstd and g = dout * weight: dinp = rstd * (g - xhat * mean(g * xhat))."""

    function = "rmsnorm_backward"
    template = "rmsnorm"
    outputs = ("dinp", "dweight")
    inputs = ("dout", "inp", "rstd", "weight", "addend")
    signature = ("dinp", "dweight", "dout", "inp", "rstd", "weight", "addend", "n", "c", "accumulate")
    optional = ("weight", "dweight")
    in_place = {"dinp": ("addend",)}
    addends = {"dinp": "addend"}

    def infer(self, inputs, attrs):
        shape = inputs["inp"].shape
        return {"dinp": (shape, "f32"), "dweight": (shape[-1:], "f32")}

    def sizes(self, op):
        return RMSNORM.sizes(op)

    def flops(self, op):
        return 9 * op.inputs["inp"].count.size

    def reference(self, op, x):
        dinp, dweight = rms_backward(x["dout"], x["inp"], x["rstd"], x["weight"])
        return {"dinp": dinp if x["addend"] is None else dinp + x["addend"], "dweight": dweight}


RMSNORM = RmsNorm()
RMSNORM_BACKWARD = RmsNormBackward()
