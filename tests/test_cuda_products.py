"""The portable matrix products of target cuda: which kernel each gets, and that each is right for any shape."""

from dataclasses import replace

import cuda_kernels
import numpy as np
import pytest

from llmgen.config import ModelConfig
from llmgen.cuda import products
from llmgen.ops.activation import gelu, gelu_derivative

MODEL = ModelConfig(1, 2, 16, 50, 16, 2, 8, 64)
X, IN = "floatX *", "const floatX *"
SIZES = "int n, int c, int oc"
SUMS = ", float *dsum, int accumulate"
FUNCTIONS = {
    "linear_forward": f"{X}out, {IN}inp, {IN}weight, {IN}bias, {IN}addend, {SIZES}",
    "linear_forward_residual": f"linear_forward(floatR *out, {IN}inp, {IN}weight, {IN}bias, const floatR *addend, {SIZES})",
    "linear_gelu_forward": f"{X}out, {X}kept, {IN}inp, {IN}weight, {IN}bias, {SIZES}",
    "linear_backward_input": f"{X}dinp, {IN}dout, {IN}weight, {SIZES}",
    "linear_backward_input_gelu": f"{X}dinp, {IN}dout, {IN}weight, {IN}kept, {SIZES}{SUMS}",
    "linear_backward_weight": f"float *dweight, float *dbias, {IN}dout, {IN}inp, {SIZES}, int accumulate",
}
# (n, c, oc): one tile and less, edges of tiles, rows of 200 bytes, odd rows, long sums, one of everything
SHAPES = [(64, 64, 64), (100, 136, 72), (37, 100, 260), (65, 99, 33), (300, 16, 8), (1, 1, 1), (130, 257, 131), (5, 8, 400)]


def library(folder, device, precision, chosen, slopes=True):
    functions = {k: v for k, v in FUNCTIONS.items() if precision == "bf16" or k != "linear_forward_residual"}
    return cuda_kernels.build(
        folder,
        device,
        {"C": 64},
        MODEL,
        ["linear"],
        functions,
        precision=precision,
        residual="fp32",
        options={"products": chosen, "slopes": slopes},
        scratch=32 << 20,
    )


def check(library, precision, n, c, oc, seed=0, slopes=True, hopper=False):
    """slopes: GELU keeps its slope for the backward, else its argument. hopper: of its gradient no columns are summed."""
    rng = np.random.default_rng(seed)

    def values(*shape):
        return cuda_kernels.rounded(rng.standard_normal(shape), precision)

    def close(got, want, terms, stored=precision):
        """Sums of `terms` products in float32, then rounded to what is stored."""
        relative = 2e-6 + (2**-8 if stored == "bf16" else 0)
        assert np.abs(got - want).max() <= relative * np.abs(want).max() + 3e-6 * np.sqrt(terms) * 4, (n, c, oc)

    inp, weight, bias, addend = values(n, c), values(oc, c), values(oc), values(n, oc)
    out, kept = np.full((n, oc), np.nan, np.float32), np.full((n, oc), np.nan, np.float32)
    product = inp.astype(float) @ weight.T.astype(float)

    library.linear_forward(out, inp, weight, bias, addend, n, c, oc)
    close(out, product + bias + addend, c)
    library.linear_forward(out, inp, weight, None, None, n, c, oc)
    close(out, product, c)
    out[...] = addend
    library.linear_forward(out, inp, weight, bias, out, n, c, oc)  # in place
    close(out, product + bias + addend, c)
    if precision == "bf16":
        exact = rng.standard_normal((n, oc)).astype(np.float32)
        library.linear_forward_residual(out, inp, weight, bias, exact, n, c, oc)
        close(out, product + bias + exact, c, "fp32")

    library.linear_gelu_forward(out, kept, inp, weight, bias, n, c, oc)
    close(kept, gelu_derivative(product + bias) if slopes else product + bias, c)
    close(out, gelu(product + bias), c)
    alone = np.full_like(out, np.nan)
    library.linear_gelu_forward(alone, None, inp, weight, bias, n, c, oc)
    np.testing.assert_array_equal(alone, out)
    library.linear_gelu_forward(out, None, inp, weight, None, n, c, oc)
    close(out, gelu(product), c)

    dout, dinp, inner = values(n, oc), np.full((n, c), np.nan, np.float32), values(n, c)
    product = dout.astype(float) @ weight.astype(float)
    library.linear_backward_input(dinp, dout, weight, n, c, oc)
    close(dinp, product, oc)
    product, dsum = product * (inner if slopes else gelu_derivative(inner.astype(float))), np.full(c, np.nan, np.float32)
    library.linear_backward_input_gelu(dinp, dout, weight, inner, n, c, oc, *(() if hopper else (None, 0)))
    close(dinp, product, oc)
    if not hopper:
        dinp[...] = np.nan
        library.linear_backward_input_gelu(dinp, dout, weight, inner, n, c, oc, dsum, 0)
        close(dinp, product, oc)
        close(dsum, product.sum(axis=0), n * oc, "fp32")
        library.linear_backward_input_gelu(dinp, dout, weight, inner, n, c, oc, dsum, 1)
        close(dsum, 2 * product.sum(axis=0), n * oc, "fp32")

    dweight, dbias = np.full((oc, c), np.nan, np.float32), np.full(oc, np.nan, np.float32)
    product, sums = dout.T.astype(float) @ inp.astype(float), dout.astype(float).sum(axis=0)
    library.linear_backward_weight(dweight, dbias, dout, inp, n, c, oc, 0)
    close(dweight, product, n, "fp32")
    close(dbias, sums, n, "fp32")
    library.linear_backward_weight(dweight, dbias, dout, inp, n, c, oc, 1)
    close(dweight, 2 * product, n, "fp32")
    close(dbias, 2 * sums, n, "fp32")
    library.linear_backward_weight(dweight, None, dout, inp, n, c, oc, 0)
    close(dweight, product, n, "fp32")


def only(tile, parts=1):
    """Options with which everything is computed on this tile, whatever the shape; sums over rows in parts."""
    chosen = {"tiles": [tile] if isinstance(tile, products.Tile) else []}
    for function in products.LAYOUTS:
        many = parts if function == "linear_backward_weight" else 0
        rule = products.Rule("c % 8 == 0 && oc % 8 == 0", tile.product(function), "true", many)
        chosen[function] = [rule, replace(rule, when="", aligned="false")]
    return chosen


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("tile", products.TILES, ids=lambda tile: tile.name)
def test_products_of_bf16_are_right_for_any_shape(folder, device, tile, parts):
    made = library(folder, device, "bf16", only(tile, parts))
    for shape in SHAPES:
        check(made, "bf16", *shape)


@pytest.mark.parametrize("tile", products.FLOAT_TILES, ids=lambda tile: f"side {tile.side}")
def test_products_of_floats_are_right_for_any_shape(folder, device, tile):
    made = library(folder, device, "fp32", only(tile, parts=3))
    for shape in SHAPES:
        check(made, "fp32", *shape)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_rules_that_know_no_shape_fit_any(folder, device, precision):
    made = library(folder, device, precision, products.options([], precision, 132), slopes=False)
    for shape in [(70, 72, 80), (33, 20, 36), (9, 11, 13)]:
        check(made, precision, *shape, slopes=False)
