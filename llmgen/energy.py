"""`llmgen bench --target cuda --energy`: what each op takes of the card's power limit.

At that limit a step lasts as long as its energy does, so joules rank the ops, and not their milliseconds alone. The program is
rendered once more with a loop around each call: in the second step, half way through its layers, each op runs again and again
for HEAT and then WINDOW seconds. Meanwhile the driver's counters of the card are read: what it used in WINDOW, and its clock.
"""

import ctypes
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from llmgen import program, toolchain
from llmgen.bench import program_command, source_around, timed_calls, write_table, write_tokens
from llmgen.bench_gpu import describe, need_gpu
from llmgen.config import Config
from llmgen.errors import UserError
from llmgen.plan import Plan

HEAT, WINDOW = 0.3, 0.6  # seconds
LOOK = 0.01  # seconds between two readings
LIBRARY = "libnvidia-ml.so.1"  # of the driver
CLOCK_OF_MULTIPROCESSORS = 1  # in NVML's numbers

LOOP = """
/* Which calls are repeated, and for how long. First `card BUS_ID`; then a measured op says `op INDEX heated` and
 * `op INDEX CALLS SECONDS`. */
static const int op_measured[OPS] = {%(measured)s};
static int op_seen[OPS], op_now, op_repeats, op_heated, op_left, op_chunk;
static long op_calls;
static double op_from;
static void op_start(int op) {
    static char card[32];
    if (!card[0]) {
        int device = 0;
        cudaGetDevice(&device);
        cudaDeviceGetPCIBusId(card, sizeof card, device);
        printf("card %%s\\n", card);
        fflush(stdout);
    }
    op_now = op, op_repeats = ++op_seen[op] == op_measured[op];
    op_heated = 0, op_left = 1, op_chunk = 0;
}
static int op_more(void) {
    if (op_left-- > 0) return 1;
    if (!op_repeats) return 0;
    cudaStreamSynchronize(stream);
    const double now = seconds();
    if (op_chunk == 0) { /* the first call: then one to be timed */
        op_chunk = 1, op_from = now;
    } else if (op_chunk == 1) { /* two hundredths of a second at a time */
        op_chunk = 2 + (int)(0.02 / (now - op_from)), op_from = now, op_calls = 0;
    } else {
        op_calls += op_chunk;
        if (now - op_from >= (op_heated ? %(window)f : %(heat)f)) {
            if (op_heated)
                printf("op %%d %%ld %%.6f\\n", op_now, op_calls, now - op_from);
            else
                printf("op %%d heated\\n", op_now);
            fflush(stdout);
            if (op_heated) return 0;
            op_heated = 1, op_calls = 0, op_from = now;
        }
    }
    op_left = op_chunk - 1;
    return 1;
}
"""


class Meter:
    """The card's energy counter and clock, read all the time by a thread."""

    def __init__(self):
        """Raises UserError where the driver's library is missing."""
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError:
            raise UserError(f"--energy reads the driver's counters, and there is no {LIBRARY}; leave it out") from None
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._samples: list[tuple[float, float, int]] = []  # seconds, joules, MHz
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _call(self, name: str, *arguments) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise UserError(f"--energy reads the driver's counters, but {name} answers {status} on this card; leave it out")

    def _read(self) -> tuple[float, float, int]:
        millijoules, clock = ctypes.c_ulonglong(), ctypes.c_uint()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(millijoules))
        self._call("nvmlDeviceGetClockInfo", self._device, CLOCK_OF_MULTIPROCESSORS, ctypes.byref(clock))
        return time.monotonic(), millijoules.value * 1e-3, clock.value

    def _run(self) -> None:
        while not self._over.wait(LOOK):
            self._samples.append(self._read())

    def watch(self, bus_id: str) -> None:
        """From now on, until the end of the with block. Raises UserError where the card counts no energy."""
        self._call("nvmlDeviceGetHandleByPciBusId_v2", bus_id.encode(), ctypes.byref(self._device))
        self._samples.append(self._read())
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def between(self, start: float, end: float) -> tuple[float, float]:
        """Watts and MHz from one time.monotonic() to another. The counter moves in ticks: whole ones are counted."""
        seen = [sample for sample in self._samples if start <= sample[0] <= end]
        ticks = [b for a, b in pairwise(seen) if b[1] != a[1]]
        if len(ticks) < 2:
            raise UserError(f"the card's energy counter moved {len(ticks)} times in {end - start:.2f} s: too seldom to measure")
        (first, joules, _), (last, more, _) = ticks[0], ticks[-1]
        return (more - joules) / (last - first), statistics.mean(clock for _, _, clock in seen)


def bench(config: Config, arch, write: Callable[[str], None], meter: Callable[[], Meter] = Meter) -> None:
    """Measure the ops of a config on the GPU that is present and write a table. Raises UserError."""
    need_gpu("bench --energy")
    plan, reading = program.plan(config, "cuda", "native", arch), meter()
    describe(plan, write)
    calls = timed_calls(plan)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokens(folder / "tokens.bin", plan, 2)
        command = program_command(_program(plan, folder), folder, 1)
        found: dict[int, tuple[float, float, float]] = {}  # op -> seconds of a call, watts, MHz
        with reading, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            heated = 0.0
            for line in child.stdout:
                match line.split():
                    case ["card", bus_id]:
                        reading.watch(bus_id)
                    case ["op", _, "heated"]:
                        heated = time.monotonic()
                    case ["op", op, count, seconds]:
                        found[int(op)] = (float(seconds) / int(count), *reading.between(heated, time.monotonic()))
        if child.returncode or len(found) < len(calls):
            raise UserError(f"the program ended with status {child.returncode} after {len(found)} of {len(calls)} ops")
    rows, total = [], [0.0, 0.0]
    for at, (call, times) in enumerate(calls):
        each, watts, clock = found[at]
        total = [total[0] + each * times, total[1] + each * times * watts]
        figures = [f"{1e6 * each:.1f}", f"{watts:.0f}", f"{clock:.0f}", f"{1e3 * each * watts:.2f}"]
        in_step = [f"{1e3 * each * times:.3f}", f"{each * times * watts:.3f}"]
        rows.append([call.function, next(iter(call.op.outputs.values())).name, str(times), *figures, *in_step])
    rows.append(["all of these", "", "", "", "", "", "", f"{1e3 * total[0]:.3f}", f"{total[1]:.3f}"])
    write("")
    write_table(["op", "writes", "calls", "us", "W", "MHz", "mJ", "ms a step", "J a step"], rows, write, text=2)


def _program(plan: Plan, folder: Path) -> Path:
    measured = [times + times // 2 + 1 for _, times in timed_calls(plan)]
    head = f"enum {{ OPS = {len(measured)} }};\nstatic void op_start(int op);\nstatic int op_more(void);\n"
    loop = LOOP % {"measured": ", ".join(map(str, measured)), "heat": HEAT, "window": WINDOW}
    path = folder / "repeated.cu"
    repeated = source_around(plan, lambda at, call: f"for (op_start({at}); op_more();) {{ {call} }}")
    path.write_text(head + repeated + loop)
    toolchain.compile(path, folder / "repeated", "cuda", plan.profile)
    return folder / "repeated"
