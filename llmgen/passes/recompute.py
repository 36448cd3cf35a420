"""Recompute: the backward computes activations again instead of keeping a slot of them for each layer.

- cheap: what is read from memory once and written once, norms and activations. What they are computed from is kept anyway.
- block: everything in a block, from what the block was handed. One layer's activations exist at a time.

The same functions compute the same bits from the same values, so results do not change. One exception: where a product's
epilogue makes GELU's value on a GPU in bf16, `cheap` makes it again from its argument rounded to bf16.
"""

from llmgen import ops
from llmgen.graph import Function, Op, Segment, Tensor

CHEAP = (ops.LAYERNORM, ops.RMSNORM, *ops.ACTIVATIONS.values())
_AGAIN = "_again"  # behind the names of what is computed again


def cheap(function: Function) -> Function:
    """Each op of `CHEAP` whose outputs a block's backward reads is run again there, just before the first reader."""

    def rewrite(forward: Segment, backward: Segment) -> Segment:
        for op in forward.ops:
            if op.kind in CHEAP:
                backward = _again([op], backward)
        return backward

    return _backwards(function, rewrite)


def block(function: Function) -> Function:
    """A block's backward begins with the block's forward: those of its ops that the backward reads, and what these need."""

    def rewrite(forward: Segment, backward: Segment) -> Segment:
        needed = {t.name for op in backward.ops for t in op.inputs.values()}
        kept: list[Op] = []
        for op in reversed(forward.ops):
            if any(t.name in needed for t in op.outputs.values()):
                kept.insert(0, op)
                needed |= {t.name for t in op.inputs.values()}
        return _again(kept, backward)

    return _backwards(function, rewrite)


def is_again(op: Op) -> bool:
    """Whether an op computes something a second time."""
    return any(t.name.endswith(_AGAIN) for t in op.outputs.values())


def _backwards(function: Function, rewrite) -> Function:
    """Rewrites the backward of each block, with its forward at hand."""
    blocks = {s.name: s for s in function.segments if s.carry and not s.reverse}
    segments = list(function.segments)
    for i, backward in enumerate(segments):
        forward = blocks.get(backward.name.removesuffix(", backward")) if backward.reverse else None
        if forward:
            segments[i] = rewrite(forward, backward)
    return function.replace(segments=tuple(segments))


def _again(made: list[Op], backward: Segment) -> Segment:
    """The backward with these ops run again before the first op that reads what they make."""
    renamed = {t.name: Tensor(t.name + _AGAIN, t.shape, t.dtype) for op in made for t in op.outputs.values()}

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: renamed.get(t.name, t) for key, t in tensors.items()}

    readers = [i for i, op in enumerate(backward.ops) if any(t.name in renamed for t in op.inputs.values())]
    if not readers:
        return backward
    again = [op.replace(inputs=rename(op.inputs), outputs=rename(op.outputs)) for op in made]
    changed = [op.replace(inputs=rename(op.inputs)) for op in backward.ops]
    return backward.replace(ops=(*changed[: readers[0]], *again, *changed[readers[0] :]))
