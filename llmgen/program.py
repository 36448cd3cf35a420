"""What the commands do with a config: plan it, build its program, run it."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from llmgen import config as configs
from llmgen import plan as plans
from llmgen.config import BYTE_VOCABULARY, GPT2_VOCABULARY, Config
from llmgen.cuda.architecture import Architecture
from llmgen.errors import UserError
from llmgen.flags import program_flags
from llmgen.generation import GenerationPlan
from llmgen.plan import Plan

# How `llmgen run` trains where no data is named: fields of [train], unless the config or the program's flags say them.
BUILTIN_TRAINING = {
    "steps": "3600",
    "shuffle": "1",
    "lr_schedule": "linear",
    "warmup_steps": "400",
    "final_lr_fraction": "0",
    "beta2": "0.98",
    "val_every": "500",
    "val_steps": "100",
    "sample_length": "256",
}


@dataclass(frozen=True)
class Built:
    source: Path
    compile_line: str
    program: Path
    notice: str = ""  # what the user should know about it, one line


def config(source, target, settings, batch_size, seq_len, precision, cpu=None, arch=None, tuned=False) -> Config:
    """The config that the command line names."""
    if tuned and target == "c":
        raise UserError("--tuned is for target cuda; the C has nothing to tune")
    if arch and target == "c":
        raise UserError(f"--arch {arch} is for target cuda; --cpu chooses the processor of target c")
    overrides = configs.parse_overrides(settings)
    flags = {"batch_size": batch_size, "seq_len": seq_len, "precision": precision}
    overrides |= {key: value for key, value in flags.items() if value is not None}
    return configs.load(source, target=target, overrides=overrides)


def machine(config: Config, arch: str | None, tuned: bool) -> str | Architecture | None:
    """What --arch names; with --tuned, and the kernels that `llmgen tune` found fastest. Raises UserError if it found none."""
    if not tuned:
        return arch
    from llmgen.cuda import hopper, products
    from llmgen.cuda import tuned as results

    found = results.machine(arch, config.program.precision)
    shapes = products.shapes(plans.make(config, "cuda", arch=found).graph)
    if not any(hopper.nearest(found.tuned, shape.function, shape.n, shape.c, shape.oc) for shape in shapes):
        raise UserError(
            f"--tuned: no product of {config.name} is tuned for {found.name} in {config.program.precision} with this GPU and "
            "toolkit; run llmgen tune with the same config first"
        )
    return found


def plan(config: Config, target: str, cpu: str, arch: str | Architecture | None) -> Plan:
    return plans.make(config, target, cpu, arch)


def threads(target: str = "c") -> int:
    """Threads that an OpenMP program would use here; 1 for a GPU, whose scratch memory is counted once."""
    if target == "cuda":
        return 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def folder(config: Config, out: str | os.PathLike | None) -> Path:
    """Where source and program go, made with its parents."""
    path = Path(out) if out else Path("generated") / config.name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}") from None
    return path


def build(config, target, cpu, arch, out, *, compile: bool = True) -> Built:
    """Render the source of the program that trains, and compile it where it changed. Raises UserError."""
    from llmgen import render

    made = plan(config, target, cpu, arch)
    return _build(f"train_{config.family}", render.source(made), made, folder(config, out), compile)


def build_generation(config, target, cpu, arch, out, *, compile: bool = True) -> Built:
    """The same for the program that generates."""
    from llmgen import generation, render

    made = generation.make(config, target, cpu, arch)
    return _build(f"generate_{config.family}", render.generation(made), made, folder(config, out), compile)


def cached_folder(config: Config, target: str, cpu: str, arch: str | None) -> Path:
    """Where a program that generates is kept: one for each model's shape and processor. Raises UserError."""
    from llmgen import cpu as processors
    from llmgen import data
    from llmgen.cuda import architecture

    where, precision = data.default_cache() / "generate", config.program.precision
    if target == "c":
        return where / f"{config.name}-{processors.resolve(cpu).name}"
    return where / f"{config.name}-{architecture.portable(arch, precision).name}-{precision}"


def _build(name: str, text: str, made: Plan | GenerationPlan, where: Path, compile: bool) -> Built:
    from llmgen import toolchain
    from llmgen.formats import files

    target = made.target
    source = where / (f"{name}.cu" if target == "cuda" else f"{name}.c")
    if not source.is_file() or source.read_text() != text:
        with files.replacing(source) as output:
            output.write(text.encode())
    program = where / (f"{name}cu" if target == "cuda" else name)
    if compile:
        result = toolchain.compile(source, program, target, made.profile)
        return Built(source, result.line, program, result.notice)
    return Built(source, toolchain.compile_line(name, target, made.profile), program)


def run(config, target, cpu, arch, out, flags: list[str]) -> int:
    """Build, prepare the built-in corpus if no data is named, train, end with a sample. Returns the exit status."""
    from llmgen import runner

    built = build(config, target, cpu, arch, out)
    if built.notice:
        print(built.notice)
    where = built.program.parent
    given = {flag.split("=")[0] for flag in flags}
    defaults = []
    if not given & {"--train-data", "-i", "--help", "-h", "--version"}:
        corpus = _corpus(config)
        defaults += ["--train-data", str(corpus / "train_*.bin")]
        if not given & {"--val-data", "-j"}:
            defaults += ["--val-data", str(corpus / "val_*.bin")]
        if not given & {"--tokenizer"}:
            defaults += ["--tokenizer", str(corpus / "tokenizer.bin")]
        usual = configs.TrainConfig()
        for flag in (flag for flag in program_flags(config) if flag.field in BUILTIN_TRAINING):
            said = getattr(config.train, flag.field) != getattr(usual, flag.field)
            if not said and not given & {f"--{flag.name}", f"-{flag.short}"}:
                defaults += [f"--{flag.name}", BUILTIN_TRAINING[flag.field]]
    if not given & {"--sample-every", "-s"} and not config.train.sample_every:
        defaults += ["--sample-every", str(configs.INT_MAX)]  # so only after the last step
    if not given & {"--save", "--debug-state"}:
        defaults += ["--save", str(where / "model.bin")]
    if not given & {"--log-dir", "-o"}:
        defaults += ["--log-dir", str(where)]
    sys.stdout.flush()
    return runner.run(built.program, [*defaults, *flags])


def _corpus(config: Config) -> Path:
    """The built-in corpus in the tokens of this vocabulary."""
    from llmgen import data

    vocab_size = config.model.vocab_size
    if vocab_size < BYTE_VOCABULARY:
        raise UserError(
            f"{config.name}: vocab_size = {vocab_size} is too small for the built-in corpus of bytes; "
            f"name your own with -- --train-data, or use --set vocab_size={BYTE_VOCABULARY}"
        )
    tokenizer = "gpt2" if vocab_size >= GPT2_VOCABULARY else "bytes"
    with data.terminal_progress("preparing the built-in corpus") as progress:
        return data.builtin_corpus(tokenizer=tokenizer, progress=progress)


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "24GB", "512 MiB", "1e9". Raises UserError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][0-9]+)?)\s*([kmgtKMGT]?i?)[bB]?\s*", text)
    try:
        return int(float(match[1]) * _UNITS[match[2].lower()])
    except (TypeError, ValueError, KeyError):
        raise UserError(f"--memory {text}: expected a size such as 24GB or 512MiB") from None


def keeping(plan: Plan, cpu: str, arch: str | None) -> Plan | None:
    """Where a plan computes anything again: the one that does not."""
    if plan.config.program.recompute == "none":
        return None
    return plans.make(plan.config.replace(recompute="none"), plan.target, cpu, arch)


def largest_batch(config: Config, target: str, cpu: str, arch: str | None, memory: str) -> str:
    """One line: the largest batch size whose plan fits in so much memory. If the config's own does not fit, more lines: what
    recompute would make of it. Raises UserError if not even 1 fits."""
    from llmgen import report

    limit, n, asked = parse_size(memory), threads(target), config.program.batch_size

    def plan(batch_size: int, recompute: str) -> Plan:
        changed = config.replace(batch_size=batch_size, total_batch_size=0, recompute=recompute)
        return plans.make(changed, target, cpu, arch)

    def total(batch_size: int, recompute: str) -> int:
        return plan(batch_size, recompute).memory.total(n)

    def largest(recompute: str) -> int:
        most = configs.INT_MAX // 8 // config.program.seq_len
        low, high = 1, 2
        while high <= most and total(high, recompute) <= limit:
            low, high = high, high * 2
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if total(middle, recompute) <= limit else (low, middle)
        return low

    now = config.program.recompute
    others = configs.RECOMPUTES[configs.RECOMPUTES.index(now) + 1 :]
    fitting = [how for how in others if total(1, how) <= limit]
    if total(1, now) > limit:
        hint = f"use --set recompute={fitting[0]}, or " if fitting else ""
        needed = f"{config.name}: batch_size = 1 needs {total(1, now):,} bytes, more than {limit:,}"
        raise UserError(f"{needed}; {hint}lower seq_len or the model")
    low, length = largest(now), config.program.seq_len
    where = "on the GPU" if target == "cuda" else f"{n} threads"
    lines = [f"largest batch_size: {low} (x {length} tokens): {total(low, now):,} of {limit:,} bytes, {where}"]
    for how in fitting if low < asked else ():
        made = plan(asked, how)
        verdict = "fits" if made.memory.total(n) <= limit else "does not fit"
        lines.append(
            f"with --set recompute={how}: {largest(how)}; {asked} {verdict} with {made.memory.total(n):,} bytes instead of "
            f"{total(asked, now):,}, for {report.recompute(made, plan(asked, now))}"
        )
    return "\n".join(lines)
