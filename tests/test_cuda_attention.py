"""CUDA attention against its float64 reference, on the emulator and on a GPU."""

from types import SimpleNamespace

import cuda_kernels
import emulator
import numpy as np
import pytest

from llmgen.config import ModelConfig
from llmgen.cuda import architecture, attention
from llmgen.ops.attention import ATTENTION, ATTENTION_BACKWARD

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64 Linux")
LIMITS = {"bf16": 1e-2, "fp32": 1e-5}


def build(folder, device, head_size, heads, kv_heads, precision, window=False, softcap=0.0, scale=0.0, hopper=False, items=0):
    if hopper and device == "gpu" and architecture.present() != "sm_90a":
        pytest.skip("no Hopper here")
    model = ModelConfig(
        num_layers=1,
        num_heads=heads,
        channels=heads * head_size + 8 * (head_size == 40),  # heads need not make up the channels
        vocab_size=50,
        max_seq_len=1024,
        num_kv_heads=kv_heads,
        head_size=head_size,
        mlp_channels=64,
        attention_window=(7 if window else 0,),
        attention_softcap=softcap,
        attention_scale=scale,
    )
    sizes = {"NH": heads, "NKV": kv_heads, "HS": head_size, "C": model.channels, "QKV": (heads + 2 * kv_heads) * head_size}
    if heads == kv_heads:
        del sizes["NKV"]
    argument = ", int window" if window else ""
    functions = {
        "attention_forward": f"floatX *out, float *lse, const floatX *qkv{argument}, int b, int t",
        "attention_backward": "floatX *dqkv, const floatX *dout, const floatX *out, const float *lse, const floatX *qkv"
        f"{argument}, int b, int t",
    }
    if hopper:
        scratch = attention.backward_scratch_bytes(2, 2048, heads, items)
        chosen = {"head_size": head_size, "fused_attention": items}
        options = {"arch": "sm_90a", "machine": "sm_90a", "options": chosen, "scratch": scratch}
        return cuda_kernels.build(
            folder, device, sizes, model, ["attention_sm90"], functions, races=device == "emulator", **options
        )
    return cuda_kernels.build(folder, device, sizes, model, ["attention"], functions, precision=precision)


def error(got, want):
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)


def check(library, head_size, heads, kv_heads, precision, b, t, window=None, softcap=0.0, scale=0.0, spread=1.5, limit=None):
    rng = np.random.default_rng(t)
    limit = limit or LIMITS[precision]
    qkv = cuda_kernels.rounded(spread * rng.standard_normal((b, t, (heads + 2 * kv_heads) * head_size)), precision)
    dout = cuda_kernels.rounded(rng.standard_normal((b, t, heads * head_size)), precision)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": head_size}
    attrs = {name: SimpleNamespace(size=size) for name, size in sizes.items()}
    op = SimpleNamespace(attrs=attrs | {"scale": scale or head_size**-0.5, "softcap": softcap})
    x = {"qkv": qkv.astype(float), "dout": dout.astype(float), "window": window}
    want, dwant = ATTENTION.reference(op, x), ATTENTION_BACKWARD.reference(op, x)

    given = () if window is None else (window,)
    out, lse, dqkv = np.full_like(dout, np.nan), np.full((b, heads, t), np.nan, np.float32), np.full_like(qkv, np.nan)
    library.attention_forward(out, lse, qkv, *given, b, t)
    assert error(out, want["out"]) < limit
    assert np.abs(lse - want["lse"]).max() < 1e-5 * max(1, np.abs(want["lse"]).max() / 10)
    library.attention_backward(dqkv, dout, out, lse, qkv, *given, b, t)
    assert error(dqkv, dwant["dqkv"]) < limit

    again = np.full_like(qkv, np.nan)
    library.attention_backward(again, dout, out, lse, qkv, *given, b, t)
    assert (again == dqkv).all()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "head_size, heads, kv_heads", [(5, 3, 3), (16, 2, 2), (64, 2, 2), (80, 4, 2), (128, 2, 1), (256, 1, 1)]
)
def test_any_head_size_and_length(folder, device, head_size, heads, kv_heads, precision):
    library = build(folder, device, head_size, heads, kv_heads, precision)
    for b, t in ((1, 1), (2, 37), (1, 64), (1, 130)):
        check(library, head_size, heads, kv_heads, precision, b, t)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("head_size, heads, kv_heads", [(40, 4, 2), (64, 2, 2)])
def test_a_window(folder, device, head_size, heads, kv_heads, precision):
    library = build(folder, device, head_size, heads, kv_heads, precision, window=True)
    for t, window in ((37, 0), (130, 1), (130, 7), (200, 64), (300, 100)):
        check(library, head_size, heads, kv_heads, precision, 1, t, window)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_capped_scores_of_a_scale_of_their_own(folder, device, precision):
    library = build(folder, device, 80, 4, 1, precision, window=True, softcap=5.0, scale=0.2)
    for t, window in ((37, 0), (150, 40)):
        check(library, 80, 4, 1, precision, 1, t, window, softcap=5.0, scale=0.2)


@pytest.mark.parametrize(
    "head_size, heads, kv_heads, items",
    [(64, 2, 2, 0), (64, 4, 2, 0), (128, 2, 1, 0), (64, 2, 2, attention.FUSED_ITEMS), (64, 4, 4, 4), (64, 5, 5, 2)],
)
def test_on_hopper(folder, device, head_size, heads, kv_heads, items):
    """With few items together, heads follow each other in the memory where parts of dQ are added up."""
    library = build(folder, device, head_size, heads, kv_heads, "bf16", hopper=True, items=items)
    for b, t in ((1, 1), (2, 37), (1, 64), (3, 130), (1, 450)):
        check(library, head_size, heads, kv_heads, "bf16", b, t)


@pytest.mark.parametrize("items", [0, 3])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_windows_and_capped_scores_on_hopper(folder, device, softcap, items):
    kv_heads = 2 if items else 1
    library = build(folder, device, 64, 2, kv_heads, "bf16", window=True, softcap=softcap, scale=0.2, hopper=True, items=items)
    for t, window in ((37, 0), (130, 1), (130, 7), (200, 64), (300, 100), (450, 150)):
        check(library, 64, 2, kv_heads, "bf16", 1, t, window, softcap=softcap, scale=0.2)


@pytest.mark.parametrize("items", [0, attention.FUSED_ITEMS])
def test_scores_far_above_the_first_on_hopper(folder, device, items):
    """The exponentials are relative to the first keys' scores, until they would leave the range of float."""
    library = build(folder, device, 64, 2, 2, "bf16", hopper=True, items=items)
    check(library, 64, 2, 2, "bf16", 1, 330, spread=7, limit=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "head_size, heads, hopper, items",
    [
        (64, 2, False, 0),
        (128, 2, False, 0),
        (64, 2, True, 0),
        (128, 2, True, 0),
        (64, 2, True, attention.FUSED_ITEMS),
        (64, 48, True, 64),
    ],
)
def test_long_sequences(folder, head_size, heads, hopper, items):
    if architecture.present() is None:
        pytest.skip("no GPU here")
    library = build(folder, "gpu", head_size, heads, heads, "bf16", hopper=hopper, items=items)
    check(library, head_size, heads, heads, "bf16", 2, 2048)


def test_scratch_holds_delta():
    assert attention.backward_scratch_bytes(2, 37, 3) == 2 * 64 * 3 * 2 * 4


def test_scratch_holds_dq_of_the_heads_that_are_handed_out_together():
    delta = attention.backward_scratch_bytes(8, 450, 6)  # 8 tiles of queries, 4 items of keys
    tile = 4 * (64 * 64 + 1)
    assert attention.backward_scratch_bytes(8, 450, 6, items=1) == delta + 1 * 8 * tile
    assert attention.backward_scratch_bytes(8, 450, 6, items=21) == delta + 5 * 8 * tile
    assert attention.backward_scratch_bytes(8, 450, 6, items=1000) == delta + 8 * 6 * 8 * tile
