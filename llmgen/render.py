"""The Jinja environment: a plan in, source text out. Templates have holes and loops over ready lists, and no arithmetic."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import jinja2

from llmgen import characters, families, host, kernels, toolchain
from llmgen import generation as generations
from llmgen.cuda.products import stores_slopes
from llmgen.generation import GenerationPlan
from llmgen.plan import C_TYPES, Call, FunctionPlan, Parameter, Plan, c_float

TEMPLATES = {"c": "train.c.j2", "cuda": "train.cu.j2"}
GENERATION_TEMPLATES = {"c": "generate.c.j2", "cuda": "generate.cu.j2"}
WIDTH = 120  # columns of the generated source


def templates_folder() -> Path:
    """The wheel's templates, else the checkout's."""
    package = Path(__file__).parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


def environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    env.filters["call"] = call
    env.filters["commas"] = "{:,}".format
    env.filters["members"] = members
    env.filters["comment_lines"] = comment_lines
    env.filters["wrap"] = wrap
    env.filters["c_float"] = c_float
    env.filters["c_type"] = C_TYPES.get
    env.filters["muon_parts"] = muon_parts
    env.filters["numbers"] = numbers
    return env


def source(plan: Plan, statement: Callable[..., str] | None = None) -> str:
    """The whole source file. It depends on the config, the target and the CPU profile, and on nothing else.

    statement: how a planned call becomes C, if not as `call` has it.
    """
    config = plan.config
    name = f"train_{config.family}"
    value = "float" if plan.target == "c" else "Value"
    sizes = [(f"{name} = {value},", comment) for name, value, comment in plan.sizes]
    context = {
        **host.context(config),
        "sizes": sizes,
        "target": plan.target,
        "timed": statement is not None,
        "parameter_members": [(f"{value} *{p.name};", f"({p.shape})") for p in plan.parameters],
        "weights_memory": "grads_memory" if plan.has_halves else "params_memory",  # where they lie as floats, for files
        "activation_members": _buffer_members(plan.forward_backward),
        "evaluation_members": _buffer_members(plan.evaluate),
        "table_members": [(f"float *{t.name};", f"({', '.join(map(str, t.shape))})") for t in plan.tables],
        "plan": plan,
        "title": families.TITLES[config.family],
        "config": config,
        "model": config.model,
        "compile_line": toolchain.compile_line(name, plan.target, plan.profile),
        "memory": plan.memory,
        "options": kernels.options(config.model, plan.evaluation_tokens),
        "model_template": f"{plan.target}/model.j2",
        "kernel_templates": kernels.templates(
            plan.templates, plan.target, plan.profile, config.program.precision, config.model
        ),
    }
    if plan.target == "cuda":
        context["options"] |= kernels.gpu_options(plan)
    return _rendered(TEMPLATES[plan.target], plan, context, statement)


def generation(plan: GenerationPlan) -> str:
    """The whole source of the program that generates. It depends on `generation.stated`, the target and the machine."""
    config, name = plan.config, f"generate_{plan.config.family}"
    value = "float" if plan.target == "c" else "floatX"
    context = {
        **host.generation_context(config, plan.target),
        "sizes": [(f"{name} = {value},", comment) for name, value, comment in plan.sizes],
        "target": plan.target,
        "value": value,
        "parameter_members": [(f"{value} *{p.name};", f"({p.shape})") for p in plan.parameters],
        "state_members": [(f"{value} *{s.name};", f"({', '.join(map(str, s.shape))})") for s in plan.states],
        "activation_members": _buffer_members(plan.decode),
        "table_members": [(f"float *{t.name};", f"({', '.join(map(str, t.shape))})") for t in plan.tables],
        "plan": plan,
        "title": families.TITLES[config.family],
        "config": config,
        "stated": generations.stated(config, plan.target),
        "hash": generations.hash_of(config, plan.target),
        "model": config.model,
        "compile_line": toolchain.compile_line(name, plan.target, plan.profile),
        "options": kernels.options(config.model, cached=True),
        "model_template": f"{plan.target}/generate_model.j2",
        "weights_memory": "params_memory",
        "kernel_templates": kernels.templates(plan.templates, plan.target, plan.profile),
        "letters": characters.LETTERS,
        "numbers": characters.NUMBERS,
        "spaces": characters.SPACES,
    }
    if plan.target == "cuda":
        context["options"] |= kernels.gpu_options(plan)
    return _rendered(GENERATION_TEMPLATES[plan.target], plan, context)


def tuner(function: str, plan: Plan, products: dict) -> str:
    """The program of `llmgen tune` for a function of products. products: what kernels.options calls so."""
    config, machine = plan.config, plan.profile
    precision = config.program.precision
    wgmma = machine.uses_wgmma(precision)
    context = {
        "function": function,
        "options": kernels.options(config.model)
        | {
            "precision": precision,
            "residual": config.program.residual_precision if precision == "bf16" else "fp32",
            "arch": machine.name,
            "hopper": wgmma,
            "slopes": stores_slopes(plan.graph),
            "products": products,
        },
        "limits": {"entry": 0.05, "relative": 0.01, "rms": 0.005},
        "kernel_templates": kernels.templates(["linear"], "cuda", machine, precision),
    }
    env = environment()

    def section(functions: frozenset) -> str:
        return "".join(env.get_template(name).render(context, functions=functions) for name in context["kernel_templates"])

    functions = kernels.with_helpers({function}, context["kernel_templates"], templates_folder(), section)
    return tidy(env.get_template("tune.cu.j2").render(context, functions=functions))


def _rendered(template: str, plan: Plan | GenerationPlan, context: dict, statement: Callable[..., str] | None = None) -> str:
    env = environment()
    env.filters["call"] = statement or call
    env.filters["on_gpu"] = "{}".format if plan.target == "c" else lambda tokens, n: f"tokens_to_gpu({tokens}, {n})"
    env.filters["floats_from_gpu"] = "{}".format if plan.target == "c" else lambda at, n: f"floats_from_gpu({at}, {n})"

    def section(functions: frozenset) -> str:
        names = [*context["kernel_templates"], context["model_template"]]  # what the model calls, it needs
        return "".join(env.get_template(name).render(context, functions=functions) for name in names)

    functions = kernels.with_helpers(plan.functions, context["kernel_templates"], templates_folder(), section)
    return tidy(env.get_template(template).render(context, functions=functions))


def tidy(text: str) -> str:
    """One blank line between parts, and before each heading; headings `/* ---- title ---` as wide as the page."""

    def heading(match: re.Match) -> str:
        title, end = match[1], match[2] or ""
        return f"/* ---- {title} ".ljust(WIDTH - len(end), "-") + end

    text = re.sub(r"^/\* ---- (.*?) -+( \*/)?$", heading, text, flags=re.M)
    text = re.sub(r"([^\n])\n(/\* ---- )", r"\1\n\n\2", text)
    text = re.sub(r"^}\n(?=INLINE|static|__global__|__device__|template|/\*)", "}\n\n", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text)


def _buffer_members(function: FunctionPlan) -> list[tuple[str, str]]:
    return [(f"{C_TYPES[b.dtype]} *{b.name};", f"({', '.join(map(str, function.shape(b)))})") for b in function.buffers]


def call(c: Call, indent: int = 4) -> str:
    """A call as a C statement, wrapped behind its opening parenthesis."""
    return wrap(f"{c.function}(", [*c.arguments], indent, ");")


def wrap(head: str, items: list[str], indent: int, tail: str) -> str:
    """`head` and comma-separated items, continued under the column where the first item stands."""
    lines, line = [], " " * indent + head
    margin = " " * len(line)
    for i, item in enumerate(items):
        piece = item + (", " if i + 1 < len(items) else tail)
        if len(line) + len(piece.rstrip()) > WIDTH and line.strip() and line != margin:
            lines.append(line.rstrip())
            line = margin
        line += piece
    return "\n".join([*lines, line.rstrip()])[indent:]


def numbers(values: tuple[int, ...]) -> str:
    """Lines of numbers: the inside of an initialiser."""
    return textwrap.fill(", ".join(map(str, values)), WIDTH, initial_indent="    ", subsequent_indent="    ")


def members(rows: list[tuple[str, str]], indent: int = 4) -> str:
    """Lines of `declaration  /* comment */` with the comments in one column."""
    width = max(len(declaration) for declaration, _ in rows)
    return "\n".join(" " * indent + f"{declaration:<{width}}  /* {comment} */" for declaration, comment in rows)


def muon_parts(p: Parameter) -> str:
    """The rows and columns of a parameter's matrices, as a part of its row of the table."""
    rows = [*p.parts, 0, 0, 0][:3]
    return f"{{ {rows[0]}, {rows[1]}, {rows[2]} }}, {p.tensor.shape[-1].size}, "


def comment_lines(text: str, prefix: str = " * ") -> str:
    return "\n".join((prefix + line).rstrip() for line in text.rstrip("\n").split("\n"))
