"""Fusions: several ops of a segment become one. Each keeps the values; tests show the fused and the plain graph agree.

They run on the graph with gradients, so a fusion may move backward ops of the head beside their forward.
"""

from collections import Counter
from dataclasses import dataclass, replace

from llmgen import ops
from llmgen.graph import Dim, Function, Kind, Op, Segment, Tensor


def join_segments(function: Function) -> Function:
    """Neighbouring segments that run once become one: the head's forward and its backward stand together."""
    joined: list[Segment] = []
    for segment in function.segments:
        if joined and not joined[-1].carry and not segment.carry:
            before = joined[-1]
            both = segment.name == before.name + ", backward"
            name = before.name + ", forward and backward" if both else f"{before.name} and {segment.name}"
            joined[-1] = before.replace(name=name, ops=before.ops + segment.ops)
        else:
            joined.append(segment)
    return function.replace(segments=tuple(joined))


def add_into(function: Function) -> Function:
    """add(a, f(x)) -> f(x, addend=a), where f can add to its output and nothing else reads f(x)."""

    def rewrite(view: _View) -> list[Op] | None:
        for at, add in enumerate(view.ops):
            if add.kind is not ops.ADD:
                continue
            for mine, other in (("b", "a"), ("a", "b")):
                made = view.producer(add.inputs[mine])
                if made is None or view.uses(add.inputs[mine]) > 1:
                    continue
                key = next(k for k, t in made.outputs.items() if t == add.inputs[mine])
                addend = made.kind.addends.get(key)
                if addend and addend not in made.inputs:
                    inputs = {**made.inputs, addend: add.inputs[other]}
                    fused = made.replace(inputs=inputs, outputs={**made.outputs, key: add.outputs["out"]})
                    return [fused if i == at else op for i, op in enumerate(view.ops) if op is not made]
        return None

    return _rewrite(function, rewrite)


def linear_gelu(function: Function) -> Function:
    """gelu(linear(x)) -> linear_gelu(x), which leaves both the sum and its GELU: the backward reads the sum."""

    def rewrite(view: _View) -> list[Op] | None:
        for gelu in view.ops:
            linear = view.producer(gelu.inputs["inp"]) if gelu.kind is ops.GELU else None
            if linear is None or linear.kind is not ops.LINEAR or "addend" in linear.inputs:
                continue
            outputs = {"out": gelu.outputs["out"], "pre": linear.outputs["out"]}
            if view.uses(linear.outputs["out"]) == 1:
                del outputs["pre"]
            fused = Op(ops.LINEAR_GELU, linear.inputs, outputs, linear.attrs)
            return [fused if op is gelu else op for op in view.ops if op is not linear]
        return None

    return _rewrite(function, rewrite)


def linear_backward_gelu(function: Function) -> Function:
    """gelu_backward(linear_backward_input(dout)) -> linear_backward_input_gelu(dout)."""

    def rewrite(view: _View) -> list[Op] | None:
        for gelu in view.ops:
            linear = view.producer(gelu.inputs["dout"]) if gelu.kind is ops.GELU.derivative else None
            if linear is None or linear.kind is not ops.LINEAR_BACKWARD_INPUT or view.uses(gelu.inputs["dout"]) > 1:
                continue
            inputs = {**linear.inputs, "pre": gelu.inputs["inp"]}
            fused = Op(ops.LINEAR_BACKWARD_INPUT_GELU, inputs, {"dinp": gelu.outputs["dinp"]}, linear.attrs)
            return [fused if op is gelu else op for op in view.ops if op is not linear]
        return None

    return _rewrite(function, rewrite)


def gelu_slopes(functions: list[Function]) -> list[Function]:
    """Where a GELU's input is kept for its own backward alone, its slope is kept instead: an epilogue of the forward has x and
    the exponential at hand, and one of the backward then only multiplies. All GELUs of a program, or none."""
    changed = []
    for function in functions:
        made = {op.outputs["pre"].name: op for op in function.ops() if op.kind is ops.LINEAR_GELU and "pre" in op.outputs}
        readers = [op for op in function.ops() if op.kind is ops.LINEAR_BACKWARD_INPUT_GELU]
        counts = _uses(function)
        if {op.inputs["pre"].name for op in readers} != made.keys() or any(counts[name] != 1 for name in made):
            return functions
        slopes = {op.outputs["pre"]: replace(op.outputs["pre"], name=f"{name}_slope") for name, op in made.items()}

        def with_slope(op: Op, slopes=slopes) -> Op:
            if op.kind is ops.LINEAR_GELU and "pre" in op.outputs:
                outputs = {"out": op.outputs["out"], "slope": slopes[op.outputs["pre"]]}
                return op.replace(kind=ops.LINEAR_GELU_SLOPE, outputs=outputs)
            if op.kind is ops.LINEAR_BACKWARD_INPUT_GELU:
                inputs = {"slope" if key == "pre" else key: slopes.get(t, t) for key, t in op.inputs.items()}
                return op.replace(kind=ops.LINEAR_BACKWARD_INPUT_SLOPE, inputs=inputs)
            return op

        segments = [segment.replace(ops=tuple(map(with_slope, segment.ops))) for segment in function.segments]
        changed.append(function.replace(segments=tuple(segments)))
    return changed


# These can sum what they write over the rows, as "dsum".
SUMMING = (ops.LAYERNORM_BACKWARD, ops.LINEAR_BACKWARD_INPUT_GELU, ops.LINEAR_BACKWARD_INPUT_SLOPE)


def bias_sums(function: Function, summing: tuple[Kind, ...] = SUMMING) -> Function:
    """The gradient of a bias is the sum of dout over the rows: it is taken where dout is made, not by another pass over it.

    summing: the kinds that do so at little cost.
    """

    def rewrite(view: _View) -> list[Op] | None:
        for linear in view.ops:
            if linear.kind is not ops.LINEAR_BACKWARD_WEIGHT or "dbias" not in linear.outputs:
                continue
            maker = view.producer(linear.inputs["dout"])
            if maker is None or maker.kind not in summing or "dsum" in maker.outputs:
                continue
            weightless = maker.kind is ops.LAYERNORM_BACKWARD and "dweight" not in maker.outputs
            sums = any(t.role == "gradient" for t in maker.outputs.values())
            if weightless or (sums and maker.accumulate != linear.accumulate):
                continue
            outputs = dict(linear.outputs)
            outputs_of_maker = {**maker.outputs, "dsum": outputs.pop("dbias")}
            with_sum = maker.replace(outputs=outputs_of_maker, accumulate=linear.accumulate)
            plain = linear.replace(outputs=outputs)
            return [with_sum if op is maker else plain if op is linear else op for op in view.ops]
        return None

    return _rewrite(function, rewrite)


def classifier(function: Function, chunk: int) -> Function:
    """cross_entropy(linear(x, w)), with its backward where it has one, -> classifier, in chunks of rows."""

    def rewrite(view: _View) -> list[Op] | None:
        for entropy in view.ops:
            linear = view.producer(entropy.inputs["logits"]) if entropy.kind is ops.CROSS_ENTROPY else None
            if linear is None or linear.kind is not ops.LINEAR or {"bias", "addend"} & linear.inputs.keys():
                continue
            logits = entropy.inputs["logits"]
            rows = Dim(chunk, "CHUNK")
            held = Tensor(logits.name, (rows, logits.shape[-1]), logits.dtype)
            inputs = {
                "inp": linear.inputs["inp"],
                "weight": linear.inputs["weight"],
                "targets": entropy.inputs["targets"],
            }
            outputs = {"losses": entropy.outputs["losses"]}
            readers = [op for op in view.ops if logits in op.inputs.values() and op is not entropy]
            if not readers and view.uses(logits) == 1:
                fused = Op(ops.CLASSIFIER, inputs, {**outputs, "logits": held}, entropy.attrs)
                return [fused if op is entropy else op for op in view.ops if op is not linear]
            if [op.kind for op in readers] != [ops.CROSS_ENTROPY_BACKWARD] or view.uses(logits) != 2:
                continue
            dlogits = readers[0].outputs["dlogits"]
            backward = {op.kind: op for op in view.ops if dlogits in op.inputs.values()}
            if backward.keys() != {ops.LINEAR_BACKWARD_INPUT, ops.LINEAR_BACKWARD_WEIGHT} or view.uses(dlogits) != 2:
                continue
            weight, inp = backward[ops.LINEAR_BACKWARD_WEIGHT], backward[ops.LINEAR_BACKWARD_INPUT]
            outputs |= {"dinp": inp.outputs["dinp"], "dweight": weight.outputs["dweight"], "logits": held}
            inputs["dlosses"] = readers[0].inputs["dlosses"]
            fused = Op(ops.CLASSIFIER_BACKWARD, inputs, outputs, entropy.attrs, weight.accumulate)
            gone = [linear, readers[0], weight, inp]
            return [fused if op is entropy else op for op in view.ops if all(op is not g for g in gone)]
        return None

    fused = _rewrite(function, rewrite)
    left = [op.outputs["logits"] for op in fused.ops() if op.kind is ops.CLASSIFIER]
    return fused.replace(outputs=(*fused.outputs, *left))


@dataclass(frozen=True)
class _View:
    """A segment's ops as a rewrite sees them: who makes a tensor here, how often it is read in the whole function."""

    ops: tuple[Op, ...]
    counts: Counter

    def producer(self, t: Tensor) -> Op | None:
        return next((op for op in self.ops if t in op.outputs.values()), None)

    def uses(self, t: Tensor) -> int:
        return self.counts[t.name]


def _rewrite(function: Function, rewrite) -> Function:
    """Apply a rewrite to each segment until it finds nothing more."""
    segments = list(function.segments)
    for i in range(len(segments)):
        while True:
            found = rewrite(_View(segments[i].ops, _uses(function)))
            if found is None:
                break
            segments[i] = segments[i].replace(ops=tuple(found))
            function = function.replace(segments=tuple(segments))
    return function


def _uses(function: Function) -> Counter:
    """Tensor name -> number of times it is read: by ops, carries and as an output of the function."""
    counts = Counter(t.name for op in function.ops() for t in op.inputs.values())
    counts.update(t.name for segment in function.segments for c in segment.carry for t in (c.initial, c.next))
    counts.update(t.name for t in function.outputs)
    return counts
