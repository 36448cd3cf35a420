"""Compiles a generated source: finds a compiler, chooses its flags, rebuilds only what changed.

- CC names the compiler of C, else gcc, clang or cc is taken; CFLAGS come last, so that they win. NVCC names nvcc.
- A program is up to date if source, command and compiler are those it was made from (a hidden file beside it says so).
- The program is compiled under another name and renamed; what the compiler says goes to a file beside it.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmgen.cpu import Profile
from llmgen.cuda.architecture import Architecture
from llmgen.errors import UserError

C_COMPILERS = ("gcc", "clang", "cc")
CUDA_FLAGS = ("-O3", "-std=c++17")
OLDEST_CUDA = (12, 0)
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
C_FLAGS = ("-O3", "-std=gnu11")
C_OPENMP = (("-fopenmp",), ("-Xpreprocessor", "-fopenmp", "-lomp"))  # the second is Apple's clang with libomp
_OPENMP_PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"


@dataclass(frozen=True)
class Build:
    program: Path
    command: tuple[str, ...]  # as one would type it
    notice: str = ""  # what the user should know about the build, one line

    @property
    def line(self) -> str:
        return shlex.join(self.command)


def c_command(
    source: str | Path,
    program: str | Path,
    profile: Profile,
    compiler: Sequence[str] = ("gcc",),
    openmp: Sequence[str] = C_OPENMP[0],
    cflags: Sequence[str] = (),
) -> tuple[str, ...]:
    """The command that compiles a C program."""
    return (*compiler, *C_FLAGS, *profile.flags, *openmp, *cflags, str(source), "-lm", "-o", str(program))


def cuda_command(
    source: str | Path,
    program: str | Path,
    machine: Architecture,
    compiler: Sequence[str] = ("nvcc",),
    more: Sequence[str] = (),
) -> tuple[str, ...]:
    """The command that compiles a CUDA program."""
    return (*compiler, *CUDA_FLAGS, *machine.flags, *more, str(source), "-o", str(program))


def compile_line(name: str, target: str, machine: Profile | Architecture) -> str:
    """What stands at the top of the source NAME.c or NAME.cu."""
    if target == "cuda":
        return shlex.join(cuda_command(f"{name}.cu", f"{name}cu", machine))
    return shlex.join(c_command(f"{name}.c", name, machine))


def compile(source: Path, program: Path, target: str, machine: Profile | Architecture, more: Sequence[str] = ()) -> Build:
    """Compile a source, unless the program is up to date. more: flags besides the usual ones.

    Raises UserError if there is no compiler (the line says how to compile elsewhere) or it fails (the line names the
    file with its output).
    """
    return (_compile_cuda if target == "cuda" else _compile_c)(source, program, machine, more)


def find_c() -> tuple[str, ...] | None:
    """The command of the C compiler, or None. Raises UserError if CC names one that is not there."""
    return _find_compiler("CC", C_COMPILERS)


def find_nvcc() -> tuple[str, ...] | None:
    """The same of nvcc: NVCC, on PATH, or where the toolkit's installer puts it."""
    return _find_compiler("NVCC", ("nvcc",)) or ((USUAL_NVCC,) if os.access(USUAL_NVCC, os.X_OK) else None)


def _compile_cuda(source: Path, program: Path, machine: Architecture, more: Sequence[str]) -> Build:
    compiler = find_nvcc()
    if compiler is None:
        line = compile_line(source.stem, "cuda", machine)
        raise UserError(f"nvcc was not found; take {source} where the CUDA toolkit is and compile it: {line}")
    version = nvcc_version(compiler)
    if version < OLDEST_CUDA:
        raise UserError(
            f"{compiler[0]} is of CUDA {version[0]}.{version[1]}, but {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or later is needed; "
            "name another with NVCC"
        )
    build = Build(program, cuda_command(source, program, machine, compiler, more))
    _compile(source, build)
    return build


def nvcc_version(compiler: Sequence[str]) -> tuple[int, int]:
    """(12, 4) for CUDA 12.4. Raises UserError if it does not say."""
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", result.stdout)
    if not found:
        raise UserError(f"{compiler[0]} does not say its version as nvcc does; name nvcc with NVCC")
    return int(found[1]), int(found[2])


def _compile_c(source: Path, program: Path, profile: Profile, more: Sequence[str]) -> Build:
    compiler = find_c()
    if compiler is None:
        line = compile_line(source.stem, "c", profile)
        raise UserError(f"no C compiler found (gcc, clang or cc); take {source} where there is one and compile it: {line}")
    cflags = shlex.split(os.environ.get("CFLAGS", ""))
    openmp = find_openmp(compiler, cflags)
    notice = ""
    if not openmp:
        notice = f"{compiler[0]} has no OpenMP here: the program will use ONE thread; install libomp or use gcc"
    build = Build(program, c_command(source, program, profile, compiler, openmp, (*more, *cflags)), notice)
    _compile(source, build)
    return build


def _find_compiler(variable: str, names: Sequence[str]) -> tuple[str, ...] | None:
    """The compiler's command: the variable's, else the first name found, else None."""
    named = shlex.split(os.environ.get(variable, ""))
    if named and shutil.which(named[0]) is None:
        raise UserError(f"{variable}={os.environ[variable]}: no such compiler; unset {variable} or correct it")
    found = next((name for name in names if shutil.which(name)), None)
    return tuple(named) or ((found,) if found else None)


def find_openmp(compiler: Sequence[str], cflags: Sequence[str] = ()) -> tuple[str, ...]:
    """The flags with which this compiler links an OpenMP program; () if none do."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(_OPENMP_PROBE)
        for openmp in C_OPENMP:
            command = [*compiler, *openmp, *cflags, str(source), "-o", str(Path(folder, "probe"))]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return openmp
    return ()


def _compile(source: Path, build: Build) -> None:
    program, log = build.program, build.program.with_name(build.program.name + ".log")
    temporary = program.with_name(f".{program.name}.tmp")
    stamp = program.with_name(f".{program.name}.built")
    key = _key(source, build.command)
    if stamp.is_file() and stamp.read_text() == _stamp(key, program):
        return
    try:
        with open(log, "wb") as output:
            command = [*build.command[:-1], str(temporary)]
            status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output).returncode
        if status != 0:
            raise UserError(f"{build.command[0]} could not compile {source}; what it says is in {log}")
        os.replace(temporary, program)
        log.unlink()
        stamp.write_text(_stamp(key, program))
    except OSError as error:
        raise UserError(f"{program}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _key(source: Path, command: Sequence[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True).stdout
    return hashlib.sha256(b"\0".join([source.read_bytes(), shlex.join(command).encode(), version])).hexdigest()


def _stamp(key: str, program: Path) -> str:
    """What the hidden file says of an up-to-date program: it is this one, made from these."""
    try:
        status = program.stat()
    except OSError:
        return ""
    return f"{key} {status.st_size} {status.st_mtime_ns}\n"
