"""The Hopper products of a config, bare, beside cuBLAS (PyTorch's mm) on the same sizes, cool and at the card's power limit.

    python3 tests/products_beside_cublas.py [--config gpt2-124m] [--batch-size 64] [--seq-len 1024]

Bare: no bias, addend or sums of columns; weight gradients are float here, bf16 in PyTorch. Then GELU's two products with their
epilogues, beside the product and GELU's kernel in PyTorch. Both sides have normal data. Cool: medians of 5 bursts of 1.2 ms,
pauses of 12 ms. Hot: medians of 3 bursts of 90 ms in turns, no pauses. Ours run in the programs of `llmgen tune`, which check
them first.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch

from llmgen import config as configs
from llmgen import data, program, tune
from llmgen.bench import products as counted
from llmgen.bench_gpu import burst, cublas_operands
from llmgen.cuda import products

COOL, PAUSE, HOT, WARM_UP = 1.2, 0.012, 90.0, 200.0  # milliseconds, seconds, milliseconds, milliseconds
PLAIN = {"linear_gelu_forward": "linear_forward", "linear_backward_input_gelu": "linear_backward_input"}


class Ours:
    """A product by llmgen's choice for it."""

    def __init__(self, path: Path, product: tune.Product, machine):
        shape = product.shape
        self._choice = products.chosen(shape, "bf16", machine.multiprocessors, wgmma=True)
        self._tile = tune.tiles(shape.function, "wgmma").index(self._choice.tile)
        self._tuner = tune.Tuner(path)
        self._tuner.product(product, products.scratch_bytes(shape, self._choice), products.turns(shape, self._choice))
        self._tuner.candidate("check", self._tile, self._choice)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._tuner.__exit__()

    def milliseconds(self, calls: int) -> float:
        return self._tuner.candidate("time", self._tile, self._choice, calls)


class PyTorch:
    def __init__(self, work):
        self._work = work

    def milliseconds(self, calls: int) -> float:
        self._work()
        return burst(torch, self._work, calls)


def beside(ours: Ours, theirs: PyTorch) -> tuple[float, float, float, float]:
    """Milliseconds: ours and theirs cool, ours and theirs hot."""
    each = max(ours.milliseconds(2), 1e-3)
    times: list[list[float]] = [[], [], [], []]
    for _ in range(5):
        for i, side in enumerate((ours, theirs)):
            time.sleep(PAUSE)
            times[i].append(side.milliseconds(math.ceil(COOL / each)))
    ours.milliseconds(math.ceil(WARM_UP / each))
    for turn in range(3):
        for i in (0, 1) if turn % 2 else (1, 0):
            times[2 + i].append((ours, theirs)[i].milliseconds(math.ceil(HOT / each)))
    return tuple(map(statistics.median, times))


def operands(shape: products.Shape):
    return cublas_operands(torch, PLAIN.get(shape.function, shape.function), shape.n, shape.c, shape.oc, torch.bfloat16)


def plain_work(shape: products.Shape):
    a, b, out = operands(shape)
    return lambda: torch.mm(a, b, out=out)


def gelu_work(shape: products.Shape):
    a, b, out = operands(shape)
    aten, bias, kept, after = torch.ops.aten, torch.randn_like(out[0]), torch.randn_like(out), torch.empty_like(out)

    def work():
        if shape.function == "linear_gelu_forward":
            torch.addmm(bias, a, b, out=out)
            aten.gelu.out(out, approximate="tanh", out=after)
        else:
            torch.mm(a, b, out=out)
            aten.gelu_backward.grad_input(out, kept, approximate="tanh", grad_input=after)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2-124m")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    a = parser.parse_args()
    overrides = {"batch_size": a.batch_size, "seq_len": a.seq_len, "precision": "bf16"}
    config = configs.load(a.config, target="cuda", overrides=overrides)
    plan = program.plan(config, "cuda", "native", "sm_90a")
    found = tune.of_plan(plan)
    bare = {products.Shape(*shape): calls for shape, calls in counted(plan).items()}
    programs = tune.build(plan, {s.function for s in bare} | {p.shape.function for p in found}, data.default_cache() / "tune")
    print(f"{config.name}, {a.batch_size} x {a.seq_len}, {torch.cuda.get_device_name()}; microseconds: ours, cuBLAS, ratio")
    times = {}
    for shape in bare:
        with Ours(programs[shape.function], tune.Product(shape), plan.profile) as ours:
            times[shape] = beside(ours, PyTorch(plain_work(shape)))
        show(f"{shape.function} {shape.n} x {shape.c} x {shape.oc}", times[shape])
    flops = {s: 2.0 * s.n * s.c * s.oc * calls for s, calls in bare.items()}
    for at, heat in ((0, "cool"), (2, "hot")):
        ours, theirs = (sum(calls * times[s][at + i] for s, calls in bare.items()) for i in (0, 1))
        ratios = {s: t[at + 1] / t[at] for s, t in times.items()}
        mean = math.exp(sum(flops[s] * math.log(ratio) for s, ratio in ratios.items()) / sum(flops.values()))
        print(
            f"of a step, {heat}: {ours:.2f} ms, cuBLAS {theirs:.2f} ms; ratio {mean:.3f}, the least {min(ratios.values()):.3f}"
        )
    for p in found:
        if p.shape.function in PLAIN:
            with Ours(programs[p.shape.function], p, plan.profile) as ours:
                show(f"{p.shape.function}, beside two kernels", beside(ours, PyTorch(gelu_work(p.shape))))


def show(title: str, t: tuple[float, float, float, float]) -> None:
    cool, hot = (f"{1e3 * a:8.1f} {1e3 * b:8.1f} {b / a:6.3f}" for a, b in (t[:2], t[2:]))
    print(f"{title:48s} cool {cool}   hot {hot}", flush=True)


if __name__ == "__main__":
    main()
