"""Compiles a generated source: finds a compiler, chooses its flags, rebuilds only what changed.

- CC names the compiler, else gcc, clang or cc is taken; CFLAGS come last, so that they win.
- A program is up to date if source, command and compiler are those it was made from (a hidden file beside it says so).
- The program is compiled under another name and renamed; what the compiler says goes to a file beside it.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmgen.cpu import Profile
from llmgen.errors import UserError

C_COMPILERS = ("gcc", "clang", "cc")
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


def compile_line(name: str, profile: Profile) -> str:
    """What stands at the top of the source NAME.c."""
    return shlex.join(c_command(f"{name}.c", name, profile))


def compile(source: Path, program: Path, profile: Profile, more: Sequence[str] = ()) -> Build:
    """Compile a C source, unless the program is up to date. more: flags besides the usual ones.

    Raises UserError if there is no compiler (the line says how to compile elsewhere) or it fails (the line names the
    file with its output).
    """
    compiler = _find_compiler("CC", C_COMPILERS)
    if compiler is None:
        line = compile_line(program.name, profile)
        raise UserError(f"no C compiler found (gcc, clang or cc); take {source} where there is one and compile it: {line}")
    cflags = shlex.split(os.environ.get("CFLAGS", ""))
    openmp = _probe_openmp(compiler, cflags)
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


def _probe_openmp(compiler: Sequence[str], cflags: Sequence[str]) -> tuple[str, ...]:
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
