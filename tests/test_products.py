"""Which tile, and how many parts, a matrix product of target cuda gets."""

import pytest

from llmgen import config, plan
from llmgen.cuda import products
from llmgen.cuda.products import Shape

ALL = list(products.LAYOUTS)
MANY = 65536


@pytest.mark.parametrize("tile", products.TILES, ids=lambda tile: tile.name)
def test_tiles_fit_every_gpu_since_ampere(tile):
    assert tile.shared_bytes <= 99 * 1024
    assert tile.blocks * tile.threads * 255 <= 65536 or tile.rows <= 64


def test_a_large_product_gets_a_large_tile_in_one_part():
    for function in ALL[:-1]:
        choice = products.choose(Shape(function, MANY, 768, 3072), "bf16", 132)
        assert choice.parts == 1
        assert choice.tile.rows * choice.tile.columns >= 128 * 128


def test_a_small_product_gets_a_small_tile():
    assert products.choose(Shape("linear_forward", 256, 128, 384), "bf16", 108).tile.name == "Tile64x64"


def test_a_weight_gradient_is_cut_until_the_device_is_busy():
    choice = products.choose(Shape("linear_backward_weight", MANY, 768, 768), "bf16", 132)
    tiles = -(-768 // choice.tile.rows) * -(-768 // choice.tile.columns)
    slots = 132 * choice.tile.blocks
    waves = tiles * choice.parts / slots
    assert choice.parts > 1
    assert waves / -(-waves // 1) > 0.8


def test_parts_fit_their_scratch_and_are_not_too_short():
    for n, c, oc in [(MANY, 768, 50304), (MANY, 8192, 8192), (300, 768, 768), (1, 5, 7), (4096, 64, 64)]:
        shape = Shape("linear_backward_weight", n, c, oc)
        for precision in ("bf16", "fp32"):
            parts = products.choose(shape, precision, 132).parts
            assert parts == 1 or n >= parts * products.LEAST_TERMS
            assert products.scratch_bytes(shape, products.choose(shape, precision, 132)) <= products.SCRATCH_LIMIT + (32 << 20)


def test_products_without_sums_over_rows_need_no_scratch():
    for function in ALL[:3]:
        shape = Shape(function, MANY, 768, 768)
        assert products.scratch_bytes(shape, products.choose(shape, "bf16", 132)) == 0


@pytest.mark.parametrize("c, oc", [(100, 64), (64, 99)])
def test_rows_that_are_no_multiples_of_16_bytes_are_not_copied_as_such(c, oc):
    shapes = [Shape(function, 64, c, oc) for function in ALL]
    chosen = products.options(shapes, "bf16", 108)
    assert all(rule.aligned == "false" for function in ALL for rule in chosen[function])


def test_the_last_rule_always_fits_and_every_tile_named_is_defined():
    shapes = [Shape(function, MANY, c, oc) for function in ALL for c, oc in [(768, 3072), (16, 16), (99, 16), (768, 768)]]
    for known in (shapes, []):
        chosen = products.options(known, "bf16", 132)
        defined = {tile.name for tile in chosen["tiles"]}
        for function in ALL:
            *_, last = chosen[function]
            assert last.when == ""
            assert all(rule.when for rule in chosen[function][:-1])
            assert {rule.product.split("<")[1].rstrip(", ") for rule in chosen[function]} <= defined


def test_a_program_asks_for_its_linears_and_for_those_in_the_classifier():
    made = plan.make(config.load("gpt2-124m", target="cuda"), "cuda", arch="sm_80")
    found = {(s.function, s.c, s.oc) for s in products.shapes(made.graph)}
    assert {("linear_forward", 768, 2304), ("linear_gelu_forward", 768, 3072), ("linear_backward_weight", 768, 50304)} <= found
