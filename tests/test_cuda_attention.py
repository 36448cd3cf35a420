"""CUDA attention against its float64 reference, on the emulator and on a GPU."""

from types import SimpleNamespace

import cuda_kernels
import emulator
import numpy as np
import pytest

from llmgen.config import ModelConfig
from llmgen.cuda import attention
from llmgen.ops.attention import ATTENTION, ATTENTION_BACKWARD

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64 Linux")
LIMITS = {"bf16": 1e-2, "fp32": 1e-5}


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "gpu" and cuda_kernels.present_architecture() is None:
        pytest.skip("no GPU here")
    return request.param


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("attention")


def build(folder, device, head_size, heads, kv_heads, precision, window=False, softcap=0.0, scale=0.0):
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
    return cuda_kernels.build(folder, device, sizes, model, ["attention"], functions, precision=precision)


def error(got, want):
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)


def check(library, head_size, heads, kv_heads, precision, b, t, window=None, softcap=0.0, scale=0.0):
    rng = np.random.default_rng(t)
    qkv = cuda_kernels.rounded(1.5 * rng.standard_normal((b, t, (heads + 2 * kv_heads) * head_size)), precision)
    dout = cuda_kernels.rounded(rng.standard_normal((b, t, heads * head_size)), precision)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": head_size}
    attrs = {name: SimpleNamespace(size=size) for name, size in sizes.items()}
    op = SimpleNamespace(attrs=attrs | {"scale": scale or head_size**-0.5, "softcap": softcap})
    x = {"qkv": qkv.astype(float), "dout": dout.astype(float), "window": window}
    want, dwant = ATTENTION.reference(op, x), ATTENTION_BACKWARD.reference(op, x)

    given = () if window is None else (window,)
    out, lse, dqkv = np.full_like(dout, np.nan), np.full((b, heads, t), np.nan, np.float32), np.full_like(qkv, np.nan)
    library.attention_forward(out, lse, qkv, *given, b, t)
    assert error(out, want["out"]) < LIMITS[precision]
    assert np.abs(lse - want["lse"]).max() < 1e-5
    library.attention_backward(dqkv, dout, out, lse, qkv, *given, b, t)
    assert error(dqkv, dwant["dqkv"]) < LIMITS[precision]

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


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128])
def test_long_sequences(folder, head_size):
    if cuda_kernels.present_architecture() is None:
        pytest.skip("no GPU here")
    library = build(folder, "gpu", head_size, 2, 2, "bf16")
    check(library, head_size, 2, 2, "bf16", 2, 2048)


def test_scratch_holds_delta():
    assert attention.backward_scratch_bytes(2, 37, 3) == 2 * 64 * 3 * 2 * 4
