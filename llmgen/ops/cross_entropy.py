"""losses = log(sum(exp(logits))) - logits[target], over the first `vocab_size` columns. logits (..., vp), targets (...).

The padding columns beyond the vocabulary never get probability or gradient.
"""

import numpy as np

from llmgen.graph import Kind, Step


def log_sum_exp(logits):
    top = logits.max(axis=-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(logits - top).sum(axis=-1))


class CrossEntropy(Kind):
    function = "cross_entropy_forward"
    outputs = ("losses",)
    inputs = ("logits", "targets")

    def infer(self, inputs, attrs):
        return {"losses": (inputs["targets"].shape, "f32")}

    def backward(self, op, d):
        """d["losses"] is a scalar: the same for every row."""
        inputs = {"dlosses": d["losses"], **op.inputs}
        return [Step(CROSS_ENTROPY_BACKWARD, inputs, {"dlogits": op.inputs["logits"]}, op.attrs)]

    def flops(self, op):
        return 4 * op.inputs["logits"].count.size

    def reference(self, op, x):
        logits = x["logits"][..., : op.attrs["vocab_size"].size]
        picked = np.take_along_axis(logits, x["targets"][..., None], axis=-1)[..., 0]
        return {"losses": log_sum_exp(logits) - picked}


class CrossEntropyBackward(Kind):
    """dlogits = (softmax(logits) - onehot(target)) * dlosses."""

    function = "cross_entropy_backward"
    outputs = ("dlogits",)
    inputs = ("dlosses", "logits", "targets")
    in_place = {"dlogits": ("logits",)}

    def infer(self, inputs, attrs):
        return {"dlogits": (inputs["logits"].shape, "f32")}

    def flops(self, op):
        return 6 * op.inputs["logits"].count.size

    def reference(self, op, x):
        v = op.attrs["vocab_size"].size
        logits = x["logits"][..., :v]
        dlogits = np.zeros_like(x["logits"])
        dlogits[..., :v] = np.exp(logits - log_sum_exp(logits)[..., None])
        picked = np.take_along_axis(dlogits, x["targets"][..., None], axis=-1)
        np.put_along_axis(dlogits, x["targets"][..., None], picked - 1, axis=-1)
        return {"dlogits": dlogits * x["dlosses"]}


CROSS_ENTROPY = CrossEntropy()
CROSS_ENTROPY_BACKWARD = CrossEntropyBackward()
