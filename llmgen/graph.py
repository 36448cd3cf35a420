"""The intermediate representation: named dimensions, tensors, ops, segments, functions, and the graph of a program.

- A `Dim` is a size and the C expression that says it. Python decides with the size; templates print the expression.
- A `Tensor` has a name, a shape and a role. Names are unique within a function.
- An `Op` applies a `Kind` (one of `llmgen.ops`) to named inputs and gives named outputs.
- A `Segment` is a list of ops repeated n times, as a scan: a block hands its carry from one repetition to the next.
- A `Function` is a list of segments; a `Graph` is one parameter table and the functions that work on it.

A tensor made inside a repeated segment exists once for each repetition. An op of another segment with the same number of
repetitions that reads it (the backward of the block) reads the one of its own repetition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

ITEM_SIZE = {"f32": 4, "bf16": 2, "i32": 4}

ROLES = ("parameter", "gradient", "activation", "input", "output", "state", "constant", "scratch")


@dataclass(frozen=True)
class Dim:
    """A size and how C says it: Dim(2304, "3*C")."""

    size: int
    expr: str

    def __mul__(self, other: Dim | int) -> Dim:
        other = dim(other)
        if other.expr == "1":
            return self
        if self.expr == "1":
            return other
        return Dim(self.size * other.size, f"{_factor(self.expr)}*{_factor(other.expr)}")

    def __rmul__(self, other: int) -> Dim:
        return dim(other) * self

    def __add__(self, other: Dim | int) -> Dim:
        other = dim(other)
        return Dim(self.size + other.size, f"{self.expr} + {other.expr}")

    def __sub__(self, other: Dim | int) -> Dim:
        other = dim(other)
        return Dim(self.size - other.size, f"{self.expr} - {_factor(other.expr)}")

    def __str__(self) -> str:
        return self.expr


def dim(value: Dim | int) -> Dim:
    return value if isinstance(value, Dim) else Dim(value, str(value))


def _factor(expr: str) -> str:
    return f"({expr})" if " + " in expr or " - " in expr else expr


ONE = dim(1)


def product(dims: Iterable[Dim]) -> Dim:
    """The number of values of a shape. B*T is written BT, as the generated source names it."""
    total = ONE
    for d in dims:
        total = total * d
    factors = total.expr.split("*")
    if factors[:2] == ["B", "T"]:
        total = Dim(total.size, "*".join(["BT", *factors[2:]]))
    return total


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[Dim, ...]  # of one repetition, where it belongs to a block
    dtype: str = "f32"
    role: str = "activation"
    layers: Dim | None = None  # parameters, gradients, constants: one for each repetition of a block
    values: tuple | None = None  # constants: what they are

    def __post_init__(self):
        assert self.role in ROLES, self.role
        assert self.dtype in ITEM_SIZE, self.dtype

    @property
    def count(self) -> Dim:
        """Values in one repetition."""
        return product(self.shape)

    @property
    def bytes(self) -> int:
        return self.count.size * ITEM_SIZE[self.dtype]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.shape)

    @property
    def stacked(self) -> tuple[Dim, ...]:
        """The shape with the layers in front, where there are any."""
        return (self.layers, *self.shape) if self.layers else self.shape

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.stacked))})"


class Kind:
    """What an op is: its shapes, its derivative, its cost, its reference. One instance for each kind, in `llmgen.ops`.

    function   name of the C and CUDA function
    template   file under templates/<target>/ops that defines it
    signature  names of the function's arguments: outputs, inputs, sizes, in the order of the C
    optional   arguments that the function does not have where the op does not: a norm without weights, a size it needs not
    in_place   output -> inputs whose memory it may take over
    addends    output -> the optional input that is added to it ("addend")
    tables     name of a function that fills constant inputs once, and those inputs
    """

    function: str = ""
    template: str = ""
    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    signature: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    in_place: dict[str, tuple[str, ...]] = {}
    addends: dict[str, str] = {}
    tables: tuple[str, tuple[str, ...]] | None = None

    def signature_of(self, op: Op) -> tuple[str, ...]:
        """The signature of the function that this op calls: without what is in `optional` and absent."""

        def there(name: str) -> bool:
            if name == "accumulate":
                return any(t.role == "gradient" for t in op.outputs.values())
            return name not in self.optional or op.tensor(name) is not None or name in self.sizes(op)

        return tuple(name for name in self.signature if there(name))

    def infer(self, inputs: dict[str, Tensor], attrs: dict) -> dict[str, tuple[tuple[Dim, ...], str]]:
        """Output name -> (shape, dtype)."""
        raise NotImplementedError

    def sizes(self, op: Op) -> dict[str, Dim]:
        """The sizes named in the signature."""
        return {}

    def backward(self, op: Op, d: dict[str, Tensor]) -> list[Step]:
        """The derivative, stated once: steps that give the gradients of the inputs from `d`, those of the outputs."""
        raise NotImplementedError(f"{self.function} has no derivative")

    def scratch(self, op: Op) -> dict[str, int]:
        """Floats of scratch memory the function needs: {"shared": n, "thread": n}, where not 0."""
        return {}

    def flops(self, op: Op) -> int:
        """Floating-point operations; a multiply-add is two."""
        return 0

    def bytes(self, op: Op) -> int:
        """Bytes read and written at least."""
        return sum(t.bytes for t in (*op.inputs.values(), *op.outputs.values()))

    def reference(self, op: Op, x: dict[str, Any]) -> dict[str, Any]:
        """The outputs in numpy float64, from the inputs in `x` (absent optional inputs are None)."""
        raise NotImplementedError


class View(Kind):
    """A kind that moves nothing: its output is a part of its input, `offset` values into it."""

    def offset(self, op: Op) -> Dim:
        raise NotImplementedError


@dataclass(frozen=True)
class Op:
    kind: Kind
    inputs: dict[str, Tensor]  # optional inputs may be absent
    outputs: dict[str, Tensor]  # optional outputs may be absent
    attrs: dict[str, Any] = field(default_factory=dict)
    accumulate: bool = False  # adds to its gradient outputs; else it overwrites them, in its first repetition

    def tensor(self, name: str) -> Tensor | None:
        return self.outputs.get(name) or self.inputs.get(name)

    def replace(self, **changes) -> Op:
        return Op(**{**self.__dict__, **changes})

    def __str__(self) -> str:
        outputs = ", ".join(t.name for t in self.outputs.values())
        inputs = ", ".join(f"{k}={t.name}" for k, t in self.inputs.items())
        return f"{outputs} = {self.kind.function}({inputs})"


@dataclass(frozen=True)
class Step:
    """One step of a backward rule: an op, and whose gradient each of its outputs is.

    With kind None nothing is computed: `same` is the gradient of every tensor in `to`.
    """

    kind: Kind | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    gives: dict[str, Tensor] = field(default_factory=dict)  # output name -> the tensor it is the gradient of
    attrs: dict[str, Any] = field(default_factory=dict)
    same: Tensor | None = None
    to: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Carry:
    """A value handed from one repetition of a block to the next."""

    initial: Tensor  # from outside, given to the first repetition
    inside: Tensor  # as the block's ops read it
    next: Tensor  # as the block's ops hand it on
    final: Tensor  # outside, after the last repetition


@dataclass(frozen=True)
class Segment:
    name: str
    ops: tuple[Op, ...]
    repeat: Dim = ONE
    carry: tuple[Carry, ...] = ()
    reverse: bool = False  # runs from the last repetition to the first

    def made(self) -> set[str]:
        """Names of the tensors that exist once for each repetition."""
        names = {t.name for op in self.ops for t in op.outputs.values() if t.role not in ("gradient", "state")}
        return names | {c.inside.name for c in self.carry}

    def replace(self, **changes) -> Segment:
        return Segment(**{**self.__dict__, **changes})


@dataclass(frozen=True)
class Function:
    name: str
    segments: tuple[Segment, ...]
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()

    def ops(self) -> Iterator[Op]:
        for segment in self.segments:
            yield from segment.ops

    def replace(self, **changes) -> Function:
        return Function(**{**self.__dict__, **changes})


@dataclass(frozen=True)
class Graph:
    """One parameter table, several functions."""

    parameters: tuple[Tensor, ...]
    functions: tuple[Function, ...]

    def function(self, name: str) -> Function:
        return next(f for f in self.functions if f.name == name)


def check(function: Function) -> None:
    """Every tensor is made before it is read and made once; a repeated one is read only where repetitions match.

    Raises ValueError naming the op.
    """
    known: dict[str, Dim] = {t.name: ONE for t in function.inputs}  # name -> repetitions it exists for
    for segment in function.segments:
        carried = {c.inside.name for c in segment.carry}
        for c in segment.carry:
            if c.initial.name not in known:
                raise ValueError(f"{function.name}/{segment.name}: carry {c.initial.name} is not made before")
            known[c.inside.name] = segment.repeat
        for op in segment.ops:
            for t in op.inputs.values():
                if t.role in ("parameter", "gradient", "constant", "state", "input"):
                    if t.layers and t.layers.size != segment.repeat.size:
                        raise ValueError(f"{function.name}/{segment.name}: {op}: {t.name} has {t.layers} layers")
                elif t.name not in known:
                    raise ValueError(f"{function.name}/{segment.name}: {op}: {t.name} is not made before")
                elif known[t.name].size not in (1, segment.repeat.size):
                    raise ValueError(f"{function.name}/{segment.name}: {op}: {t.name} exists {known[t.name]} times")
            for t in op.outputs.values():
                if t.role in ("gradient", "parameter", "state"):
                    continue
                if t.name in known or t.name in carried:
                    raise ValueError(f"{function.name}/{segment.name}: {op}: {t.name} is made twice")
                known[t.name] = segment.repeat
        for c in segment.carry:
            if c.next.name not in known:
                raise ValueError(f"{function.name}/{segment.name}: carry {c.next.name} is never made")
            known[c.final.name] = ONE


class Builder:
    """Collects the ops of one segment; `apply` names the outputs after the first one."""

    def __init__(self):
        self.ops: list[Op] = []

    def apply(self, kind: Kind, name: str, *, attrs: dict | None = None, **inputs: Tensor | None) -> Any:
        """Append an op. Its first output is called `name`, the others `name_<output>`.

        Returns the output tensor, or the tuple of them where there are several.
        """
        given = {key: t for key, t in inputs.items() if t is not None}
        attrs = attrs or {}
        outputs = {}
        for i, (key, (shape, dtype)) in enumerate(kind.infer(given, attrs).items()):
            outputs[key] = Tensor(name if i == 0 else f"{name}_{key}", shape, dtype)
        self.ops.append(Op(kind, given, outputs, attrs))
        made = tuple(outputs.values())
        return made[0] if len(made) == 1 else made
