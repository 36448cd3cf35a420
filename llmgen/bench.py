"""What a step costs: each op's time and its fraction of the machine's peak, and the same work in PyTorch.

- Ops are timed inside the program itself, rendered once more with a clock around each call: caches are as in training.
- Against PyTorch: the model's products and its attention one by one, in the layouts the program uses, then whole steps of
  the program and of examples/gpt2_pytorch.py, each in a process of its own. All in turns; medians.
"""

import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmgen import ops, program, render, runner, toolchain
from llmgen.config import Config
from llmgen.errors import UserError
from llmgen.formats import tokens
from llmgen.harness import Library, source
from llmgen.plan import Call, Plan

SIGNATURES = {
    "linear_forward": "out inp weight bias addend n c oc",
    "linear_backward_input": "dinp dout weight n c oc",
    "linear_backward_weight": "dweight dbias dout inp n c oc accumulate",
    "attention_forward": "out lse qkv b t",
    "attention_backward": "dqkv dout out lse qkv b t",
}
PRODUCTS = ("linear", "attention", "classifier")  # op templates that are matrix products: their flops are worth a figure
SHORTEST = 2e-3  # seconds of one measurement: what takes less is done several times
PAUSE = 3e-3  # seconds between ours and PyTorch's in one process: for a while after its work, a team of threads spins
_STEP = re.compile(r"step (\d+)/.*? ([\d.]+) ms")


def bench(
    config: Config,
    cpu: str,
    against: str | None,
    steps: int,
    rounds: int,
    write: Callable[[str], None],
) -> None:
    """Measure a config and write tables. Raises UserError."""
    plan = program.plan(config, "c", cpu, None)
    os.environ.update(runner.environment())  # as `llmgen run` has it; for PyTorch too
    if against:
        import_torch()
    threads = program.threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokens(folder / "tokens.bin", plan, steps)
        timed = _timed_program(plan, folder)
        library = _library(plan, folder, threads)
        peak = max(library.peak() for _ in range(10))
        write(f"{config.name}: {config.program.batch_size} x {config.program.seq_len} tokens, {threads} threads")
        write(f"{_processor()}, profile {plan.profile.name}; measured peak of its multiply-adds {peak:.0f} GFLOP/s")
        _write_ops(plan, timed, folder, steps, peak, write)
        if against:
            _write_products(plan, library, peak, rounds, write)
            _write_attention(plan, library, rounds, write)
            _write_steps(config, cpu, folder, threads, steps, rounds, write)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
    return found[1] if found else "an unnamed processor"


def import_torch():
    try:
        import torch
    except ImportError:
        raise UserError("bench --against torch needs PyTorch: pip install torch, or leave --against out") from None
    return torch


def write_tokens(path: Path, plan: Plan, steps: int) -> None:
    program = plan.config.program
    count = (steps + 2) * program.batch_size * program.seq_len + 1
    vocab_size = plan.config.model.vocab_size
    tokens.write(path, np.random.default_rng(0).integers(vocab_size, size=count), vocab_size)


# ---- the program's own ops


def timed_calls(plan: Plan) -> list[tuple[Call, int]]:
    """The calls of forward_backward, and how often each is made in a micro-batch."""
    return [(call, block.repeat.size) for block in plan.forward_backward.blocks for call in block.calls]


def source_around(plan: Plan, around: Callable[[int, str], str]) -> str:
    """The program's source, but that the statement of each timed call is as `around` has it, which is told the call's index."""
    index = {id(call): at for at, (call, _) in enumerate(timed_calls(plan))}

    def statement(call: Call, indent: int = 4) -> str:
        plain = render.call(call, indent)
        return around(index[id(call)], plain) if id(call) in index else plain

    return render.source(plan, statement)


def _timed_program(plan: Plan, folder: Path) -> Path:
    """The program with a clock around each call of forward_backward: it writes `op INDEX SECONDS` to stderr at its end."""
    clock = (
        f"enum {{ OPS = {len(timed_calls(plan))}, OP_CALLS = 1 << 16 }};\n"
        "static double op_times[OPS][OP_CALLS];\nstatic int op_calls[OPS];\n"
        "static void op_start(void);\nstatic void op_end(int op);\n"
    )
    report = (
        "\nstatic double op_started;\nstatic void op_start(void) { op_started = seconds(); }\n"
        "static void op_end(int op) {\n"
        "    if (op_calls[op] < OP_CALLS) op_times[op][op_calls[op]++] = seconds() - op_started;\n}\n"
        "__attribute__((destructor)) static void op_report(void) {\n"
        "    for (int op = 0; op < OPS; op++)\n"
        '        for (int i = 0; i < op_calls[op]; i++) fprintf(stderr, "op %d %.9f\\n", op, op_times[op][i]);\n}\n'
    )
    path = folder / "timed.c"
    path.write_text(clock + source_around(plan, lambda at, call: f"op_start(); {call} op_end({at});") + report)
    toolchain.compile(path, folder / "timed", "c", plan.profile)
    return folder / "timed"


@dataclass(frozen=True)
class Run:
    milliseconds: list[float]  # of each step but the first, which touches its memory for the first time
    ops: dict[int, list[float]]  # index of the call -> seconds
    peak_bytes: int


def run(command: Sequence[str]) -> Run:
    """Run a trainer to its end. Its memory's high-water mark is its own: each has its process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        printed, complaint = out.read(), err.read()
    if child.returncode != 0:
        raise UserError(f"{command[0]} failed: {(complaint.splitlines() or ['no word on stderr'])[-1]}")
    times: dict[int, list[float]] = {}
    for at, seconds in re.findall(r"^op (\d+) ([\d.]+)$", complaint, re.M):
        times.setdefault(int(at), []).append(float(seconds))
    unit = 1 if sys.platform == "darwin" else 1024
    found = [(int(step), float(ms)) for step, ms in _STEP.findall(printed)]
    return Run([ms for step, ms in found if step > 1], times, usage.ru_maxrss * unit)


def program_command(path: Path, folder: Path, steps: int) -> list[str]:
    return [str(path), "--train-data", str(folder / "tokens.bin"), "--steps", str(steps + 1), "--val-every", "0"]


def op_times(plan: Plan, timed: Path, folder: Path, steps: int) -> tuple[float, float, list[tuple[Call, int, float]]]:
    """Medians in milliseconds of a timed program: a step, what of it is in no op, and the ops with their calls in a step."""
    done = run(program_command(timed, folder, steps))
    rest = np.array(done.milliseconds)
    ops = []
    for at, (call, calls) in enumerate(timed_calls(plan)):
        of_steps = 1e3 * np.array(done.ops[at]).reshape(-1, calls).sum(axis=1)[1:]
        rest -= of_steps
        ops.append((call, calls, float(np.median(of_steps))))
    return statistics.median(done.milliseconds), float(np.median(rest)), ops


def _write_ops(plan: Plan, timed: Path, folder: Path, steps: int, peak: float, write) -> None:
    step, left, ops = op_times(plan, timed, folder, steps)
    rows = []
    for call, calls, milliseconds in ops:
        out = next(iter(call.op.outputs.values()))
        gflops = call.op.kind.flops(call.op) * calls / milliseconds * 1e-6
        speed = [f"{gflops:.0f}", f"{gflops / peak:.0%}"] if call.op.kind.template in PRODUCTS else ["", ""]
        rows.append([call.function, out.name, str(calls), f"{milliseconds:.2f}", f"{milliseconds / step:.1%}", *speed])
    rows.append(["norm, AdamW, the rest", "", "", f"{left:.2f}", f"{left / step:.1%}", "", ""])
    rows.append(["the step", "", "", f"{step:.2f}", "100.0%", f"{plan.flops / step * 1e-6:.0f}", ""])
    rows[-1][-1] = f"{plan.flops / step * 1e-6 / peak:.0%}"
    write("")
    write_table(["op", "writes", "calls", "ms a step", "of it", "GFLOP/s", "of peak"], rows, write, text=2)


def write_table(head: list[str], rows: list[list[str]], write, text: int = 1) -> None:
    """Columns: the first `text` of them to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [f"{cell:<{w}}" if i < text else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        write("  ".join(cells).rstrip())


# ---- products and attention, in turns with PyTorch


def _library(plan: Plan, folder: Path, threads: int) -> Library:
    path, library = folder / "kernels.c", folder / "kernels.so"
    plain = plain_attention(plan.config)
    signatures = {name: arguments for name, arguments in SIGNATURES.items() if plain or not name.startswith("attention")}
    sizes = {name: value for name, value, _ in plan.sizes}
    path.write_text(source(sizes, plan.config.model, ["linear", *(["attention"] if plain else [])], signatures))
    toolchain.compile(path, library, "c", plan.profile, ("-fPIC", "-shared"))
    return Library(library, signatures, threads)


def plain_attention(config: Config) -> bool:
    m = config.model
    plain = m.num_kv_heads == m.num_heads and m.num_heads * m.head_size == m.channels
    return plain and not (any(m.attention_window) or m.attention_softcap or m.attention_scale)


def _compare(mine: Callable, theirs: Callable, rounds: int) -> tuple[float, float]:
    """Median seconds of both, in turns."""
    times: tuple[list, list] = ([], [])
    repeats = [1, 1]
    for i, work in enumerate((mine, theirs)):  # the first run is not counted
        work()
        start = time.perf_counter()
        work()
        repeats[i] = max(1, round(SHORTEST / max(time.perf_counter() - start, 1e-7)))
    gc.disable()
    for _ in range(rounds):
        for i, work in enumerate((mine, theirs)):
            time.sleep(PAUSE)
            work()  # wakes the threads
            start = time.perf_counter()
            for _ in range(repeats[i]):
                work()
            times[i].append((time.perf_counter() - start) / repeats[i])
    gc.enable()
    return statistics.median(times[0]), statistics.median(times[1])


def products(plan: Plan) -> dict[tuple[str, int, int, int], int]:
    """(function, n, c, oc) of each product of a step -> how often it is done. The classifier's are three for each chunk."""
    found: dict[tuple[str, int, int, int], int] = {}
    names = {ops.LINEAR: "linear_forward", ops.LINEAR_GELU: "linear_forward"}
    names |= {ops.LINEAR_BACKWARD_INPUT: "linear_backward_input", ops.LINEAR_BACKWARD_WEIGHT: "linear_backward_weight"}
    for segment in plan.graph.function("forward_backward").segments:
        for op in segment.ops:
            if op.kind is ops.CLASSIFIER_BACKWARD:
                model, rows = plan.config.model, plan.config.program.batch_size * plan.config.program.seq_len
                shape, times = (plan.chunk, model.channels, model.padded_vocab_size), rows // plan.chunk
                kinds = list(dict.fromkeys(names.values()))
            elif op.kind.function in (*names.values(), "linear_gelu_forward", "linear_backward_input_gelu"):
                sizes = op.kind.sizes(op)
                shape, times = tuple(sizes[name].size for name in ("n", "c", "oc")), segment.repeat.size
                kinds = [op.kind.function.replace("_gelu", "")]
            else:
                continue
            for kind in kinds:
                found[(kind, *shape)] = found.get((kind, *shape), 0) + times
    return found


def _aligned(rng, *shape: int) -> np.ndarray:
    """Random floats that begin on a cache line, as the program's do."""
    count = int(np.prod(shape))
    memory = np.empty(count + 16, np.float32)
    begin = -memory.ctypes.data % 64 // 4
    array = memory[begin : begin + count].reshape(shape)
    rng.standard_normal(dtype=np.float32, out=array)
    return array


def _write_products(plan: Plan, library: Library, peak: float, rounds: int, write) -> None:
    torch = import_torch()
    torch.set_num_threads(program.threads())
    rng = np.random.default_rng(0)
    rows, sums, ratios = [], [0.0, 0.0], []
    for (kind, n, c, oc), times in products(plan).items():
        inp, weight, out = _aligned(rng, n, c), _aligned(rng, oc, c), _aligned(rng, n, oc)
        x, w, y = torch.from_numpy(inp), torch.from_numpy(weight), torch.from_numpy(out)
        if kind == "linear_forward":
            mine, theirs = partial(library.linear_forward, out, inp, weight, None, None, n, c, oc), (x, w.T, y)
        elif kind == "linear_backward_input":
            mine, theirs = partial(library.linear_backward_input, inp, out, weight, n, c, oc), (y, w, x)
        else:
            mine, theirs = partial(library.linear_backward_weight, weight, None, out, inp, n, c, oc, 0), (y.T, x, w)
        ours, torchs = _compare(mine, partial(torch.mm, *theirs[:2], out=theirs[2]), rounds)
        flops = 2e-9 * n * c * oc
        sums[0] += times * ours
        sums[1] += times * torchs
        ratios.append(torchs / ours)
        rows.append([f"{kind} {n} x {c} x {oc}", str(times), f"{flops / ours:.0f}", f"{flops / ours / peak:.0%}"])
        rows[-1] += [f"{flops / torchs:.0f}", f"{torchs / ours:.2f}"]
    total = sum(2e-9 * n * c * oc * times for (_, n, c, oc), times in products(plan).items())
    rows.append(["all, weighted by flops", "", f"{total / sums[0]:.0f}", f"{total / sums[0] / peak:.0%}"])
    rows[-1] += [f"{total / sums[1]:.0f}", f"{sums[1] / sums[0]:.2f}"]
    rows.append(["the lowest", "", "", "", "", f"{min(ratios):.2f}"])
    write("")
    write_table(["product, n x c x oc", "a step", "GFLOP/s", "of peak", "PyTorch", "ratio"], rows, write)


def partial(function: Callable, *arguments, **options) -> Callable[[], object]:
    return lambda: function(*arguments, **options)


def _write_attention(plan: Plan, library: Library, rounds: int, write) -> None:
    if not plain_attention(plan.config):
        return
    torch = import_torch()
    model, b, t = plan.config.model, plan.config.program.batch_size, plan.config.program.seq_len
    c, nh = model.channels, model.num_heads
    rng = np.random.default_rng(0)
    qkv, dqkv, out, dout = (_aligned(rng, b * t, width) for width in (3 * c, 3 * c, c, c))
    lse = _aligned(rng, b * nh * t)
    parts = torch.from_numpy(qkv).view(b, t, 3 * c).chunk(3, -1)
    q, k, v = (p.view(b, t, nh, c // nh).transpose(1, 2).detach().requires_grad_() for p in parts)
    attend = torch.nn.functional.scaled_dot_product_attention
    done = attend(q, k, v, is_causal=True)
    gradient = torch.from_numpy(dout).view(b, t, nh, c // nh).transpose(1, 2)

    def forward():
        with torch.no_grad():
            attend(q, k, v, is_causal=True)

    mine = partial(library.attention_forward, out, lse, qkv, b, t)
    both = [("forward", _compare(mine, forward, rounds))]
    mine = partial(library.attention_backward, dqkv, dout, out, lse, qkv, b, t)
    theirs = partial(torch.autograd.grad, done, (q, k, v), gradient, retain_graph=True)
    both.append(("backward", _compare(mine, theirs, rounds)))
    shape = f"{b} x {nh} x {t} x {c // nh}"
    write("")
    rows = [[f"{name} {shape}", f"{1e3 * a:.3f}", f"{1e3 * b:.3f}", f"{b / a:.2f}"] for name, (a, b) in both]
    write_table(["attention, b x heads x t x channels", "ms", "PyTorch", "ratio"], rows, write)


# ---- whole steps


def _script() -> Path:
    """The wheel's copy of the PyTorch program, else the checkout's."""
    package = Path(__file__).parent
    inside = package / "examples"
    return (inside if inside.is_dir() else package.parent / "examples") / "gpt2_pytorch.py"


def torch_commands(config: Config, threads: int, steps: int, *more: str) -> Iterator[tuple[str, list[str]]]:
    """With the vocabulary as it is and padded: one or the other is faster. more: further arguments of the script."""
    m, program = config.model, config.program
    for vocab_size in dict.fromkeys((m.vocab_size, m.padded_vocab_size)):
        sizes = {
            "layers": m.num_layers,
            "heads": m.num_heads,
            "channels": m.channels,
            "vocab-size": vocab_size,
            "max-seq-len": m.max_seq_len,
            "batch-size": program.batch_size,
            "seq-len": program.seq_len,
            "steps": steps + 1,
            "threads": threads,
        }
        words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        yield f"PyTorch, {vocab_size} tokens", [sys.executable, str(_script()), *words, *more]


def _write_steps(config: Config, cpu: str, folder: Path, threads: int, steps: int, rounds: int, write) -> None:
    if config.family != "gpt2":
        write(f"\nno whole step of PyTorch: its program is GPT-2's, not {config.family}'s")
        return
    built = program.build(config, "c", cpu, None, folder / "program")
    runs: dict[str, list[Run]] = {}
    for _ in range(rounds):
        for name, command in [
            ("ours", program_command(built.program, folder, steps)),
            *torch_commands(config, threads, steps),
        ]:
            runs.setdefault(name, []).append(run(command))
    medians = {name: statistics.median(ms for run in of for ms in run.milliseconds) for name, of in runs.items()}
    batch = config.program.batch_size * config.program.seq_len
    rows = []
    for name, of in runs.items():
        best = min(ms for run in of for ms in run.milliseconds)
        ms = medians[name]
        peak_gb = max(run.peak_bytes for run in of) / 1e9
        rows.append([name, f"{ms:.2f}", f"{best:.2f}", f"{1e3 * batch / ms:,.0f}", f"{peak_gb:.2f}"])
        rows[-1] += [f"{ms / medians['ours']:.2f}"]
    write("")
    write_table(["a whole step", "median ms", "best ms", "tokens/s", "peak GB", "to ours"], rows, write)
