"""What changes between two configurations: parameters, bytes, flops, and the generated sources."""

import difflib
import re

from llmgen import models, render
from llmgen.config import TABLES, Config
from llmgen.plan import Plan
from llmgen.report import table


def diff(a: Plan, b: Plan, threads: int) -> str:
    """Four parts: fields, sizes, parameters, and the sources as a unified diff. Parts without a difference are left out."""
    parts = [fields(a.config, b.config), sizes(a, b, threads), parameters(a, b), sources(a, b)]
    return "\n\n".join(part for part in parts if part) or "no difference"


def fields(a: Config, b: Config) -> str:
    rows = []
    for name in TABLES:
        before, after = a.to_dict()[name], b.to_dict()[name]
        rows += [[f"[{name}] {key}", str(before[key]), str(after[key])] for key in before if before[key] != after[key]]
    return table(["field", a.name, b.name], rows, 1) if rows else ""


def sizes(a: Plan, b: Plan, threads: int) -> str:
    rows = []
    pairs = [("parameters", models.count(a.config), models.count(b.config))]
    pairs += [(f"bytes: {key}", getattr(a.memory, key), getattr(b.memory, key)) for key in ("activations", "arena")]
    pairs += [("bytes: total", a.memory.total(threads), b.memory.total(threads))]
    pairs += [("flops a token", round(a.flops_per_token), round(b.flops_per_token))]
    for name, before, after in pairs:
        if before == after:
            continue
        change = f"{after - before:+,}" + (f" ({100 * (after - before) / before:+.1f} %)" if before else "")
        rows.append([name, f"{before:,}", f"{after:,}", change])
    return table(["", a.config.name, b.config.name, "change"], rows, 1) if rows else ""


def parameters(a: Plan, b: Plan) -> str:
    before, after = (
        {p.name: f"({', '.join(str(d.size) for d in p.tensor.stacked)})" for p in plan.parameters} for plan in (a, b)
    )
    names = list(dict.fromkeys([*before, *after]))
    rows = [[n, before.get(n, "-"), after.get(n, "-")] for n in names if before.get(n) != after.get(n)]
    return table(["parameter", a.config.name, b.config.name], rows, 3) if rows else ""


def sources(a: Plan, b: Plan) -> str:
    """The difference of the generated sources, without what follows from it: the comment at the top, offsets, file layouts."""
    names = [f"{plan.config.name}/train_{plan.config.family}.c" for plan in (a, b)]
    lines = [_essence(render.source(plan)).splitlines() for plan in (a, b)]
    return "\n".join(difflib.unified_diff(*lines, *names, lineterm=""))


def _essence(source: str) -> str:
    body = source[source.index("#define") :]
    for section in ("weights: ", "debug state: "):
        body = re.sub(rf"^/\* ---- {section}.*?(?=^/\* ---- )", "", body, flags=re.M | re.S)
    body = re.sub(r"^static const char version.*", "", body, flags=re.M)
    body = re.sub(r"^    (acts|eval)\.\w+ = workspace.*\n", "", body, flags=re.M)
    body = re.sub(r"allocate_tensors\(\d+\)", "allocate_tensors(...)", body)
    body = re.sub(r'^    \{ "(\w+)", \d+,', r'    { "\1", ...,', body, flags=re.M)
    return re.sub(
        r"^(static const size_t PARAMETER_VALUES = |/\* All memory the model ever uses).*", r"\1...", body, flags=re.M
    )
