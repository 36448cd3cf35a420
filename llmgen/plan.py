"""The plan: where every byte lives and which call comes when. Templates print it and add nothing up.

`make` takes a Config through graph, passes and memory to finished C expressions.
"""

import dataclasses
from dataclasses import dataclass

from llmgen import cpu, memory, models, ops, passes
from llmgen.config import INT_MAX, Config
from llmgen.cuda import architecture, scratch
from llmgen.cuda.architecture import Architecture
from llmgen.errors import UserError
from llmgen.graph import ITEM_SIZE, ONE, Dim, Function, Graph, Op, Segment, Tensor, View, dim
from llmgen.memory import Buffer, Layout, aligned, stride_expr, stride_values
from llmgen.models import transformer
from llmgen.passes import recompute

RESULT_BYTES = 256  # a step's loss and norm, on a GPU
ALIGNMENT = {"c": 64, "cuda": 256}  # bytes at which every tensor, and every layer of it, starts
C_TYPES = {"f32": "float", "bf16": "floatX", "i32": "int"}
DTYPES = {"f32": "fp32", "bf16": "bf16", "i32": "int32"}


@dataclass(frozen=True)
class Parameter:
    """A row of the parameter table. Offsets and strides in values unless they say bytes."""

    tensor: Tensor
    offset: int
    stride: int  # from one layer to the next
    stride_expr: str
    file_offset: int  # bytes, from the first tensor of the file
    decay: bool
    initial_mean: float
    initial_std: float
    valid: int  # values of a layer that are initialised: vocabulary padding stays zero
    parts: tuple[int, ...]  # Muon: rows of each matrix in a layer; empty for AdamW

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def layers(self) -> int:
        return self.tensor.layers.size if self.tensor.layers else 1

    @property
    def count(self) -> int:
        return self.tensor.count.size

    @property
    def bytes(self) -> int:
        """As the file has it: without alignment."""
        return self.count * self.layers * ITEM_SIZE[self.tensor.dtype]

    @property
    def shape(self) -> str:
        return ", ".join(map(str, self.tensor.stacked))


@dataclass(frozen=True)
class Call:
    function: str
    arguments: tuple[str, ...]
    op: Op


@dataclass(frozen=True)
class Block:
    """Calls in their order; in a loop over the layers if `repeat` is not 1."""

    name: str
    calls: tuple[Call, ...]
    repeat: Dim = ONE
    reverse: bool = False


@dataclass(frozen=True)
class FunctionPlan:
    name: str
    blocks: tuple[Block, ...]
    layout: Layout

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return self.layout.buffers

    @property
    def bytes(self) -> int:
        return self.layout.saved_bytes + self.layout.arena_bytes

    def offset(self, buffer: Buffer) -> int:
        """Bytes from the start of the workspace."""
        return buffer.offset + (0 if buffer.slots else self.layout.saved_bytes)

    def shape(self, buffer: Buffer) -> tuple[Dim, ...]:
        return (buffer.slots, *buffer.shape) if buffer.slots else buffer.shape


@dataclass(frozen=True)
class Table:
    """A constant that the program computes once: rotary cosines and sines."""

    name: str
    shape: tuple[Dim, ...]
    offset: int  # values
    values: int  # up to the next one, alignment included


@dataclass(frozen=True)
class Memory:
    """Bytes of each class. `total` is what the program allocates with so many threads."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    arena: int
    constants: int
    arena_lower_bound: int
    scratch_per_thread: int

    def total(self, threads: int) -> int:
        """Bytes in all: the first six classes, and each thread's scratch."""
        return sum(dataclasses.astuple(self)[:6]) + threads * self.scratch_per_thread


@dataclass(frozen=True)
class Plan:
    config: Config
    target: str
    profile: cpu.Profile | Architecture  # what the source is written for
    graph: Graph
    parameters: tuple[Parameter, ...]
    parameter_values: int  # values of the flat buffer, alignment included
    forward_backward: FunctionPlan
    evaluate: FunctionPlan
    evaluation_tokens: int
    chunk: int
    thread_scratch: int  # float values for each thread; on a GPU, of the kernel that runs, and its counters
    turns: int  # counters of a GPU's kernels
    flops: int  # of one forward_backward, but for what is computed again
    again_flops: int  # of what is
    sizes: tuple[tuple[str, int, str], ...]  # name, value, comment: the enum at the top of the source
    reals: tuple[tuple[str, float, str], ...]  # the same for constants that are no integers
    update_scratch: int  # values that the optimizer needs while forward_backward's activations are free
    tables: tuple[Table, ...]
    fillers: tuple[str, ...]  # calls that fill the tables
    layer_constants: tuple[Tensor, ...]  # numbers that differ from layer to layer

    @property
    def functions(self) -> frozenset[str]:
        """Names of the kernels that the program calls, besides those that templates/cuda/model.j2 names."""
        blocks = (*self.forward_backward.blocks, *self.evaluate.blocks)
        called = {call.function for block in blocks for call in block.calls}
        if self.target == "c":
            called |= {op.kind.function for op in self.graph.function("update").ops()}
        return frozenset(called)

    @property
    def templates(self) -> list[str]:
        """The op templates they stand in, in the order of their first use."""
        return templates(self.graph)

    @property
    def workspace(self) -> int:
        """Bytes that forward_backward, evaluate and update share: they never run at once."""
        return max(self.forward_backward.bytes, self.evaluate.bytes, self.update_bytes)

    @property
    def has_halves(self) -> bool:
        """Whether the parameters lie in memory in two halves: what the model works with, and what it lacks of float32."""
        return self.parameters[0].tensor.dtype != "f32"

    @property
    def input_bytes(self) -> int:
        """What a GPU holds besides: the tokens of a micro-batch or an evaluation, and a step's results."""
        if self.target == "c":
            return 0
        return self.token_bytes + RESULT_BYTES

    @property
    def token_bytes(self) -> int:
        """Of the tokens of a micro-batch or an evaluation, and one more, as a GPU holds them."""
        tokens = max(self.evaluation_tokens, self.config.program.batch_size * self.config.program.seq_len)
        return aligned(4 * (tokens + 1), ALIGNMENT["cuda"])

    @property
    def sequence_bytes(self) -> int:
        """What each sequence of a micro-batch adds, about."""
        return -(-self.workspace // self.config.program.batch_size)

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the micro-batch, about."""
        return self.memory.total(1) - self.sequence_bytes * self.config.program.batch_size

    @property
    def update_bytes(self) -> int:
        return aligned(self.update_scratch * 4, ALIGNMENT[self.target])

    @property
    def memory(self) -> Memory:
        flat = self.parameter_values * 4
        working = self.parameter_values * ITEM_SIZE[self.parameters[0].tensor.dtype]
        saved = self.forward_backward.layout.saved_bytes
        bound = max(
            self.forward_backward.layout.arena_lower_bound,
            self.evaluate.layout.arena_lower_bound - saved,
            self.update_bytes - saved,
        )
        return Memory(
            parameters=working,
            gradients=flat,
            optimizer=2 * flat + (working if self.has_halves else 0),
            activations=saved,
            arena=self.workspace - saved,
            constants=4 * sum(t.values for t in self.tables) + self.input_bytes,
            arena_lower_bound=bound,
            scratch_per_thread=self.thread_scratch * 4,
        )

    @property
    def flops_per_token(self) -> float:
        return self.flops / (self.config.program.batch_size * self.config.program.seq_len)

    def to_json(self, threads: int) -> dict:
        def tensor(name, shape, dtype, **more):
            return {"name": name, "shape": [d.size for d in shape], "dtype": dtype, **more}

        plan, config = self.forward_backward, self.config.program
        return {
            "config": {"name": self.config.name, "hash": self.config.hash, **self.config.to_dict()},
            "target": self.target,
            "parameters": [
                tensor(
                    p.name,
                    p.tensor.stacked,
                    DTYPES[p.tensor.dtype],
                    offset=p.offset * ITEM_SIZE[p.tensor.dtype],
                    file_offset=p.file_offset,
                    bytes=p.bytes,
                )
                for p in self.parameters
            ],
            "activations": [
                tensor(b.name, plan.shape(b), DTYPES[b.dtype], offset=plan.offset(b), bytes=b.bytes, per_layer=bool(b.slots))
                for b in plan.buffers
            ],
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total(threads), "threads": threads},
            "flops_per_token": self.flops_per_token,
            **(
                {"recompute_flops_per_token": self.again_flops / (config.batch_size * config.seq_len)}
                if self.again_flops
                else {}
            ),
        }


def make(config: Config, target: str = "c", profile: str = "x86-64-v3", arch: str | Architecture | None = None) -> Plan:
    """Plan a config for a target. profile: a name of `llmgen.cpu`, for target c; arch: as --arch says, for target cuda.

    Raises UserError if the plan cannot be run.
    """
    alignment = ALIGNMENT[target]
    model, precision = config.model, config.program.precision
    rows = config.program.batch_size * config.program.seq_len
    if target == "c":
        machine: cpu.Profile | Architecture = cpu.resolve(profile)
        chunk = cpu.chunk_rows(rows, model.padded_vocab_size)
    else:
        machine = architecture.resolve(arch, precision)
        chunk = scratch.chunk_rows(rows, model.padded_vocab_size * (2 if precision == "bf16" else 4))
    wgmma = target == "cuda" and machine.uses_wgmma(precision)
    graph = passes.for_target(models.build(config), target, chunk, config.program, wgmma)
    parameters = parameter_table(config, graph, alignment)
    planned = {}
    for name in ("forward_backward", "evaluate"):
        function = memory.with_copies(graph.function(name))
        planned[name] = function_plan(function, memory.layout(function, alignment), parameters, target)
    last = parameters[-1]
    evaluation_tokens = transformer.evaluation_tokens(config)
    if target == "c":
        kernel_sizes = cpu.constants(
            machine,
            linears=linears(graph),
            channels=model.channels,
            head_size=model.head_size,
            seq_len=config.program.seq_len,
            max_seq_len=min(model.max_seq_len, evaluation_tokens),
            rows=rows,
            padded_vocab_size=model.padded_vocab_size,
        )
        working = next(value for name, value, _ in kernel_sizes if name == "THREAD_SCRATCH")
    else:
        kernel_sizes = [("CHUNK", chunk, "rows of logits that exist at a time")]
        turns = aligned(4 * scratch.turns(graph, config, machine), alignment) // 4
        working = aligned(scratch.bytes(graph, config, machine), alignment) // 4 + turns
    updates = list(graph.function("update").ops())
    work = {False: 0, True: 0}
    for segment in graph.function("forward_backward").segments:
        for op in segment.ops:
            work[recompute.is_again(op)] += op.kind.flops(op) * segment.repeat.size
    plan = Plan(
        config=config,
        target=target,
        profile=machine,
        graph=graph,
        parameters=tuple(parameters),
        parameter_values=last.offset + last.stride * last.layers,
        forward_backward=planned["forward_backward"],
        evaluate=planned["evaluate"],
        evaluation_tokens=evaluation_tokens,
        chunk=chunk,
        thread_scratch=working,
        turns=turns if target == "cuda" else 0,
        flops=work[False],
        again_flops=work[True],
        sizes=(*_sizes(config, evaluation_tokens), *kernel_sizes),
        reals=(("NORM_EPSILON", model.norm_epsilon, "added to the variance in a norm"),),
        update_scratch=max((ops.MUON.scratch_values(op) for op in updates if op.kind is ops.MUON), default=0),
        tables=tables(graph, alignment),
        fillers=fillers(graph),
        layer_constants=tuple(t for t in constants(graph) if t.layers),
    )
    if plan.memory.total(1) >= 2**62:
        raise UserError(
            f"{config.name}: needs {plan.memory.total(1):.3g} bytes, more than 64-bit offsets reach; make it smaller"
        )
    return plan


def templates(graph: Graph) -> list[str]:
    """The op templates of a graph's kernels, in the order of their first use."""
    made = [op for f in graph.functions for op in f.ops() if not isinstance(op.kind, View)]
    return list(dict.fromkeys(op.kind.template for op in made))


def constants(graph: Graph) -> list[Tensor]:
    """The constants that ops read, each once."""
    read = [t for f in graph.functions for op in f.ops() for t in op.inputs.values() if t.role == "constant"]
    return list({t.name: t for t in read}.values())


def tables(graph: Graph, alignment: int) -> tuple[Table, ...]:
    """The constants that are computed once, one behind the other."""
    rows, offset = [], 0
    for t in (t for t in constants(graph) if not t.layers):
        rows.append(Table(t.name, t.shape, offset, aligned(t.count.size, alignment // 4)))
        offset += rows[-1].values
    return tuple(rows)


def fillers(graph: Graph) -> tuple[str, ...]:
    """The calls that compute them."""
    calls = {}
    for op in (op for f in graph.functions for op in f.ops() if op.kind.tables):
        function, names = op.kind.tables
        calls[f"{function}({', '.join(f'tables.{op.inputs[name].name}' for name in names)})"] = None
    return tuple(calls)


def linears(graph: Graph) -> list[tuple[int, int, int]]:
    """(n, c, oc) of every linear layer: rows, channels in, channels out."""
    found = {}
    kinds = (ops.LINEAR, ops.LINEAR_GELU, ops.LINEAR_GELU_SLOPE)
    for op in (op for f in graph.functions for op in f.ops() if op.kind in kinds):
        sizes = op.kind.sizes(op)
        found[tuple(sizes[name].size for name in ("n", "c", "oc"))] = None
    return list(found)


def _sizes(config: Config, evaluation_tokens: int) -> tuple[tuple[str, int, str], ...]:
    s = transformer.Sizes.of(config)
    return (
        ("B", s.B.size, "sequences in a micro-batch"),
        ("T", s.T.size, "tokens in a sequence"),
        ("BT", s.B.size * s.T.size, "B * T"),
        *model_sizes(config),
        ("EVAL_TOKENS", evaluation_tokens, "tokens that evaluate takes at most"),
    )


def model_sizes(config: Config) -> tuple[tuple[str, int, str], ...]:
    """The named sizes of a model: name, value, comment."""
    s, m = transformer.Sizes.of(config), config.model
    rows = [
        (s.L, "layers"),
        (s.NH, "attention heads"),
        *([(s.NKV, "heads of keys and values, shared by NH / NKV heads of queries")] if s.NKV != s.NH else []),
        (s.HS, "channels of a head"),
        *(
            [(Dim(int(m.head_size * m.rope_fraction) // 2, "ROPE_HALF"), "pairs of them that turn")]
            if m.position == "rope"
            else []
        ),
        *([(s.QKV, "(NH + 2 * NKV) * HS" if s.NKV != s.NH else "3 * NH * HS")] if s.QKV.expr == "QKV" else []),
        (s.C, "channels: NH * HS" if s.A == s.C else "channels"),
        *([(s.F, "channels of the MLP")] if s.F.expr == "F" else []),
        (s.V, "tokens in the vocabulary"),
        (s.VP, "V rounded up to a multiple of 128; the rows past V stay zero"),
        (s.MAXT, "longest sequence" + (" the position embeddings reach" if m.position == "learned" else "")),
    ]
    return tuple((d.expr, d.size, comment) for d, comment in rows)


def parameter_table(config: Config, graph: Graph, alignment: int) -> list[Parameter]:
    updates = {op.inputs["param"].name: op.attrs for f in graph.functions for op in f.ops() if "param" in op.inputs}
    rows: list[Parameter] = []
    offset = file_offset = 0
    for t in graph.parameters:
        mean, std = transformer.initial(t, config)
        valid = t.count.size
        if t.shape[0].expr == "VP":
            valid = valid // t.shape[0].size * config.model.vocab_size
        row = Parameter(
            tensor=t,
            offset=offset,
            stride=stride_values(t.bytes, t.dtype, alignment),
            stride_expr=stride_expr(t.shape, t.dtype, alignment),
            file_offset=file_offset,
            decay=updates.get(t.name, {}).get("decay", False),
            initial_mean=mean,
            initial_std=std,
            valid=valid,
            parts=updates.get(t.name, {}).get("parts", ()),
        )
        rows.append(row)
        offset += row.stride * row.layers
        file_offset += row.bytes
    return rows


def function_plan(function: Function, layout: Layout, parameters: list[Parameter], target: str) -> FunctionPlan:
    expressions = _Expressions(function, layout, {p.name: p for p in parameters}, target)
    blocks = []
    for segment in function.segments:
        calls = []
        for op in segment.ops:
            if isinstance(op.kind, View):
                continue
            if not op.kind.template:
                raise UserError(f"{op.kind.function} has no kernel for this target")
            calls.append(Call(op.kind.function, expressions.arguments(op, segment), op))
        blocks.append(Block(segment.name, tuple(calls), segment.repeat if segment.carry else ONE, segment.reverse))
    return FunctionPlan(function.name, tuple(blocks), layout)


class _Expressions:
    """Finished C expressions for the arguments of calls."""

    def __init__(self, function: Function, layout: Layout, parameters: dict[str, Parameter], target: str):
        self.layout, self.parameters, self.target, self.alignment = layout, parameters, target, ALIGNMENT[target]
        self.struct = {"forward_backward": "acts", "evaluate": "eval", "decode": "acts"}[function.name]

    def arguments(self, op: Op, segment: Segment) -> tuple[str, ...]:
        sizes = op.kind.sizes(op)
        arguments = []
        for name in op.kind.signature_of(op):
            if name == "accumulate":
                arguments.append(self.accumulate(op, segment))
            elif name in sizes:
                arguments.append(_wide(sizes[name]) if isinstance(sizes[name], Dim) else c_float(sizes[name]))
            else:
                t = op.tensor(name)
                arguments.append(self.tensor(t) if t else self.nothing(op, name))
        return tuple(arguments)

    def accumulate(self, op: Op, segment: Segment) -> str:
        if op.accumulate:
            return "1"
        shared = segment.carry and any(t.role == "gradient" and not t.layers for t in op.outputs.values())
        if not shared:
            return "micro_batch > 0"
        return f"micro_batch > 0 || l {'<' if segment.reverse else '>'} {'L - 1' if segment.reverse else '0'}"

    def nothing(self, op: Op, name: str) -> str:
        """The argument for a tensor that is not there; an addend's type, which the function is compiled for, is said."""
        if self.target == "c" or name != "addend":
            return "NULL"
        (key,) = (key for key, addend in op.kind.addends.items() if addend == name)
        return f"({C_TYPES[op.outputs[key].dtype]} *)NULL"

    def tensor(self, t: Tensor) -> str:
        if t.role in ("parameter", "gradient"):
            struct, name = ("params", t.name) if t.role == "parameter" else ("grads", t.name[1:])
            return f"{struct}.{name}" + (f" + l*{self.parameters[name].stride_expr}" if t.layers else "")
        if t.role == "state":
            return f"cache.{t.name} + l*{stride_expr(t.shape, t.dtype, self.alignment)}"
        if t.role == "constant":
            return f"{t.name}[l]" if t.layers else f"tables.{t.name}"
        if t.name not in self.layout.places:
            return t.name  # an input of the function
        place = self.layout.places[t.name]
        offset = "" if place.offset is None else f" + {place.offset}"
        if place.slot == "input":
            return place.buffer + offset
        buffer = self.layout.buffer(place.buffer)
        stride = stride_expr(buffer.shape, buffer.dtype, self.alignment)
        expr = f"{self.struct}.{place.buffer}"
        if place.slot is not None:
            slot = dim(place.slot) if isinstance(place.slot, int | Dim) else Dim(1, place.slot)
            if slot.size:
                expr += f" + {_wide(slot * Dim(buffer.stride // ITEM_SIZE[buffer.dtype], stride))}"
        return expr + offset


def c_float(x: float) -> str:
    """A float literal of nine digits."""
    text = f"{x:.9g}"
    return (text if "." in text or "e" in text else text + ".0") + "f"


def _wide(d: Dim) -> str:
    """The expression, reckoned in size_t where an int would not hold it."""
    return f"(size_t){d}" if d.size > INT_MAX else str(d)
