"""Random functions for property tests: adds, GELUs and copies, blocks with one or two carries and captured tensors."""

import random

from llmgen import ops
from llmgen.autodiff import differentiate
from llmgen.graph import Builder, Carry, Dim, Function, Segment, Tensor, check
from llmgen.passes import fusion

SHAPE = (Dim(2, "B"), Dim(3, "C"))


def random_function(seed: int, backward: bool) -> Function:
    """A function of the parameters p0 and p1 (one row each) whose output is a (2, 3) tensor."""
    rng = random.Random(seed)
    table = [Tensor(f"p{i}", (Dim(2, "B"), Dim(3, "C")), role="parameter") for i in range(2)]
    names = iter(range(10_000))
    segments = []

    def grow(g: Builder, pool: list[Tensor], n: int) -> list[Tensor]:
        made = []
        for _ in range(n):
            kind = rng.choice([ops.ADD, ops.ADD, ops.GELU, ops.COPY])
            inputs = {name: rng.choice(pool + made) for name in kind.inputs}
            made.append(g.apply(kind, f"t{next(names)}", **inputs))
        return made

    tokens = Tensor("tokens", (Dim(2, "B"),), "i32", "input")
    g = Builder()
    outside = [g.apply(ops.TOKEN_EMBEDDING, f"e{i}", tokens=tokens, wte=p) for i, p in enumerate(table)]
    outside += grow(g, outside, rng.randint(0, 4))
    segments.append(Segment("begin", tuple(g.ops)))
    for b in range(rng.randint(1, 2)):
        g = Builder()
        initials = rng.sample(outside, rng.randint(1, 2))
        inside = [Tensor(f"in{b}{i}", SHAPE) for i in range(len(initials))]
        captured = rng.sample(outside, rng.randint(0, min(2, len(outside))))
        made = grow(g, inside + captured, rng.randint(1, 6))
        carries = []
        for i, t in enumerate(initials):
            source = rng.choice(made)
            handed = g.apply(ops.ADD, f"out{b}{i}", a=inside[i], b=source)
            carries.append(Carry(t, inside[i], handed, Tensor(f"final{b}{i}", SHAPE)))
        segments.append(Segment(f"block{b}", tuple(g.ops), Dim(rng.randint(2, 4), "L"), tuple(carries)))
        g = Builder()
        finals = [c.final for c in carries]
        outside += finals
        outside += grow(g, outside, rng.randint(1, 3))
        segments.append(Segment(f"between{b}", tuple(g.ops)))
    g = Builder()
    total = outside[0]
    for t in outside[1:]:
        total = g.apply(ops.ADD, f"sum{next(names)}", a=total, b=t)
    segments.append(Segment("end", tuple(g.ops)))
    function = Function("forward_backward", tuple(segments), (tokens,), (total,))
    check(function)
    if backward:
        seed_tensor = Tensor("dtotal", SHAPE, role="input")
        function = differentiate(function, {total.name: seed_tensor})
        function = function.replace(inputs=(*function.inputs, seed_tensor))
        check(function)
    return fusion.add_into(fusion.join_segments(function))
