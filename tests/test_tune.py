"""llmgen tune without a GPU: its programs run on the emulator. Times mean nothing then; what is verified and kept does."""

import json
import re

import emulator
import pytest

from llmgen import config as configs
from llmgen import plan as plans
from llmgen import program, render, toolchain, tune
from llmgen.cuda import architecture, hopper, products, tuned
from llmgen.cuda.products import Shape
from llmgen.errors import UserError

SMALL = {"num_layers": 1, "num_heads": 2, "channels": 64, "vocab_size": 120, "max_seq_len": 32, "batch_size": 3, "seq_len": 24}
GPU, TOOLKIT = "Emulated", "13.0"
emulated_only = pytest.mark.skipif(not emulator.available(), reason="the emulator is for g++ on x86-64 Linux")


def small(**overrides) -> configs.Config:
    return configs.load("gpt2-nano", target="cuda", overrides={"precision": "bf16", **SMALL, **overrides})


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A machine with a GPU, nvcc and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(architecture, "gpu_name", lambda: GPU)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: ("nvcc",))
    monkeypatch.setattr(toolchain, "nvcc_version", lambda compiler: (13, 0))
    return tmp_path


@pytest.fixture
def emulated(monkeypatch, here):
    """Where nvcc would compile, the emulator does; two candidates of each product."""

    def compile(source, program, target, machine, more=()):
        emulator.compile(source, program)
        return toolchain.Build(program, ("nvcc",))

    every = tune.candidates
    monkeypatch.setattr(toolchain, "compile", compile)
    monkeypatch.setattr(tune, "candidates", lambda shape, kernels: every(shape, kernels)[-2:])
    return here


def ran(config, arch, rounds=2, export=None) -> str:
    lines: list[str] = []
    tune.tune(config, arch, rounds, None, export, False, lines.append)
    return "\n".join(lines)


def planted(monkeypatch, function: str, tile: int, change) -> None:
    """Changes what a tile's kernel is called with: `change` of the statement."""
    plain = tune.source

    def source(name, *arguments):
        text = plain(name, *arguments)
        if name != function:
            return text
        made, count = re.subn(rf"(\(tried_tile == {tile}\)\n\s*)([^;]+;)", lambda m: m[1] + change(m[2]), text)
        assert count == 1
        return made

    monkeypatch.setattr(tune, "source", source)


@emulated_only
@pytest.mark.parametrize(
    "arch, overrides",
    [
        ("sm_80", {}),
        ("sm_90a", {"residual_precision": "fp32"}),
        pytest.param("sm_80", {"residual_precision": "fp32"}, marks=pytest.mark.slow),
        pytest.param("sm_80", {"precision": "fp32"}, marks=pytest.mark.slow),
        pytest.param("sm_90a", {}, marks=pytest.mark.slow),
    ],
)
def test_every_product_is_verified_timed_and_kept(emulated, arch, overrides):
    config = small(**overrides)
    text = ran(config, arch)
    assert "left out" not in text and "cannot be tried" not in text
    wanted = tune.of_plan(program.plan(config, "cuda", "native", arch))
    assert {p.shape.function for p in wanted} == set(products.LAYOUTS)
    for product in wanted:
        assert any(line.startswith(product.title + "  ") for line in text.splitlines()), product.title
    kept = tuned.read()
    assert {(r.function, r.n, r.c, r.oc) for r in kept} == {
        (p.shape.function, p.shape.n, p.shape.c, p.shape.oc) for p in wanted
    }
    assert {(r.gpu, r.toolkit) for r in kept} == {(emulated_gpu(), TOOLKIT)}
    assert all(r.milliseconds > 0 for r in kept)


def emulated_gpu() -> str:
    """As the emulator names its device."""
    return next(r.gpu for r in tuned.read())


@emulated_only
@pytest.mark.parametrize(
    "arch, function, wrong",
    [
        ("sm_80", "linear_forward", lambda call: call.replace("n, oc, c)", "n, oc, c - 8)")),  # terms are missing
        ("sm_80", "linear_backward_input_gelu", lambda call: call.replace("dsum,", "NULL,")),  # an output is not written
        ("sm_80", "linear_backward_weight", lambda call: call.replace("accumulate", "0")),  # right once
        (
            "sm_90a",
            "linear_gelu_forward",
            lambda call: call.replace("epilogue,", "Epilogue<floatX, floatX>{out, slope, NULL, NULL},"),
        ),  # without bias
    ],
)
def test_a_wrong_candidate_is_left_out(emulated, monkeypatch, arch, function, wrong):
    planned = program.plan(small(), "cuda", "native", arch)
    shape = next(p.shape for p in tune.of_plan(planned) if p.shape.function == function)
    kernels = tuned.family(planned.profile, "bf16")
    tiles = tune.tiles(function, kernels)
    bad, good = tiles[-1], tiles[-2]
    kind = hopper.Choice if kernels == "wgmma" else products.Choice
    monkeypatch.setattr(tune, "candidates", lambda shape, kernels: [kind(good, 1), kind(bad, 1)])
    monkeypatch.setattr(tune, "of_plan", lambda plan, plain=tune.of_plan: [p for p in plain(plan) if p.shape == shape])
    monkeypatch.setattr(tune, "expected", lambda *_: (kind(bad, 1), kind(bad, 1)))
    planted(monkeypatch, function, len(tiles) - 1, wrong)
    text = ran(small(), arch)
    assert f"{bad.name} is left out: wrong result" in text
    (kept,) = tuned.read()
    assert kept.choice == kind(good, 1)


@emulated_only
@pytest.mark.parametrize(
    "planted_call, said",
    [
        ("*(volatile int *)8 = 0;", "the program ended with status"),
        ("(void)getchar();", "no answer in"),
        ('note(cudaErrorInvalidValue, "launch");', "launch"),
    ],
)
def test_a_candidate_that_faults_or_hangs_ends_nothing(emulated, monkeypatch, planted_call, said):
    monkeypatch.setattr(tune, "PATIENCE", 8.0)
    monkeypatch.setattr(
        tune,
        "of_plan",
        lambda plan, plain=tune.of_plan: [p for p in plain(plan) if p.shape.function == "linear_backward_input"],
    )
    monkeypatch.setattr(tune, "candidates", lambda shape, kernels: products.candidates(shape, "bf16"))
    planted(monkeypatch, "linear_backward_input", 1, lambda call: planted_call)
    text = ran(small(), "sm_80", rounds=1)
    bad = products.TILES[1].name
    assert re.search(rf"{bad} is left out: .*{re.escape(said)}", text), text
    assert text.count("is left out") == (1 if "launch" not in planted_call else 4)  # what ends the program is not tried again
    assert len(tuned.read()) == len(
        [
            s
            for s in products.shapes(program.plan(small(), "cuda", "native", "sm_80").graph)
            if s.function == "linear_backward_input"
        ]
    )
    assert not any(r.choice.tile.name == bad for r in tuned.read())


# ---- what is kept, and who uses it

SHAPE = Shape("linear_backward_weight", 65536, 768, 768)
OTHER = hopper.Choice(hopper.WEIGHT_TILES[-1], 7, True)


def kept(choice=OTHER, shape=SHAPE, gpu=GPU, toolkit=TOOLKIT, kernels="wgmma"):
    tuned.keep([tuned.result(gpu, toolkit, kernels, shape, choice, 0.25)])


def gpt2(batch_size=64):
    return configs.load("gpt2-124m", target="cuda", overrides={"batch_size": batch_size, "seq_len": 1024})


def test_sources_change_with_the_cache_only_where_tuned_is_said(here):
    plain = render.source(plans.make(gpt2(), "cuda", arch="sm_90a"))
    assert OTHER.tile.name not in plain
    kept()
    assert render.source(plans.make(gpt2(), "cuda", arch=program.machine(gpt2(), "sm_90a", False))) == plain
    planned = plans.make(gpt2(), "cuda", arch=program.machine(gpt2(), "sm_90a", True))
    source = render.source(planned)
    assert f"weight_gradient_sm90<{OTHER.tile.name}, true>(dweight, dbias, dout, inp, n, c, oc, accumulate, 7, APART)" in source
    assert planned.memory.scratch_per_thread >= hopper.scratch_bytes(SHAPE.function, SHAPE.n, SHAPE.c, SHAPE.oc, OTHER)
    near = plans.make(gpt2(32), "cuda", arch=program.machine(gpt2(32), "sm_90a", True))  # half as many rows
    assert OTHER.tile.name in render.source(near)


def test_the_portable_kernels_have_results_of_their_own(here):
    kept()
    choice = products.Choice(products.TILES[2], 3)
    kept(choice, kernels="mma")
    source = render.source(plans.make(gpt2(), "cuda", arch=program.machine(gpt2(), "sm_80", True)))
    assert "weight_gradient<Tile64x64, true>(dweight, dbias, dout, inp, n, c, oc, accumulate, 3)" in source
    assert "sm90" not in source


@pytest.mark.parametrize("other", [{"gpu": "another"}, {"toolkit": "12.4"}, {"kernels": "mma"}])
def test_results_of_another_machine_are_not_used(here, other):
    choice = products.Choice(products.TILES[0], 1) if "kernels" in other else OTHER
    kept(choice, **other)
    with pytest.raises(UserError, match="run llmgen tune"):
        program.machine(gpt2(), "sm_90a", True)


def test_tuned_without_a_gpu_is_one_line(here, monkeypatch):
    kept()
    monkeypatch.setattr(architecture, "gpu_name", lambda: None)
    with pytest.raises(UserError, match="--tuned takes what llmgen tune found"):
        program.machine(gpt2(), "sm_90a", True)
    with pytest.raises(UserError, match="tune measures on an NVIDIA GPU"):
        ran(small(), "sm_80")


def test_results_are_merged(here):
    kept()
    kept(shape=Shape("linear_forward", 8192, 1600, 4800), choice=hopper.Choice(hopper.TILES[0]))
    better = hopper.Choice(hopper.WEIGHT_TILES[0], 2)
    kept(better)
    results = tuned.read()
    assert len(results) == 2 and better in [r.choice for r in results]
    assert not list(tuned.path().parent.glob(".*"))


def test_nothing_is_left_half_written(here, monkeypatch):
    kept()
    before = tuned.path().read_bytes()
    monkeypatch.setattr(
        "llmgen.formats.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="cannot be written"):
        kept(hopper.Choice(hopper.WEIGHT_TILES[0], 2))
    assert tuned.path().read_bytes() == before
    assert not list(tuned.path().parent.glob(".*"))


def damaged_row(**changes):
    kept()
    (row,) = json.loads(tuned.path().read_text())["results"]
    return json.dumps({"version": 1, "results": [row | changes]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"\xff\xfe",
        lambda: b"[]",
        lambda: b'{"version": 2, "results": []}',
        lambda: b'{"version": 1, "results": [{}]}',
        lambda: damaged_row(parts=0),
        lambda: damaged_row(parts="2"),
        lambda: damaged_row(function="linear"),
        lambda: damaged_row(tile={"rows": 3}),
        lambda: damaged_row(tile={"rows": "128"} | {k: v for k, v in vars(OTHER.tile).items() if k != "rows"}),
        lambda: damaged_row(tile=vars(OTHER.tile) | {"stages": 99}),
    ],
    ids=range(11),
)
def test_a_damaged_cache_is_one_line(here, content):
    data = content()
    tuned.path().parent.mkdir(parents=True, exist_ok=True)
    tuned.path().write_bytes(data)
    with pytest.raises(UserError) as error:
        program.machine(gpt2(), "sm_90a", True)
    text = str(error.value)
    assert text.startswith(f"{tuned.path()}: is damaged") and "remove it" in text and "\n" not in text
    with pytest.raises(UserError, match="is damaged"):
        ran(small(), "sm_80")  # before anything is compiled


def test_a_cache_from_before_there_were_transposed_tiles_is_read(here):
    kept()
    tuned.path().write_bytes(damaged_row(tile={k: v for k, v in vars(OTHER.tile).items() if k != "transposed"}))
    (row,) = tuned.read()
    assert row.choice == OTHER


def test_the_export_is_a_table_that_can_ship(here):
    transposed = next(tile for tile in hopper.WEIGHT_TILES if tile.transposed)
    choices = {
        Shape("linear_forward", 65536, 768, 2304): hopper.Choice(hopper.TILES[0]),
        SHAPE: OTHER,
        Shape("linear_backward_weight", 65536, 768, 3072): hopper.Choice(hopper.WEIGHT_TILES[2], 5),
        Shape("linear_backward_weight", 8192, 6400, 1600): hopper.Choice(transposed),
    }
    for shape, choice in choices.items():
        kept(choice, shape)
    text = tuned.exported(GPU, TOOLKIT)
    table = hopper.read_table(text)
    assert table == {(s.function, s.c, s.oc): [(s.n, choice)] for s, choice in choices.items()}
    assert text.startswith("# The fastest of the candidates") and GPU in text


def test_what_ships_stays_unless_something_is_faster_by_more_than_noise():
    a, b = hopper.Choice(hopper.TILES[0]), hopper.Choice(hopper.TILES[1])
    product = tune.Product(Shape("linear_forward", 64, 64, 64))
    assert tune.Tuned(product, a, a, {a: [1.001, 1.002], b: [1.0, 1.001]}, 0).winner == a
    assert tune.Tuned(product, a, a, {a: [1.1, 1.2], b: [1.0, 1.001]}, 0).winner == b


def test_every_candidate_has_a_tile_in_the_program():
    for shape in (SHAPE, Shape("linear_gelu_forward", 8192, 1600, 6400), Shape("linear_backward_input_gelu", 8192, 6400, 1600)):
        for kernels in ("wgmma", "mma", "floats"):
            tiles = tune.tiles(shape.function, kernels)
            found = tune.candidates(shape, kernels)
            assert {choice.tile for choice in found} <= set(tiles)
            assert len(found) == len(set(found)) >= len(tiles)
