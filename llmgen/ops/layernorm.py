"""Layer norm (Ba, Kiros, Hinton 2016, arXiv:1607.06450) over the last axis:

out = (inp - mean) * rstd * weight + bias, with rstd = 1 / sqrt(variance + epsilon). inp, out (..., c); mean, rstd (...).
Weight and bias may be absent.
"""

import numpy as np

from llmgen.graph import Kind, Step, product


class LayerNorm(Kind):
    function = "layernorm_forward"
    template = "layernorm"
    outputs = ("out", "mean", "rstd")
    inputs = ("inp", "weight", "bias")
    signature = ("out", "mean", "rstd", "inp", "weight", "bias", "n", "c")
    optional = ("weight", "bias")

    def infer(self, inputs, attrs):
        shape = inputs["inp"].shape
        return {"out": (shape, "f32"), "mean": (shape[:-1], "f32"), "rstd": (shape[:-1], "f32")}

    def sizes(self, op):
        shape = op.inputs["inp"].shape
        return {"n": product(shape[:-1]), "c": shape[-1]}

    def backward(self, op, d):
        inputs = {"dout": d["out"], **op.inputs, "mean": op.outputs["mean"], "rstd": op.outputs["rstd"]}
        inputs.pop("bias", None)
        gives = {"d" + name: t for name, t in op.inputs.items()}
        return [Step(LAYERNORM_BACKWARD, inputs, gives)]

    def flops(self, op):
        return 8 * op.inputs["inp"].count.size

    def reference(self, op, x):
        mean = x["inp"].mean(axis=-1)
        centered = x["inp"] - mean[..., None]
        rstd = 1 / np.sqrt((centered**2).mean(axis=-1) + op.attrs["epsilon"])
        out = centered * rstd[..., None]
        out = out if x["weight"] is None else out * x["weight"]
        return {"out": out if x["bias"] is None else out + x["bias"], "mean": mean, "rstd": rstd}


class LayerNormBackward(Kind):
    """With xhat = (inp - mean) * rstd and g = dout * weight: dinp = rstd * (g - mean(g) - xhat * mean(g * xhat)).

    dsum, where a fusion asks for it, is the sum of dinp over the rows: the gradient of a bias that was added to inp.
    """

    function = "layernorm_backward"
    template = "layernorm"
    outputs = ("dinp", "dweight", "dbias", "dsum")
    inputs = ("dout", "inp", "mean", "rstd", "weight", "addend")
    signature = (
        *("dinp", "dweight", "dbias", "dout", "inp", "mean", "rstd", "weight", "addend", "n", "c"),
        *("accumulate", "dsum"),
    )
    optional = ("weight", "dweight", "dbias", "dsum")
    in_place = {"dinp": ("addend",)}
    addends = {"dinp": "addend"}

    def infer(self, inputs, attrs):
        shape, channels = inputs["inp"].shape, inputs["inp"].shape[-1:]
        return {"dinp": (shape, "f32"), "dweight": (channels, "f32"), "dbias": (channels, "f32")}

    def sizes(self, op):
        return LAYERNORM.sizes(op)

    def flops(self, op):
        return 14 * op.inputs["inp"].count.size

    def reference(self, op, x):
        xhat = (x["inp"] - x["mean"][..., None]) * x["rstd"][..., None]
        g = x["dout"] if x["weight"] is None else x["dout"] * x["weight"]
        along = -1
        dinp = g - g.mean(along, keepdims=True) - xhat * (g * xhat).mean(along, keepdims=True)
        dinp = dinp * x["rstd"][..., None]
        if x["addend"] is not None:
            dinp = dinp + x["addend"]
        rows = tuple(range(xhat.ndim - 1))
        sums = {"dweight": (x["dout"] * xhat).sum(rows), "dbias": x["dout"].sum(rows), "dsum": dinp.sum(rows)}
        return {"dinp": dinp, **sums}


LAYERNORM = LayerNorm()
LAYERNORM_BACKWARD = LayerNormBackward()
