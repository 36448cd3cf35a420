"""A CPU emulator of CUDA for the generated sources: they become C++ that g++ compiles and the processor runs.

What is emulated, and what it notices, is said at the top of runtime.h, ptx.h and cuda.h. Here: the few things of the
language that are not C++ (launches, shared memory, inline PTX), and the compiler's command.

EMULATOR_SEED (a number) chooses another order in which threads run; EMULATOR_RACES makes everything look for races.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from emulator import ptx

FOLDER = Path(__file__).parent
# Misaligned accesses and indices outside of arrays trap, which the emulator reports.
FLAGS = [
    *("-std=c++17", "-O2", "-march=native", "-g1", "-fno-gnu-unique", "-fPIC", "-fno-strict-aliasing", "-w"),
    *("-fno-omit-frame-pointer", "-fno-optimize-sibling-calls", "-fno-threadsafe-statics"),
    *("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"),
]


def available() -> bool:
    return shutil.which("g++") is not None and os.uname().machine == "x86_64" and os.uname().sysname == "Linux"


def compile(source: Path, program: Path, shared: bool = False, races: bool = False) -> None:
    """Compiles a .cu to a program (or a shared library) that runs here. Raises RuntimeError with what the compiler says.

    races: it also looks for races in shared memory, which takes longer.
    """
    text = program.with_name(program.name + ".emulated.cpp")
    text.write_text(translate(source.read_text(), source.name))
    objects = [_runtime(name) for name in ("runtime", "cuda", "hopper", "races")]
    link = ["-shared", "-Wl,-Bsymbolic"] if shared else []
    instrument = ["-fsanitize=thread"] if races or os.environ.get("EMULATOR_RACES") else []
    compiled = text.with_suffix(".o")
    _run(["g++", *FLAGS, *instrument, f"-I{FOLDER}", "-c", str(text), "-o", str(compiled)])
    _run(["g++", str(compiled), *map(str, objects), *link, "-ldl", "-o", str(program)])


def _runtime(name: str) -> Path:
    """A part of the emulator itself, compiled once for all programs."""
    text = b"".join(p.read_bytes() for p in sorted(FOLDER.glob("*.[hc]*"))) + str(FLAGS).encode()
    compiled = FOLDER / "__pycache__" / f"{name}-{hashlib.sha256(text).hexdigest()[:12]}.o"
    if not compiled.exists():
        compiled.parent.mkdir(exist_ok=True)
        temporary = compiled.with_suffix(f".{os.getpid()}")
        flags = [f for f in FLAGS if "sanitize" not in f]
        _run(["g++", *flags, "-O3", "-c", str(FOLDER / f"{name}.cpp"), "-o", str(temporary)])
        temporary.rename(compiled)
    return compiled


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:6000]}")


def translate(text: str, name: str = "source.cu") -> str:
    """C++ of a .cu; line numbers stay those of the .cu."""
    text = re.sub(r"#include <(cuda\w*|cuda/\w+)\.h>", '#include "cuda.h"', text)
    text = re.sub(r"\b__noinline__\b", "__attribute__((noinline))", text)
    for replace in (_asm, _launches, _shared):
        text = replace(text)
    return f'#include "cuda.h"\n#line 1 "{name}"\n{text}'


def _masked(text: str) -> str:
    """The text with comments and strings blanked, so that what is found in it is code, at the same place."""
    blank = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\])\'', re.S)
    return blank.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def _closing(masked: str, start: int) -> int:
    """Where the bracket at `start` closes."""
    pairs, depth = {"(": ")", "<": ">", "{": "}"}, 0
    for i in range(start, len(masked)):
        if masked[i] == masked[start]:
            depth += 1
        elif masked[i] == pairs[masked[start]]:
            depth -= 1
            if depth == 0:
                return i
    raise ValueError(f"unclosed {masked[start]}: {masked[start : start + 80]}")


def _kept_lines(new: str, old: str) -> str:
    """`new` with as many line breaks as `old`."""
    return new.replace("\n", " ") + "\n" * old.count("\n")


def _asm(text: str) -> str:
    masked = _masked(text)
    for match in reversed(list(re.finditer(r"\basm\s*(?:volatile)?\s*\(", masked))):
        end = _closing(masked, match.end() - 1)
        statement = re.sub(r"/\*.*?\*/|//[^\n]*", "", text[match.end() : end])
        text = text[: match.start()] + _kept_lines(ptx.translate(statement), text[match.start() : end]) + text[end + 1 :]
    return text


def _launches(text: str) -> str:
    """kernel<<<grid, block, shared, stream>>>(arguments) is a call with the kernel's name, shape, stream and arguments."""
    while match := re.search(r"<<<", masked := _masked(text)):
        head = re.search(r"\w+\s*$", masked[: match.start()])
        start = head.start() if head else _template_start(masked, match.start())
        close = masked.index(">>>", match.end())
        opening = masked.index("(", close)
        end = _closing(masked, opening)
        kernel, arguments = text[start : match.start()].strip(), text[opening + 1 : end].strip()
        shape = ptx.split(text[match.end() : close], ",")
        stream = shape[3] if len(shape) > 3 else "nullptr"
        call = (
            f'emulator::start("{re.sub(r"[^A-Za-z0-9_]+", " ", kernel).strip()}", emulator::shape({", ".join(shape[:3])}), '
            f"(void *)({stream}), [=](auto... a) {{ {kernel}(a...); }}{', ' if arguments else ''}{arguments})"
        )
        text = text[:start] + _kept_lines(call, text[start:end]) + text[end + 1 :]
    return text


def _template_start(masked: str, end: int) -> int:
    """Where NAME<...> begins that ends at `end`."""
    i, depth = len(masked[:end].rstrip()) - 1, 0
    while True:
        depth += (masked[i] == ">") - (masked[i] == "<")
        if depth == 0:
            return re.search(r"\w+\s*$", masked[:i]).start()
        i -= 1


_ATTRIBUTES = r"(?:(?:__align__|alignas)\s*\(([^()]*(?:\([^()]*\))?[^()]*)\)\s*)?"


def _shared(text: str) -> str:
    """Variables in shared memory become references into the block's part of it."""

    def dynamic(match: re.Match) -> str:
        alignment, type_, name = match[1] or match[2], match[3], match[4]
        check = (
            f' if ((uintptr_t){name} % ({alignment})) emulator::fail("dynamic shared memory: alignment");' if alignment else ""
        )
        if match.start() == 0 or match.string[match.start() - 1] == "\n":  # outside of functions
            return f"#define {name} (({type_} *)emulator::dynamic_shared())"
        return f"{type_} *{name} = ({type_} *)emulator::dynamic_shared();{check}"

    def static(match: re.Match) -> str:
        alignment, type_, declarators = match[1] or match[2] or "1", match[3].strip(), match[4]
        made = []
        for declarator in ptx.split(declarators, ","):
            name, dimensions = re.fullmatch(r"(\w+)\s*(.*)", declarator, re.S).groups()
            made.append(
                f"typedef {type_} {name}_type{dimensions}; static const char {name}_key = 0; {name}_type &{name} = "
                f"*({name}_type *)emulator::static_shared(&{name}_key, sizeof({name}_type), "
                f"std::max<size_t>({alignment}, alignof({name}_type)));"
            )
        return " ".join(made)

    def replace(pattern: str, function, text: str) -> str:
        masked = _masked(text)
        return re.sub(pattern, lambda m: m[0] if masked[m.start()] == " " else _kept_lines(function(m), m[0]), text)

    found = rf"__shared__\s+{_ATTRIBUTES}"
    text = replace(rf"\bextern\s+{_ATTRIBUTES}{found}([\w:]+(?:\s+[\w:]+)*?)\s+(\w+)\s*\[\s*\]\s*;", dynamic, text)
    types = r"((?:(?:unsigned|const|struct)\s+)*[\w:]+(?:<[^;=]*?>)?\s)"
    return replace(rf"\b(?:static\s+)?{_ATTRIBUTES}{found}{types}\s*([^;=(]*(?:\([^;]*\)[^;=(]*)*);", static, text)
