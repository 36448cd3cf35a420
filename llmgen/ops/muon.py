"""Muon (Jordan et al. 2024): momentum made orthogonal by Newton-Schulz iteration, for matrices inside the layers.

g = grad * grad_scale; m = 0.95 m + g; u = g + 0.95 m (Nesterov); o = orthogonal(u), for each part of the rows by itself;
param -= learning_rate * (0.2 sqrt(max(rows, columns)) o + weight_decay * param): the factor gives updates the size of AdamW's,
so that both share one learning rate (Liu et al. 2025, arXiv:2502.16982).
"""

import numpy as np

from llmgen.graph import Kind, Op

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
UPDATE_SIZE = 0.2


def orthogonal(x):
    """Singular values of x (rows, columns) brought near 1: x <- a x + (b s + c s^2) x with s = x x^T, five times."""
    a, b, c = COEFFICIENTS
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(ITERATIONS):
        if x.shape[0] <= x.shape[1]:
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        else:
            s = x.T @ x
            x = a * x + x @ (b * s + c * s @ s)
    return x


class Muon(Kind):
    """Attribute parts: the numbers of rows that are orthogonal by themselves (queries, keys, values). In x as AdamW's."""

    function = "muon_update"
    template = "muon"
    outputs = ("param", "m")
    inputs = ("param", "m", "grad")

    def scratch_values(self, op: Op) -> int:
        """Floats: the update, the next one, and two squares of the shorter side, for the largest part."""
        columns = op.inputs["param"].shape[1].size
        return max(2 * rows * columns + 2 * min(rows, columns) ** 2 for rows in op.attrs["parts"])

    def flops(self, op):
        columns = op.inputs["param"].shape[1].size
        products = sum(4 * r * columns * min(r, columns) + 2 * min(r, columns) ** 3 for r in op.attrs["parts"])
        return ITERATIONS * products

    def bytes(self, op):
        return 5 * op.inputs["param"].bytes

    def reference(self, op, x):
        g = x["grad"] * x["grad_scale"]
        m = MOMENTUM * x["m"] + g
        update = g + MOMENTUM * m
        cuts = np.cumsum(op.attrs["parts"])[:-1]
        layers = []
        for layer in update:  # stacked over the layers
            parts = np.split(layer, cuts)
            layers.append(np.concatenate([UPDATE_SIZE * np.sqrt(max(p.shape)) * orthogonal(p) for p in parts]))
        change = np.stack(layers) + x["weight_decay"] * x["param"]
        return {"param": x["param"] - x["learning_rate"] * change, "m": m}


MUON = Muon()
