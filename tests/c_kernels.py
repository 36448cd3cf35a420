"""Renders the kernel templates alone into a shared library, so that every function can be called with numpy arrays."""

import ctypes
import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmgen import config, cpu, kernels, render

TEMPLATES = Path(__file__).parents[1] / "templates"

GLOBALS = """
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

SIGNATURES = {
    "token_embedding_forward": "out tokens wte n c",
    "token_embedding_backward": "dwte dout tokens rows n c accumulate",
    "position_embedding_forward": "out inp wpe b t c",
    "position_embedding_backward": "dwpe dout rows b t c accumulate",
    "layernorm_forward": "out mean rstd inp weight bias n c",
    "layernorm_backward": "dinp dweight dbias dout inp mean rstd weight addend n c accumulate",
    "linear_forward": "out inp weight bias addend n c oc",
    "linear_gelu_forward": "out pre inp weight bias n c oc",
    "linear_backward_input": "dinp dout weight n c oc",
    "linear_backward_weight": "dweight dbias dout inp n c oc accumulate",
    "gelu_forward": "out inp size",
    "gelu_backward": "dinp dout inp size",
    "add_forward": "out inp addend size",
    "attention_forward": "out lse qkv b t",
    "attention_backward": "dqkv dout out lse qkv b t",
    "classifier_forward": "losses logits inp weight targets n",
    "classifier_forward_backward": "losses dinp dweight logits inp weight targets loss_scale n accumulate",
    "sum_of_squares": "x size",
    "adamw_update": "param m v grad size grad_scale learning_rate weight_decay beta1 beta2 epsilon step",
}
INTS = ["n", "c", "oc", "b", "t", "rows", "accumulate", "step"]
FLOATS = ["loss_scale", "grad_scale", "learning_rate", "weight_decay", "beta1", "beta2", "epsilon"]
OPS = ["token_embedding", "position_embedding", "layernorm", "linear", "add", "attention", "classifier", "global_norm", "adamw"]
MATH = ("vexp", "vlog", "vtanh", "vsqrt", "vgelu", "vgelu_grad")


def c_type(name: str) -> str:
    if name in INTS:
        return f"int {name}"
    if name in FLOATS:
        return f"float {name}"
    return {"tokens": "const int *tokens", "targets": "const int *targets", "size": "size_t size"}.get(name, f"float *{name}")


@dataclass(frozen=True)
class Sizes:
    """What a kernel needs at compile time."""

    batch: int = 2
    seq_len: int = 16
    num_heads: int = 2
    head_size: int = 8
    vocab_size: int = 50
    max_seq_len: int = 0  # 0: seq_len
    chunk: int = 0  # 0: as the generator chooses

    @property
    def channels(self) -> int:
        return self.num_heads * self.head_size

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 128) * 128


def source(sizes: Sizes, profile: cpu.Profile, overrides: dict[str, int] | None = None) -> str:
    """The C of all kernels, with an exported test_NAME around each."""
    s, c, rows = sizes, sizes.channels, sizes.batch * sizes.seq_len
    longest = s.max_seq_len or s.seq_len
    fixed = {
        "NH": s.num_heads,
        "HS": s.head_size,
        "C": c,
        "V": s.vocab_size,
        "VP": s.padded_vocab_size,
        "MAXT": longest,
    }
    blocking = cpu.constants(
        profile,
        linears=[(rows, c, 3 * c), (rows, c, c), (rows, c, 4 * c), (rows, 4 * c, c)],
        channels=c,
        head_size=s.head_size,
        seq_len=s.seq_len,
        max_seq_len=longest,
        rows=rows,
        padded_vocab_size=s.padded_vocab_size,
    )
    values = {**fixed, **{name: value for name, value, _ in blocking}, **({"CHUNK": s.chunk} if s.chunk else {})}
    values.update(overrides or {})
    enum = "".join(f"    {name} = {value},\n" for name, value in values.items())
    environment = render.environment()
    model = config.ModelConfig(1, s.num_heads, c, s.vocab_size, longest, s.num_heads, s.head_size, 4 * c)
    names = ["c/compiler.j2", *kernels.templates(OPS)]

    def section(functions: frozenset) -> str:
        parts = [environment.get_template(name).render(functions=functions, options=kernels.options(model)) for name in names]
        return "".join(parts)

    body = section(kernels.with_helpers([*SIGNATURES, *MATH], names, TEMPLATES, section))
    return GLOBALS % enum + body + wrappers()


def wrappers() -> str:
    lines = [
        "void test_setup(int threads);",
        "void test_setup(int threads) {",
        "    num_threads = threads;",
        "#ifdef _OPENMP",
        "    omp_set_num_threads(threads);",
        "#endif",
        "    free(thread_scratch);",
        "    thread_scratch = aligned_alloc(64, sizeof(float) * THREAD_SCRATCH * (size_t)threads);",
        "}",
        "void test_logits_file(const char *path);",
        "void test_logits_file(const char *path) {",
        "    if (logits_file) fclose(logits_file);",
        '    logits_file = path ? fopen(path, "wb") : NULL;',
        "}",
    ]
    for name, arguments in SIGNATURES.items():
        names = arguments.split()
        result = "double" if name == "sum_of_squares" else "void"
        head = f"{result} test_{name}({', '.join(c_type(a) for a in names)})"
        lines += [head + ";", f"{head} {{ {'return ' if result == 'double' else ''}{name}({', '.join(names)}); }}"]
    for name in MATH:
        head = f"void test_{name}(float *out, float *inp, size_t size)"
        lines += [
            head + ";",
            head + " {",
            f"    for (size_t i = 0; i + W <= size; i += W) store(out + i, {name}(load(inp + i)));",
            "}",
        ]
    return "\n".join(lines) + "\n"


def compile_source(text: str, folder: Path, compiler: str, flags: list[str]) -> Path:
    """Compiles to a shared library named by its content; warnings are errors."""
    key = hashlib.sha256(" ".join([compiler, *flags, text]).encode()).hexdigest()[:16]
    path, library = folder / f"{key}.c", folder / f"{key}.so"
    if not library.exists():
        path.write_text(text)
        strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
        link = [flag for flag in flags if flag != "-Ofast"]  # which at linking would change how this process computes
        for command in (
            [compiler, *flags, *strict, "-fPIC", "-c", str(path), "-o", f"{library}.o"],
            [compiler, *link, "-shared", f"{library}.o", "-lm", "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
    return library


class Library:
    """Calls the kernels with numpy arrays and plain numbers: lib.add_forward(out, a, b, n)."""

    def __init__(self, path: Path, threads: int = 1):
        self._library = ctypes.CDLL(str(path))
        self._library.test_sum_of_squares.restype = ctypes.c_double
        self.setup(threads)

    def setup(self, threads: int) -> None:
        self._library.test_setup(threads)

    def logits_file(self, path: Path | None) -> None:
        self._library.test_logits_file(None if path is None else str(path).encode())

    def __getattr__(self, name: str):
        function = getattr(self._library, f"test_{name}")
        names = SIGNATURES[name].split() if name in SIGNATURES else ["out", "inp", "size"]

        def call(*values):
            assert len(values) == len(names), f"{name} takes {names}"
            return function(*map(_argument, names, values))

        return call


def _argument(name: str, value):
    if name in INTS:
        return ctypes.c_int(value)
    if name in FLOATS:
        return ctypes.c_float(value)
    if name == "size":
        return ctypes.c_size_t(value)
    if value is None:
        return ctypes.c_void_p(None)
    assert value.flags.c_contiguous and value.dtype in (np.float32, np.int32), name
    return ctypes.c_void_p(value.ctypes.data)
