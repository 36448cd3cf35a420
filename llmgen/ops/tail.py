"""A view: the rows of a (b, t, ...) tensor from row `first` on, counted over all b*t. Nothing is moved."""

from llmgen.graph import View, product


class Tail(View):
    function = "tail"
    outputs = ("out",)
    inputs = ("inp",)

    def infer(self, inputs, attrs):
        b, t, *rest = inputs["inp"].shape
        return {"out": ((product((b, t)) - attrs["first"], *rest), inputs["inp"].dtype)}

    def offset(self, op):
        return product((op.attrs["first"], *op.inputs["inp"].shape[2:]))

    def reference(self, op, x):
        return {"out": x["inp"].reshape(-1, *x["inp"].shape[2:])[op.attrs["first"].size :]}


TAIL = Tail()
