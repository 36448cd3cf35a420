"""Which functions of templates/c a generated source needs, beside those that its calls name."""

import re
from collections.abc import Iterable
from pathlib import Path

# In the order of the generated source.
TEMPLATES = (
    "c/compiler.j2",
    "c/vector.j2",
    "c/ops/gelu.j2",
    "c/gemm.j2",
    "c/ops/token_embedding.j2",
    "c/ops/position_embedding.j2",
    "c/ops/layernorm.j2",
    "c/ops/linear.j2",
    "c/ops/add.j2",
    "c/ops/attention.j2",
    "c/ops/classifier.j2",
    "c/ops/global_norm.j2",
    "c/ops/adamw.j2",
)

_GUARDED = re.compile(r"^{% if (.*?) %}\n(.*?)^{% endif %}", re.M | re.S)  # at the left margin
_INNER = re.compile(r"^ +{% if .*?^ +{% endif %}", re.M | re.S)  # an optional part of a function


def with_helpers(functions: Iterable[str], templates: Path) -> frozenset[str]:
    """The functions and all that they call, directly or not, among those that the templates emit on demand.

    templates: the folder that holds c/. A function stands between `{% if "name" in functions %}` and `{% endif %}` at
    the left margin; whatever name occurs in there is needed by it.
    """
    text = "\n".join((templates / name).read_text() for name in TEMPLATES)
    blocks = [(re.findall(r'"(\w+)"', condition), _INNER.sub("", body)) for condition, body in _GUARDED.findall(text)]
    known = {name for names, _ in blocks for name in names}
    needs = {name: set() for name in known}
    always = set(re.findall(r"\w+", _INNER.sub("", _GUARDED.sub("", text)))) & known
    for names, body in blocks:
        for name in names:
            needs[name] |= set(re.findall(r"\w+", body)) & known
    found, todo = set(), {*functions, *always}
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= needs.get(name, set()) - found
    return frozenset(found)
