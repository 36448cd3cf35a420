"""Recompute: the backward computes cheap activations again instead of keeping a slot of them for each layer.

What is cheap is read from memory once and written once: norms and activations. What they are computed from is kept anyway.
The same function computes the same bits, so results do not change.
"""

from llmgen import ops
from llmgen.graph import Function, Op, Segment, Tensor

CHEAP = (ops.LAYERNORM, ops.RMSNORM, *ops.ACTIVATIONS.values())


def cheap(function: Function) -> Function:
    """Each op of `CHEAP` whose outputs a block's backward reads is run again there, just before the first reader."""
    blocks = {s.name: s for s in function.segments if s.carry and not s.reverse}
    segments = list(function.segments)
    for i, backward in enumerate(segments):
        forward = blocks.get(backward.name.removesuffix(", backward")) if backward.reverse else None
        for op in forward.ops if forward else ():
            if op.kind in CHEAP:
                segments[i] = _again(op, segments[i])
    return function.replace(segments=tuple(segments))


def _again(op: Op, backward: Segment) -> Segment:
    renamed = {t.name: Tensor(f"{t.name}_again", t.shape, t.dtype) for t in op.outputs.values()}
    readers = [j for j, reader in enumerate(backward.ops) if any(t.name in renamed for t in reader.inputs.values())]
    if not readers:
        return backward
    again = op.replace(outputs={name: renamed[t.name] for name, t in op.outputs.items()})
    changed = [o.replace(inputs={k: renamed.get(t.name, t) for k, t in o.inputs.items()}) for o in backward.ops]
    return backward.replace(ops=(*changed[: readers[0]], again, *changed[readers[0] :]))
