"""Runs a graph in numpy float64: the oracle that needs no framework.

Values are arrays; a tensor that exists once for each repetition of a block is a list of them. Parameters, their gradients and
states are stacked arrays, one layer after the other; what a function writes of a state is written into the array given.
"""

from typing import Any

import numpy as np

from llmgen.autodiff import gradient_of
from llmgen.graph import Function, Graph, Op, Segment, Tensor

STORED = ("parameter", "gradient", "constant", "state")


def run(function: Function, values: dict[str, Any], keep: set[str] | None = None) -> dict[str, Any]:
    """Run a function.

    values: name -> array for inputs and parameters (stacked). Parameter gradients already in it are overwritten by the first
    op that writes them, or added to if `values["micro_batch"]` is above 0.
    keep: names of tensors to keep; None keeps everything.
    Returns the values with what was made: outputs, gradients ("d" + name), activations (lists inside blocks).
    """
    values = dict(values)
    last_use = _last_use(function) if keep is not None else {}
    for i, segment in enumerate(function.segments):
        _run_segment(segment, values)
        if keep is not None:
            outputs = {t.name for t in function.outputs} | keep
            for name in [n for n, at in last_use.items() if at == i and n in values and n not in outputs]:
                del values[name]
    return values


def _last_use(function: Function) -> dict[str, int]:
    """Name of an activation -> index of the last segment that reads or makes it."""
    last: dict[str, int] = {}
    for i, segment in enumerate(function.segments):
        carried = [t for c in segment.carry for t in (c.initial, c.inside, c.next, c.final)]
        touched = [t for op in segment.ops for t in (*op.inputs.values(), *op.outputs.values())]
        last.update({t.name: i for t in (*carried, *touched) if t.role == "activation"})
    return last


def _run_segment(segment: Segment, values: dict[str, Any]) -> None:
    n = segment.repeat.size
    if not segment.carry and n == 1:
        for op in segment.ops:
            _run_op(op, values, values, 0, first=True)
        return
    order = range(n - 1, -1, -1) if segment.reverse else range(n)
    made = segment.made()
    for name in made:
        values[name] = [None] * n
    for c in segment.carry:
        values[c.inside.name][order[0]] = values[c.initial.name]
    for step, layer in enumerate(order):
        for op in segment.ops:
            _run_op(op, values, _Layer(values, layer), layer, first=step == 0)
        for c in segment.carry:
            handed_on = _Layer(values, layer)[c.next.name]
            if step + 1 < n:
                values[c.inside.name][order[step + 1]] = handed_on
            else:
                values[c.final.name] = handed_on


class _Layer:
    """The values as an op in repetition `layer` sees them."""

    def __init__(self, values: dict[str, Any], layer: int):
        self.values, self.layer = values, layer

    def __getitem__(self, name: str) -> Any:
        value = self.values[name]
        return value[self.layer] if isinstance(value, list) else value

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name][self.layer] = value


def _run_op(op: Op, values: dict[str, Any], scope: Any, layer: int, first: bool) -> None:
    def read(t: Tensor | None):
        if t is None:
            return None
        if t.role == "constant":
            return np.asarray(t.values[layer] if t.layers else t.values)
        if t.role in STORED and t.layers:
            return values[t.name][layer]
        return scope[t.name]

    x = {name: read(op.inputs.get(name)) for name in op.kind.inputs}
    results = op.kind.reference(op, x)
    for name, t in op.outputs.items():
        result = results[name]
        if t.role == "state":
            values[t.name][layer if t.layers else Ellipsis] = result
            continue
        if t.role != "gradient":
            scope[t.name] = result
            continue
        if t.name not in values:
            values[t.name] = np.zeros(tuple(d.size for d in t.stacked))
        target = values[t.name]
        adds = op.accumulate or values.get("micro_batch", 0) > 0 or not (first or t.layers)
        at = layer if t.layers else Ellipsis
        target[at] = target[at] + result if adds else result


def training_step(
    graph: Graph,
    parameters: dict[str, np.ndarray],
    moments: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    batches: list[tuple[np.ndarray, np.ndarray]],
    *,
    step: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    grad_clip: float = 1.0,
) -> tuple[float, float]:
    """One optimizer step over the micro-batches (tokens, targets), in place. `step` counts from 1.

    Returns the loss before the update and the gradient's norm before clipping.
    """
    values: dict[str, Any] = {**parameters}
    loss, scale = 0.0, 1.0 / sum(tokens.size for tokens, _ in batches)
    gradients: dict[str, Any] = {}
    function = graph.function("forward_backward")
    for i, (tokens, targets) in enumerate(batches):
        inputs = {"tokens": tokens, "targets": targets, "loss_scale": scale, "micro_batch": i}
        values = run(function, {**parameters, **gradients, **inputs}, keep=set())
        gradients = {gradient_of(p).name: values[gradient_of(p).name] for p in graph.parameters}
        loss += values["losses"].sum() * scale
    settings = {"learning_rate": learning_rate, "beta1": beta1, "beta2": beta2, "epsilon": epsilon, "step": step}
    norm = None
    for op in graph.function("update").ops():
        if "total" in op.outputs:
            norm = float(np.sqrt(sum(op.kind.reference(op, {"x": g})["total"] for g in gradients.values())))
            continue
        name = op.inputs["param"].name
        x = {
            "param": parameters[name],
            "grad": gradients["d" + name],
            "m": moments[0][name],
            "v": moments[1][name],
            "grad_scale": grad_clip / norm if 0 < grad_clip < norm else 1.0,
            "weight_decay": weight_decay if op.attrs["decay"] else 0.0,
            **settings,
        }
        result = op.kind.reference(op, x)
        for target, key in ((parameters, "param"), (moments[0], "m"), (moments[1], "v")):
            target[name] = result.get(key, target[name])
    return float(loss), norm
