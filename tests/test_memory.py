import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_function

from llmgen import config, memory, plan, reference
from llmgen.graph import View


class Workspace:
    """Runs a function on one flat buffer, every tensor at the place the layout gives it."""

    def __init__(self, function, layout, alignment):
        self.function, self.layout = function, layout
        self.memory = np.full((layout.saved_bytes + layout.arena_bytes) // 8 + 1, np.nan)

    def at(self, t, layer):
        place = self.layout.places[t.name]
        buffer = self.layout.buffer(place.buffer)
        start = buffer.offset + (0 if buffer.slots else self.layout.saved_bytes)
        slot = {None: 0, "l": layer, "l + 1": layer + 1}.get(place.slot) if not hasattr(place.slot, "size") else place.slot.size
        if slot is None:
            slot = place.slot
        start = start + slot * buffer.stride
        return self.memory[start // 8 : start // 8 + t.count.size].reshape(t.sizes)

    def run(self, values):
        gradients = {}
        for segment in self.function.segments:
            n = segment.repeat.size if segment.carry else 1
            for step, layer in enumerate(range(n - 1, -1, -1) if segment.reverse else range(n)):
                for op in segment.ops:
                    x = {}
                    for name in op.kind.inputs:
                        t = op.inputs.get(name)
                        x[name] = None if t is None else values[t.name] if t.name in values else self.at(t, layer).copy()
                    results = op.kind.reference(op, x)
                    for name, t in op.outputs.items():
                        if t.role == "gradient":
                            adds = op.accumulate or step > 0
                            gradients[t.name] = results[name] + (gradients[t.name] if adds else 0)
                        else:
                            self.at(t, layer)[...] = results[name]
        return gradients


def double_sized(function):
    """The layout counts four bytes a value; the test computes in eight."""
    layout = memory.layout(function, 64)
    buffers = tuple(memory.Buffer(**{**b.__dict__, "offset": 2 * b.offset, "stride": 2 * b.stride}) for b in layout.buffers)
    return memory.Layout(buffers, layout.places, 2 * layout.saved_bytes, 2 * layout.arena_bytes, 2 * layout.arena_lower_bound)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_a_function_run_in_its_planned_memory_gives_the_same_values(seed, backward):
    function = memory.with_copies(random_function(seed, backward))
    rng = np.random.default_rng(seed)
    values = {"p0": rng.normal(size=(2, 3)), "p1": rng.normal(size=(2, 3)), "tokens": np.array([1, 0])}
    values["dtotal"] = rng.normal(size=(2, 3))
    want = reference.run(function, values)
    layout = double_sized(function)
    workspace = Workspace(function, layout, 64)
    gradients = workspace.run(values)
    output = function.outputs[0]
    np.testing.assert_allclose(workspace.at(output, 0), want[output.name], rtol=1e-12)
    assert gradients.keys() == ({"dp0", "dp1"} if backward else set())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, want[name], rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_no_two_buffers_alive_at_once_overlap(seed, backward):
    layout = memory.layout(memory.with_copies(random_function(seed, backward)), 64)
    start = {b.name: b.offset + (0 if b.slots else layout.saved_bytes) for b in layout.buffers}
    assert len(start) == len(layout.buffers), "names are unique"
    for i, a in enumerate(layout.buffers):
        assert start[a.name] % 64 == 0
        for b in layout.buffers[:i]:
            apart = start[a.name] + a.bytes <= start[b.name] or start[b.name] + b.bytes <= start[a.name]
            assert apart or not memory.overlap(a.interval, b.interval), (a, b)
    assert layout.arena_bytes >= layout.arena_lower_bound


def test_the_arena_of_gpt2_is_as_small_as_its_live_bytes():
    for name in ("gpt2-nano", "gpt2-124m"):
        planned = plan.make(config.load(name))
        for function in (planned.forward_backward, planned.evaluate):
            assert function.layout.arena_bytes <= 1.02 * function.layout.arena_lower_bound


def test_the_residual_stream_needs_one_buffer_in_evaluate_and_one_for_its_gradient():
    planned = plan.make(config.load("gpt2-nano"))
    evaluate = planned.evaluate.layout.places
    assert {evaluate[n].buffer for n in ("embedding", "encoded", "residual", "residual2", "residual3", "final")} == {"residual"}
    training = planned.forward_backward.layout.places
    gradients = {name for name in training if name.startswith(("dresidual", "dencoded", "dfinal"))}
    assert len(gradients) == 5 and {training[n].buffer for n in gradients} == {"dresidual"}


def test_a_view_takes_no_memory():
    planned = plan.make(config.load("gpt2-nano"))
    function = planned.graph.function("evaluate")
    views = [t.name for op in function.ops() if isinstance(op.kind, View) for t in op.outputs.values()]
    assert views and not {b.name for b in planned.evaluate.buffers} & set(views)


def test_packing_reuses_memory_when_lifetimes_allow():
    def buffer(name, size, first, last):
        return memory.Buffer(name, (), "f32", None, (first, last), size)

    packed, total = memory.pack([buffer("a", 64, 0, 1), buffer("b", 128, 2, 3), buffer("c", 64, 1, 2)])
    assert total == 192
    assert memory.lower_bound(packed) == 192


@pytest.mark.parametrize("alignment", [64, 256])
def test_every_layer_of_a_tensor_is_aligned(alignment):
    function = memory.with_copies(random_function(7, True))
    layout = memory.layout(function, alignment)
    assert all(b.stride % alignment == 0 and b.offset % alignment == 0 for b in layout.buffers)
