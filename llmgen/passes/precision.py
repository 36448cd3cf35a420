"""Precision: which tensors are bfloat16 on a GPU. Everything else, and every sum on the way, stays float32.

- Working weights and activations are bf16, and so are their gradients.
- The residual stream and its gradient are bf16 or float32, as the config says.
- Statistics (mean, rstd, lse), losses, constants and the gradients of parameters stay float32.
- Generation: the cache of keys and values is bf16, the logits are float32.
- Matrix products take bf16 operands: where one is float32, a copy converts it.
"""

from llmgen import ops
from llmgen.graph import Carry, Function, Graph, Op, Segment, Tensor

FLOAT32 = ("mean", "rstd", "qrstd", "krstd", "lse", "losses")  # outputs of any op
CARRIED = (ops.POSITION_EMBEDDING, ops.SCALE, ops.COPY)  # whose input is of the residual stream where the output is
OPERANDS = {  # of matrix products
    ops.LINEAR: ("inp",),
    ops.LINEAR_GELU: ("inp",),
    ops.LINEAR_GELU_SLOPE: ("inp",),
    ops.LINEAR_BACKWARD_INPUT: ("dout",),
    ops.LINEAR_BACKWARD_INPUT_GELU: ("dout",),
    ops.LINEAR_BACKWARD_INPUT_SLOPE: ("dout",),
    ops.LINEAR_BACKWARD_WEIGHT: ("dout", "inp"),
}


def bf16(graph: Graph, residual: str) -> Graph:
    """The graph in bfloat16. residual: "bf16" or "fp32"."""
    parameters = {p.name: _as(p, "bf16") for p in graph.parameters}
    functions = []
    for function in graph.functions:
        if function.name != "update":
            function = _function(function, parameters, "f32" if residual == "fp32" else "bf16")
        functions.append(function)
    return Graph(tuple(parameters.values()), tuple(functions))


def _function(function: Function, parameters: dict[str, Tensor], residual: str) -> Function:
    stream = residual_stream(function)

    def typed(t: Tensor) -> Tensor:
        if t.role == "parameter":
            return parameters[t.name]
        if t.role == "state":
            return _as(t, "bf16")
        if t.role not in ("activation", "output") or t.name in fixed:
            return t
        return _as(t, residual if t.name in stream else "bf16")

    fixed = {t.name for op in function.ops() for name, t in op.outputs.items() if name in FLOAT32 or t.dtype == "i32"}
    if function.name == "decode":  # tokens are drawn from its outputs
        fixed |= {t.name for t in function.outputs}
        fixed |= {op.inputs["inp"].name for op in function.ops() if op.kind is ops.SOFTCAP}
    segments = []
    for segment in function.segments:
        made = [
            op.replace(
                inputs={name: typed(t) for name, t in op.inputs.items()},
                outputs={name: typed(t) for name, t in op.outputs.items()},
            )
            for op in segment.ops
        ]
        carry = tuple(Carry(*(typed(t) for t in (c.initial, c.inside, c.next, c.final))) for c in segment.carry)
        segments.append(_with_operands(segment.replace(ops=tuple(made), carry=carry)))
    return function.replace(segments=tuple(segments), outputs=tuple(typed(t) for t in function.outputs))


def residual_stream(function: Function) -> set[str]:
    """Names of the tensors that blocks hand on, and of what is added to them on the way."""
    stream = {t.name for s in function.segments for c in s.carry for t in (c.initial, c.inside, c.next, c.final)}
    before = -1
    while len(stream) > before:
        before = len(stream)
        for op in function.ops():
            added = (*op.kind.addends.values(), *(("a", "b") if op.kind is ops.ADD else ()))
            if any(op.inputs[name].name in stream for name in added if name in op.inputs):
                stream |= {t.name for name, t in op.outputs.items() if name in (*op.kind.addends, "out")}
            if op.kind in CARRIED and op.outputs["out"].name in stream:
                stream.add(op.inputs["inp"].name)
    return stream


def _with_operands(segment: Segment) -> Segment:
    """Copies in bf16 of what the segment's products would read in float32."""
    made: list[Op] = []
    copies: dict[str, Tensor] = {}
    for op in segment.ops:
        inputs = dict(op.inputs)
        for name in OPERANDS.get(op.kind, ()):
            t = inputs[name]
            if t.dtype != "f32":
                continue
            if t.name not in copies:
                copies[t.name] = _as(Tensor(f"{t.name}_bf16", t.shape), "bf16")
                made.append(Op(ops.COPY, {"inp": t}, {"out": copies[t.name]}))
            inputs[name] = copies[t.name]
        made.append(op.replace(inputs=inputs))
    return segment.replace(ops=tuple(made))


def _as(t: Tensor, dtype: str) -> Tensor:
    return Tensor(t.name, t.shape, dtype, t.role, t.layers, t.values)
