"""Inline PTX as C++: each asm statement becomes a block of calls of the functions in ptx.h.

So what is tested is the PTX itself, with its operands in their order, and not a replacement of the functions around it.
"""

import re

# Instruction (a pattern for its whole name) -> function; \1, \2 are groups of the pattern; "" does nothing here.
_SPACE = r"(?:\.shared(?:::cta|::cluster)?)"
_GLOBAL = r"(?:\.global)?"
_CACHE = r"(?:\.(?:nc|ca|cg|cs|lu|L1::\w+|L2::\w+|L2::cache_hint|weak))*"
_TYPE = r"(?:\.v[248])?\.[bsuf](?:8|16|32|64|128)"
_ORDER = r"(?:\.(?:release|relaxed|acquire))?(?:\.(?:cta|cluster))?"
_COMPLETE = r"\.mbarrier::complete_tx::bytes"
_HINT = r"(?:\.L2::cache_hint)?"
INSTRUCTIONS = [
    (r"mov\.[bsuf](?:16|32|64)", "mov"),
    (r"setp\.ne\.[bsu]32", "setp_ne"),
    (r"selp\.[bsuf]32", "selp"),
    (r"(ex2|lg2|rcp|rsqrt|tanh)\.approx(?:\.ftz)?\.f32", r"\1"),
    (r"cvt\.rn(?:\.satfinite)?\.bf16x2\.f32", "cvt_bf16x2"),
    (rf"ld{_GLOBAL}{_CACHE}{_TYPE}", "ld"),
    (rf"ld\.(?:acquire|relaxed|volatile)(?:\.gpu|\.sys|\.cta|\.cluster)?{_GLOBAL}{_TYPE}", "ld_shared_with_others"),
    (rf"st(?:\.release|\.relaxed|\.volatile)?(?:\.gpu|\.sys|\.cta|\.cluster)?{_GLOBAL}{_CACHE}{_TYPE}", "st"),
    (rf"ld(?:\.volatile)?{_SPACE}{_TYPE}", "lds"),
    (rf"st(?:\.volatile)?{_SPACE}{_TYPE}", "sts"),
    (rf"red(?:\.release|\.relaxed)?(?:\.gpu|\.sys)?{_GLOBAL}\.add(?:\.v[24])?\.f32", "red_add"),
    (rf"red(?:\.release|\.relaxed)?(?:\.gpu|\.sys)?{_GLOBAL}\.add\.[su]32", "red_add_s32"),
    (r"(?:fence|membar)\.[\w.:]+", "nothing"),
    (r"prefetch[\w.:]*", "nothing"),
    (rf"cp\.async\.c[ag]{_SPACE}\.global(?:\.L2::\w+)*", "cp_async"),
    (r"cp\.async\.commit_group", "cp_async_commit"),
    (r"cp\.async\.wait_group", "cp_async_wait"),
    (r"cp\.async\.wait_all", "cp_async_wait_all"),
    (rf"ldmatrix\.sync\.aligned\.m8n8\.x[124]{_SPACE}\.b16", "ldmatrix<false>"),
    (rf"ldmatrix\.sync\.aligned\.m8n8\.x[124]\.trans{_SPACE}\.b16", "ldmatrix<true>"),
    (rf"stmatrix\.sync\.aligned\.m8n8\.x[124]{_SPACE}\.b16", "stmatrix<false>"),
    (rf"stmatrix\.sync\.aligned\.m8n8\.x[124]\.trans{_SPACE}\.b16", "stmatrix<true>"),
    (r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.bf16\.bf16\.f32", r"mma<\1>"),
    (r"tanh\.approx\.f16x2", "tanh_f16x2"),
    (r"mapa(?:\.shared::cluster)?\.u32", "mapa"),
    (r"elect\.sync", "elect"),
    (r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32", "setmaxnreg"),
    (r"griddepcontrol\.\w+", "nothing"),
    (r"(?:barrier|bar)\.cluster\.arrive(?:\.(?:release|relaxed))?(?:\.aligned)?", "cluster_arrive"),
    (r"(?:barrier|bar)\.cluster\.wait(?:\.acquire)?(?:\.aligned)?", "cluster_wait"),
    (rf"mbarrier\.init{_SPACE}\.b64", "mbarrier_init"),
    (rf"mbarrier\.inval{_SPACE}\.b64", "nothing"),
    (rf"mbarrier\.expect_tx{_ORDER}{_SPACE}\.b64", "mbarrier_expect_tx"),
    (rf"mbarrier\.arrive\.expect_tx{_ORDER}{_SPACE}\.b64", "mbarrier_arrive_expect_tx"),
    (rf"mbarrier\.arrive{_ORDER}{_SPACE}\.b64", "mbarrier_arrive"),
    (rf"mbarrier\.(?:try|test)_wait\.parity{_ORDER}{_SPACE}\.b64", "mbarrier_try_wait"),
    (rf"cp\.async\.bulk\.tensor\.(\d)d{_SPACE}\.global(?:\.tile)?{_COMPLETE}{_HINT}", r"tma_load<\1>"),
    (
        rf"cp\.async\.bulk\.tensor\.(\d)d{_SPACE}\.global(?:\.tile)?{_COMPLETE}\.multicast::cluster{_HINT}",
        r"tma_load_multicast<\1>",
    ),
    (rf"cp\.async\.bulk\.tensor\.(\d)d\.global{_SPACE}(?:\.tile)?\.bulk_group{_HINT}", r"tma_store<\1>"),
    (rf"cp\.reduce\.async\.bulk\.tensor\.(\d)d\.global{_SPACE}\.add(?:\.tile)?\.bulk_group{_HINT}", r"tma_reduce_add<\1>"),
    (rf"cp\.async\.bulk{_SPACE}\.global{_COMPLETE}", "bulk_load"),
    (rf"cp\.async\.bulk\.global{_SPACE}\.bulk_group", "bulk_store"),
    (rf"cp\.reduce\.async\.bulk\.global{_SPACE}\.bulk_group\.add\.f32", "bulk_reduce_add"),
    (r"cp\.async\.bulk\.commit_group", "bulk_commit"),
    (r"cp\.async\.bulk\.wait_group\.read", "bulk_wait_read"),
    (r"cp\.async\.bulk\.wait_group", "bulk_wait_done"),
    (r"wgmma\.fence\.sync\.aligned", "nothing"),
    (r"wgmma\.commit_group\.sync\.aligned", "wgmma_commit"),
    (r"wgmma\.wait_group\.sync\.aligned", "wgmma_wait"),
    (r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16", r"wgmma<\1>"),
    (r"(?:bar|barrier)\.sync(?:\.aligned)?", "bar_sync"),
    (r"(?:bar|barrier)\.arrive(?:\.aligned)?", "bar_arrive"),
]
_REGISTERS = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "f32": "float"}
_REGISTERS |= {"b64": "uint64_t", "u64": "uint64_t"}


def function(instruction: str) -> str:
    for pattern, name in INSTRUCTIONS:
        if match := re.fullmatch(pattern, instruction):
            return "ptx::" + match.expand(name)
    raise ValueError(f"the emulator does not know the instruction {instruction} (tests/emulator/ptx.py)")


def split(text: str, separator: str) -> list[str]:
    """The parts between separators that are outside of parentheses, brackets, braces and strings."""
    parts, depth, i, start = [], 0, 0, 0
    while i < len(text):
        if text[i] == '"':
            i += 1
            while text[i] != '"':
                i += 2 if text[i] == "\\" else 1
        elif text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif text[i] == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
        i += 1
    parts.append(text[start:].strip())
    return parts


def _string(text: str) -> str:
    """The value of adjacent string literals."""
    if re.sub(r'"(\\.|[^"\\])*"', "", text).strip():
        raise ValueError(f"only string literals can stand in asm: {text}")
    joined = "".join(m[0][1:-1] for m in re.finditer(r'"(\\.|[^"\\])*"', text))
    return joined.replace("\\n", "\n").replace("\\t", " ").replace('\\"', '"')


def translate(statement: str) -> str:
    """C++ for what stands in the parentheses of an asm statement."""
    code, *sections = split(statement, ":")
    operands = [o for section in sections[:2] for o in split(section, ",") if o]
    results, lines = set(), []
    for i, operand in enumerate(operands):
        match = re.fullmatch(r'"([=+]?)&?([rlhfnCd])"\s*\((.*)\)', operand, re.S)
        if match is None:
            raise ValueError(f"asm operand {operand}")
        writes, constraint, expression = match.groups()
        if writes:
            results.add(i)
            lines.append(f"auto &asm_{i} = {expression};")
            lines.append(f"(void)ptx::operand_{constraint}(asm_{i});")
        elif constraint == "n":
            lines.append(f"constexpr int asm_{i} = {expression};")
        else:
            lines.append(f"const auto asm_{i} = ptx::operand_{constraint}({expression});")
    registers: set[str] = set()
    for line in _statements(_string(code)):
        lines.append(_instruction(line, registers, results))
    return "do { " + " ".join(lines).replace("\n", " ") + " } while (0)"


def _statements(code: str) -> list[str]:
    """Instructions, declarations and labels; the braces of a scope are dropped."""
    code = re.sub(r"//.*|/\*.*?\*/", "", code)
    found = []
    while code := code.strip():
        if label := re.match(r"\w+\s*:(?!:)", code):
            found.append(label[0])
            code = code[label.end() :]
        elif code[0] in "{}":
            code = code[1:]
        else:
            part, _, code = code.partition(";")
            found.append(" ".join(part.split()))
    return found


def _instruction(line: str, registers: set[str], results: set[int]) -> str:
    if line.endswith(":"):
        return f"{line[:-1].strip()}_label:;"
    if declaration := re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", line):
        names = [n.strip() for n in declaration[2].split(",")]
        registers.update(names)
        return f"{_REGISTERS[declaration[1]]} {', '.join(f'{n} = 0' for n in names)};"
    guard = ""
    if guarded := re.match(r"@(!?)(\w+)\s+", line):
        guard, line = f"if ({guarded[1]}{guarded[2]}) ", line[guarded.end() :]
    name, _, rest = line.partition(" ")
    if re.fullmatch(r"bra(\.uni)?", name):
        return f"{guard}goto {rest.strip()}_label;"
    arguments = [a for a in split(rest, ",") if a not in ("", "_")]
    written = [_argument(a, registers, results, first=i == 0) for i, a in enumerate(arguments)]
    return f"{guard}{function(name)}({', '.join(written)});"


def _argument(text: str, registers: set[str], results: set[int], first: bool) -> str:
    """%0 -> asm_0, or &asm_0 where it is a result; [%0] -> asm_0; {..} -> {..}; %%laneid -> special_laneid()."""
    text = text.removeprefix("_|")
    if text[0] == "[":
        inner = split(text[1:-1], ",")
        return ", ".join(_argument(a, registers, set(), first=False) for a in inner)
    if text[0] == "{":
        return "{" + ", ".join(_argument(a, registers, results, first) for a in split(text[1:-1], ",")) + "}"
    if special := re.fullmatch(r"%%?([a-z][\w.]*)", text):
        return f"ptx::special_{special[1].replace('.', '_')}()"
    if number := re.fullmatch(r"%(\d+)", text):
        return f"&asm_{number[1]}" if int(number[1]) in results else f"asm_{number[1]}"
    if text in registers:
        return f"&{text}" if first else text
    if re.fullmatch(r"[\w%+\- ]+", text):  # a number, or an address with an offset
        return re.sub(r"%(\d+)", r"asm_\1", text)
    raise ValueError(f"the emulator does not know the operand {text}")
