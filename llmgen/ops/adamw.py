"""AdamW (Loshchilov, Hutter 2017, arXiv:1711.05101) on ranges of the flat parameter buffer; the sum of squares for clipping.

g = grad * grad_scale; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
param -= learning_rate * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon) + weight_decay * param).
"""

import numpy as np

from llmgen.graph import Kind


class SumOfSquares(Kind):
    function = "sum_of_squares"
    template = "global_norm"
    outputs = ("total",)
    inputs = ("x",)
    signature = ("x", "n")

    def sizes(self, op):
        return {"n": op.inputs["x"].count}

    def flops(self, op):
        return 2 * op.inputs["x"].count.size

    def reference(self, op, x):
        return {"total": np.sum(x["x"] ** 2)}


class AdamW(Kind):
    """Attributes at run time, in x: grad_scale, learning_rate, beta1, beta2, epsilon, weight_decay, step (from 1)."""

    function = "adamw_update"
    template = "adamw"
    outputs = ("param", "m", "v")
    inputs = ("param", "m", "v", "grad")

    def flops(self, op):
        return 14 * op.inputs["param"].count.size

    def bytes(self, op):
        return 7 * op.inputs["param"].bytes

    def reference(self, op, x):
        g = x["grad"] * x["grad_scale"]
        m = x["beta1"] * x["m"] + (1 - x["beta1"]) * g
        v = x["beta2"] * x["v"] + (1 - x["beta2"]) * g**2
        mhat, vhat = m / (1 - x["beta1"] ** x["step"]), v / (1 - x["beta2"] ** x["step"])
        change = mhat / (np.sqrt(vhat) + x["epsilon"]) + x["weight_decay"] * x["param"]
        return {"param": x["param"] - x["learning_rate"] * change, "m": m, "v": v}


SUM_OF_SQUARES = SumOfSquares()
ADAMW = AdamW()
