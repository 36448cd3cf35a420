"""out[i] = inp[rows[i]]: those rows of which the logits are wanted. inp (n, c), rows (m), out (m, c)."""

from llmgen.graph import Kind


class Select(Kind):
    function = "select_rows"
    template = "select"
    outputs = ("out",)
    inputs = ("inp", "rows")
    signature = ("out", "inp", "rows", "m", "c")

    def infer(self, inputs, attrs):
        return {"out": ((*inputs["rows"].shape, inputs["inp"].shape[-1]), "f32")}

    def sizes(self, op):
        return {"m": op.inputs["rows"].shape[0], "c": op.inputs["inp"].shape[-1]}

    def bytes(self, op):
        return op.inputs["rows"].bytes + 2 * op.outputs["out"].bytes

    def reference(self, op, x):
        return {"out": x["inp"][x["rows"]]}


SELECT = Select()
