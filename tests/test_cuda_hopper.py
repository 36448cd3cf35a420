"""The matrix products of Hopper: which tile each gets, and that each tile is right for any shape that TMA can take."""

import cuda_kernels
import pytest
from test_cuda_products import FUNCTIONS, MODEL, check

from llmgen.cuda import architecture, hopper, products

# (n, c, oc): less than a tile, edges of tiles and of clusters, sums of several laps of the ring
SHAPES = [(40, 72, 136), (200, 328, 200), (70, 640, 8), (300, 16, 264)]
TILES = {
    "pingpong": hopper.Tile(True, 2, 128, 192, 2, 1, 4, 3),
    "pingpong, 160 columns": hopper.Tile(True, 2, 128, 160, 2, 1, 4, 3),
    "joint, a shared": hopper.Tile(False, 2, 128, 192, 1, 2, 3, 2),
    "joint, 128 columns": hopper.Tile(False, 2, 128, 128, 1, 2, 4, 2),
    "three consumers": hopper.Tile(False, 3, 64, 192, 2, 1, 3, 2),
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


@pytest.mark.parametrize("parts", ["1, IN_TURN", "3, IN_TURN", "3, APART"])
@pytest.mark.parametrize("tile", TILES)
def test_products_on_hopper_are_right_for_any_shape(folder, hopper_device, tile, parts):
    if parts != "1, IN_TURN" and "columns" in tile:
        pytest.skip("as with 192 columns")
    made = cuda_kernels.build(
        folder,
        hopper_device,
        {"C": 64},
        MODEL,
        ["linear"],
        FUNCTIONS,
        residual="fp32",
        arch="sm_90a",
        machine="sm_90a",
        options={"products": only(TILES[tile], parts)},
        scratch=4 << 20,
    )
    for shape in SHAPES:
        check(made, "bf16", *shape)


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
