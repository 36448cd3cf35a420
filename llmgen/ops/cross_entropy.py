"""losses = lse - logits[target] with lse = log(sum(exp(logits))), over the first `vocab_size` columns.

logits (..., vp), targets (...). The padding columns beyond the vocabulary never get probability or gradient. Options:
softcap    logits are replaced by cap * tanh(logits / cap) (Gemma 2, arXiv:2408.00118)
smoothing  the target has 1 - s of the probability, all tokens share s (Szegedy et al. 2016, arXiv:1512.00567)
z_loss     adds z * lse^2 (Chowdhery et al. 2022, arXiv:2204.02311)
"""

import numpy as np

from llmgen.graph import Kind, Step


def log_sum_exp(logits):
    top = logits.max(axis=-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(logits - top).sum(axis=-1))


def capped(logits, cap):
    return cap * np.tanh(logits / cap) if cap else logits


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
        a = op.attrs
        logits = capped(x["logits"][..., : a["vocab_size"].size], a["softcap"])
        picked = np.take_along_axis(logits, x["targets"][..., None], axis=-1)[..., 0]
        lse = log_sum_exp(logits)
        wanted = (1 - a["smoothing"]) * picked + a["smoothing"] * logits.mean(axis=-1)
        return {"losses": lse - wanted + a["z_loss"] * lse**2}


class CrossEntropyBackward(Kind):
    """dlogits = (softmax(logits) (1 + 2 z lse) - (1 - s) onehot(target) - s / v) * dlosses; a softcap adds its slope."""

    function = "cross_entropy_backward"
    outputs = ("dlogits",)
    inputs = ("dlosses", "logits", "targets")
    in_place = {"dlogits": ("logits",)}

    def infer(self, inputs, attrs):
        return {"dlogits": (inputs["logits"].shape, "f32")}

    def flops(self, op):
        return 6 * op.inputs["logits"].count.size

    def reference(self, op, x):
        a, v = op.attrs, op.attrs["vocab_size"].size
        logits = capped(x["logits"][..., :v], a["softcap"])
        lse = log_sum_exp(logits)[..., None]
        d = np.exp(logits - lse) * (1 + 2 * a["z_loss"] * lse) - a["smoothing"] / v
        picked = np.take_along_axis(d, x["targets"][..., None], axis=-1)
        np.put_along_axis(d, x["targets"][..., None], picked - (1 - a["smoothing"]), axis=-1)
        if a["softcap"]:
            d *= 1 - (logits / a["softcap"]) ** 2
        dlogits = np.zeros_like(x["logits"])
        dlogits[..., :v] = d * x["dlosses"]
        return {"dlogits": dlogits}


CROSS_ENTROPY = CrossEntropy()
CROSS_ENTROPY_BACKWARD = CrossEntropyBackward()
