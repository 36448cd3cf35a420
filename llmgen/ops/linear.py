"""out = inp weight^T + bias (+ addend). inp (..., c), weight (oc, c), bias (oc), out (..., oc)."""

from llmgen.graph import Kind, Step, product
from llmgen.ops.activation import gelu, gelu_derivative


class Linear(Kind):
    function = "linear_forward"
    template = "linear"
    outputs = ("out",)
    inputs = ("inp", "weight", "bias", "addend")
    signature = ("out", "inp", "weight", "bias", "addend", "n", "c", "oc")
    in_place = {"out": ("addend",)}
    addends = {"out": "addend"}

    def infer(self, inputs, attrs):
        return {"out": ((*inputs["inp"].shape[:-1], inputs["weight"].shape[0]), "f32")}

    def sizes(self, op):
        oc, c = op.inputs["weight"].shape
        return {"n": product(op.inputs["inp"].shape[:-1]), "c": c, "oc": oc}

    def backward(self, op, d):
        gives = {"dweight": op.inputs["weight"]}
        if "bias" in op.inputs:
            gives["dbias"] = op.inputs["bias"]
        return [
            Step(LINEAR_BACKWARD_WEIGHT, {"dout": d["out"], "inp": op.inputs["inp"]}, gives),
            Step(
                LINEAR_BACKWARD_INPUT,
                {"dout": d["out"], "weight": op.inputs["weight"]},
                {"dinp": op.inputs["inp"]},
            ),
        ]

    def flops(self, op):
        sizes = self.sizes(op)
        return 2 * sizes["n"].size * sizes["c"].size * sizes["oc"].size

    def reference(self, op, x):
        out = x["inp"] @ x["weight"].T
        if x["bias"] is not None:
            out = out + x["bias"]
        if x["addend"] is not None:
            out = out + x["addend"]
        return {"out": out}


class LinearBackwardInput(Kind):
    """dinp = dout weight."""

    function = "linear_backward_input"
    template = "linear"
    outputs = ("dinp",)
    inputs = ("dout", "weight")
    signature = ("dinp", "dout", "weight", "n", "c", "oc")

    def infer(self, inputs, attrs):
        return {"dinp": ((*inputs["dout"].shape[:-1], inputs["weight"].shape[1]), "f32")}

    def sizes(self, op):
        oc, c = op.inputs["weight"].shape
        return {"n": product(op.inputs["dout"].shape[:-1]), "c": c, "oc": oc}

    flops = Linear.flops

    def reference(self, op, x):
        return {"dinp": x["dout"] @ x["weight"]}


class LinearBackwardWeight(Kind):
    """dweight = dout^T inp, dbias = the column sums of dout."""

    function = "linear_backward_weight"
    template = "linear"
    outputs = ("dweight", "dbias")
    inputs = ("dout", "inp")
    signature = ("dweight", "dbias", "dout", "inp", "n", "c", "oc", "accumulate")

    def infer(self, inputs, attrs):
        oc, c = inputs["dout"].shape[-1], inputs["inp"].shape[-1]
        return {"dweight": ((oc, c), "f32"), "dbias": ((oc,), "f32")}

    def sizes(self, op):
        shape = op.inputs["inp"].shape
        return {"n": product(shape[:-1]), "c": shape[-1], "oc": op.inputs["dout"].shape[-1]}

    flops = Linear.flops

    def reference(self, op, x):
        dout = x["dout"].reshape(-1, x["dout"].shape[-1])
        return {"dweight": dout.T @ x["inp"].reshape(-1, x["inp"].shape[-1]), "dbias": dout.sum(axis=0)}


class LinearGelu(Kind):
    """linear and gelu in one: pre = inp weight^T + bias, out = gelu(pre). The backward reads pre."""

    function = "linear_gelu_forward"
    template = "linear"
    outputs = ("out", "pre")
    inputs = ("inp", "weight", "bias")
    signature = ("out", "pre", "inp", "weight", "bias", "n", "c", "oc")

    sizes = Linear.sizes
    flops = Linear.flops

    def reference(self, op, x):
        pre = LINEAR.reference(op, {**x, "addend": None})["out"]
        return {"out": gelu(pre), "pre": pre}


class LinearGeluSlope(LinearGelu):
    """The same, leaving slope = gelu'(pre) in place of pre: the backward multiplies by it, and need not compute it."""

    outputs = ("out", "slope")
    signature = ("out", "slope", "inp", "weight", "bias", "n", "c", "oc")

    def reference(self, op, x):
        made = super().reference(op, x)
        return {"out": made["out"], "slope": gelu_derivative(made["pre"])}


class LinearBackwardInputGelu(LinearBackwardInput):
    """dinp = dout weight * gelu'(pre): the gradient passes the linear layer and the GELU before it.

    dsum, where a fusion asks for it, is the sum of dinp over the rows: the gradient of the bias that was added to make pre.
    """

    function = "linear_backward_input_gelu"
    outputs = ("dinp", "dsum")
    inputs = ("dout", "weight", "pre")
    signature = ("dinp", "dout", "weight", "pre", "n", "c", "oc", "dsum", "accumulate")
    optional = ("dsum",)

    def reference(self, op, x):
        dinp = x["dout"] @ x["weight"] * gelu_derivative(x["pre"])
        return {"dinp": dinp, "dsum": dinp.reshape(-1, dinp.shape[-1]).sum(axis=0)}


class LinearBackwardInputSlope(LinearBackwardInputGelu):
    """The same where the forward left slope = gelu'(pre)."""

    inputs = ("dout", "weight", "slope")
    signature = ("dinp", "dout", "weight", "slope", "n", "c", "oc", "dsum", "accumulate")

    def reference(self, op, x):
        dinp = x["dout"] @ x["weight"] * x["slope"]
        return {"dinp": dinp, "dsum": dinp.reshape(-1, dinp.shape[-1]).sum(axis=0)}


LINEAR = Linear()
LINEAR_BACKWARD_INPUT = LinearBackwardInput()
LINEAR_BACKWARD_INPUT_GELU = LinearBackwardInputGelu()
LINEAR_BACKWARD_INPUT_SLOPE = LinearBackwardInputSlope()
LINEAR_BACKWARD_WEIGHT = LinearBackwardWeight()
LINEAR_GELU = LinearGelu()
LINEAR_GELU_SLOPE = LinearGeluSlope()
