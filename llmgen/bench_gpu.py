"""`llmgen bench --target cuda`: each op and the whole step on a GPU, alone or beside PyTorch.

- The ops' times are those of the program itself, rendered once more with an event before and after each call.
- Against PyTorch: cuBLAS's bare products in the layouts the program uses and SDPA, timed by events too; then whole steps of
  the program and of examples/gpt2_pytorch.py, eager and compiled, each in a process of its own, in turns; medians.
"""

import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from llmgen import program, toolchain
from llmgen.bench import (
    PRODUCTS,
    import_torch,
    op_times,
    plain_attention,
    products,
    program_command,
    source_around,
    timed_calls,
    torch_commands,
    write_table,
    write_tokens,
)
from llmgen.config import Config
from llmgen.cuda import architecture
from llmgen.errors import UserError
from llmgen.plan import Plan

BURST = 5  # calls of a product in one measurement of cuBLAS
PEAK_SIZE = 8192  # of the square product whose speed is called the device's peak


def bench(
    config: Config,
    arch: str | None,
    against: str | None,
    modes: Sequence[str],
    steps: int,
    rounds: int,
    write: Callable[[str], None],
) -> None:
    """Measure a config on the GPU that is present and write tables. modes: of torch.compile. Raises UserError."""
    need_gpu("bench --target cuda")
    plan = program.plan(config, "cuda", "native", arch)
    torch = import_torch() if against else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokens(folder / "tokens.bin", plan, steps)
        timed = _timed_program(plan, folder)
        describe(plan, write)
        peak = _peak(torch) if torch else 0.0
        if peak:
            write(f"peak: {peak:.0f} TFLOP/s, PyTorch's product of {PEAK_SIZE} x {PEAK_SIZE} x {PEAK_SIZE} in bf16")
        _write_ops(plan, timed, folder, steps, peak, write)
        if torch:
            _write_products(torch, plan, rounds, peak, write)
            _write_attention(torch, plan, rounds, write)
        _write_steps(config, arch, folder, steps, rounds, ["", *modes] if torch else [], write)


def need_gpu(command: str) -> None:
    """Raises UserError where there is none."""
    if architecture.present() is None:
        raise UserError(f"{command} needs an NVIDIA GPU, and nvidia-smi shows none; llmgen doctor says more")


def describe(plan: Plan, write: Callable[[str], None]) -> None:
    """What is measured, and on which GPU."""
    config, command = plan.config, ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        device = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        device = ""
    write(f"{config.name}: {config.program.batch_size} x {config.program.seq_len} tokens, {config.program.precision}")
    write(f"{device or 'an unnamed GPU'}, source for {plan.profile.name}")


def _timed_program(plan: Plan, folder: Path) -> Path:
    """The program with an event before and after each call of forward_backward: it writes `op INDEX SECONDS` at its end."""
    clock = (
        "#include <cuda_runtime.h>\n"
        f"enum {{ OPS = {len(timed_calls(plan))}, OP_CALLS = 1 << 12 }};\n"
        "static cudaEvent_t op_events[OPS][OP_CALLS][2];\nstatic int op_calls[OPS];\n"
        "static void op_start(int op);\nstatic void op_end(int op);\nstatic void op_report(void);\n"
    )
    report = (
        "\nstatic void op_event(int op, int end) {\n    static int begun;\n"
        "    if (!begun++) atexit(op_report);\n"
        "    if (op_calls[op] >= OP_CALLS) return;\n"
        "    cudaEvent_t *event = &op_events[op][op_calls[op]][end];\n"
        "    cudaEventCreate(event);\n    cudaEventRecord(*event, stream);\n}\n"
        "static void op_start(int op) { op_event(op, 0); }\n"
        "static void op_end(int op) {\n    op_event(op, 1);\n    if (op_calls[op] < OP_CALLS) op_calls[op]++;\n}\n"
        "static void op_report(void) {\n    float ms;\n"
        "    for (int op = 0; op < OPS; op++)\n        for (int i = 0; i < op_calls[op]; i++) {\n"
        "            cudaEventElapsedTime(&ms, op_events[op][i][0], op_events[op][i][1]);\n"
        '            fprintf(stderr, "op %d %.9f\\n", op, ms * 1e-3);\n        }\n}\n'
    )
    path = folder / "timed.cu"
    path.write_text(clock + source_around(plan, lambda at, call: f"op_start({at}); {call} op_end({at});") + report)
    toolchain.compile(path, folder / "timed", "cuda", plan.profile)
    return folder / "timed"


def _write_ops(plan: Plan, timed: Path, folder: Path, steps: int, peak: float, write) -> None:
    step, left, ops = op_times(plan, timed, folder, steps)
    rows = []
    for call, calls, milliseconds in ops:
        out = next(iter(call.op.outputs.values()))
        tflops = call.op.kind.flops(call.op) * calls / milliseconds * 1e-9
        terabytes = call.op.kind.bytes(call.op) * calls / milliseconds * 1e-9
        fast = [f"{tflops:.0f}", f"{tflops / peak:.0%}" if peak else "", ""]
        speed = fast if call.op.kind.template in PRODUCTS else ["", "", f"{terabytes:.2f}"]
        rows.append([call.function, out.name, str(calls), f"{milliseconds:.3f}", f"{milliseconds / step:.1%}", *speed])
    rows.append(["norm, AdamW, the rest", "", "", f"{left:.3f}", f"{left / step:.1%}", "", "", ""])
    rows.append(["the step, launch by launch", "", "", f"{step:.3f}", "100.0%", f"{plan.flops / step * 1e-9:.0f}", "", ""])
    write("")
    write_table(["op", "writes", "calls", "ms a step", "of it", "TFLOP/s", "of peak", "TB/s"], rows, write, text=2)


def _milliseconds(torch, work: Callable[[], object], rounds: int, calls: int = BURST) -> float:
    """Median of the mean time of a call, by events around bursts of so many calls."""
    return statistics.median([burst(torch, work, calls) for _ in range(max(rounds, 3) + 1)][1:])


def burst(torch, work: Callable[[], object], calls: int) -> float:
    """Milliseconds of a call, by events around so many."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def _peak(torch) -> float:
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2e-9 * PEAK_SIZE**3 / _milliseconds(torch, lambda: a @ b, 5)


def cublas_operands(torch, function: str, n: int, c: int, oc: int, dtype):
    """a, b and out of the torch.mm that computes a linear layer's product, in the layouts of the program; normal values."""
    x, weight, y = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((n, c), (oc, c), (n, oc)))
    return {
        "linear_forward": (x, weight.T, y),
        "linear_backward_input": (y, weight, x),
        "linear_backward_weight": (y.T, x, weight),
    }[function]


def _write_products(torch, plan: Plan, rounds: int, peak: float, write) -> None:
    """cuBLAS's products, bare: no bias, GELU or sum, weight gradients in bf16. Ours, with all of that, stand above."""
    dtype = torch.bfloat16 if plan.config.program.precision == "bf16" else torch.float32
    rows, total, work = [], 0.0, 0.0
    for (kind, n, c, oc), times in products(plan).items():
        a, b, out = cublas_operands(torch, kind, n, c, oc, dtype)
        milliseconds = _milliseconds(torch, lambda a=a, b=b, out=out: torch.mm(a, b, out=out), rounds)
        tflops = 2e-9 * n * c * oc / milliseconds
        total, work = total + times * milliseconds, work + times * 2e-9 * n * c * oc
        speed = [f"{times * milliseconds:.3f}", f"{tflops:.0f}", f"{tflops / peak:.0%}"]
        rows.append([f"{kind} {n} x {c} x {oc}", str(times), f"{milliseconds:.3f}", *speed])
    rows.append(["all", "", "", f"{total:.3f}", f"{work / total:.0f}", f"{work / total / peak:.0%}"])
    write("")
    write_table(["cuBLAS, n x c x oc", "calls", "ms", "ms a step", "TFLOP/s", "of peak"], rows, write)


def _write_attention(torch, plan: Plan, rounds: int, write) -> None:
    if not plain_attention(plan.config) or plan.config.program.precision != "bf16":
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, b, t = plan.config.model, plan.config.program.batch_size, plan.config.program.seq_len
    c, nh = model.channels, model.num_heads
    qkv, dout = (torch.randn(b, t, width, device="cuda", dtype=torch.bfloat16) for width in (3 * c, c))
    q, k, v = (p.view(b, t, nh, c // nh).transpose(1, 2).detach().requires_grad_() for p in qkv.chunk(3, -1))
    gradient = dout.view(b, t, nh, c // nh).transpose(1, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    rows = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            try:
                done = attend(q, k, v, is_causal=True)
            except RuntimeError:  # this one does not take the shape
                continue
            forward = _milliseconds(torch, lambda: attend(q, k, v, is_causal=True), rounds)
            backward = _milliseconds(
                torch, lambda done=done: torch.autograd.grad(done, (q, k, v), gradient, retain_graph=True), rounds
            )
        layers = model.num_layers
        name = backend.name.lower().replace("_", " ")
        rows.append([name, f"{forward:.3f}", f"{backward:.3f}", f"{layers * forward:.3f}", f"{layers * backward:.3f}"])
    write("")
    head = [f"SDPA {b} x {nh} x {t} x {c // nh}", "forward ms", "backward ms", "ms a step", "ms a step"]
    write_table(head, rows, write)


def _write_steps(config: Config, arch: str | None, folder: Path, steps: int, rounds: int, modes: Sequence[str], write) -> None:
    """modes: of PyTorch's program: "" is eager, others are torch.compile's."""
    built = program.build(config, "cuda", "native", arch, folder / "program")
    work = {"ours": program_command(built.program, folder, steps)}
    if config.family == "gpt2" and config.program.precision == "bf16":
        for mode in modes:
            more = ["--device", "cuda", *(["--compile", mode] if mode else [])]
            for name, command in torch_commands(config, 8, steps, *more):
                work[f"{name}, {f'compiled, {mode}' if mode else 'eager'}"] = command
    milliseconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    write("")
    for _ in range(rounds):
        for name, command in work.items():
            result = subprocess.run(command, capture_output=True, text=True)
            found = [float(ms) for ms in re.findall(r"^step .*? ([\d.]+) ms", result.stdout, re.M)]
            if result.returncode or not found:
                last = (result.stderr.strip().splitlines() or ["no message"])[-1]
                write(f"{name}: failed: {last}")
                continue
            counted = found[2:] or found[-1:]  # the first ones compile and warm up
            write(f"{name}: {statistics.median(counted):.2f} ms a step")  # at once: a compiler of steps can take minutes
            milliseconds.setdefault(name, []).extend(counted)
            memory[name] = int(re.search(r"^memory: (\d+)", result.stdout, re.M)[1])
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    batch = config.program.batch_size * config.program.seq_len
    rows = []
    for name, times in milliseconds.items():
        ms = medians[name]
        figures = [f"{ms:.2f}", f"{min(times):.2f}", f"{1e3 * batch / ms:,.0f}", f"{memory[name] / 1e9:.2f}"]
        rows.append([name, *figures, f"{ms / medians['ours']:.2f}" if "ours" in medians else ""])
    write("")
    write_table(["a whole step", "median ms", "best ms", "tokens/s", "GB", "to ours"], rows, write)
    sys.stdout.flush()
