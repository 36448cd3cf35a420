"""Reverse-mode differentiation of a graph: the forward segments in, the backward segments out.

- Each op's own backward rule says which steps give the gradients of its inputs; nothing here knows any op.
- The gradient of a tensor used more than once is summed in the reverse order of its uses: by the op that makes the later
  contribution where its kind takes an addend, else by an `add`.
- A block's backward is a block run from the last repetition to the first. Its carry is the gradient of the forward's carry,
  and of every activation that the forward captured from outside.
- A parameter's gradient is a buffer that ops write or, from the second on, add to (`Op.accumulate`).
"""

from llmgen.graph import Carry, Function, Op, Segment, Step, Tensor
from llmgen.ops import ADD, ZERO


def gradient_of(parameter: Tensor) -> Tensor:
    return Tensor("d" + parameter.name, parameter.shape, parameter.dtype, "gradient", parameter.layers)


def differentiate(forward: Function, seeds: dict[str, Tensor]) -> Function:
    """The function followed by its backward.

    seeds: name of an output -> the tensor holding its gradient (an input of the function).
    Raises NotImplementedError if an op on the way has no derivative.
    """
    return _Differentiation(forward).run(seeds)


class _Differentiation:
    def __init__(self, forward: Function):
        self.forward = forward
        self.names = {t.name for op in forward.ops() for t in op.outputs.values()}
        self.names |= {c.inside.name for s in forward.segments for c in s.carry}
        self.written: set[str] = set()  # parameter gradients that hold a value already

    def run(self, seeds: dict[str, Tensor]) -> Function:
        gradients = dict(seeds)  # tensor name -> its gradient so far, outside all blocks
        backward: list[Segment] = []
        for segment in reversed(self.forward.segments):
            if segment.carry:
                backward += self._block(segment, gradients)
            else:
                backward.append(Segment(segment.name + ", backward", tuple(self._ops(segment.ops, gradients))))
        backward = [s for s in backward if s.ops]
        return self.forward.replace(segments=(*self.forward.segments, *backward))

    def _block(self, segment: Segment, gradients: dict[str, Tensor]) -> list[Segment]:
        zeros: list[Op] = []
        inner: dict[str, Tensor] = {}
        incoming = []  # gradient before the loop, in it, of what it is at the block's begin, of what it is outside
        for t in self._captured(segment):
            if t.name not in gradients:  # the block alone uses it
                gradients[t.name] = self._fresh(t)
                zeros.append(Op(ZERO, {}, {"out": gradients[t.name]}, {"like": t}))
            inner[t.name] = self._fresh(t)
            incoming.append((gradients.pop(t.name), inner[t.name], t, t))
        for c in segment.carry:
            if c.final.name not in gradients:
                raise ValueError(f"nothing depends on {c.final.name}, what block {segment.name} leaves behind")
            inner[c.next.name] = self._fresh(c.next)
            incoming.append((gradients[c.final.name], inner[c.next.name], c.inside, c.initial))
        ops = self._ops(segment.ops, inner)
        carry, sums = [], []
        for before, inside, source, target in incoming:
            handed_on = inner.get(source.name)
            if handed_on is None:  # the block never reads what it is handed
                handed_on = self._fresh(source)
                ops.append(Op(ZERO, {}, {"out": handed_on}, {"like": source}))
            final = self._fresh(target)
            carry.append(Carry(before, inside, handed_on, final))
            self._contribute(final, target, gradients, sums)
        block = Segment(segment.name + ", backward", tuple(ops), segment.repeat, tuple(carry), not segment.reverse)
        sum_segment = Segment(f"what {segment.name} captured, backward", tuple(sums))
        return [Segment(segment.name + ", zeros", tuple(zeros)), block, sum_segment]

    def _captured(self, segment: Segment) -> list[Tensor]:
        """Activations from outside that the block's ops read, in the order of their first use."""
        own = segment.made()
        captured: dict[str, Tensor] = {}
        for op in segment.ops:
            for t in op.inputs.values():
                if t.role == "activation" and t.dtype == "f32" and t.name not in own:
                    captured.setdefault(t.name, t)
        return list(captured.values())

    def _ops(self, forward: tuple[Op, ...], gradients: dict[str, Tensor]) -> list[Op]:
        ops: list[Op] = []
        for op in reversed(forward):
            d = {key: gradients[t.name] for key, t in op.outputs.items() if t.name in gradients}
            if d:
                for step in op.kind.backward(op, d):
                    self._step(step, gradients, ops)
        return ops

    def _step(self, step: Step, gradients: dict[str, Tensor], ops: list[Op]) -> None:
        if step.kind is None:
            for target in step.to:
                self._contribute(step.same, target, gradients, ops)
            return
        inputs, outputs, accumulate = dict(step.inputs), {}, []
        later = []
        made_by = step.kind.infer(inputs, step.attrs)
        assert step.gives.keys() <= made_by.keys(), (step.kind.function, step.gives.keys())
        for key, (shape, dtype) in made_by.items():
            target = step.gives.get(key)
            if target is None or target.role not in ("parameter", "activation"):
                continue
            if target.role == "parameter":
                outputs[key] = gradient_of(target)
                accumulate.append(outputs[key].name in self.written)
                self.written.add(outputs[key].name)
                continue
            made = Tensor(self._fresh(target).name, shape, dtype)
            outputs[key] = made
            addend = step.kind.addends.get(key)
            if target.name in gradients and addend:
                inputs[addend] = gradients[target.name]
                gradients[target.name] = made
            else:
                later.append((made, target))
        if len(set(accumulate)) > 1:
            raise ValueError(f"{step.kind.function} would add to one parameter gradient and overwrite another")
        if not outputs:
            return
        ops.append(Op(step.kind, inputs, outputs, step.attrs, any(accumulate)))
        for made, target in later:
            self._contribute(made, target, gradients, ops)

    def _contribute(self, gradient: Tensor, target: Tensor, gradients: dict[str, Tensor], ops: list[Op]) -> None:
        if target.role == "parameter":
            raise ValueError(f"the gradient of parameter {target.name} must be written by an op of its own")
        before = gradients.get(target.name)
        if before is None:
            gradients[target.name] = gradient
        else:
            total = self._fresh(target)
            ops.append(Op(ADD, {"a": before, "b": gradient}, {"out": total}))
            gradients[target.name] = total

    def _fresh(self, t: Tensor) -> Tensor:
        name, i = "d" + t.name, 2
        while name in self.names:
            name, i = f"d{t.name}_{i}", i + 1
        self.names.add(name)
        return Tensor(name, t.shape, t.dtype)
