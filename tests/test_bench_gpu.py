"""bench --target cuda without a GPU: the program with its clocks runs on the emulator, and PyTorch's part on the CPU.

The figures mean nothing then; that every table is made does.
"""

import time
from types import SimpleNamespace

import emulator
import pytest

from llmgen import bench_gpu, energy, toolchain
from llmgen import config as configs
from llmgen.cuda import architecture
from llmgen.errors import UserError

SMALL = {"num_layers": 1, "num_heads": 2, "channels": 32, "max_seq_len": 16, "batch_size": 1, "seq_len": 16}

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator is for g++ on x86-64 Linux")


class Event:
    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at) + 1e-3


@pytest.fixture
def emulated(monkeypatch):
    """Programs for the emulator where nvcc would compile them."""

    def compile(source, program, target, machine, more=()):
        emulator.compile(source, program)
        return toolchain.Build(program, ("nvcc",))

    monkeypatch.setattr(toolchain, "compile", compile)
    monkeypatch.setattr(architecture, "present", lambda: "sm_80")


def test_it_times_every_op_and_the_step(emulated):
    lines = []
    config = configs.load("gpt2-nano", target="cuda", overrides=SMALL)
    bench_gpu.bench(config, "sm_80", None, [], 2, 1, lines.append)
    text = "\n".join(lines)
    assert "attention_backward" in text and "the step, launch by launch" in text
    (step,) = [line for line in lines if line.startswith("ours ")]
    milliseconds, tokens_per_second = float(step.split()[1]), float(step.split()[3].replace(",", ""))
    assert tokens_per_second == pytest.approx(1e3 * 16 / milliseconds, rel=0.02)


class Meter(energy.Meter):
    """A card of 600 W at 1500 MHz whose counter moves every hundredth of a second."""

    def _call(self, name, *arguments):
        if name == "nvmlDeviceGetHandleByPciBusId_v2":
            assert arguments[0] == b"0000:00:00.0"
        elif name == "nvmlDeviceGetTotalEnergyConsumption":
            arguments[1]._obj.value = int(time.monotonic() * 100) * 6000
        elif name == "nvmlDeviceGetClockInfo":
            arguments[2]._obj.value = 1500


def test_the_energy_of_every_op(emulated, monkeypatch):
    monkeypatch.setattr(energy, "HEAT", 0.02)
    monkeypatch.setattr(energy, "WINDOW", 0.15)
    monkeypatch.setattr(energy, "LOOK", 0.001)
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: None)
    lines = []
    config = configs.load("gpt2-nano", target="cuda", overrides=SMALL)
    energy.bench(config, "sm_80", lines.append, Meter)
    assert "16 tokens" in lines[0] and lines[1].endswith("source for sm_80")
    rows = [line.split() for line in lines[3:]]
    ops = rows[1:-1]
    assert {"attention_backward", "layernorm_forward", "linear_backward_weight"} <= {row[0] for row in ops}
    for row in ops:
        calls, microseconds, watts, clock, millijoules, milliseconds, joules = map(float, row[2:])
        assert watts == pytest.approx(600, rel=0.1) and clock == 1500
        assert millijoules == pytest.approx(microseconds * 1e-3 * watts, rel=0.02, abs=0.01)
        assert milliseconds == pytest.approx(calls * microseconds * 1e-3, rel=0.02, abs=1e-3)
        assert joules == pytest.approx(milliseconds * 1e-3 * watts, rel=0.02, abs=1e-3)
    assert float(rows[-1][-1]) == pytest.approx(sum(float(row[-1]) for row in ops), abs=1e-2)


def test_energy_without_counters_is_one_line(emulated, monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(energy.ctypes, "CDLL", missing)
    config = configs.load("gpt2-nano", target="cuda", overrides=SMALL)
    with pytest.raises(UserError, match="there is no libnvidia-ml"):
        energy.bench(config, "sm_80", lambda line: None)


def test_what_pytorch_is_asked_for(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench_gpu, "PEAK_SIZE", 64)
    randn = torch.randn
    fake = SimpleNamespace(
        **{name: getattr(torch, name) for name in ("bfloat16", "float32", "mm", "cuda", "autograd", "nn")},
        randn=lambda *shape, device, dtype: randn(*shape).to(dtype),
    )
    plan = bench_gpu.program.plan(configs.load("gpt2-nano", target="cuda", overrides=SMALL), "cuda", "native", "sm_80")
    lines = []
    peak = bench_gpu._peak(fake)
    bench_gpu._write_products(fake, plan, 1, peak, lines.append)
    bench_gpu._write_attention(fake, plan, 1, lines.append)
    text = "\n".join(lines)
    assert peak > 0
    assert "linear_backward_weight 16 x 32 x 128" in text and "linear_forward 16 x 32 x 384" in text  # the head's rows: 384
    assert "SDPA 1 x 2 x 16 x 16" in text and "flash attention" in text


@pytest.mark.slow
def test_products_beside_cublas(emulated, monkeypatch, tmp_path, capsys):
    """The script that docs/gpu-gemm-hopper.md names, with PyTorch on the CPU for cuBLAS."""
    torch = pytest.importorskip("torch")
    import products_beside_cublas as script

    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: randn(*shape).to(dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a CPU")
    for name in ("COOL", "PAUSE", "HOT", "WARM_UP"):
        monkeypatch.setattr(script, name, 1e-6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = tmp_path / "small.toml"
    config.write_text(
        'family = "gpt2"\n[model]\nnum_layers = 3\nnum_heads = 1\nchannels = 64\nvocab_size = 120\nmax_seq_len = 24\n'
    )
    monkeypatch.setattr("sys.argv", ["", "--config", str(config), "--batch-size", "2", "--seq-len", "24"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("linear_") and "cool" in line for line in lines) == 15 + 2
    assert any(line.startswith("linear_forward 48 x 64 x 192 ") for line in lines)
    assert any(line.startswith("linear_gelu_forward, beside two kernels") for line in lines)
    (cool, hot) = (line for line in lines if line.startswith("of a step"))
    assert "ratio" in cool and "hot" in hot


def test_joules_of_wgmma(monkeypatch, capsys):
    """The script that docs/gpu.md names."""
    import joules_of_wgmma as script

    for name, value in {"HEAT": 0.02, "WINDOW": 0.15, "STEPS": 14, "Meter": Meter, "compile": emulator.compile}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(energy, "LOOK", 0.001)
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: None)
    cases = [case for case in script.CASES if case[4] <= 24 * script.MEGABYTE]
    monkeypatch.setattr(script, "CASES", cases)
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        assert line.startswith(case[0]) and line.endswith("W, 1500 MHz")
        assert float(line[len(case[0]) :].split()[0]) > 0
