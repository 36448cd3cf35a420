"""out[i] = wte[tokens[i]]: a row of the table for each token. out (b, t, c), tokens (b, t), wte (rows, c)."""

import numpy as np

from llmgen.graph import Kind, Step, product


class TokenEmbedding(Kind):
    function = "token_embedding_forward"
    template = "token_embedding"
    outputs = ("out",)
    inputs = ("tokens", "wte")
    signature = ("out", "tokens", "wte", "n", "c")

    def infer(self, inputs, attrs):
        return {"out": ((*inputs["tokens"].shape, inputs["wte"].shape[1]), "f32")}

    def sizes(self, op):
        return {"n": product(op.inputs["tokens"].shape), "c": op.inputs["wte"].shape[1]}

    def backward(self, op, d):
        inputs = {"dout": d["out"], "tokens": op.inputs["tokens"]}
        rows = op.inputs["wte"].shape[0]
        return [Step(TOKEN_EMBEDDING_BACKWARD, inputs, {"dwte": op.inputs["wte"]}, {"rows": rows})]

    def bytes(self, op):
        return op.inputs["tokens"].bytes + 2 * op.outputs["out"].bytes

    def reference(self, op, x):
        return {"out": x["wte"][x["tokens"]]}


class TokenEmbeddingBackward(Kind):
    function = "token_embedding_backward"
    template = "token_embedding"
    outputs = ("dwte",)
    inputs = ("dout", "tokens")
    signature = ("dwte", "dout", "tokens", "rows", "n", "c", "accumulate")

    def infer(self, inputs, attrs):
        return {"dwte": ((attrs["rows"], inputs["dout"].shape[-1]), "f32")}

    def sizes(self, op):
        n = product(op.inputs["tokens"].shape)
        return {"rows": op.attrs["rows"], "n": n, "c": op.inputs["dout"].shape[-1]}

    def flops(self, op):
        return op.inputs["dout"].count.size

    def bytes(self, op):
        return 3 * op.inputs["dout"].bytes

    def reference(self, op, x):
        dwte = np.zeros((op.attrs["rows"].size, x["dout"].shape[-1]))
        np.add.at(dwte, x["tokens"].reshape(-1), x["dout"].reshape(-1, dwte.shape[1]))
        return {"dwte": dwte}


TOKEN_EMBEDDING = TokenEmbedding()
TOKEN_EMBEDDING_BACKWARD = TokenEmbeddingBackward()
