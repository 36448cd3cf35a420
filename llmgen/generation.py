"""The plan of the program that generates: what `llmgen.plan` is for the one that trains, for the function `decode` alone.

It depends on the family and `[model]`, the target and what it is compiled for, and on a GPU on the precision; what the config
says of training does not matter.
"""

import hashlib
import json
from dataclasses import dataclass

from llmgen import cpu, memory, passes
from llmgen.config import Config
from llmgen.cuda import architecture, attention
from llmgen.cuda.architecture import Architecture
from llmgen.graph import ITEM_SIZE, Dim, Graph, Tensor
from llmgen.memory import aligned, stride_values
from llmgen.models import transformer
from llmgen.plan import (
    ALIGNMENT,
    FunctionPlan,
    Parameter,
    Table,
    constants,
    fillers,
    function_plan,
    linears,
    model_sizes,
    parameter_table,
    tables,
    templates,
)


@dataclass(frozen=True)
class State:
    """Keys or values of one sequence, all layers. Offsets in values; those of the next sequence begin `State`s further on."""

    name: str
    shape: tuple[Dim, ...]
    offset: int
    values: int


@dataclass(frozen=True)
class GenerationPlan:
    config: Config
    target: str
    profile: cpu.Profile | Architecture  # what the source is written for
    graph: Graph
    parameters: tuple[Parameter, ...]
    parameter_values: int  # values of the flat buffer, alignment included
    decode: FunctionPlan
    states: tuple[State, ...]
    thread_scratch: int  # values for each thread; on a GPU, floats of the kernel that runs
    sizes: tuple[tuple[str, int, str], ...]  # name, value, comment: the enum at the top of the source
    reals: tuple[tuple[str, float, str], ...]
    tables: tuple[Table, ...]
    fillers: tuple[str, ...]
    layer_constants: tuple[Tensor, ...]

    @property
    def functions(self) -> frozenset[str]:
        """Names of the kernels that the program calls."""
        return frozenset(call.function for block in self.decode.blocks for call in block.calls)

    @property
    def templates(self) -> list[str]:
        """The op templates they stand in, in the order of their first use."""
        return templates(self.graph)

    @property
    def has_halves(self) -> bool:
        return False

    @property
    def state_values(self) -> int:
        """Values of one sequence in the cache."""
        return sum(state.values for state in self.states)

    @property
    def constant_values(self) -> int:
        return sum(table.values for table in self.tables)

    @property
    def item_size(self) -> int:
        """Bytes of a value: of the parameters, and of the cache."""
        return ITEM_SIZE[self.parameters[0].tensor.dtype]


def make(config: Config, target: str = "c", profile: str = "x86-64-v3", arch: str | None = None) -> GenerationPlan:
    """Plan the generation program of a config. profile: a name of `llmgen.cpu`, for target c; arch: as --arch says, for cuda.

    Raises UserError if it cannot be built.
    """
    alignment, model = ALIGNMENT[target], config.model
    machine = cpu.resolve(profile) if target == "c" else architecture.portable(arch, config.program.precision)
    graph = passes.for_target(transformer.build_generation(config), target, 0, config.program)
    parameters = parameter_table(config, graph, alignment)
    decode = memory.with_copies(graph.function("decode"))
    room, context = transformer.cached_tokens(config), transformer.context_tokens(config)
    whole = "whole registers" if target == "c" else f"a multiple of {transformer.CACHE_MULTIPLE}"
    sizes = (
        *model_sizes(config),
        (
            "CONTEXT",
            context,
            "tokens of a sequence, prompt included" + (", whatever MAXT" if context < model.max_seq_len else ""),
        ),
        ("CACHE", room, f"the same, in the cache: rounded up to {whole}"),
        ("PIECE", decode.inputs[0].shape[0].size, "tokens that decode takes at most: a longer prompt goes in several pieces"),
        ("SEQUENCES", transformer.DECODED_ROWS, "sequences that are generated side by side, at most"),
    )
    if target == "c":
        kernel_sizes = cpu.generation_constants(machine, linears=linears(graph), cached_tokens=room)
        scratch = next(value for name, value, _ in kernel_sizes if name == "THREAD_SCRATCH")
    else:
        kernel_sizes = [("CACHE_PARTS", attention.cache_parts(room), "of a sequence, that blocks attend to side by side")]
        scratch = attention.cached_scratch_bytes(transformer.DECODED_ROWS, room, model.num_heads, model.head_size)
        scratch = aligned(scratch, alignment) // 4
    return GenerationPlan(
        config=config,
        target=target,
        profile=machine,
        graph=graph,
        parameters=tuple(parameters),
        parameter_values=parameters[-1].offset + parameters[-1].stride * parameters[-1].layers,
        decode=function_plan(decode, memory.layout(decode, alignment), parameters, target),
        states=_states(graph, alignment),
        thread_scratch=scratch,
        sizes=(*sizes, *kernel_sizes),
        reals=(("NORM_EPSILON", model.norm_epsilon, "added to the variance in a norm"),),
        tables=tables(graph, alignment),
        fillers=fillers(graph),
        layer_constants=tuple(t for t in constants(graph) if t.layers),
    )


def _states(graph: Graph, alignment: int) -> tuple[State, ...]:
    """One behind the other."""
    written = {t.name: t for op in graph.function("decode").ops() for t in op.outputs.values() if t.role == "state"}
    states, offset = [], 0
    for t in written.values():
        states.append(State(t.name, t.stacked, offset, stride_values(t.bytes, t.dtype, alignment) * t.layers.size))
        offset += states[-1].values
    return tuple(states)


def stated(config: Config, target: str = "c") -> dict:
    """What decides the program: family and [model], without what follows from the family; on a GPU the number formats."""
    said = config.stated()
    tables = {"family": config.family, "model": said["model"]}
    if target == "cuda":
        formats = ("precision", "residual_precision")
        tables["program"] = {name: said["program"][name] for name in formats if name in said["program"]}
    return tables


def hash_of(config: Config, target: str = "c") -> str:
    """Eight hex digits that change when anything does that the program depends on."""
    return hashlib.sha256(json.dumps(stated(config, target), sort_keys=True).encode()).hexdigest()[:8]
