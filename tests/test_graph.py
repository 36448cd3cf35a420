"""What later architectures need of the graph: constants per layer, captured tensors, parameters shared by all layers."""

import numpy as np
import pytest

from llmgen import ops
from llmgen.autodiff import differentiate
from llmgen.graph import Builder, Carry, Dim, Function, Kind, Op, Segment, Step, Tensor, check, product
from llmgen.ops.activation import gelu
from llmgen.reference import run

B, T, C, L = Dim(2, "B"), Dim(3, "T"), Dim(4, "C"), Dim(3, "L")


class Scale(Kind):
    """out = inp * by, a number that differs from layer to layer."""

    function, outputs, inputs = "scale", ("out",), ("inp", "by")

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def backward(self, op, d):
        return [Step(SCALE, {"inp": d["out"], "by": op.inputs["by"]}, {"out": op.inputs["inp"]})]

    def reference(self, op, x):
        return {"out": x["inp"] * x["by"]}


SCALE = Scale()


def network(*, captured: bool, used_after: bool) -> Function:
    """embedding -> L times (x + scale_l * gelu(x w_l^T + embedding) u^T) -> output: w differs by layer, u does not."""
    tokens = Tensor("tokens", (B, T), "i32", "input")
    wte = Tensor("wte", (Dim(5, "V"), C), role="parameter")
    w = Tensor("w", (C, C), role="parameter", layers=L)
    u = Tensor("u", (C, C), role="parameter")
    by = Tensor("by", (), role="constant", layers=L, values=(0.5, -1.0, 2.0))
    g = Builder()
    x0 = g.apply(ops.TOKEN_EMBEDDING, "x0", tokens=tokens, wte=wte)
    begin = Segment("begin", tuple(g.ops))
    g = Builder()
    x = Tensor("x", (B, T, C))
    h = g.apply(ops.LINEAR, "h", inp=x, weight=w)
    if captured:
        h = g.apply(ops.ADD, "h0", a=h, b=x0)
    h = g.apply(ops.GELU, "act", inp=h)
    h = g.apply(ops.LINEAR, "proj", inp=h, weight=u)
    h = g.apply(SCALE, "scaled", inp=h, by=by)
    handed_on = g.apply(ops.ADD, "x_next", a=x, b=h)
    final = Tensor("final", (B, T, C))
    block = Segment("block", tuple(g.ops), L, (Carry(x0, x, handed_on, final),))
    g = Builder()
    out = g.apply(ops.GELU, "out", inp=final)
    if used_after:
        out = g.apply(ops.ADD, "out2", a=out, b=x0)
    return Function("f", (begin, block, Segment("end", tuple(g.ops))), (tokens,), (out,))


def by_hand(values, captured, used_after):
    x0 = x = values["wte"][values["tokens"]]
    for layer, scale in enumerate((0.5, -1.0, 2.0)):
        h = x @ values["w"][layer].T + (x0 if captured else 0)
        x = x + scale * gelu(h) @ values["u"].T
    return gelu(x) + (x0 if used_after else 0)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("used_after", [False, True])
def test_constants_captured_tensors_and_shared_parameters_have_their_gradients(captured, used_after):
    forward = network(captured=captured, used_after=used_after)
    seed = Tensor("seed", (B, T, C), role="input")
    function = differentiate(forward, {forward.outputs[0].name: seed})
    function = function.replace(inputs=(*function.inputs, seed))
    check(function)
    rng = np.random.default_rng(0)
    values = {"wte": rng.normal(size=(5, 4)), "w": rng.normal(size=(3, 4, 4)), "u": rng.normal(size=(4, 4))}
    values |= {"tokens": rng.integers(0, 5, (2, 3)), "seed": rng.normal(size=(2, 3, 4))}
    results = run(function, values)
    np.testing.assert_allclose(results[forward.outputs[0].name], by_hand(values, captured, used_after), rtol=1e-12)
    for name in ("wte", "w", "u"):
        direction = rng.normal(size=values[name].shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = {**values, name: values[name] + step * direction}
            ends.append(np.sum(by_hand(moved, captured, used_after) * values["seed"]))
        want = (ends[0] - ends[1]) / 2e-6
        assert np.sum(results["d" + name] * direction) == pytest.approx(want, rel=1e-6), name


def test_a_dim_prints_what_it_is():
    assert str(3 * C) == "3*C" and (3 * C).size == 12
    assert str((L + 1) * C) == "(L + 1)*C" and ((L + 1) * C).size == 16
    assert str(product((B, T, C))) == "BT*C"
    assert str(Dim(1, "b") * Dim(9, "t") - Dim(0, "first")) == "b*t - first"


def test_a_graph_that_reads_what_is_not_made_is_refused():
    x, y = Tensor("x", (C,)), Tensor("y", (C,))
    op = Op(ops.GELU, {"inp": x}, {"out": y})
    with pytest.raises(ValueError, match="x is not made before"):
        check(Function("f", (Segment("s", (op,)),)))
    again = Op(ops.GELU, {"inp": Tensor("i", (C,), role="input")}, {"out": y})
    with pytest.raises(ValueError, match="y is made twice"):
        check(Function("f", (Segment("s", (again, again)),), (Tensor("i", (C,), role="input"),)))


def test_a_tensor_of_one_block_cannot_be_read_in_a_block_of_another_length():
    forward = network(captured=False, used_after=False)
    block = forward.segments[1]
    other = Segment(
        "other", (Op(ops.GELU, {"inp": block.ops[0].outputs["out"]}, {"out": Tensor("z", (B, T, C))}),), Dim(5, "M")
    )
    with pytest.raises(ValueError, match="exists L times"):
        check(forward.replace(segments=(*forward.segments, other)))
