"""The head's product and the cross-entropy in one, a chunk of rows at a time: the (n, vp) logits never exist in full.

inp (..., c), weight (vp, c), targets, losses (...); logits (chunk, vp) holds one chunk.
Made by the fusion of linear + cross_entropy (and their backward) in `llmgen.passes.fusion`.
"""

from llmgen.graph import Kind, product
from llmgen.ops.cross_entropy import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD


class Classifier(Kind):
    """logits holds the last chunk when the function returns."""

    function = "classifier_forward"
    template = "classifier"
    outputs = ("losses", "logits")
    inputs = ("inp", "weight", "targets")
    signature = ("losses", "logits", "inp", "weight", "targets", "n")

    def sizes(self, op):
        return {"n": product(op.inputs["targets"].shape)}

    def flops(self, op):
        vp, c = op.inputs["weight"].shape
        return (2 * c.size + 4) * vp.size * product(op.inputs["targets"].shape).size

    def reference(self, op, x):
        logits = x["inp"] @ x["weight"].T
        losses = CROSS_ENTROPY.reference(op, {"logits": logits, "targets": x["targets"]})["losses"]
        return {"losses": losses, "logits": last_chunk(op, logits)}


class ClassifierBackward(Kind):
    """Forward and backward: each chunk of logits becomes its own gradient while it is in the cache."""

    function = "classifier_forward_backward"
    template = "classifier"
    outputs = ("losses", "dinp", "dweight", "logits")
    inputs = ("inp", "weight", "targets", "dlosses")
    signature = ("losses", "dinp", "dweight", "logits", "inp", "weight", "targets", "dlosses", "n", "accumulate")

    def sizes(self, op):
        return {"n": product(op.inputs["targets"].shape)}

    def flops(self, op):
        vp, c = op.inputs["weight"].shape
        return (6 * c.size + 6) * vp.size * product(op.inputs["targets"].shape).size

    def reference(self, op, x):
        logits = x["inp"] @ x["weight"].T
        losses = CROSS_ENTROPY.reference(op, {"logits": logits, "targets": x["targets"]})["losses"]
        inputs = {"logits": logits, "targets": x["targets"], "dlosses": x["dlosses"]}
        dlogits = CROSS_ENTROPY_BACKWARD.reference(op, inputs)["dlogits"]
        flat = dlogits.reshape(-1, dlogits.shape[-1])
        return {
            "losses": losses,
            "dinp": dlogits @ x["weight"],
            "dweight": flat.T @ x["inp"].reshape(-1, x["inp"].shape[-1]),
            "logits": last_chunk(op, dlogits),
        }


def last_chunk(op, logits):
    """The rows the function leaves in its buffer, the rest of it undefined."""
    rows = op.outputs["logits"].shape[0].size
    flat = logits.reshape(-1, logits.shape[-1])
    return flat[(len(flat) - 1) // rows * rows :]


CLASSIFIER = Classifier()
CLASSIFIER_BACKWARD = ClassifierBackward()
