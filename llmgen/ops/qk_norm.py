"""RMS norm of each query and key head (Dehghani et al. 2023, arXiv:2302.05442); values pass unchanged.

inp, out (..., (NH + 2*NKV)*HS); rstd (..., NH + NKV); qweight, kweight (HS), shared by the heads, may be absent.
"""

import numpy as np

from llmgen.graph import Kind, Step, product
from llmgen.ops import heads
from llmgen.ops.rmsnorm import rms_backward, rms_forward


class QkNorm(Kind):
    function = "qk_norm_forward"
    template = "qk_norm"
    outputs = ("out", "rstd")
    inputs = ("inp", "qweight", "kweight")
    signature = ("out", "rstd", "inp", "qweight", "kweight", "n")
    optional = ("qweight", "kweight")

    def infer(self, inputs, attrs):
        *rows, width = inputs["inp"].shape
        return {"out": ((*rows, width), "f32"), "rstd": ((*rows, attrs["num_heads"] + attrs["num_kv_heads"]), "f32")}

    def sizes(self, op):
        return {"n": product(op.inputs["inp"].shape[:-1])}

    def backward(self, op, d):
        inputs = {"dout": d["out"], **op.inputs, "rstd": op.outputs["rstd"]}
        gives = {"dinp": op.inputs["inp"]}
        if "qweight" in op.inputs:
            gives |= {"dqweight": op.inputs["qweight"], "dkweight": op.inputs["kweight"]}
        return [Step(QK_NORM_BACKWARD, inputs, gives, op.attrs)]

    def flops(self, op):
        return 4 * op.inputs["inp"].count.size

    def reference(self, op, x):
        *rows, width = x["inp"].shape
        flat = x["inp"].reshape(1, -1, width)
        q, k, v = heads.split(flat, op.attrs["num_heads"].size, op.attrs["num_kv_heads"].size)
        (q, q_rstd), (k, k_rstd) = (
            rms_forward(part, x[weight], op.attrs["epsilon"]) for part, weight in ((q, "qweight"), (k, "kweight"))
        )
        rstd = np.concatenate([q_rstd, k_rstd], axis=1).transpose(0, 2, 1)
        return {"out": heads.join(q, k, v).reshape(x["inp"].shape), "rstd": rstd.reshape(*rows, -1)}


class QkNormBackward(Kind):
    function = "qk_norm_backward"
    template = "qk_norm"
    outputs = ("dinp", "dqweight", "dkweight")
    inputs = ("dout", "inp", "rstd", "qweight", "kweight")
    signature = ("dinp", "dqweight", "dkweight", "dout", "inp", "rstd", "qweight", "kweight", "n", "accumulate")
    optional = ("qweight", "kweight", "dqweight", "dkweight")

    def infer(self, inputs, attrs):
        head = ((attrs["head_size"],), "f32")
        return {"dinp": (inputs["inp"].shape, "f32"), "dqweight": head, "dkweight": head}

    def sizes(self, op):
        return QK_NORM.sizes(op)

    def flops(self, op):
        return 9 * op.inputs["inp"].count.size

    def reference(self, op, x):
        counts = (op.attrs["num_heads"].size, op.attrs["num_kv_heads"].size)
        q, k, _ = heads.split(x["inp"], *counts)
        dq, dk, dv = heads.split(x["dout"], *counts)
        q_rstd, k_rstd = np.split(x["rstd"].transpose(0, 2, 1), [counts[0]], axis=1)
        dq, dqweight = rms_backward(dq, q, q_rstd, x["qweight"])
        dk, dkweight = rms_backward(dk, k, k_rstd, x["kweight"])
        return {"dinp": heads.join(dq, dk, dv), "dqweight": dqweight, "dkweight": dkweight}


QK_NORM = QkNorm()
QK_NORM_BACKWARD = QkNormBackward()
