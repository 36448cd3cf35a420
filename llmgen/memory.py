"""Where a function's activations live: liveness, sharing in place, one slot per layer for what the backward needs, one arena.

Time is counted in ticks: one for each op, and one before and after each segment, where carries change hands. Ops of a block
have one tick for all repetitions. Every rule here is a statement about the intervals [made, last read] of tensors:

- a tensor made in a block and read in another segment is *saved*: one slot per layer, and never shares memory;
- a carry that is not saved stays in one buffer through all repetitions; a saved one has a slot more than layers;
- an op's output takes over the memory of an input that is read there for the last time, where the op's kind allows it;
- all other buffers share the arena: two of them overlap only if their intervals do not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from llmgen import ops
from llmgen.graph import ITEM_SIZE, Carry, Dim, Function, Op, Segment, Tensor, View, dim, product
from llmgen.passes import fusion

FOREVER = 1 << 30


@dataclass(frozen=True)
class Place:
    """Where a tensor is: a buffer, and which slot of it: None, a number, "l" or "l + 1" within a block."""

    buffer: str
    slot: str | int | Dim | None = None
    offset: Dim | None = None  # values into the slot, for views


@dataclass(frozen=True)
class Buffer:
    name: str
    shape: tuple[Dim, ...]  # of one slot
    dtype: str
    slots: Dim | None  # None: it lies in the arena
    interval: tuple[int, int]  # ticks, both included
    stride: int  # bytes from one slot to the next, aligned
    offset: int = 0  # bytes; in the saved region if it has slots, else in the arena

    @property
    def bytes(self) -> int:
        return self.stride * (self.slots.size if self.slots else 1)


@dataclass(frozen=True)
class Layout:
    buffers: tuple[Buffer, ...]
    places: dict[str, Place]  # tensor name -> place
    saved_bytes: int
    arena_bytes: int
    arena_lower_bound: int  # the largest sum of live arena bytes at any tick

    def buffer(self, name: str) -> Buffer:
        return next(b for b in self.buffers if b.name == name)


def aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def with_copies(function: Function) -> Function:
    """Insert the copies that let every carry have memory of its own. Most functions need none."""
    while (changed := _with_one_copy(function)) is not None:
        function = changed
    return function


def _with_one_copy(function: Function) -> Function | None:
    times = _Times(function)
    initials: set[str] = set()
    for i, segment in enumerate(function.segments):
        handed_on: set[str] = set()
        for j, c in enumerate(segment.carry):
            saved, name = times.is_saved(c), c.initial.name
            read_later = not saved and name in times.last and times.last[name] > times.begin[i]
            if name in times.inputs | times.finals | initials or read_later:
                own = Tensor(f"{c.inside.name}_initial", c.inside.shape, c.inside.dtype)
                before = Segment(f"copies for {segment.name}", (_copy(c.initial, own),))
                block = _with_carry(segment, j, Carry(own, c.inside, c.next, c.final))
                segments = (*function.segments[:i], before, block, *function.segments[i + 1 :])
                return fusion.join_segments(function.replace(segments=segments))
            if c.next.name in handed_on or not times.hands_over(c, i, saved):
                own = Tensor(f"{c.inside.name}_next", c.inside.shape, c.inside.dtype)
                block = segment.replace(ops=(*segment.ops, _copy(c.next, own)))
                block = _with_carry(block, j, Carry(c.initial, c.inside, own, c.final))
                return function.replace(segments=(*function.segments[:i], block, *function.segments[i + 1 :]))
            initials.add(name)
            handed_on.add(c.next.name)
    return None


def _copy(source: Tensor, target: Tensor) -> Op:
    return Op(ops.COPY, {"inp": source}, {"out": target})


def _with_carry(segment: Segment, j: int, carry: Carry) -> Segment:
    return segment.replace(carry=(*segment.carry[:j], carry, *segment.carry[j + 1 :]))


@dataclass
class _Times:
    """When each activation is made and last read."""

    function: Function
    made: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    home: dict[str, int] = field(default_factory=dict)  # the segment of the block it belongs to
    tensors: dict[str, Tensor] = field(default_factory=dict)
    views: dict[str, tuple[str, Dim]] = field(default_factory=dict)  # view -> what it looks into, and where
    begin: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    tick: dict[int, int] = field(default_factory=dict)  # id(op) -> tick
    readers: dict[str, set[int]] = field(default_factory=dict)  # tensor -> segments whose ops read it
    finals: set[str] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.inputs = {t.name for t in self.function.inputs}
        tick = 0
        for i, segment in enumerate(self.function.segments):
            self.begin.append(tick)
            for j, op in enumerate(segment.ops):
                self.tick[id(op)] = tick + 1 + j
            tick += len(segment.ops) + 1
            self.end.append(tick)
            tick += 1
            self._segment(i, segment)
        for t in self.function.outputs:
            self._read(t.name, FOREVER)

    def _segment(self, i: int, segment: Segment) -> None:
        for c in segment.carry:
            self._read(c.initial.name, self.begin[i])
            self._make(c.inside, self.begin[i], i)
        for op in segment.ops:
            tick = self.tick[id(op)]
            for t in op.inputs.values():
                if t.role == "activation":
                    inside = not segment.carry or self.home.get(self._base(t.name)) == i
                    self._read(t.name, tick if inside else self.end[i], i)
            for t in op.outputs.values():
                if t.role != "activation":
                    continue
                if isinstance(op.kind, View):
                    inp = next(iter(op.inputs.values()))
                    self.views[t.name] = (inp.name, op.kind.offset(op))
                else:
                    self._make(t, tick, i if segment.carry else None)
        for c in segment.carry:
            self._read(c.next.name, self.end[i])
            self._make(c.final, self.end[i], None)
            self.finals.add(c.final.name)

    def _base(self, name: str) -> str:
        while name in self.views:
            name = self.views[name][0]
        return name

    def _make(self, t: Tensor, tick: int, home: int | None) -> None:
        self.tensors[t.name] = t
        self.made[t.name] = self.last[t.name] = tick
        self.readers[t.name] = set()
        if home is not None:
            self.home[t.name] = home

    def _read(self, name: str, tick: int, segment: int | None = None) -> None:
        name = self._base(name)
        if name in self.inputs:
            return
        self.last[name] = max(self.last[name], tick)
        if segment is not None:
            self.readers[name].add(segment)

    def is_saved(self, t: Tensor | Carry) -> bool:
        """Whether another segment reads this tensor of a block, or what a carry hands through it."""
        if isinstance(t, Carry):
            return self.is_saved(t.inside) or self.is_saved(t.next)
        home = self.home.get(t.name)
        return home is not None and bool(self.readers[t.name] - {home})

    def hands_over(self, c: Carry, i: int, saved: bool) -> bool:
        """Whether what the block hands on can be written where it goes: a slot of its own, or where the block was handed it."""
        if c.next == c.inside:
            return not saved
        if self.home.get(c.next.name) != i or all(c.next not in op.outputs.values() for op in self.function.segments[i].ops):
            return False
        if saved:
            return True
        if self.last[c.inside.name] < self.made[c.next.name]:
            return True
        producer = next(op for op in self.function.segments[i].ops if c.next in op.outputs.values())
        return self.last[c.inside.name] == self.made[c.next.name] and c.inside in _overwritable(producer, c.next)

    def interval(self, name: str) -> tuple[int, int]:
        return self.made[name], self.last[name]


def _overwritable(op: Op, output: Tensor) -> list[Tensor]:
    """The inputs whose memory this output may take over."""
    key = next(k for k, t in op.outputs.items() if t == output)
    return [op.inputs[name] for name in op.kind.in_place.get(key, ()) if name in op.inputs]


def layout(function: Function, alignment: int) -> Layout:
    """Assign every activation of a function to a buffer. `with_copies` has been applied."""
    return _Assignment(function, alignment).layout()


class _Assignment:
    def __init__(self, function: Function, alignment: int):
        self.function, self.alignment = function, alignment
        self.times = _Times(function)
        self.group: dict[str, str] = {name: name for name in self.times.made}  # union-find: tensor -> representative
        self.members: dict[str, list[str]] = {name: [name] for name in self.times.made}
        self.successors: set[tuple[str, str]] = set()  # pairs of which the second may take over the first's memory
        self.names: dict[str, str] = {}  # representative -> name, where not its first tensor's
        self.slots: dict[str, tuple[str, Dim, str | Dim | int]] = {}  # representative -> (buffer, slots, slot)

    def layout(self) -> Layout:
        self._carries()
        self._saved()
        self._in_place()
        saved, arena, places = self._buffers()
        offset = 0
        placed = []
        for b in saved:
            placed.append(Buffer(**{**b.__dict__, "offset": offset}))
            offset += b.bytes
        arena, arena_bytes = pack(arena)
        places |= {view: self._view(view, places) for view in self.times.views}
        return Layout((*placed, *arena), places, offset, arena_bytes, lower_bound(arena))

    def _carries(self) -> None:
        for segment in self.function.segments:
            for c in segment.carry:
                if self.times.is_saved(c):
                    name, n = c.inside.name, segment.repeat + 1
                    up = not segment.reverse
                    slots = ("l", "l + 1", 0, segment.repeat) if up else ("l + 1", "l", segment.repeat, 0)
                    for t, slot in zip((c.inside, c.next, c.initial, c.final), slots, strict=True):
                        self.slots[self._find(t.name)] = (name, n, slot)
                    continue
                for a, b in ((c.initial, c.inside), (c.inside, c.next), (c.next, c.final)):
                    self.successors.add((a.name, b.name))
                    self._union(a.name, b.name)
                self.names[self._find(c.inside.name)] = (c.next if segment.reverse else c.inside).name

    def _saved(self) -> None:
        for name, home in self.times.home.items():
            if self._find(name) not in self.slots and self.times.is_saved(self.times.tensors[name]):
                self.slots[self._find(name)] = (name, self.function.segments[home].repeat, "l")

    def _in_place(self) -> None:
        for op in self.function.ops():
            for out in op.outputs.values():
                self.successors |= {(inp.name, out.name) for inp in _overwritable(op, out)}
        for i, segment in enumerate(self.function.segments):
            for op in segment.ops:
                for out in op.outputs.values():
                    if out.role != "activation" or isinstance(op.kind, View):
                        continue
                    for inp in _overwritable(op, out):
                        if inp.role == "activation" and self._share(inp, out, i if segment.carry else None):
                            break

    def _share(self, inp: Tensor, out: Tensor, home: int | None) -> bool:
        """Let `out` take over the memory of `inp` if nothing else in their groups is alive then."""
        if (
            inp.name not in self.group
            or self.times.home.get(inp.name) != home
            or (inp.bytes, inp.dtype) != (out.bytes, out.dtype)
        ):
            return False
        a, b = self._find(inp.name), self._find(out.name)
        if a in self.slots or (b in self.slots and len(self.members[a]) > 1):
            return False
        if a != b and not all(self._apart(x, y) for x in self.members[a] for y in self.members[b]):
            return False
        self._union(b, a) if b in self.slots else self._union(a, b)
        return True

    def _apart(self, x: str, y: str) -> bool:
        """Whether two tensors may have the same memory: never alive together but for an op that turns one into the other."""
        (made_x, last_x), (made_y, last_y) = self.times.interval(x), self.times.interval(y)
        if last_x < made_y or last_y < made_x:
            return True
        turns = last_x == made_y and (x, y) in self.successors
        return turns or (last_y == made_x and (y, x) in self.successors)

    def _find(self, name: str) -> str:
        while self.group[name] != name:
            name = self.group[name]
        return name

    def _union(self, a: str, b: str) -> None:
        a, b = self._find(a), self._find(b)
        if a == b:
            return
        self.group[b] = a
        self.members[a] += self.members.pop(b)
        name = self.names.pop(b, None)
        if name and a not in self.names:
            self.names[a] = name

    def _buffers(self) -> tuple[list[Buffer], list[Buffer], dict[str, Place]]:
        saved: dict[str, Buffer] = {}
        arena: list[Buffer] = []
        places: dict[str, Place] = {}
        for root, names in self.members.items():
            t = self.times.tensors[names[0]]
            stride = aligned(max(self.times.tensors[n].bytes for n in names), self.alignment)
            interval = (min(self.times.made[n] for n in names), max(self.times.last[n] for n in names))
            if root in self.slots:
                name, slots, slot = self.slots[root]
                saved[name] = Buffer(name, t.shape, t.dtype, slots, interval, stride)
            else:
                name, slot = self.names.get(root, names[0]), None
                arena.append(Buffer(name, t.shape, t.dtype, None, interval, stride))
            places |= {n: Place(name, slot) for n in names}
        order = list(places)
        return list(saved.values()), sorted(arena, key=lambda b: (b.interval[0], order.index(b.name))), places

    def _view(self, name: str, places: dict[str, Place]) -> Place:
        """The place of a view of a buffer; views of inputs have the input's name."""
        base, offset = self.times.views[name]
        if base in self.times.views:
            inner = self._view(base, places)
            return Place(inner.buffer, inner.slot, inner.offset + offset)
        if base in places:
            return Place(places[base].buffer, places[base].slot, offset)
        return Place(base, "input", offset)


def pack(buffers: Iterable[Buffer]) -> tuple[list[Buffer], int]:
    """Offsets for buffers of which only those alive together must not overlap: the largest first, each as low as it fits.

    Returns the buffers in the order given, and the bytes of the arena.
    """
    buffers = list(buffers)
    placed: dict[int, Buffer] = {}
    for i in sorted(range(len(buffers)), key=lambda i: (-buffers[i].bytes, buffers[i].interval)):
        b = buffers[i]
        offset = 0
        rivals = [p for p in placed.values() if overlap(p.interval, b.interval)]
        for p in sorted(rivals, key=lambda p: p.offset):
            if offset + b.bytes <= p.offset:
                break
            offset = max(offset, p.offset + p.bytes)
        placed[i] = Buffer(**{**b.__dict__, "offset": offset})
    return [placed[i] for i in range(len(buffers))], max((p.offset + p.bytes for p in placed.values()), default=0)


def lower_bound(buffers: Iterable[Buffer]) -> int:
    buffers = list(buffers)
    ticks = {b.interval[0] for b in buffers}
    return max((sum(b.bytes for b in buffers if b.interval[0] <= t <= b.interval[1]) for t in ticks), default=0)


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def stride_values(t_bytes: int, dtype: str, alignment: int) -> int:
    """Values from one layer of a tensor to the next."""
    return aligned(t_bytes, alignment) // ITEM_SIZE[dtype]


def stride_expr(shape: tuple[Dim, ...], dtype: str, alignment: int) -> str:
    """The same in C: the shape's own product where it is aligned, else a number."""
    count = product(shape)
    values = stride_values(count.size * ITEM_SIZE[dtype], dtype, alignment)
    return str(count) if values == count.size else str(dim(values))
