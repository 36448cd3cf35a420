"""Plans and configs as tables for people."""

from llmgen.config import Config
from llmgen.graph import ITEM_SIZE, product
from llmgen.plan import Plan


def table(head: list[str], rows: list[list[str]], left: int = 2) -> str:
    """Columns two spaces apart; the first `left` are flush left, the others right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row):
        cells = [f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])


def size(count: float) -> str:
    """Bytes for reading: 1.50 GB; GB = 1e9 bytes."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def recompute(plan: Plan, keeping: Plan) -> str:
    """What it costs in time and gains in bytes. keeping: the plan that computes nothing again."""
    held, before = ((m.activations + m.arena) for m in (plan.memory, keeping.memory))
    return (
        f"{plan.again_flops / plan.flops:.1%} more flops; activations and arena take {size(held)} instead of {size(before)} "
        f"({held / before:.0%})"
    )


def plan(plan: Plan, threads: int, keeping: Plan | None = None) -> str:
    """keeping: where the plan computes anything again, the one that does not."""
    config, memory = plan.config, plan.memory
    model, program = config.model, config.program
    parts = [
        f"{config.name} (hash {config.hash}), target {plan.target} for {plan.profile.name}, {program.precision}: "
        f"{model.num_layers} layers, {model.num_heads} heads, {model.channels} channels, {model.vocab_size} tokens; "
        f"micro-batch {program.batch_size} x {program.seq_len}"
    ]
    rows = [
        [
            p.name,
            f"({p.shape})",
            f"{p.count * p.layers:,}",
            f"{p.bytes:,}",
            f"{p.offset * ITEM_SIZE[p.tensor.dtype]:,}",
            f"{p.file_offset:,}",
        ]
        + ["yes" if p.decay else "", f"{p.initial_mean:g}" if not p.initial_std else f"N(0, {p.initial_std:.4g})"]
        for p in plan.parameters
    ]
    head = ["parameter", "shape", "values", "bytes", "offset", "file offset", "decay", "initial"]
    parts.append(table(head, rows))
    function = plan.forward_backward
    rows = [
        [b.name, f"({', '.join(map(str, function.shape(b)))})", f"{product(function.shape(b)).size:,}", f"{b.bytes:,}"]
        + [f"{function.offset(b):,}", "kept for the backward" if b.slots else "arena"]
        for b in function.buffers
    ]
    parts.append(table(["activation", "shape", "values", "bytes", "offset", "place"], rows))
    scratch = f"{threads} threads x {memory.scratch_per_thread:,}" if plan.target == "c" else "of the kernel that runs"
    rows = [
        ["parameters", f"{memory.parameters:,}", size(memory.parameters)],
        ["gradients", f"{memory.gradients:,}", size(memory.gradients)],
        ["optimizer", f"{memory.optimizer:,}", size(memory.optimizer)],
        ["activations", f"{memory.activations:,}", size(memory.activations)],
        ["arena", f"{memory.arena:,}", f"{size(memory.arena)} (at least {memory.arena_lower_bound:,} alive at once)"],
        *([["constants", f"{memory.constants:,}", size(memory.constants)]] if memory.constants else []),
        ["scratch", f"{threads * memory.scratch_per_thread:,}", scratch],
        ["total", f"{memory.total(threads):,}", size(memory.total(threads))],
    ]
    width = max(len(row[1]) for row in rows)
    lines = "\n".join(f"{name:<12}{count:>{width}}  {note}" for name, count, note in rows)
    parts.append(f"memory, bytes\n{lines}")
    tokens = program.batch_size * program.seq_len
    parts.append(f"{plan.flops_per_token:,.0f} flops a token, {plan.flops_per_token * tokens / 1e9:,.1f} GFLOP a micro-batch")
    if keeping:
        parts[-1] += f'\nrecompute = "{program.recompute}": {recompute(plan, keeping)}'
    return "\n\n".join(parts)


def configs(listed: list[tuple[Config, int]]) -> str:
    """listed: configs with their numbers of parameters."""
    rows = []
    for config, count in listed:
        m, p = config.model, config.program
        values = [m.num_layers, m.num_heads, m.channels, m.vocab_size, m.max_seq_len]
        rows.append([config.name, f"{count:,}", *(f"{v:,}" for v in values), f"{p.batch_size} x {p.seq_len}"])
    return table(["preset", "parameters", "layers", "heads", "channels", "vocabulary", "longest", "micro-batch"], rows, 1)
