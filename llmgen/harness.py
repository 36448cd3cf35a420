"""The kernels of a generated source alone, as a shared library whose functions Python calls with numpy arrays.

Tests compare them with numpy this way, and `llmgen bench` with PyTorch.
"""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmgen import kernels, render
from llmgen.config import ModelConfig

# What the kernels expect of the program around them.
_GLOBALS = """
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
%s};
static const float NORM_EPSILON = 1e-5f;
static int num_threads = 1;
static float *thread_scratch;
static FILE *logits_file;
static void write_logits(const float *logits, int rows) {
    for (int row = 0; row < rows; row++) fwrite(logits + (size_t)row * VP, sizeof(float), V, logits_file);
}

"""

_SETUP = """
void harness_setup(int threads);
void harness_setup(int threads) {
    num_threads = threads;
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    free(thread_scratch);
    thread_scratch = aligned_alloc(64, sizeof(float) * THREAD_SCRATCH * (size_t)threads);
}
void harness_logits_file(const char *path);
void harness_logits_file(const char *path) {
    if (logits_file) fclose(logits_file);
    logits_file = path ? fopen(path, "wb") : NULL;
}
"""

_INTS = frozenset(["n", "c", "oc", "b", "t", "rows", "accumulate", "step"])
_FLOATS = frozenset(["loss_scale", "grad_scale", "learning_rate", "weight_decay", "beta1", "beta2", "epsilon"])


def source(
    sizes: Mapping[str, int],
    model: ModelConfig,
    ops: Iterable[str],
    signatures: Mapping[str, str],
    helpers: Sequence[str] = (),
) -> str:
    """The C of the kernels: with a function harness_NAME for each of `signatures`, name -> arguments in their order.

    sizes: the constants of the enum; ops: op templates; helpers: functions of vectors, exported as (out, inp, size).
    """
    environment = render.environment()
    names = ["c/compiler.j2", *kernels.templates(ops), "c/bench.j2"]

    def section(functions: frozenset) -> str:
        chosen = kernels.options(model)
        return "".join(environment.get_template(name).render(functions=functions, options=chosen) for name in names)

    wanted = kernels.with_helpers([*signatures, *helpers], names, render.templates_folder(), section)
    enum = "".join(f"    {name} = {value},\n" for name, value in sizes.items())
    return _GLOBALS % enum + section(wanted) + _SETUP + _exports(signatures, helpers)


def _exports(signatures: Mapping[str, str], helpers: Sequence[str]) -> str:
    lines = []
    for name, arguments in signatures.items():
        names = arguments.split()
        result = "double" if name == "sum_of_squares" else "void"
        head = f"{result} harness_{name}({', '.join(_c_type(a) for a in names)})"
        lines += [head + ";", f"{head} {{ {'return ' if result == 'double' else ''}{name}({', '.join(names)}); }}"]
    for name in helpers:
        head = f"void harness_{name}(float *out, float *inp, size_t size)"
        loop = f"for (size_t i = 0; i + W <= size; i += W) store(out + i, {name}(load(inp + i)));"
        lines += [head + ";", head + " {", "    " + loop, "}"]
    return "\n".join(lines) + "\n"


def _c_type(name: str) -> str:
    if name in _INTS:
        return f"int {name}"
    if name in _FLOATS:
        return f"float {name}"
    return {"tokens": "const int *tokens", "targets": "const int *targets", "size": "size_t size"}.get(name, f"float *{name}")


class Library:
    """Calls the kernels with numpy arrays and plain numbers: library.add_forward(out, a, b, n). NULL is None."""

    def __init__(self, path: Path, signatures: Mapping[str, str], threads: int = 1):
        self._library, self._signatures = ctypes.CDLL(str(path)), signatures
        if "sum_of_squares" in signatures:
            self._library.harness_sum_of_squares.restype = ctypes.c_double
        self._library.harness_peak.restype = ctypes.c_double
        self.setup(threads)

    def setup(self, threads: int) -> None:
        self._library.harness_setup(threads)

    def peak(self, rounds: int = 2_000_000) -> float:
        """GFLOP/s of multiply-adds on registers alone, by all threads: no kernel can be faster."""
        return 2e-9 * self._library.harness_peak(rounds)

    def logits_file(self, path: Path | None) -> None:
        self._library.harness_logits_file(None if path is None else str(path).encode())

    def __getattr__(self, name: str):
        function = getattr(self._library, f"harness_{name}")
        names = self._signatures.get(name, "out inp size").split()

        def call(*values):
            assert len(values) == len(names), f"{name} takes {names}"
            return function(*map(_argument, names, values))

        return call


def _argument(name: str, value):
    if name in _INTS:
        return ctypes.c_int(value)
    if name in _FLOATS:
        return ctypes.c_float(value)
    if name == "size":
        return ctypes.c_size_t(value)
    if value is None:
        return ctypes.c_void_p(None)
    assert value.flags.c_contiguous and value.dtype in (np.float32, np.int32), name
    return ctypes.c_void_p(value.ctypes.data)
