"""Every op's derivative against finite differences of its own reference, in float64."""

import numpy as np
import pytest

from llmgen import ops
from llmgen.autodiff import differentiate
from llmgen.graph import Builder, Dim, Function, Kind, Segment, Tensor
from llmgen.reference import run

B, T, C, OC, V, VP, NH, MAXT = (
    Dim(n, name) for n, name in ((2, "B"), (5, "T"), (6, "C"), (7, "OC"), (11, "V"), (16, "VP"), (3, "NH"), (9, "MAXT"))
)
TOKENS = Tensor("tokens", (B, T), "i32", "input")
TARGETS = Tensor("targets", (B, T), "i32", "input")


def parameter(name, *shape):
    return Tensor(name, shape, role="parameter")


class Lift(Kind):
    """Makes an activation out of a parameter, so that gradients of activations can be seen."""

    function, outputs, inputs = "lift", ("out",), ("inp",)

    def infer(self, inputs, attrs):
        return {"out": (inputs["inp"].shape, "f32")}

    def backward(self, op, d):
        from llmgen.graph import Step

        return [Step(LIFT_BACKWARD, {"dout": d["out"]}, {"dinp": op.inputs["inp"]})]

    def reference(self, op, x):
        return {"out": x["inp"]}


class LiftBackward(Lift):
    outputs, inputs = ("dinp",), ("dout",)

    def infer(self, inputs, attrs):
        return {"dinp": (inputs["dout"].shape, "f32")}

    def reference(self, op, x):
        return {"dinp": x["dout"]}


LIFT, LIFT_BACKWARD = Lift(), LiftBackward()

HS, NKV = Dim(2, "HS"), Dim(1, "NKV")
HEADS = {"num_heads": NH, "num_kv_heads": NH, "head_size": HS, "channels": C}
GROUPS = {"num_heads": NH, "num_kv_heads": NKV, "head_size": HS, "channels": C}
GROUPED = Dim(10, "QKV")
TURNS = {name: Tensor(name, (MAXT, Dim(1, "ROPE_HALF")), role="constant", values=()) for name in ("cos", "sin")}
FREQUENCIES = {"half": Dim(1, "ROPE_HALF"), "theta": 100.0, "factor": 8.0}
FREQUENCIES |= {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_seq_len": 13}
PLAIN_LOSS = {"vocab_size": V, "softcap": 0.0, "smoothing": 0.0, "z_loss": 0.0}

# name -> (op, inputs as parameter shapes or tensors, attributes)
CASES = {
    "token_embedding": (ops.TOKEN_EMBEDDING, {"tokens": TOKENS, "wte": parameter("wte", VP, C)}, {}),
    "position_embedding": (ops.POSITION_EMBEDDING, {"inp": (B, T, C), "wpe": parameter("wpe", MAXT, C)}, {}),
    "layernorm": (
        ops.LAYERNORM,
        {"inp": (B, T, C), "weight": parameter("weight", C), "bias": parameter("bias", C)},
        {"epsilon": 1e-5},
    ),
    "linear": (ops.LINEAR, {"inp": (B, T, C), "weight": parameter("weight", OC, C), "bias": parameter("bias", OC)}, {}),
    "linear without bias": (ops.LINEAR, {"inp": (B, T, C), "weight": parameter("weight", OC, C)}, {}),
    **{name: (kind, {"inp": (B, T, C)}, {}) for name, kind in ops.ACTIVATIONS.items()},
    "add": (ops.ADD, {"a": (B, T, C), "b": (B, T, C)}, {}),
    "multiply": (ops.MULTIPLY, {"a": (B, T, C), "b": (B, T, C)}, {}),
    "scale": (ops.SCALE, {"inp": (B, T, C)}, {"factor": 0.7}),
    "copy": (ops.COPY, {"inp": (B, T, C)}, {}),
    "layernorm without weight": (ops.LAYERNORM, {"inp": (B, T, C)}, {"epsilon": 1e-5}),
    "rmsnorm": (ops.RMSNORM, {"inp": (B, T, C), "weight": parameter("weight", C)}, {"epsilon": 1e-5}),
    "rmsnorm without weight": (ops.RMSNORM, {"inp": (B, T, C)}, {"epsilon": 1e-5}),
    "qk_norm": (
        ops.QK_NORM,
        {"inp": (B, T, GROUPED), "qweight": parameter("qweight", HS), "kweight": parameter("kweight", HS)},
        {**GROUPS, "epsilon": 1e-5},
    ),
    "qk_norm without weight": (ops.QK_NORM, {"inp": (B, T, GROUPED)}, {**GROUPS, "epsilon": 1e-5}),
    "rope": (ops.ROPE, {"inp": (B, T, GROUPED), **TURNS}, {**GROUPS, **FREQUENCIES, "scaling": "none"}),
    "rope, slowed down": (ops.ROPE, {"inp": (B, T, GROUPED), **TURNS}, {**GROUPS, **FREQUENCIES, "scaling": "llama3"}),
    "attention": (ops.ATTENTION, {"qkv": (B, T, 3 * C)}, {**HEADS, "scale": 0.6, "softcap": 0.0}),
    "attention, grouped": (ops.ATTENTION, {"qkv": (B, T, GROUPED)}, {**GROUPS, "scale": 0.6, "softcap": 0.0}),
    "attention, windowed": (
        ops.ATTENTION,
        {"qkv": (B, T, 3 * C), "window": Tensor("window", (), "i32", "constant", values=2)},
        {**HEADS, "scale": 0.6, "softcap": 0.0},
    ),
    "attention, capped": (ops.ATTENTION, {"qkv": (B, T, 3 * C)}, {**HEADS, "scale": 2.0, "softcap": 1.5}),
    "cross_entropy": (ops.CROSS_ENTROPY, {"logits": (B, T, VP), "targets": TARGETS}, PLAIN_LOSS),
    "cross_entropy, all options": (
        ops.CROSS_ENTROPY,
        {"logits": (B, T, VP), "targets": TARGETS},
        {"vocab_size": V, "softcap": 2.0, "smoothing": 0.1, "z_loss": 0.05},
    ),
}


def function_of(kind, inputs, attrs):
    """The op as a function of parameters, ending in a sum weighted by the seed gradient."""
    g = Builder()
    given = {}
    for name, t in inputs.items():
        given[name] = t if isinstance(t, Tensor) else g.apply(LIFT, f"{name}_in", inp=parameter(f"p_{name}", *t))
    made = g.apply(kind, "out", attrs=attrs, **given)
    out = made[0] if isinstance(made, tuple) else made
    forward = Function("f", (Segment("all", tuple(g.ops)),), (TOKENS, TARGETS), (out,))
    seed = Tensor("seed", () if kind is ops.CROSS_ENTROPY else out.shape, role="input")
    return differentiate(forward, {out.name: seed}), seed


@pytest.mark.parametrize("name", CASES)
def test_the_backward_rule_is_the_derivative_of_the_forward(name):
    kind, inputs, attrs = CASES[name]
    function, seed = function_of(kind, inputs, attrs)
    rng = np.random.default_rng(1)
    parameters = [t for op in function.ops() for t in op.inputs.values() if t.role == "parameter"]
    values = {t.name: rng.normal(size=t.sizes) for t in parameters}
    values |= {n: rng.integers(0, V.size, (B.size, T.size)) for n in ("tokens", "targets")}
    values["seed"] = rng.normal(size=tuple(d.size for d in seed.shape))
    results = run(function, values)

    def objective():
        return float(np.sum(run(function, values)["out"] * values["seed"]))

    assert parameters
    for t in {t.name: t for t in parameters}.values():
        direction = rng.normal(size=t.sizes)
        before, step = values[t.name], 1e-6
        values[t.name] = before + step * direction
        above = objective()
        values[t.name] = before - step * direction
        below = objective()
        values[t.name] = before
        want = (above - below) / (2 * step)
        assert np.sum(results["d" + t.name] * direction) == pytest.approx(want, rel=1e-6, abs=1e-8), t.name


def test_every_kind_of_the_forward_graph_is_checked_here():
    forward = {kind for kind in vars(ops).values() if isinstance(kind, Kind) and type(kind).backward is not Kind.backward}
    assert forward == {kind for kind, _, _ in CASES.values()}


def test_rotary_angles_turn_a_pair_by_its_position():
    g = Builder()
    g.apply(ops.ROPE, "out", attrs={**HEADS, **FREQUENCIES, "scaling": "none"}, inp=Tensor("x", (B, T, 3 * C)), **TURNS)
    x = np.zeros((1, 3, 18))
    x[:, :, 0] = 1.0  # the first channel of the first query
    out = g.ops[0].kind.reference(g.ops[0], {"inp": x})["out"]
    np.testing.assert_allclose(out[0, :, :2], [[np.cos(t), np.sin(t)] for t in range(3)], rtol=1e-12)
    np.testing.assert_array_equal(out[0, :, 12:], x[0, :, 12:])


def test_layer_norm_gives_rows_of_mean_0_and_variance_1():
    x = np.random.default_rng(0).normal(2, 3, (4, 50))
    inp, w, b = Tensor("x", (Dim(4, "n"), Dim(50, "c"))), Tensor("w", (Dim(50, "c"),)), Tensor("b", (Dim(50, "c"),))
    g = Builder()
    g.apply(ops.LAYERNORM, "out", attrs={"epsilon": 1e-5}, inp=inp, weight=w, bias=b)
    op = g.ops[0]
    out = op.kind.reference(op, {"inp": x, "weight": np.ones(50), "bias": np.zeros(50)})["out"]
    np.testing.assert_allclose(out.mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(out.std(-1), 1, rtol=1e-4)


def test_attention_looks_only_at_the_past():
    g = Builder()
    g.apply(ops.ATTENTION, "out", attrs={**HEADS, "scale": 1.0, "softcap": 0.0}, qkv=Tensor("qkv", (B, T, 3 * C)))
    op = g.ops[0]
    qkv = np.random.default_rng(0).normal(size=(2, 5, 18))
    changed = qkv.copy()
    changed[:, 3:] += 1
    before, after = (op.kind.reference(op, {"qkv": x, "window": None})["out"] for x in (qkv, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(before[:, 3:] != after[:, 3:])


def test_adamw_follows_its_formula_for_one_value():
    x = {"param": 1.0, "m": 0.5, "v": 0.25, "grad": 2.0, "grad_scale": 0.5, "learning_rate": 0.1, "weight_decay": 0.01}
    x |= {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "step": 2}
    result = ops.ADAMW.reference(None, x)
    m, v = 0.9 * 0.5 + 0.1, 0.99 * 0.25 + 0.01
    assert result["m"] == pytest.approx(m) and result["v"] == pytest.approx(v)
    change = (m / 0.19) / (np.sqrt(v / 0.0199) + 1e-8) + 0.01
    assert result["param"] == pytest.approx(1 - 0.1 * change)
