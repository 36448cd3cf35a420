"""Every kernel of the C target against numpy in float64, over ordinary and awkward shapes, for all profiles it can."""

import shutil

import numpy as np
import pytest
from c_kernels import Sizes, compile_source, load, source

from llmgen import cpu

PROFILES = [p.name for p in cpu.PROFILES if p.name.startswith("x86")]
ORDER = ["x86-64-v2", "x86-64-v3", "x86-64-v4"]
GNU11 = ["-std=gnu11", "-O3", "-fopenmp"]

# Sizes with every edge: channels that no vector divides, a block that is not full, a single head, a single token.
AWKWARD = {
    "ordinary": Sizes(batch=2, seq_len=64, num_heads=4, head_size=32, vocab_size=257),
    "head size 5": Sizes(batch=3, seq_len=37, num_heads=20, head_size=5, vocab_size=101),
    "head size 80": Sizes(batch=3, seq_len=37, num_heads=2, head_size=80, vocab_size=101, chunk=50),
    "one head, several blocks": Sizes(batch=1, seq_len=300, num_heads=1, head_size=64, vocab_size=1000, chunk=7),
    "one channel": Sizes(batch=1, seq_len=3, num_heads=1, head_size=1, vocab_size=2),
    "a single token": Sizes(batch=1, seq_len=1, num_heads=1, head_size=7, vocab_size=3),
}


def runs_here(profile: str) -> bool:
    native = cpu.resolve("native").name
    return native in ORDER and ORDER.index(profile) <= ORDER.index(native)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")

    def build(sizes=None, profile="x86-64-v3", threads=2, compiler="gcc", flags=GNU11, march=True, overrides=None):
        if march and not runs_here(profile):
            pytest.skip(f"this processor is no {profile}")
        if shutil.which(compiler) is None:
            pytest.skip(f"{compiler} is not installed")
        chosen = cpu.resolve(profile)
        text = source(sizes or Sizes(), chosen, overrides)
        return load(compile_source(text, folder, compiler, [*flags, *(chosen.flags if march else ())]), threads)

    return build


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def poisoned(*shape):
    """Memory that must be written before it is read."""
    return np.full(shape, np.nan, dtype=np.float32)


def error(got, want):
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def check(limit=1e-6, **pairs):
    for name, (got, want) in pairs.items():
        e = error(got, want)
        assert e <= limit, f"{name}: error {e:.2e}, limit {limit:.0e}"


def f64(*arrays):
    return [None if a is None else a.astype(np.float64) for a in arrays]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_grad(x):
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return 0.5 * (1 + np.tanh(u)) + 0.5 * x * (1 - np.tanh(u) ** 2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


# ---- products


def check_linear(lib, rng, n, c, oc):
    inp, weight, bias, dout, addend = (normal(rng, *s) for s in [(n, c), (oc, c), (oc,), (n, oc), (n, oc)])
    inp64, weight64, bias64, dout64, addend64 = f64(inp, weight, bias, dout, addend)
    product = inp64 @ weight64.T

    out = poisoned(n, oc)
    lib.linear_forward(out, inp, weight, None, None, n, c, oc)
    check(product=(out, product))
    out = poisoned(n, oc)
    lib.linear_forward(out, inp, weight, bias, addend, n, c, oc)
    check(bias_and_addend=(out, product + bias64 + addend64))
    out = addend.copy()
    lib.linear_forward(out, inp, weight, bias, out, n, c, oc)
    check(in_place=(out, product + bias64 + addend64))

    out, pre = poisoned(n, oc), poisoned(n, oc)
    lib.linear_gelu_forward(out, pre, inp, weight, bias, n, c, oc)
    check(pre=(pre, product + bias64), gelu=(out, gelu(product + bias64)))

    dinp = poisoned(n, c)
    lib.linear_backward_input(dinp, dout, weight, n, c, oc)
    check(dinp=(dinp, dout64 @ weight64))
    dinp = poisoned(n, c)
    lib.linear_backward_input_gelu(dinp, dout, weight, inp, n, c, oc)
    check(dinp_gelu=(dinp, dout64 @ weight64 * gelu_grad(inp64)))

    dweight, dbias = poisoned(oc, c), poisoned(oc)
    lib.linear_backward_weight(dweight, dbias, dout, inp, n, c, oc, 0)
    check(dweight=(dweight, dout64.T @ inp64), dbias=(dbias, dout64.sum(0)))
    lib.linear_backward_weight(dweight, dbias, dout, inp, n, c, oc, 1)
    check(dweight_twice=(dweight, 2 * dout64.T @ inp64), dbias_twice=(dbias, 2 * dout64.sum(0)))
    lib.linear_backward_weight(dweight, None, dout, inp, n, c, oc, 0)
    check(dweight_alone=(dweight, dout64.T @ inp64))


SHAPES = [(1, 1, 1), (1, 100, 515), (5, 3, 7), (17, 1, 1), (17, 16, 3), (64, 64, 64), (111, 100, 300), (257, 100, 515)]
SHAPES += [(37, 1031, 16), (300, 770, 50), (33, 260, 1100)]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_layers_equal_numpy(build, rng, profile, shape):
    check_linear(build(profile=profile), rng, *shape)


@pytest.mark.parametrize("profile", PROFILES)
def test_linear_layers_equal_numpy_when_every_block_is_small(build, rng, profile):
    p = cpu.resolve(profile)
    blocking = {"KC": 16, "MC": 2 * p.tile_rows, "NC": p.tile_columns, "KC_BOTH": 24, "NC_BOTH": 2 * p.tile_columns}
    lib = build(profile=profile, overrides={**blocking, "A_PANEL": 24 * p.tile_rows + 16, "TEAM_PRODUCTS": 0})
    for shape in [(64, 64, 64), (111, 100, 90), (37, 131, 17)]:
        check_linear(lib, rng, *shape)


# ---- attention


def attention_reference(qkv, dout, heads):
    b, t, c = dout.shape
    hs = c // heads
    q, k, v = (qkv[:, :, i * c : (i + 1) * c].reshape(b, t, heads, hs).transpose(0, 2, 1, 3) for i in range(3))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(hs)
    scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - top)
    lse = (top + np.log(p.sum(-1, keepdims=True)))[..., 0]
    p /= p.sum(-1, keepdims=True)
    out = p @ v
    g = dout.reshape(b, t, heads, hs).transpose(0, 2, 1, 3)
    dp = g @ v.transpose(0, 1, 3, 2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(hs)
    flat = lambda x: x.transpose(0, 2, 1, 3).reshape(b, t, c)  # noqa: E731
    dq, dk, dv = flat(ds @ k), flat(ds.transpose(0, 1, 3, 2) @ q), flat(p.transpose(0, 1, 3, 2) @ g)
    return flat(out), lse, dq, dk, dv


def check_attention(lib, rng, sizes, b, t, spread=1.0):
    c = sizes.channels
    qkv, dout = normal(rng, b, t, 3 * c) * np.float32(spread), normal(rng, b, t, c)
    out, lse, dqkv = poisoned(b, t, c), poisoned(b, sizes.num_heads, t), poisoned(b, t, 3 * c)
    lib.attention_forward(out, lse, qkv, b, t)
    want, want_lse, dq, dk, dv = attention_reference(*f64(qkv, dout), sizes.num_heads)
    limit = 1e-6 * max(1, spread**2)
    check(limit, out=(out, want), lse=(lse, want_lse))
    lib.attention_backward(dqkv, dout, out, lse, qkv, b, t)
    check(2 * limit, dv=(dqkv[..., 2 * c :], dv))
    if t > 1:  # a single token's scores have no gradient
        check(2 * limit, dq=(dqkv[..., :c], dq), dk=(dqkv[..., c : 2 * c], dk))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", AWKWARD)
def test_attention_equals_numpy(build, rng, profile, name):
    sizes = AWKWARD[name]
    check_attention(build(sizes, profile), rng, sizes, sizes.batch, sizes.seq_len)


def test_attention_serves_sequences_longer_and_shorter_than_those_of_training(build, rng):
    sizes = Sizes(batch=2, seq_len=16, num_heads=3, head_size=24, max_seq_len=210)
    lib = build(sizes)
    for t in (1, 2, 15, 16, 17, 100, 210):
        check_attention(lib, rng, sizes, 1, t)


def test_attention_rescales_when_large_scores_come_late(build, rng):
    sizes = Sizes(batch=1, seq_len=290, num_heads=1, head_size=16)
    check_attention(build(sizes), rng, sizes, 1, 290, spread=4.0)


# ---- row by row


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("n, c", [(2, 5), (3, 5), (7, 100), (130, 128), (37, 33)])
def test_layernorm_equals_numpy(build, rng, profile, n, c):
    lib = build(profile=profile)
    inp, dout, addend = (normal(rng, n, c) for _ in range(3))
    inp += 3
    weight, bias = 1 + normal(rng, c) / 10, normal(rng, c) / 20
    out, mean, rstd = poisoned(n, c), poisoned(n), poisoned(n)
    lib.layernorm_forward(out, mean, rstd, inp, weight, bias, n, c)
    inp64, dout64, addend64, weight64, bias64 = f64(inp, dout, addend, weight, bias)
    mean64 = inp64.mean(1, keepdims=True)
    rstd64 = 1 / np.sqrt(inp64.var(1, keepdims=True) + np.float64(np.float32(1e-5)))
    xhat = (inp64 - mean64) * rstd64
    check(2e-6, out=(out, xhat * weight64 + bias64), rstd=(rstd, rstd64[:, 0]))
    check(mean=(mean, mean64[:, 0]))

    g = dout64 * weight64
    dinp64 = rstd64 * (g - g.mean(1, keepdims=True) - xhat * (g * xhat).mean(1, keepdims=True))
    dinp, dweight, dbias = poisoned(n, c), poisoned(c), poisoned(c)
    lib.layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight, None, n, c, 0)
    if c > 1:
        check(2e-6, dinp=(dinp, dinp64), dweight=(dweight, (dout64 * xhat).sum(0)))
    check(dbias=(dbias, dout64.sum(0)))
    dinp = addend.copy()
    lib.layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight, dinp, n, c, 1)
    check(2e-6, dinp_added=(dinp, addend64 + dinp64), dbias_twice=(dbias, 2 * dout64.sum(0)))
    if c > 1:
        check(2e-6, dweight_twice=(dweight, 2 * (dout64 * xhat).sum(0)))


@pytest.mark.parametrize("n", [1, 7, 64, 10007])
def test_gelu_and_add_equal_numpy(build, rng, n):
    lib = build()
    inp, dout = 3 * normal(rng, n), normal(rng, n)
    out = poisoned(n)
    lib.gelu_forward(out, inp, n)
    check(gelu=(out, gelu(inp.astype(np.float64))))
    want = dout.astype(np.float64) * gelu_grad(inp.astype(np.float64))
    lib.gelu_backward(out, dout, inp, n)
    check(dinp=(out, want))
    lib.gelu_backward(dout, dout, inp, n)
    check(in_place=(dout, want))
    want = inp.astype(np.float64) + dout
    lib.add_forward(inp, inp, dout, n)
    check(add=(inp, want))


@pytest.mark.parametrize("b, t, c, rows", [(1, 1, 1, 1), (3, 37, 100, 50), (2, 64, 128, 64)])
def test_embeddings_equal_numpy(build, rng, b, t, c, rows):
    lib = build()
    n = b * t
    tokens = rng.integers(0, 11, n, dtype=np.int32)
    wte, wpe, dout = normal(rng, 11, c), normal(rng, rows, c), normal(rng, n, c)
    out = poisoned(n, c)
    lib.token_embedding_forward(out, tokens, wte, n, c)
    assert (out == wte[tokens]).all()
    want = out.reshape(b, t, c) + wpe[:t]
    lib.position_embedding_forward(out, out, wpe, b, t, c)
    assert (out.reshape(b, t, c) == want).all()

    dwte, want = poisoned(11, c), np.zeros((11, c))
    np.add.at(want, tokens, dout.astype(np.float64))
    for times in (1, 2):
        lib.token_embedding_backward(dwte, dout, tokens, 11, n, c, times - 1)
        check(dwte=(dwte, times * want))
    dwpe, want = poisoned(rows, c), np.zeros((rows, c))
    want[:t] = dout.astype(np.float64).reshape(b, t, c).sum(0)
    for times in (1, 2):
        lib.position_embedding_backward(dwpe, dout, rows, b, t, c, times - 1)
        check(dwpe=(dwpe, times * want))


# ---- classifier


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", AWKWARD)
def test_classifier_equals_numpy(build, rng, profile, name, tmp_path):
    s = AWKWARD[name]
    lib = build(s, profile)
    n, c, v, vp = s.batch * s.seq_len, s.channels, s.vocab_size, s.padded_vocab_size
    inp, weight = normal(rng, n, c), normal(rng, vp, c)
    weight[v:] = 0
    targets = rng.integers(0, v, n, dtype=np.int32)
    scale = 1 / n
    logits64 = inp.astype(np.float64) @ weight.astype(np.float64).T[:, :v]
    top = logits64.max(1, keepdims=True)
    e = np.exp(logits64 - top)
    losses64 = np.log(e.sum(1)) + top[:, 0] - logits64[np.arange(n), targets]
    d = e / e.sum(1, keepdims=True)
    d[np.arange(n), targets] -= 1
    d *= scale

    losses, logits, dinp, dweight = poisoned(n), poisoned(n, vp), poisoned(n, c), poisoned(vp, c)
    lib.logits_file(tmp_path / "logits")
    lib.classifier_forward_backward(losses, dinp, dweight, logits, inp, weight, targets, scale, n, 0)
    lib.logits_file(None)
    streamed = np.fromfile(tmp_path / "logits", np.float32).reshape(n, v)
    check(logits=(streamed, logits64), losses=(losses, losses64))
    check(2e-6, dinp=(dinp, d @ weight.astype(np.float64)[:v]), dweight=(dweight[:v], d.T @ inp.astype(np.float64)))
    assert not dweight[v:].any(), "the padding has no gradient"
    lib.classifier_forward_backward(losses, dinp, dweight, logits, inp, weight, targets, scale, n, 1)
    check(2e-6, dweight_twice=(dweight[:v], 2 * d.T @ inp.astype(np.float64)))

    losses, logits = poisoned(n), poisoned(n, vp)
    lib.classifier_forward(losses, logits, inp, weight, targets, n)
    chunk = s.chunk or n
    last = n - (n - 1) // chunk * chunk
    check(losses=(losses, losses64), logits=(logits[:last, :v], logits64[-last:]))


def test_a_loss_stays_finite_for_huge_logits(build):
    s = AWKWARD["one channel"]
    losses, logits, dinp, dweight = poisoned(1), poisoned(1, 128), poisoned(1, 1), poisoned(128, 1)
    weight = np.zeros((128, 1), np.float32)
    weight[:2, 0] = 1000, -1000
    args = np.ones((1, 1), np.float32), weight, np.array([1], np.int32)
    build(s).classifier_forward_backward(losses, dinp, dweight, logits, *args, 1.0, 1, 0)
    assert losses[0] == 2000 and dinp[0, 0] == 2000 and list(dweight[:2, 0]) == [1, -1]


# ---- optimizer


@pytest.mark.parametrize("n", [1, 16, 100003])
def test_sum_of_squares_equals_numpy(build, rng, n):
    x = normal(rng, n)
    assert build().sum_of_squares(x, n) == pytest.approx((x.astype(np.float64) ** 2).sum(), rel=1e-7)


@pytest.mark.parametrize("n", [1, 37, 20000])
def test_adamw_equals_numpy(build, rng, n):
    lib = build()
    param, m, v = normal(rng, n), np.zeros(n, np.float32), np.zeros(n, np.float32)
    p64, m64, v64 = f64(param, m, v)
    lr, decay, b1, b2, eps, scale = (np.float64(np.float32(x)) for x in (1e-2, 0.1, 0.9, 0.95, 1e-8, 0.25))
    for step in range(1, 11):
        grad = normal(rng, n) * np.float32(10.0) ** rng.integers(-9, 3, n).astype(np.float32)
        grad[::5] = 0
        lib.adamw_update(param, m, v, grad, n, scale, lr, decay, b1, b2, eps, step)
        g = grad.astype(np.float64) * scale
        m64, v64 = b1 * m64 + (1 - b1) * g, b2 * v64 + (1 - b2) * g * g
        p64 -= lr * (m64 / (1 - b1**step) / (np.sqrt(v64 / (1 - b2**step)) + eps) + decay * p64)
        check(param=(param, p64), m=(m, m64))


# ---- exp, log, tanh, sqrt: distance from the exact value in units of the spacing of floats around it


def ulps(got, want):
    _, exponent = np.frexp(want)
    return np.abs(got.astype(np.float64) - want) / np.ldexp(1.0, np.maximum(exponent, -125) - 24)


def floats_between(low, high, stride, at_once=1 << 22):
    """Every stride-th float of an interval that does not include 0 inside, so many at once; a multiple of 64."""
    a, b = sorted(int(np.float32(x).view(np.int32)) for x in (low, high))
    for begin in range(a, b - 64 * stride, at_once * stride):
        bits = np.arange(begin, min(b, begin + at_once * stride), stride, dtype=np.int64).astype(np.int32)
        yield np.ascontiguousarray(bits[: len(bits) // 64 * 64]).view(np.float32)


RANGES = [
    ("vexp", np.exp, 1e-20, 88.7, 1.1),
    ("vexp", np.exp, -1e-20, -87.3, 1.1),
    ("vexp", np.exp, -87.3, -103.9, 1.1),
    ("vtanh", np.tanh, 1e-20, 20.0, 1.5),
    ("vtanh", np.tanh, -1e-20, -20.0, 1.5),
    ("vlog", np.log, 1.18e-38, 3.4e38, 1.1),
    ("vsqrt", np.sqrt, 1e-36, 3.4e38, 1.0),
]


def check_ulps(lib, name, exact, low, high, limit, stride):
    worst = at = 0
    for x in floats_between(low, high, stride):
        y = np.empty_like(x)
        getattr(lib, name)(y, x, len(x))
        e = ulps(y, exact(x.astype(np.float64)))
        if e.max() > worst:
            worst, at = e.max(), x[e.argmax()]
    print(f"{name} [{low:g}, {high:g}]: {worst:.3f} ulp at {at!r}")
    assert worst <= limit, f"{name}: {worst:.2f} ulp at {at!r}"


@pytest.mark.parametrize("case", RANGES, ids=lambda c: f"{c[0]} to {c[3]:g}")
@pytest.mark.parametrize("profile", PROFILES)
def test_functions_are_within_their_ulps(build, profile, case):
    check_ulps(build(profile=profile), *case, stride=1009)


@pytest.mark.slow
@pytest.mark.parametrize("case", RANGES, ids=lambda c: f"{c[0]} to {c[3]:g}")
def test_functions_are_within_their_ulps_over_all_floats(build, case):
    check_ulps(build(), *case, stride=1)


def test_exp_and_tanh_at_the_ends(build):
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 89, -200, 1] * 2, np.float32)
    y = poisoned(16)
    build().vexp(y, x, 16)
    assert np.isnan(y[0]) and list(y[1:7]) == [np.inf, 0, 1, 1, np.inf, 0]
    build().vtanh(y, x, 16)
    assert np.isnan(y[0]) and list(y[1:7]) == [1, -1, 0, 0, 1, -1]


# ---- builds


def results(lib, rng):
    """A pass through every kernel that sums, as bytes."""
    s = AWKWARD["head size 5"]
    b, t, c, v = s.batch, s.seq_len, s.channels, s.padded_vocab_size
    n = b * t
    qkv, dout, weight = normal(rng, b, t, 3 * c), normal(rng, b, t, c), normal(rng, 4 * c, c)
    out, lse, dqkv = poisoned(b, t, c), poisoned(b, s.num_heads, t), poisoned(b, t, 3 * c)
    lib.attention_forward(out, lse, qkv, b, t)
    lib.attention_backward(dqkv, dout, out, lse, qkv, b, t)
    hidden, pre, dweight, dbias, dinp = (
        poisoned(n, 4 * c),
        poisoned(n, 4 * c),
        poisoned(4 * c, c),
        poisoned(4 * c),
        poisoned(n, c),
    )
    lib.linear_gelu_forward(hidden, pre, out, weight, None, n, c, 4 * c)
    lib.linear_backward_weight(dweight, dbias, hidden, out, n, c, 4 * c, 0)
    lib.linear_backward_input(dinp, hidden, weight, n, c, 4 * c)
    mean, rstd, dw, db, ones = poisoned(n), poisoned(n), poisoned(c), poisoned(c), np.ones(c, np.float32)
    lib.layernorm_forward(out, mean, rstd, dinp, ones, ones, n, c)
    lib.layernorm_backward(out, dw, db, dout, dinp, mean, rstd, ones, None, n, c, 0)
    losses, logits, dhead = poisoned(n), poisoned(n, v), poisoned(v, c)
    targets = np.arange(n, dtype=np.int32) % s.vocab_size
    lib.classifier_forward_backward(losses, dinp, dhead, logits, out, normal(rng, v, c), targets, 1.0 / n, n, 0)
    lib.token_embedding_backward(dhead, dinp, targets, v, n, c, 1)
    norm = np.array([lib.sum_of_squares(dhead, dhead.size)])
    return [a.tobytes() for a in (out, lse, dqkv, hidden, pre, dweight, dbias, dinp, dw, db, losses, dhead, norm)]


def test_results_do_not_depend_on_the_number_of_threads(build):
    lib = build(AWKWARD["head size 5"], overrides={"TEAM_PRODUCTS": 0, "TEAM_VALUES": 0})
    runs = []
    for threads in (1, 2, 3, 2):
        lib.setup(threads)
        runs.append(results(lib, np.random.default_rng(1)))
    assert runs[0] == runs[1] == runs[2] == runs[3]


@pytest.mark.parametrize("march", [True, False], ids=["march", "no march"])
@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "no openmp"])
@pytest.mark.parametrize("standard", ["c11", "gnu11"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_every_build_is_clean_and_right(build, rng, compiler, standard, openmp, march):
    sizes = AWKWARD["head size 5"]
    flags = [f"-std={standard}", "-O2", *(["-fopenmp"] if openmp else [])]
    lib = build(sizes, threads=2 if openmp else 1, compiler=compiler, flags=flags, march=march)
    check_linear(lib, rng, 33, 37, 50)
    check_attention(lib, rng, sizes, 2, 37)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_fast_math_breaks_nothing(build, rng, compiler):
    sizes = AWKWARD["one head, several blocks"]
    lib = build(sizes, compiler=compiler, flags=["-std=gnu11", "-Ofast", "-fopenmp"])
    check_linear(lib, rng, 33, 37, 50)
    check_attention(lib, rng, sizes, 1, 300)
    for name, exact, low, high, _ in RANGES:
        if low != -87.3:  # subnormals are flushed there
            check_ulps(lib, name, exact, low, min(high, 1e30), 40, stride=10007)


def test_vectors_four_times_a_register_are_right(build, rng):
    sizes = AWKWARD["head size 80"]
    lib = build(sizes, "x86-64-v4", march=False)
    check_linear(lib, rng, 33, 37, 50)
    check_attention(lib, rng, sizes, 2, 37)


def test_no_build_without_optimisation_warns(build, rng):
    check_linear(build(flags=["-std=c11", "-O0"], threads=1), rng, 33, 37, 50)


def test_other_processors_compile(build, tmp_path):
    sizes = AWKWARD["head size 5"]
    v4 = cpu.resolve("x86-64-v4")
    compile_source(source(sizes, v4), tmp_path, "gcc", [*GNU11, *v4.flags])
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("no compiler for arm64: install gcc-aarch64-linux-gnu")
    arm = cpu.resolve("armv8-a")
    compile_source(source(sizes, arm), tmp_path, "aarch64-linux-gnu-gcc", [*GNU11, *arm.flags])
