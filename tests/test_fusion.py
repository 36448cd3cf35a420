"""The graph a target computes gives the same values as the plain one."""

import numpy as np
import pytest

from llmgen import config, models, ops, passes, plan, reference
from llmgen.config import ProgramConfig
from llmgen.passes import fusion
from llmgen.verify import random_parameters

SMALL = {
    "num_layers": 3,
    "num_heads": 2,
    "channels": 8,
    "vocab_size": 21,
    "max_seq_len": 12,
    "batch_size": 2,
    "seq_len": 7,
}


@pytest.fixture(scope="module")
def plain():
    return models.build(config.load("gpt2-nano", overrides=SMALL))


def values_for(graph, seed=0):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 21, (2, 8))
    values = {name: p.astype(float) for name, p in random_parameters(graph, seed).items()}
    return values | {"tokens": text[:, :-1], "targets": text[:, 1:], "loss_scale": 1 / 14}


@pytest.mark.parametrize("chunk", [1, 5, 14])
def test_the_fused_graph_gives_the_losses_and_gradients_of_the_plain_one(plain, chunk):
    fused = passes.for_target(plain, "c", chunk, ProgramConfig())
    values = values_for(plain)
    want = reference.run(plain.function("forward_backward"), values)
    got = reference.run(fused.function("forward_backward"), values)
    for name in ["losses", *("d" + p.name for p in plain.parameters)]:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=1e-14, err_msg=name)
    evaluated = reference.run(fused.function("evaluate"), values)
    np.testing.assert_allclose(evaluated["losses"].reshape(-1), want["losses"].reshape(-1), rtol=1e-12)
    tail = (14 - 1) // chunk * chunk
    logits = want["logits"].reshape(14, -1)
    np.testing.assert_allclose(evaluated["logits"], logits[tail:], rtol=1e-10)


@pytest.mark.parametrize("rewrite", [fusion.join_segments, fusion.add_into, fusion.linear_gelu, fusion.linear_backward_gelu])
def test_each_fusion_alone_changes_no_value(plain, rewrite):
    values = values_for(plain, 1)
    function = plain.function("forward_backward")
    want, got = reference.run(function, values), reference.run(rewrite(function), values)
    for name in ["losses", *("d" + p.name for p in plain.parameters)]:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=1e-14)


def test_the_slope_of_a_gelu_is_kept_where_nothing_else_reads_its_argument(plain):
    values = values_for(plain, 1)
    fused = passes.for_target(plain, "c", 5, ProgramConfig()).function("forward_backward")
    (slopes,) = fusion.gelu_slopes([fused])
    kinds = [op.kind for op in slopes.ops()]
    assert ops.LINEAR_GELU_SLOPE in kinds and ops.LINEAR_BACKWARD_INPUT_SLOPE in kinds
    assert not {ops.LINEAR_GELU, ops.LINEAR_BACKWARD_INPUT_GELU} & set(kinds)
    want, got = reference.run(fused, values), reference.run(slopes, values)
    for name in ["losses", *("d" + p.name for p in plain.parameters)]:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=1e-14)
    again = passes.for_target(plain, "c", 5, ProgramConfig(recompute="cheap")).function("forward_backward")
    assert fusion.gelu_slopes([fused, again]) == [fused, again], "all of a program, or none"


def test_the_fusions_leave_no_separate_add_gelu_or_logits(plain):
    fused = passes.for_target(plain, "c", 5, ProgramConfig())
    kinds = [op.kind for op in fused.function("forward_backward").ops()]
    assert not {ops.ADD, ops.GELU, ops.GELU.derivative, ops.CROSS_ENTROPY, ops.CROSS_ENTROPY_BACKWARD} & set(kinds)
    assert kinds.count(ops.CLASSIFIER_BACKWARD) == 1
    assert len(kinds) == len(list(plain.function("forward_backward").ops())) - 2 - 2 - 4


def test_an_add_whose_part_is_read_elsewhere_stays(plain):
    function = plain.function("forward_backward")
    block = function.segments[1]
    attproj = next(op for op in block.ops if op.outputs["out"].name == "attproj")
    again = ops.COPY
    from llmgen.graph import Op, Tensor

    extra = Op(again, {"inp": attproj.outputs["out"]}, {"out": Tensor("again", attproj.outputs["out"].shape)})
    changed = function.replace(segments=(function.segments[0], block.replace(ops=(*block.ops, extra)), *function.segments[2:]))
    kinds = [op.kind for op in fusion.add_into(changed).segments[1].ops]
    assert kinds.count(ops.ADD) == 1


def test_later_micro_batches_add_to_the_gradients(plain):
    fused = passes.for_target(plain, "c", 5, ProgramConfig()).function("forward_backward")
    first, second = values_for(plain, 2), values_for(plain, 3)
    second |= {p.name: first[p.name] for p in plain.parameters}
    one, two = reference.run(fused, first), reference.run(fused, second)
    gradients = {"d" + p.name: one["d" + p.name].copy() for p in plain.parameters}
    both = reference.run(fused, {**second, **gradients, "micro_batch": 1})
    for name in gradients:
        np.testing.assert_allclose(both[name], one[name] + two[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "extra", [{}, {"norm": "rmsnorm", "mlp": "gated", "activation": "silu"}, {"norm_position": "sandwich"}]
)
def test_recomputing_what_is_cheap_changes_no_value(extra):
    graph = models.build(config.load("gpt2-nano", overrides={**SMALL, **extra}))
    kept, again = (
        passes.for_target(graph, "c", 5, ProgramConfig(recompute=how)).function("forward_backward") for how in ("none", "cheap")
    )
    values = values_for(graph, 4)
    want, got = reference.run(kept, values), reference.run(again, values)
    assert len(list(again.ops())) > len(list(kept.ops()))
    for name in ["losses", *("d" + p.name for p in graph.parameters)]:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_recomputing_frees_the_slots_of_norms_and_activations():
    made = [plan.make(config.load("gpt2-124m", overrides={"recompute": how})) for how in ("none", "cheap")]
    kept, again = ({b.name for b in p.forward_backward.buffers if b.slots} for p in made)
    assert kept - again == {"ln1", "ln1_mean", "ln1_rstd", "ln2", "ln2_mean", "ln2_rstd", "gelu"} and again < kept
    assert made[1].memory.activations < 0.65 * made[0].memory.activations
