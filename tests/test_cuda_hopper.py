"""The matrix products of Hopper: which tile each gets, and that each tile is right for any shape that TMA can take."""

from types import SimpleNamespace

import cuda_kernels
import numpy as np
import pytest
from test_cuda_elementwise import FUNCTIONS as ELEMENTWISE
from test_cuda_products import FUNCTIONS, MODEL, SUMS, check

from llmgen import ops
from llmgen.cuda import architecture, hopper, products
from llmgen.graph import Dim

# (n, c, oc): less than a tile, edges of tiles and of clusters, sums of several laps of the ring
SHAPES = [(40, 72, 136), (200, 328, 200), (70, 640, 8), (300, 16, 264)]
TILES = {
    "pingpong": hopper.Tile(True, 2, 128, 192, 2, 1, 4, 3),
    "pingpong, 160 columns": hopper.Tile(True, 2, 128, 160, 2, 1, 4, 3),
    "joint, a shared": hopper.Tile(False, 2, 128, 192, 1, 2, 3, 2),
    "joint, 128 columns": hopper.Tile(False, 2, 128, 128, 1, 2, 4, 2),
    "three consumers": hopper.Tile(False, 3, 64, 192, 2, 1, 3, 2),
    "transposed": hopper.Tile(False, 2, 128, 160, 1, 2, 3, 2, transposed=True),
    "transposed, b shared": hopper.Tile(False, 3, 64, 192, 2, 1, 3, 2, transposed=True),
    "alone": hopper.Tile(False, 1, 64, 64, 1, 1, 4, 2),
}


@pytest.fixture
def hopper_device(device):
    if device == "gpu" and architecture.present() != "sm_90a":
        pytest.skip("no Hopper here")
    return device


def only(tile, parts):
    """Options with which everything is computed on this tile."""
    chosen = {"tiles": [], "hopper": hopper.options([tile])}
    for function in products.LAYOUTS:
        many = parts if function == hopper.WEIGHT_GRADIENT else 0
        chosen[function] = [products.Rule("", tile.product(function), "true", many)]
    return chosen


TYPICAL = ("pingpong", "joint, a shared", "transposed")
CASES = [(tile, "3, IN_TURN") for tile in TILES] + [
    pytest.param(tile, parts, marks=() if tile in TYPICAL else pytest.mark.slow)
    for tile in TILES
    for parts in ("1, IN_TURN", "3, APART")
    if parts == "1, IN_TURN" or "columns" not in tile  # as with 192 columns
]


@pytest.mark.parametrize("tile, parts", CASES)
def test_products_on_hopper_are_right_for_any_shape(folder, hopper_device, tile, parts):
    slopes = parts != "1, IN_TURN"  # what GELU keeps has nothing to do with the parts; each is tried with each tile
    made = cuda_kernels.build(
        folder,
        hopper_device,
        {"C": 64},
        MODEL,
        ["linear"],
        {**FUNCTIONS, "linear_backward_input_gelu": FUNCTIONS["linear_backward_input_gelu"].removesuffix(SUMS)},
        residual="fp32",
        arch="sm_90a",
        machine="sm_90a",
        options={"products": only(TILES[tile], parts), "slopes": slopes},
        scratch=4 << 20,
        races=hopper_device == "emulator" and parts == "3, IN_TURN",
    )
    for shape in SHAPES:
        check(made, "bf16", *shape, slopes=slopes, hopper=True)


def test_every_choice_fits_in_shared_memory():
    for function in products.LAYOUTS:
        for tile in {c.tile for c in hopper.candidates(function, 65536, 768, 65536)}:
            assert tile.shared_bytes(function) <= hopper.SHARED_LIMIT, (function, tile)
    for (function, c, oc), choices in hopper.measured().items():
        for _, choice in choices:
            assert choice.tile.shared_bytes(function) <= hopper.SHARED_LIMIT, (function, c, oc)


def test_the_table_is_for_about_as_many_rows():
    measured = hopper.choose("linear_forward", 65536, 3072, 768)
    assert hopper.choose("linear_forward", 32768, 3072, 768) == measured
    assert not measured.tile.pingpong
    assert hopper.choose("linear_forward", 64, 3072, 768).tile.tile_rows == 64


def test_small_products_get_small_tiles_and_long_sums_are_cut():
    assert hopper.choose("linear_forward", 512, 128, 384).tile.tile_rows == 64
    assert hopper.choose(hopper.WEIGHT_GRADIENT, 65536, 768, 768).parts > 1


def test_counters_and_scratch_follow_the_choice():
    assert hopper.turns("linear_forward", 768, 768, hopper.choose("linear_forward", 65536, 768, 768)) == 0
    in_turn = hopper.choose(hopper.WEIGHT_GRADIENT, 65536, 768, 3072)
    assert in_turn.parts > 1 and not in_turn.apart
    assert hopper.turns(hopper.WEIGHT_GRADIENT, 768, 3072, in_turn) == 3072 // 16 * 4
    apart = hopper.choose(hopper.WEIGHT_GRADIENT, 65536, 768, 768)
    assert apart.apart
    assert hopper.scratch_bytes(hopper.WEIGHT_GRADIENT, 65536, 768, 768, apart) >= 4 * apart.parts * 768 * 768


def test_floats_take_the_portable_kernels_on_hopper_too():
    shape = products.Shape(hopper.WEIGHT_GRADIENT, 65536, 768, 768)
    choice = products.chosen(shape, "fp32", 132, wgmma=True)
    assert isinstance(choice.tile, products.FloatTile)
    assert products.scratch_bytes(shape, choice) >= 4 * choice.parts * 768 * 768


HEADS = {  # forward, input gradient
    "pingpong and joint": (TILES["pingpong"], TILES["joint, a shared"]),
    "joint and pingpong": (TILES["joint, a shared"], TILES["pingpong, 160 columns"]),
    "alone": (TILES["alone"], TILES["alone"]),
}


@pytest.mark.parametrize("tiles", HEADS)
def test_the_heads_gradient_comes_without_a_pass_over_the_logits(folder, hopper_device, tiles):
    """Rows of which another token is 100 nats more likely than the target are among them."""
    n, chunk, v, c, scale = 300, 160, 333, 72, 2.0**-7
    vp = -(-v // 128) * 128
    forward, inputs = HEADS[tiles]
    head = products.Head(products.Shape("linear_backward_input", chunk, c, vp), (forward, inputs), 1024)
    plain = only(TILES["pingpong"], "1, IN_TURN")
    plain["hopper"] = hopper.options({TILES["pingpong"], forward, inputs})
    names = ("classifier_forward", "classifier_forward_backward")
    made = cuda_kernels.build(
        folder,
        hopper_device,
        {"V": v, "VP": vp, "C": c, "CHUNK": chunk},
        MODEL,
        ["linear", "classifier"],
        {name: ELEMENTWISE[name] for name in names},
        arch="sm_90a",
        machine="sm_90a",
        options={"products": plain, "head": head},
        scratch=head.scratch_bytes,
        races=hopper_device == "emulator",
    )
    rng = np.random.default_rng(0)
    inp, weight = (cuda_kernels.rounded(rng.standard_normal(shape), "bf16") for shape in ((n, c), (vp, c)))
    weight = cuda_kernels.rounded(weight * 3 / np.sqrt(c), "bf16")
    weight[v:] = 0
    inp[::7] = cuda_kernels.rounded(inp[::7] * 16, "bf16")
    logits = inp.astype(float) @ weight.T.astype(float)
    targets = rng.integers(0, v, n, dtype=np.int32)
    targets[:2] = 0, v - 1
    targets[7] = logits[7, :v].argmin()
    targets[14] = logits[14, :v].argmax()
    assert logits[7].max() - logits[7, targets[7]] > 100
    op = SimpleNamespace(attrs={"vocab_size": Dim(v, "V"), "softcap": 0, "smoothing": 0, "z_loss": 0})
    losses = ops.CROSS_ENTROPY.reference(op, {"logits": logits, "targets": targets})["losses"]
    dlogits = ops.CROSS_ENTROPY_BACKWARD.reference(op, {"logits": logits, "targets": targets, "dlosses": scale})["dlogits"]

    got, held, dinp, dweight = (np.full(shape, np.nan, np.float32) for shape in (n, (chunk, vp), (n, c), (vp, c)))
    for times in (1, 2):
        made.classifier_forward_backward(got, dinp, dweight, held, inp, weight, targets, scale, n, times - 1)
        assert np.abs(got - losses).max() < 1e-3
        want = dlogits @ weight.astype(float)
        assert np.linalg.norm(dinp - want) <= 5e-3 * np.linalg.norm(want)
        each = np.linalg.norm(dinp - want, axis=1) <= 2e-2 * np.linalg.norm(want, axis=1) + 1e-3 * scale
        assert each.all(), np.flatnonzero(~each)
        want = times * (dlogits.T @ inp.astype(float))
        assert np.linalg.norm(dweight - want) <= 5e-3 * np.linalg.norm(want)
        assert (dweight[v:] == 0).all()
