"""bench --target cuda without a GPU: the program with its clocks runs on the emulator, and PyTorch's part on the CPU.

The figures mean nothing then; that every table is made does.
"""

import time
from types import SimpleNamespace

import emulator
import pytest

from llmgen import bench_gpu, toolchain
from llmgen import config as configs
from llmgen.cuda import architecture

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
