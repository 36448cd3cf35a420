"""Renders CUDA kernel templates alone, for the emulator or a GPU, so that each function can be called with numpy arrays.

    library = cuda_kernels.build(folder, "emulator", sizes, model, ["linear"], {
        "linear_forward": "floatX *out, const floatX *inp, const floatX *weight, const floatX *bias, "
                          "const floatR *addend, int n, int c, int oc"})
    library.linear_forward(out, inp, weight, bias, addend, n, c, oc)

A function that is a C++ template has one name for each choice of types: {"linear_forward_residual": "linear_forward(floatR
*out, ...)"}. Arrays are float32 or int32 (for pointers to int) and go through the declared type, so that bf16 rounds them;
those that are not const come back. The same array given twice is one buffer. None is NULL. Around each buffer, the scratch
memory and the turns there are zones that nobody may write; the turns must be zero when a function ends.
"""

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import emulator
import numpy as np

from llmgen import kernels, render
from llmgen.config import ModelConfig
from llmgen.cuda import architecture, products

HOPPER_PRELUDE = ("cuda/ptx_sm90.j2", "cuda/tensor_map.j2", "cuda/gemm_sm90.j2")
GUARD = 1024  # bytes before and behind each buffer
DEVICES = ("emulator", "gpu")

# What the kernels expect of the program around them.
_GLOBALS = """
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef __nv_bfloat16 bf16;
typedef {floatX} floatX; /* activations and weights */
typedef {floatR} floatR; /* the residual stream */

enum {{
{enum}}};
static const float NORM_EPSILON = 1e-5f;
static const size_t SCRATCH_BYTES = {scratch};
static cudaStream_t stream;
static float *scratch;
static int *turns;
static FILE *logits_file;
static void write_logits(const floatX *, int) {{}}
#define die(status, ...) (fprintf(stderr, __VA_ARGS__), exit(status))
static cudaError_t harness_error;
#define cudaCheck(call) do {{ cudaError_t e = (call); if (e != cudaSuccess && !harness_error) harness_error = e; }} while (0)

"""

_SETUP = """
extern "C" void *harness_malloc(size_t size) { void *p = NULL; cudaCheck(cudaMalloc(&p, size)); return p; }
extern "C" void harness_free(void *p) { cudaCheck(cudaFree(p)); }
extern "C" void harness_copy(void *to, const void *from, size_t n) { cudaCheck(cudaMemcpy(to, from, n, cudaMemcpyDefault)); }
extern "C" void harness_setup(void *scratch_memory, void *turns_memory) {
    if (!stream) cudaCheck(cudaStreamCreate(&stream));
    scratch = (float *)scratch_memory, turns = (int *)turns_memory;
}
/* What went wrong since the last call, or NULL. */
extern "C" const char *harness_failed(void) {
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaGetLastError());
    const cudaError_t e = harness_error;
    harness_error = cudaSuccess;
    return e == cudaSuccess ? NULL : cudaGetErrorString(e);
}
"""


def source(
    sizes: Mapping[str, int],
    model: ModelConfig,
    ops: Iterable[str],
    functions: Mapping[str, str],
    precision: str = "bf16",
    residual: str = "bf16",
    arch: str = "sm_80",
    scratch: int = 1 << 20,
    options: Mapping | None = None,
    more: str = "",
) -> str:
    """The .cu: the op templates `ops` (names in templates/cuda/ops), and an exported function for each of `functions`.

    sizes: the constants of the enum; options: more of them, or others; more: kernels of the test's own, behind the ops.
    """
    environment, folder = render.environment(), render.templates_folder()
    hopper = arch == "sm_90a"
    names = [n for n in dict.fromkeys([*kernels.PRELUDE["cuda"], *HOPPER_PRELUDE]) if hopper or n not in HOPPER_PRELUDE]
    names = [n for n in names if (folder / n).exists()] + [f"cuda/ops/{op}.j2" for op in ops]
    names = list(dict.fromkeys(sorted(names, key=lambda n: "/ptx" not in n)))
    chosen = kernels.options(model) | {
        "precision": precision,
        "residual": "fp32" if precision == "fp32" else residual,
        "arch": arch,
        "hopper": hopper,
        "products": products.options((), precision, 108),
        **(options or {}),
    }

    def section(wanted: frozenset) -> str:
        return "".join(environment.get_template(n).render(functions=wanted, options=chosen) for n in names)

    called = {re.match(r"\s*(\w+)\s*\(", text)[1] if "(" in text else name for name, text in functions.items()}
    called |= set(re.findall(r"\w+", more))
    plain = {"bf16": "bf16", "fp32": "float"}
    start = _GLOBALS.format(
        floatX=plain[precision],
        floatR=plain["fp32" if precision == "fp32" else residual],
        enum="".join(f"    {name} = {value},\n" for name, value in sizes.items()),
        scratch=scratch,
    )
    exports = "".join(_export(name, text) for name, text in functions.items())
    return start + section(kernels.with_helpers(called, names, folder, section)) + more + _SETUP + exports


def _arguments(name: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    """The function behind an exported name, and its arguments: (type, name)."""
    if "(" in text:
        name, text = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.S).groups()
    pairs = [re.fullmatch(r"\s*(.*?)\s*(\w+)\s*", part, re.S).groups() for part in text.split(",")]
    return name, [(" ".join(type_.split()), argument) for type_, argument in pairs]


def _export(name: str, text: str) -> str:
    function, arguments = _arguments(name, text)
    parameters = ", ".join(f"{'void *' if '*' in t else t + ' '}{a}" for t, a in arguments)
    values = ", ".join(f"({t}){a}" for t, a in arguments)
    return f'extern "C" void harness_{name}({parameters}) {{ {function}({values}); }}\n'


def build(folder: Path, device: str, *args, machine: str | None = None, races: bool = False, **kwargs) -> "Library":
    """Renders (see `source`), compiles and loads; what has been compiled in the folder is not compiled again.

    machine: the architecture for nvcc, if not the present GPU's. races: the emulator also looks for races in shared memory.
    """
    text = source(*args, **kwargs)
    functions = kwargs["functions"] if "functions" in kwargs else args[3]
    compiled = compile_text(folder, device, text, machine, races)
    plain = {"floatX": kwargs.get("precision", "bf16"), "floatR": kwargs.get("residual", "bf16")}
    if plain["floatX"] == "fp32":
        plain["floatR"] = "fp32"
    return Library(compiled, device, functions, plain, kwargs.get("scratch", 1 << 20))


def compile_text(folder: Path, device: str, text: str, machine: str | None = None, races: bool = False) -> Path:
    key = hashlib.sha256(f"{device} {machine} {races} {text}".encode()).hexdigest()[:16]
    library = folder / f"{key}.so"
    if not library.exists():  # a worker beside this one may compile it too
        name = f"{key}_{os.getpid()}"
        path, compiled = folder / f"{name}.cu", folder / f"{name}.so"
        path.write_text(text)
        if device == "emulator":
            emulator.compile(path, compiled, shared=True, races=races)
        else:
            flags = architecture.resolve(machine, "fp32").flags
            command = ["nvcc", *flags, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
            done = subprocess.run([*command, str(path), "-o", str(compiled)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} {path}\n{done.stderr[:6000]}")
        compiled.replace(library)
    return library


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16 (ties to even), as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray, precision: str = "bf16") -> np.ndarray:
    """Values as the device sees them."""
    return from_bf16(to_bf16(values)) if precision == "bf16" else np.asarray(values, np.float32)


class Failure(Exception):
    """A kernel did not end well: it faulted, deadlocked, or wrote where it may not."""


class Library:
    """The exported functions, to be called with numpy arrays and numbers."""

    def __init__(
        self, path: Path, device: str, functions: Mapping[str, str], types: Mapping[str, str], scratch: int, turns: int = 65536
    ):
        self._library, self._device, self._types = ctypes.CDLL(str(path)), device, types
        self._arguments = {name: _arguments(name, text)[1] for name, text in functions.items()}
        self._library.harness_malloc.restype = ctypes.c_void_p
        self._library.harness_failed.restype = ctypes.c_char_p
        self._scratch_bytes, self._turns_bytes = scratch, 4 * turns

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in self._arguments:
            raise AttributeError(name)

        def call(*values):
            return self._call(name, values)

        return call

    def _call(self, name: str, values: tuple) -> None:
        arguments = self._arguments[name]
        assert len(values) == len(arguments), f"{name} takes {[a for _, a in arguments]}"
        buffers: dict = {}  # (address, type) -> buffer
        given, back = [], []
        scratch = self._new(np.full(self._scratch_bytes, 0xFF, np.uint8), "scratch")
        turns = self._new(np.zeros(self._turns_bytes, np.uint8), "turns")
        self._library.harness_setup(ctypes.c_void_p(scratch[0]), ctypes.c_void_p(turns[0]))
        for value, (type_, argument) in zip(values, arguments, strict=True):
            if "*" not in type_:
                given.append(
                    {"float": ctypes.c_float, "size_t": ctypes.c_size_t}.get(type_.removeprefix("const "), ctypes.c_int)(value)
                )
            elif value is None:
                given.append(ctypes.c_void_p(None))
            else:
                base = type_.replace("const", "").replace("*", "").strip()
                assert value.flags.c_contiguous and value.dtype == (np.int32 if base == "int" else np.float32), argument
                key = (value.ctypes.data, base)
                half = base == "bf16" or self._types.get(base) == "bf16"
                if key not in buffers:
                    buffers[key] = self._new((to_bf16(value) if half else value).reshape(-1).view(np.uint8), argument)
                if not type_.startswith("const"):
                    back.append((value, buffers[key], half))
                given.append(ctypes.c_void_p(buffers[key][0]))
        getattr(self._library, f"harness_{name}")(*given)
        self._check(name)
        for value, buffer, half in back:
            got = self._bytes(buffer[0], buffer[1])
            value[...] = (from_bf16(got.view(np.uint16)) if half else got.view(value.dtype)).reshape(value.shape)
        wrong = [b[2] for b in [*buffers.values(), scratch, turns] if not self._guarded(b)]
        left = self._bytes(turns[0], turns[1]).any()
        for buffer in [*buffers.values(), scratch, turns]:
            self._library.harness_free(ctypes.c_void_p(buffer[0] - self._guard))
        self._check(name)
        if wrong:
            raise Failure(f"{name} writes outside of {', '.join(wrong)}")
        if left:
            raise Failure(f"{name} leaves turns that are not zero")

    @property
    def _guard(self) -> int:
        """The emulator has pages around each buffer that nobody can touch."""
        return 0 if self._device == "emulator" else GUARD

    def _new(self, content: np.ndarray, name: str) -> tuple[int, int, str]:
        """A buffer on the device: (address, bytes, name)."""
        zone = np.full(self._guard, 0xA5, np.uint8)
        whole = np.concatenate([zone, content, zone])
        memory = self._library.harness_malloc(ctypes.c_size_t(whole.nbytes))
        self._check(name)
        self._library.harness_copy(ctypes.c_void_p(memory), ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(whole.nbytes))
        return memory + self._guard, content.nbytes, name

    def _bytes(self, address: int, size: int) -> np.ndarray:
        got = np.empty(size, np.uint8)
        self._library.harness_copy(ctypes.c_void_p(got.ctypes.data), ctypes.c_void_p(address), ctypes.c_size_t(size))
        return got

    def _guarded(self, buffer: tuple[int, int, str]) -> bool:
        address, size, _ = buffer
        before, behind = self._bytes(address - self._guard, self._guard), self._bytes(address + size, self._guard)
        return bool((before == 0xA5).all() and (behind == 0xA5).all())

    def _check(self, name: str) -> None:
        failed = self._library.harness_failed()
        if failed:
            raise Failure(f"{name}: {failed.decode()}")
