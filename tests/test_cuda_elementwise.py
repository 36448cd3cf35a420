"""The CUDA kernels that are bound by memory, each against its float64 reference: on the emulator, and on a GPU.

Inputs are rounded to what the device sees before the reference has them, so that what remains is the rounding of results.
"""

import math
from types import SimpleNamespace

import cuda_kernels
import emulator
import numpy as np
import pytest

from llmgen import ops
from llmgen.config import ModelConfig
from llmgen.cuda import elementwise
from llmgen.graph import Dim

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64 Linux")
MODEL = ModelConfig(1, 2, 16, 50, 16, 2, 8, 64)
KINDS = {"bf16": ("bf16", "bf16"), "mixed": ("bf16", "fp32"), "fp32": ("fp32", "fp32")}  # precision, residual
EPSILON = SimpleNamespace(attrs={"epsilon": 1e-5})
ROWS = "const floatX *dout, const floatR *inp"
FUNCTIONS = {
    "token_embedding_forward": "floatR *out, const int *tokens, const floatX *wte, int n, int c",
    "token_embedding_backward": "float *dwte, const floatR *dout, const int *tokens, int rows, int n, int c, int accumulate",
    "position_embedding_forward": "floatR *out, const floatR *inp, const floatX *wpe, int b, int t, int c",
    "position_embedding_backward": "float *dwpe, const floatR *dout, int rows, int b, int t, int c, int accumulate",
    "layernorm_forward": "floatX *out, float *mean, float *rstd, const floatR *inp, const floatX *weight, const floatX *bias, "
    "int n, int c",
    "layernorm_backward": f"floatR *dinp, float *dweight, float *dbias, {ROWS}, const float *mean, const float *rstd, "
    "const floatX *weight, const floatR *addend, int n, int c, int accumulate, float *dsum, floatX *dinp_copy",
    "rmsnorm_forward": "floatX *out, float *rstd, const floatR *inp, const floatX *weight, int n, int c",
    "rmsnorm_backward": f"floatR *dinp, float *dweight, {ROWS}, const float *rstd, const floatX *weight, "
    "const floatR *addend, int n, int c, int accumulate, float *dsum, floatX *dinp_copy",
    "classifier_forward": "float *losses, floatX *logits, const floatX *inp, const floatX *weight, const int *targets, int n",
    "classifier_forward_backward": "float *losses, floatX *dinp, float *dweight, floatX *logits, const floatX *inp, "
    "const floatX *weight, const int *targets, float loss_scale, int n, int accumulate",
    "adamw": "float *param, floatX *working, float *m, float *v, const float *grad, "
    "float grad_scale, float learning_rate, float beta1, float beta2, float epsilon, int step, int n",
    "muon": "float *param, floatX *working, float *m, const float *grad, float grad_scale, "
    "float learning_rate, float weight_decay, int rows, int columns, float *room",
    "halves": "float *back, floatX *working, const float *weights, int n",
    "norm": "float *out, const float *x, int n",
    "losses": "float *out, const float *x, int n, int accumulate",
    "rope_tables": "float *cosines, float *sines",
    "rope_forward": "floatX *out, const floatX *inp, const float *cosines, const float *sines, int b, int t",
    "rope_backward": "floatX *dinp, const floatX *dout, const float *cosines, const float *sines, int b, int t",
    "qk_norm_forward": "floatX *out, float *rstd, const floatX *inp, const floatX *qweight, const floatX *kweight, int n",
    "qk_norm_backward": "floatX *dinp, float *dqweight, float *dkweight, const floatX *dout, const floatX *inp, "
    "const float *rstd, const floatX *qweight, const floatX *kweight, int n, int accumulate",
    "add_forward": "floatR *out, const floatX *a, const floatR *b, size_t n",
    "multiply_forward": "floatX *out, const floatX *a, const floatR *b, size_t n",
    "scale_forward": "floatR *out, const floatX *inp, float factor, size_t n",
    "copy_forward": "floatX *out, const floatR *inp, size_t n",
    "zero": "floatX *out, size_t n",
    "add_behind": "floatX *out, const floatX *a, const floatX *b, int n",
}
for activation in ops.ACTIVATIONS:
    FUNCTIONS[f"{activation}_forward"] = "floatX *out, const floatX *inp, size_t n"
    FUNCTIONS[f"{activation}_backward"] = "floatX *dinp, const floatX *dout, const floatX *inp, size_t n"
# Numbers on the device as the harness can hand them over, and tensors of a test's own.
NORM = """
__global__ void copy_double_kernel(float *to, const double *from) { *to = (float)*from; }
static void norm(float *out, const float *x, int n) {
    double *sum = (double *)scratch + 2048;
    global_norm(sum, x, n);
    sum_kernel<<<1, 1024, 0, stream>>>(sum + 1, sum, 1, 0);
    copy_double_kernel<<<1, 1, 0, stream>>>(out, sum + 1);
}
static void losses(float *out, const float *x, int n, int accumulate) {
    double *sum = (double *)scratch;
    cudaMemset(sum, 0, 8);
    if (accumulate) sum_losses(sum, x, n, 0);
    sum_losses(sum, x, n, accumulate);
    copy_double_kernel<<<1, 1, 0, stream>>>(out, sum);
}
"""
ADAMW = """
static void adamw(float *param, floatX *working, float *m, float *v, const float *grad,
                  float grad_scale, float learning_rate, float beta1, float beta2, float epsilon, int step, int n) {
    Tensors tensors = {3, {(size_t)n / 3 / 4 * 4, (size_t)n / 2 / 4 * 4, (size_t)n}, {0.1f, NOT_ADAMW, 0.0f}};
    BEFORE
    adamw_update(WEIGHTS, m, v, grad, &tensors, grad_scale, learning_rate, beta1, beta2, epsilon, step);
    AFTER
}
"""
MUON = """
static void muon(float *param, floatX *working, float *m, const float *grad, float grad_scale,
                 float learning_rate, float weight_decay, int rows, int columns, float *room) {
    const int n = rows * columns;
    BEFORE
    muon_update(WEIGHTS, m, grad, rows, columns, grad_scale, learning_rate, weight_decay, room);
    AFTER
}
"""
HALVES_THERE_AND_BACK = """
static void halves(float *back, floatX *working, const float *weights, int n) {
    int16_t *rest = (int16_t *)scratch;
    halve_weights(working, rest, weights, n);
    whole_weights(back, working, rest, n);
}
"""
# In bf16 the optimizers work on weights in two halves.
HALVES = {
    "BEFORE": "int16_t *rest = (int16_t *)scratch + (1 << 20);\n    halve_weights(working, rest, param, n);",
    "WEIGHTS": "working, rest",
    "AFTER": "whole_weights(param, working, rest, n);",
}
BEHIND = """
static void add_behind(floatX *out, const floatX *a, const floatX *b, int n) { add_forward(out + 1, a + 1, b + 1, n - 1); }
"""


@pytest.fixture
def build(folder, device):
    """build(kind, sizes, templates, functions, more, **options of the templates)"""

    def make(kind, sizes, templates, functions, more="", scratch=4 << 20, **options):
        precision, residual = KINDS[kind]
        for name, text in HALVES.items():
            more = more.replace(name, text if precision == "bf16" else "param" if name == "WEIGHTS" else "")
        signatures = {name: FUNCTIONS[name] for name in functions.split()}
        sizes = {"V": 50, "VP": 128, "C": 64, "NH": 2, "HS": 8, "NKV": 1, "MAXT": 64, "CHUNK": 16, "ROPE_HALF": 4} | sizes
        sizes = {"QKV": (sizes["NH"] + 2 * sizes["NKV"]) * sizes["HS"]} | sizes
        chosen = {"precision": precision, "residual": residual, "scratch": scratch, "options": options, "more": more}
        return cuda_kernels.build(folder, device, sizes, MODEL, templates.split(), signatures, **chosen)

    return make


def values(rng, *shape, precision="bf16", scale=1.0):
    """Normal numbers as the device sees them."""
    return cuda_kernels.rounded(rng.standard_normal(shape).astype(np.float32) * np.float32(scale), precision)


def empty(*shape):
    return np.full(shape, np.nan, np.float32)


def close(got, want, precision="fp32", sums=1.0):
    """Equal but for the rounding of results, and float sums in another order. sums: of the values that were added up."""
    relative = 2.0**-8 if precision == "bf16" else 1e-5
    bound = relative * np.abs(want) + 2e-6 * np.maximum(sums, np.abs(want).max())
    wrong = np.abs(got - want) - bound
    assert np.isfinite(got).all() and (wrong <= 0).all(), f"off by {np.abs(got - want).max()} of {np.abs(want).max()}"


# ---- rows of channels

SHAPES = [("bf16", c) for c in (64, 99, 100, 768, 1600)] + [("mixed", c) for c in (100, 768)] + [("fp32", c) for c in (99, 768)]
WIDE = [("bf16", 8200), ("fp32", 8191)]


@pytest.mark.parametrize("kind, c", SHAPES + WIDE)
@pytest.mark.parametrize("n", [1, 37, 300])
def test_layernorm(build, rng, kind, c, n):
    if c > 2000 and n > 37:
        n = 39
    x_type, r_type = KINDS[kind]
    lib = build(kind, {"C": c}, "layernorm", "layernorm_forward layernorm_backward", scratch=elementwise.norm_scratch(n, c))
    inp, dout = values(rng, n, c, precision=r_type, scale=3) + 1, values(rng, n, c, precision=x_type)
    inp = cuda_kernels.rounded(inp, r_type)
    weight, bias = values(rng, c, precision=x_type), values(rng, c, precision=x_type)
    out, mean, rstd = empty(n, c), empty(n), empty(n)
    want = ops.LAYERNORM.reference(
        EPSILON, {"inp": inp.astype(float), "weight": weight.astype(float), "bias": bias.astype(float)}
    )
    lib.layernorm_forward(out, mean, rstd, inp, weight, bias, n, c)
    close(out, want["out"], x_type)
    close(mean, want["mean"])
    close(rstd, want["rstd"])

    addend = values(rng, n, c, precision=r_type)
    x = {"dout": dout, "inp": inp, "mean": mean, "rstd": rstd, "weight": weight, "addend": addend}
    x = {name: a.astype(float) for name, a in x.items()}
    want = ops.LAYERNORM_BACKWARD.reference(EPSILON, x)
    dinp, dweight, dbias, dsum, copy = addend.copy(), empty(c), empty(c), empty(c), empty(n, c)
    lib.layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight, dinp, n, c, 0, dsum, copy)
    close(dinp, want["dinp"], r_type)
    close(copy, want["dinp"], x_type)
    close(dweight, want["dweight"], sums=n)
    close(dbias, want["dbias"], sums=n)
    close(dsum, want["dinp"].sum(0), sums=3 * n)
    plain = ops.LAYERNORM_BACKWARD.reference(EPSILON, x | {"addend": None})
    lib.layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight, None, n, c, 1, None, None)
    close(dinp, plain["dinp"], r_type)
    close(dweight, 2 * want["dweight"], sums=2 * n)
    close(dbias, 2 * want["dbias"], sums=2 * n)


@pytest.mark.parametrize("weight, bias", [(True, False), (False, False)])
def test_layernorm_without_weights(folder, device, rng, weight, bias):
    n, c, w = 11, 100, values(rng, 100)
    given = {"weight": "const floatX *weight, " if weight else "", "dweight": "float *dweight, " if weight else ""}
    functions = {
        "layernorm_forward": f"floatX *out, float *mean, float *rstd, const floatR *inp, {given['weight']}int n, int c",
        "layernorm_backward": f"floatR *dinp, {given['dweight']}{ROWS}, const float *mean, const float *rstd, {given['weight']}"
        f"const floatR *addend, int n, int c{', int accumulate' if weight else ''}, float *dsum",
    }
    options = {"norm_weight": weight, "norm_bias": bias}
    lib = cuda_kernels.build(folder, device, {"C": c}, MODEL, ["layernorm"], functions, options=options)
    inp, dout, addend = values(rng, n, c), values(rng, n, c), values(rng, n, c)
    out, mean, rstd, dinp, dsum, dweight = empty(n, c), empty(n), empty(n), empty(n, c), empty(c), empty(c)
    lib.layernorm_forward(out, mean, rstd, inp, *([w] if weight else []), n, c)
    x = {"inp": inp.astype(float), "weight": w.astype(float) if weight else None, "bias": None}
    want = ops.LAYERNORM.reference(EPSILON, x)
    close(out, want["out"], "bf16")
    want = ops.LAYERNORM_BACKWARD.reference(
        EPSILON, x | {"dout": dout.astype(float), "mean": mean, "rstd": rstd, "addend": addend}
    )
    if weight:
        lib.layernorm_backward(dinp, dweight, dout, inp, mean, rstd, w, addend, n, c, 0, dsum)
        close(dweight, want["dweight"], sums=n)
    else:
        lib.layernorm_backward(dinp, dout, inp, mean, rstd, addend, n, c, dsum)
    close(dinp, want["dinp"], "bf16")
    close(dsum, want["dinp"].sum(0), sums=3 * n)


@pytest.mark.parametrize("kind, c", SHAPES)
def test_rmsnorm(build, rng, kind, c):
    n, (x_type, r_type) = 37, KINDS[kind]
    lib = build(kind, {"C": c}, "rmsnorm", "rmsnorm_forward rmsnorm_backward", scratch=elementwise.norm_scratch(n, c))
    inp, dout = values(rng, n, c, precision=r_type, scale=3), values(rng, n, c, precision=x_type)
    weight, addend = values(rng, c, precision=x_type), values(rng, n, c, precision=r_type)
    out, rstd = empty(n, c), empty(n)
    want = ops.RMSNORM.reference(EPSILON, {"inp": inp.astype(float), "weight": weight.astype(float)})
    lib.rmsnorm_forward(out, rstd, inp, weight, n, c)
    close(out, want["out"], x_type)
    close(rstd, want["rstd"])
    x = {"dout": dout, "inp": inp, "rstd": rstd, "weight": weight, "addend": addend}
    want = ops.RMSNORM_BACKWARD.reference(EPSILON, {name: a.astype(float) for name, a in x.items()})
    dinp, dweight, dsum, copy = addend.copy(), np.ones(c, np.float32), np.ones(c, np.float32), empty(n, c)
    lib.rmsnorm_backward(dinp, dweight, dout, inp, rstd, weight, dinp, n, c, 1, dsum, copy)
    close(dinp, want["dinp"], r_type)
    close(copy, want["dinp"], x_type)
    close(dweight, 1 + want["dweight"], sums=n)
    close(dsum, 1 + want["dinp"].sum(0), sums=3 * n)


@pytest.mark.parametrize("kind, c", SHAPES)
def test_embeddings(build, rng, kind, c):
    b, t, longest, rows, (x_type, r_type) = 3, 13, 16, 300, KINDS[kind]
    n = b * t
    names = "token_embedding_forward token_embedding_backward position_embedding_forward position_embedding_backward"
    lib = build(kind, {"C": c}, "token_embedding position_embedding", names, scratch=elementwise.token_embedding_scratch(n, c))
    wte, wpe = values(rng, rows, c, precision=x_type), values(rng, longest, c, precision=x_type)
    tokens = rng.integers(0, rows, n, dtype=np.int32)
    tokens[::3] = 7
    out = empty(n, c)
    lib.token_embedding_forward(out, tokens, wte, n, c)
    assert (out == wte[tokens]).all()
    lib.position_embedding_forward(out, out, wpe, b, t, c)
    close(out, wte[tokens].astype(float) + np.tile(wpe[:t], (b, 1)), r_type)

    dout, dwpe, dwte = values(rng, n, c, precision=r_type), empty(longest, c), values(rng, rows, c, precision="fp32")
    lib.position_embedding_backward(dwpe, dout, longest, b, t, c, 0)
    want = np.zeros((longest, c))
    want[:t] = dout.reshape(b, t, c).sum(0, dtype=float)
    close(dwpe, want, sums=b)
    lib.position_embedding_backward(dwpe, dout, longest, b, t, c, 1)
    close(dwpe, 2 * want, sums=b)
    want = dwte.astype(float)
    np.add.at(want, tokens, dout.astype(float))
    lib.token_embedding_backward(dwte, dout, tokens, rows, n, c, 1)
    close(dwte, want, sums=n)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000, 5000])
@pytest.mark.parametrize("case", ["random", "equal", "few", "text"])
def test_gradients_of_token_embeddings_are_summed_in_order(build, rng, n, case):
    c, rows = 8, 70000
    lib = build(
        "mixed", {"C": c}, "token_embedding", "token_embedding_backward", scratch=elementwise.token_embedding_scratch(n, c)
    )
    tokens = {
        "random": rng.integers(0, rows, n),
        "equal": np.full(n, rows - 1),
        "few": rng.integers(0, 3, n) * 30000,
        "text": np.minimum(rng.zipf(1.2, n), rows) - 1,
    }[case].astype(np.int32)
    dout = values(rng, n, c, precision="fp32")
    results = []
    for _ in range(2):
        dwte = empty(rows, c)
        lib.token_embedding_backward(dwte, dout, tokens, rows, n, c, 0)
        results.append(dwte)
    want = np.zeros((rows, c))
    np.add.at(want, tokens, dout.astype(float))
    close(results[0], want, sums=n)
    assert (results[0] == results[1]).all()


# ---- the classifier

CLASSIFIERS = [
    ("bf16", 101, 64, {}),
    ("mixed", 128, 100, {}),
    ("bf16", 1000, 99, {"label_smoothing": 0.1, "z_loss": 1e-2, "loss": True}),
    ("fp32", 101, 64, {"logit_softcap": 3.0}),
    ("fp32", 30001, 8, {"label_smoothing": 0.2, "logit_softcap": 5.0, "z_loss": 1e-3, "loss": True}),
    ("bf16", 50257, 8, {}),
]


@pytest.mark.parametrize("kind, v, c, options", CLASSIFIERS)
def test_classifier(build, rng, kind, v, c, options):
    n, chunk = (11, 4) if v < 10000 else (5, 3)
    vp, precision, scale = -(-v // 128) * 128, KINDS[kind][0], 0.125
    sizes = {"V": v, "VP": vp, "C": c, "CHUNK": chunk}
    names = "classifier_forward classifier_forward_backward"
    lib = build(kind, sizes, "linear classifier", names, scratch=64 << 20, **options)
    inp, weight = values(rng, n, c, precision=precision), values(rng, vp, c, precision=precision, scale=2 / math.sqrt(c))
    targets = rng.integers(0, v, n, dtype=np.int32)
    targets[:2] = 0, v - 1
    attrs = {
        "vocab_size": Dim(v, "V"),
        "softcap": options.get("logit_softcap", 0),
        "smoothing": options.get("label_smoothing", 0),
    }
    op = SimpleNamespace(attrs=attrs | {"z_loss": options.get("z_loss", 0)})
    raw = cuda_kernels.rounded(inp.astype(float) @ weight.T.astype(float), precision).astype(float)
    losses = ops.CROSS_ENTROPY.reference(op, {"logits": raw, "targets": targets})["losses"]
    dlogits = ops.CROSS_ENTROPY_BACKWARD.reference(op, {"logits": raw, "targets": targets, "dlosses": scale})["dlogits"]
    tolerance = 2e-2 if precision == "bf16" else 1e-4

    got, logits, dinp, dweight = empty(n), empty(chunk, vp), empty(n, c), empty(vp, c)
    lib.classifier_forward(got, logits, inp, weight, targets, n)
    assert np.abs(got - losses).max() < tolerance
    got[:] = np.nan
    lib.classifier_forward_backward(got, dinp, dweight, logits, inp, weight, targets, scale, n, 0)
    assert np.abs(got - losses).max() < tolerance
    last = (n - 1) // chunk * chunk
    rows = n - last
    assert (logits[:rows, v:] == 0).all()
    error = np.abs(logits[:rows] - dlogits[last:])
    assert (error <= (2e-2 if precision == "bf16" else 1e-4) * np.abs(dlogits[last:]) + 1e-5 * scale).all(), error.max()
    _near(dinp, dlogits @ weight.astype(float), tolerance)
    _near(dweight, dlogits.T @ inp.astype(float), tolerance)
    lib.classifier_forward_backward(got, dinp, dweight, logits, inp, weight, targets, scale, n, 1)
    _near(dweight, 2 * dlogits.T @ inp.astype(float), tolerance)


def _near(got, want, tolerance):
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


# ---- the optimizer and sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [8, 1024, 5000])
def test_adamw(build, rng, kind, n):
    lib = build(kind, {}, "global_norm adamw", "adamw", more=ADAMW)
    param, m, v, grad = (values(rng, n, precision="fp32") for _ in range(4))
    v, working = np.abs(v), empty(n)
    x = {"param": param, "m": m, "v": v, "grad": grad}
    x = {name: a.astype(float) for name, a in x.items()}
    x |= {"grad_scale": 0.5, "learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    x |= {"step": 3, "weight_decay": np.where(np.arange(n) < n // 3 // 4 * 4, 0.1, 0.0)}
    want = ops.ADAMW.reference(None, x)
    left = slice(n // 3 // 4 * 4, n // 2 // 4 * 4)
    before = [a.copy() for a in (param, m, v)]
    lib.adamw(param, working, m, v, grad, 0.5, 0.01, 0.9, 0.95, 1e-8, 3, n)
    for got, name, old in zip((param, m, v), ("param", "m", "v"), before, strict=True):
        assert (got[left] == old[left]).all()
        want[name][left] = old[left]
        close(got, want[name])
    if KINDS[kind][0] == "bf16":
        assert (working == cuda_kernels.rounded(param)).all()


def test_the_halves_of_a_weight_are_the_weight(build, rng):
    """Ties, which go away from zero, numbers that round up to the next exponent, no numbers and others."""
    bits = np.array([0x3F808000, 0xBF818000, 0x3F808001, 0x3F807FFF, 0x3FFFFFFF, 0x7F7FFFFF, 0x80000001, 0x80000000], np.uint32)
    special = np.array([0.0, np.inf, -np.inf], np.float32)
    weights = np.concatenate([bits.view(np.float32), special, values(rng, 1000, precision="fp32")])
    lib = build("bf16", {}, "global_norm adamw", "halves", more=HALVES_THERE_AND_BACK)
    working, back = empty(weights.size), empty(weights.size)
    lib.halves(back, working, weights, weights.size)
    np.testing.assert_array_equal(back.view(np.uint32), weights.view(np.uint32))
    near = (weights.view(np.uint32).astype(np.uint64) + 0x8000 & 0xFFFF0000).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(working, near)
    weights = np.array([0x7FFFFFFF, 0x7FC00000, 0xFF800001, 0x7F808000], np.uint32).view(np.float32)
    working, back = empty(weights.size), empty(weights.size)
    lib.halves(back, working, weights, weights.size)
    assert np.isnan(back).all() and np.isnan(working).all()


@pytest.mark.parametrize("n", [1, 3, 4, 1027, 300000])
def test_sums_of_squares_and_of_losses(build, rng, n):
    lib = build("bf16", {}, "global_norm", "norm losses", more=NORM)
    x, out = values(rng, n, precision="fp32"), empty(1)
    lib.norm(out, x, n)
    assert abs(out[0] - np.sum(x.astype(float) ** 2)) <= 1e-6 * np.sum(x.astype(float) ** 2)
    for accumulate in (0, 1):
        lib.losses(out, x, n, accumulate)
        assert abs(out[0] - (1 + accumulate) * x.sum(dtype=float)) <= 1e-6 * np.abs(x).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, columns", [(12, 33), (40, 16), (21, 21)])
def test_muon(build, rng, kind, rows, columns):
    lib = build(kind, {}, "global_norm adamw muon", "muon", more=MUON)
    param, m, grad = (values(rng, rows, columns, precision="fp32") for _ in range(3))
    x = {"param": param[None].astype(float), "m": m[None].astype(float), "grad": grad[None].astype(float)}
    x |= {"grad_scale": 0.5, "learning_rate": 0.1, "weight_decay": 0.2}
    want = ops.MUON.reference(SimpleNamespace(attrs={"parts": (rows,)}), x)
    working, room = empty(rows, columns), empty(4 * rows * columns + 4 * 40 * 40)
    lib.muon(param, working, m, grad, 0.5, 0.1, 0.2, rows, columns, room)
    close(m, want["m"][0])
    assert np.abs(param - want["param"][0]).max() < 2e-4
    if KINDS[kind][0] == "bf16":
        assert (working == cuda_kernels.rounded(param)).all()


# ---- heads


@pytest.mark.parametrize(
    "kind, hs, half", [("bf16", 64, 32), ("bf16", 80, 10), ("mixed", 5, 2), ("fp32", 10, 5), ("bf16", 300, 150)]
)
def test_rope(build, rng, kind, hs, half):
    b, t, nh, nkv, precision = 2, 7, 4, 2, KINDS[kind][0]
    names = "rope_tables rope_forward rope_backward"
    sizes = {"NH": nh, "NKV": nkv, "HS": hs, "MAXT": 11, "ROPE_HALF": half}
    lib = build(kind, sizes, "rope", names, qkv="QKV", qkv_shape="QKV", kv_heads="NKV")
    cosines, sines = empty(11, half), empty(11, half)
    lib.rope_tables(cosines, sines)
    attrs = {
        "num_heads": Dim(nh, "NH"),
        "num_kv_heads": Dim(nkv, "NKV"),
        "half": Dim(half, "ROPE_HALF"),
        "theta": MODEL.rope_theta,
    }
    op = SimpleNamespace(attrs=attrs | {"scaling": "none"})
    inp = values(rng, b, t, (nh + 2 * nkv) * hs, precision=precision)
    for call, reference, name in (
        (lib.rope_forward, ops.ROPE, "inp"),
        (lib.rope_backward, ops.ROPE_BACKWARD, "dout"),
    ):
        want = next(iter(reference.reference(op, {name: inp.astype(float)}).values()))
        out = empty(*inp.shape)
        call(out, inp, cosines, sines, b, t)
        close(out, want, precision)
        again = inp.copy()
        call(again, again, cosines, sines, b, t)
        assert (again == out).all()


@pytest.mark.parametrize("kind, hs", [("bf16", 64), ("bf16", 80), ("mixed", 5), ("fp32", 10), ("bf16", 300), ("fp32", 128)])
@pytest.mark.parametrize("weight", [True, False])
def test_qk_norm(folder, device, rng, kind, hs, weight):
    n, nh, nkv, (precision, residual) = 23, 4, 2, KINDS[kind]
    functions = {name: FUNCTIONS[name] for name in ("qk_norm_forward", "qk_norm_backward")}
    if not weight:
        functions["qk_norm_forward"] = "floatX *out, float *rstd, const floatX *inp, int n"
        functions["qk_norm_backward"] = "floatX *dinp, const floatX *dout, const floatX *inp, const float *rstd, int n"
    options = {"qk_norm_weight": weight, "qkv": "QKV", "qkv_shape": "QKV", "kv_heads": "NKV"}
    sizes = {"C": 64, "NH": nh, "NKV": nkv, "HS": hs, "QKV": (nh + 2 * nkv) * hs}
    chosen = {
        "precision": precision,
        "residual": residual,
        "options": options,
        "scratch": elementwise.qk_norm_scratch(n, nh + 2 * nkv, hs),
    }
    lib = cuda_kernels.build(folder, device, sizes, MODEL, ["qk_norm"], functions, **chosen)
    width = (nh + 2 * nkv) * hs
    inp, dout = values(rng, 1, n, width, precision=precision), values(rng, 1, n, width, precision=precision)
    q, k = values(rng, hs, precision=precision), values(rng, hs, precision=precision)
    op = SimpleNamespace(attrs={"num_heads": Dim(nh, "NH"), "num_kv_heads": Dim(nkv, "NKV"), "epsilon": 1e-5})
    x = {"inp": inp, "qweight": q if weight else None, "kweight": k if weight else None}
    x = {name: a if a is None else a.astype(float) for name, a in x.items()}
    want = ops.QK_NORM.reference(op, x)
    out, rstd = empty(1, n, width), empty(1, n, nh + nkv)
    weights = (q, k) if weight else ()
    lib.qk_norm_forward(out, rstd, inp, *weights, n)
    close(out, want["out"], precision)
    close(rstd, want["rstd"])
    want = ops.QK_NORM_BACKWARD.reference(op, x | {"dout": dout.astype(float), "rstd": rstd.astype(float)})
    dinp, dq, dk = empty(1, n, width), np.ones(hs, np.float32), np.ones(hs, np.float32)
    lib.qk_norm_backward(dinp, *((dq, dk) if weight else ()), dout, inp, rstd, *weights, n, *((1,) if weight else ()))
    close(dinp, want["dinp"], precision)
    if weight:
        close(dq, 1 + want["dqweight"], sums=n * nh)
        close(dk, 1 + want["dkweight"], sums=n * nkv)


# ---- element by element


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 7, 8, 4099])
def test_values_one_by_one(build, rng, kind, n):
    x_type, r_type = KINDS[kind]
    names = "add_forward multiply_forward scale_forward copy_forward zero add_behind"
    lib = build(kind, {}, "add multiply scale copy zero", names, more=BEHIND)
    a, b, out = values(rng, n, precision=x_type), values(rng, n, precision=r_type), empty(n)
    lib.add_forward(out, a, b, n)
    close(out, a.astype(float) + b, r_type)
    lib.multiply_forward(out, a, b, n)
    close(out, a.astype(float) * b, x_type)
    lib.scale_forward(out, a, 0.7, n)
    close(out, a.astype(float) * np.float32(0.7), r_type)
    lib.copy_forward(out, b, n)
    assert (out == cuda_kernels.rounded(b, x_type)).all()
    lib.add_behind(out, a, a, n)
    assert (out[1:] == 2 * a[1:]).all() and out[0] == cuda_kernels.rounded(b, x_type)[0]
    if kind != "mixed":
        in_place = b.copy()
        lib.add_forward(in_place, a, in_place, n)
        close(in_place, a.astype(float) + b, r_type)
    lib.zero(out, n)
    assert (out == 0).all()


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_activations(build, rng, kind, name):
    n, precision, kinds = 2003, KINDS[kind][0], ops.ACTIVATIONS[name]
    lib = build(kind, {}, name, f"{name}_forward {name}_backward")
    inp, dout = values(rng, n, precision=precision, scale=3), values(rng, n, precision=precision)
    inp[:5] = cuda_kernels.rounded(np.array([0, 100, -100, 1e4, -1e4], np.float32), precision)
    out = empty(n)
    with np.errstate(over="ignore"):
        lib_out, want = getattr(lib, f"{name}_forward"), kinds.reference(None, {"inp": inp.astype(float)})["out"]
        lib_out(out, inp, n)
        _within(out, want, precision)
        want = kinds.derivative.reference(None, {"dout": dout.astype(float), "inp": inp.astype(float)})["dinp"]
        getattr(lib, f"{name}_backward")(dout, dout, inp, n)
        _within(dout, want, precision)


def _within(got, want, precision):
    bound = (2.0**-8 if precision == "bf16" else 1e-5) * np.abs(want) + 3e-6
    assert np.isfinite(got).all() and (np.abs(got - want) <= bound).all(), np.abs(got - want).max()
