"""The commands: parse, call one function, print. No logic.

Heavy modules are imported where they are used, so that `llmgen --help` is instant.
"""

import os
import signal
import sys

import click

import llmgen
from llmgen.errors import UserError


def options(*decorators):
    """Several click options as one decorator."""

    def decorate(function):
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


build_options = options(
    click.option("--target", type=click.Choice(["c", "cuda"]), default="c", show_default=True),
    click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Overrides a field of the config."),
    click.option("--batch-size", type=int, metavar="N", help="Sequences in a training micro-batch."),
    click.option("--seq-len", type=int, metavar="N", help="Tokens in each of them."),
    click.option("--precision", metavar="P", help="fp32, or with target cuda bf16."),
    click.option("--cpu", default="native", show_default=True, metavar="P", help="Processor profile of the C."),
    click.option("--arch", metavar="A", help="GPU architecture of the .cu."),
)

config_option = click.option(
    "--config", "source", metavar="C", help="A preset, a TOML file, a HuggingFace folder or a weights file."
)
config_options = options(
    config_option,
    build_options,
    click.option("--tuned", is_flag=True, help="With target cuda: the kernels that llmgen tune found fastest here."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(llmgen.__version__, message="llmgen %(version)s")
def cli():
    """From a model configuration to one standalone source file that trains it."""


@cli.command()
@click.option("--show", metavar="NAME", help="Prints one preset as TOML.")
def configs(show):
    """Lists the presets with their sizes."""
    from llmgen import config, models, report

    if show:
        if show not in config.presets():
            raise UserError(f"no preset '{show}'; presets: {', '.join(config.presets())}")
        click.echo(config.load(show).to_toml(), nl=False)
    else:
        listed = [config.load(name) for name in config.presets()]
        click.echo(report.configs([(c, models.count(c)) for c in listed]))


@cli.command()
@config_options
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.option("--memory", metavar="SIZE", help="Answers with the largest batch size that fits, as in 24GB.")
def plan(as_json, memory, **choices):
    """Shows tensors, memory and flops before anything is compiled."""
    import json

    from llmgen import program, report

    config = program.config(**choices)
    arch = program.machine(config, choices["arch"], choices["tuned"])
    if memory:
        click.echo(program.largest_batch(config, choices["target"], choices["cpu"], arch, memory))
        return
    made = program.plan(config, choices["target"], choices["cpu"], arch)
    threads = program.threads(choices["target"])
    if as_json:
        click.echo(json.dumps(made.to_json(threads), indent=1))
    else:
        click.echo(report.plan(made, threads, program.keeping(made, choices["cpu"], arch)))


@cli.command()
@click.argument("config_a")
@click.argument("config_b")
@build_options
def diff(config_a, config_b, **choices):
    """What changes from CONFIG_A to CONFIG_B: fields, sizes, parameters, and the generated source.

    --set and the other options change CONFIG_B alone: `llmgen diff gpt2-nano gpt2-nano --set position=rope`.
    """
    from llmgen import config, program
    from llmgen import diff as difference

    where = (choices["target"], choices["cpu"], choices["arch"])
    a = program.plan(config.load(config_a, target=choices["target"]), *where)
    b = program.plan(program.config(config_b, **choices), *where)
    click.echo(difference.diff(a, b, program.threads(choices["target"])))


@cli.command()
@config_options
@click.option("--out", metavar="DIR", help="The folder for source and program.")
@click.option("--no-compile", is_flag=True, help="Leaves only the source.")
@click.option("--generate", is_flag=True, help="The program that generates text, instead of the one that trains.")
def build(out, no_compile, generate, **choices):
    """Renders and compiles the program of a config."""
    from llmgen import program

    config = program.config(**choices)
    make = program.build_generation if generate else program.build
    arch = program.machine(config, choices["arch"], choices["tuned"])
    built = make(config, choices["target"], choices["cpu"], arch, out, compile=not no_compile)
    click.echo(built.source)
    click.echo(built.compile_line)
    if not no_compile:
        click.echo(built.program)
    if built.notice:
        click.echo(built.notice)


@cli.command(context_settings={"ignore_unknown_options": False})
@config_options
@click.option("--out", metavar="DIR", help="The folder for source, program, model.bin and metrics.jsonl.")
@click.argument("flags", nargs=-1, metavar="[-- PROGRAM FLAGS]")
def run(out, flags, **choices):
    """Builds if needed, then trains: on the built-in corpus if no data is named. Ends with a sample."""
    from llmgen import program

    config = program.config(**choices)
    arch = program.machine(config, choices["arch"], choices["tuned"])
    sys.exit(program.run(config, choices["target"], choices["cpu"], arch, out, list(flags)))


@cli.command()
@click.option("--model", required=True, metavar="FILE", help="The weights.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to go on from; may be given several times.")
@click.option("--prompts", "prompts_file", metavar="FILE", help="A file with a prompt on each line.")
@click.option(
    "--tokenizer",
    metavar="T",
    help="gpt2, bytes, a folder with a tokenizer.json, the file, or a table that export-tokens wrote. Where the vocabulary's "
    "size says it, gpt2 or bytes is taken.",
)
@click.option("--tokens", type=int, metavar="N", help="Most tokens that a prompt goes on for; 128 unless said.")
@click.option(
    "--temperature", type=float, metavar="X", help="Divides the logits; 0 takes the most probable token; 1 unless said."
)
@click.option("--top-k", type=int, metavar="N", help="Draws from the N most probable tokens.")
@click.option("--top-p", type=float, metavar="X", help="Draws from the most probable tokens that have this probability in all.")
@click.option("--seed", type=int, metavar="N", help="Of what is drawn.")
@click.option("--batch", type=int, metavar="N", help="Prompts that are worked on side by side; 16 unless said.")
@click.option("--quiet", is_flag=True, help="Prints what is generated, without prompts and figures.")
@click.option("--target", type=click.Choice(["c", "cuda"]), default="c", show_default=True)
@click.option("--precision", metavar="P", help="With target cuda bf16, unless fp32 is said.")
@click.option("--cpu", default="native", show_default=True, metavar="P", help="Processor profile of the C.")
@click.option("--arch", metavar="A", help="GPU architecture of the .cu.")
@click.option("--out", metavar="DIR", help="The folder for source and program, instead of the cache.")
def generate(model, prompts, prompts_file, tokenizer, target, precision, cpu, arch, out, quiet, **values):
    """Goes on from prompts with a model: builds the program for it if needed, and runs it."""
    from llmgen.generate import Machine, generate

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    machine = Machine(target, precision, cpu, arch)
    sys.exit(generate(model, prompts, prompts_file, tokenizer, machine, out, [*flags, *["--quiet"] * quiet]))


@cli.command("export-tokens")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--tokenizer",
    default="gpt2",
    show_default=True,
    metavar="T",
    help="gpt2, bytes, a folder with a tokenizer.json, or the file.",
)
@click.option("--out", required=True, metavar="DIR", help="The folder for train_*.bin, val_*.bin and tokenizer.bin.")
@click.option("--val-fraction", type=float, default=0.05, show_default=True, metavar="X", help="Held out for validation.")
@click.option("--shard-size", type=int, default=100_000_000, show_default=True, metavar="N", help="Tokens in a file.")
@click.option("--errors", default="strict", show_default=True, metavar="HOW", help="What is not UTF-8: strict or replace.")
@click.option("--text-field", default="text", show_default=True, metavar="F", help="Of JSON lines and Parquet.")
def export_tokens(sources, tokenizer, out, val_fraction, shard_size, errors, text_field):
    """Encodes text files and folders as token shards; of .jsonl and .parquet files each row is a document."""
    from llmgen import data

    with data.terminal_progress("export-tokens") as progress:
        made = data.export_tokens(sources, tokenizer, out, val_fraction, shard_size, errors, progress, text_field)
    click.echo(made.summary())


@cli.command("export-eval")
@click.argument("source", metavar="SOURCE.jsonl")
@click.option(
    "--tokenizer",
    default="gpt2",
    show_default=True,
    metavar="T",
    help="gpt2, bytes, a folder with a tokenizer.json, or the file.",
)
@click.option("--out", required=True, metavar="FILE", help="The file for the trainer's --eval-data.")
@click.option("--examples", type=click.IntRange(1), metavar="N", help="Only the first N.")
def export_eval(source, tokenizer, out, examples):
    """Encodes multiple-choice questions, lines of JSON as HellaSwag has them."""
    from llmgen import evaluation

    click.echo(evaluation.export_eval(source, tokenizer, out, examples))


@cli.command("export-weights")
@click.argument("source")
@click.option("--out", required=True, metavar="FILE", help="The weights file.")
@click.option("--dtype", default="fp32", show_default=True, metavar="D", help="fp32 or bf16.")
@click.option("--config", "config_source", metavar="C", help="Instead of the config.json beside the weights.")
def export_weights(source, out, dtype, config_source):
    """Converts a HuggingFace hub id, folder or .safetensors file to a weights file."""
    from llmgen import config, huggingface

    given = config.load(config_source) if config_source else None
    huggingface.export_weights(source, out, dtype, given, note=click.echo)


@cli.command("import-weights")
@click.argument("file")
@click.option("--out", required=True, metavar="DIR", help="The folder, for transformers' from_pretrained.")
@click.option("--state", metavar="STATE", help="A debug state, whose gradients become gradients.safetensors.")
@click.option(
    "--tokenizer",
    metavar="T",
    help="gpt2, bytes, a folder with a tokenizer.json, or the file: its files are put there too. Where the vocabulary's size "
    "says it, gpt2 or bytes is taken.",
)
def import_weights(file, out, state, tokenizer):
    """Converts a weights file to a folder that transformers loads."""
    from llmgen import huggingface

    for path in huggingface.import_weights(file, out, state, tokenizer):
        click.echo(path)


@cli.command()
@config_options
def verify(**choices):
    """Compares the program with the float64 reference, tensor by tensor."""
    from llmgen import program
    from llmgen.verify import verify

    config = program.config(**choices)
    arch = program.machine(config, choices["arch"], choices["tuned"])

    def build(config, folder):
        return program.build(config, choices["target"], choices["cpu"], arch, folder).program

    sys.exit(0 if verify(config, build, click.echo) else 1)


@cli.command()
@config_options
@click.option("--against", type=click.Choice(["torch"]), help="The same work in PyTorch, in turns with ours.")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Steps in each run.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Runs of each, in turns.")
@click.option("--compile", "modes", default="default", show_default=True, metavar="MODES", help="Of torch.compile, on a GPU.")
@click.option("--energy", is_flag=True, help="On a GPU: each op's power, clock and energy instead.")
def bench(against, steps, rounds, modes, energy, **choices):
    """Times each op and the whole training step, alone or beside PyTorch."""
    from llmgen import bench, bench_gpu, program
    from llmgen import energy as energies

    config = program.config(**choices)
    if choices["target"] != "cuda":
        if energy:
            raise UserError("--energy is of a GPU; add --target cuda, or leave it out")
        return bench.bench(config, choices["cpu"], against, steps, rounds, click.echo)
    arch = program.machine(config, choices["arch"], choices["tuned"])
    if energy:
        return energies.bench(config, arch, click.echo)
    bench_gpu.bench(config, arch, against, [m for m in modes.split(",") if m], steps, rounds, click.echo)


@cli.command()
@config_option
@click.option("--arch", metavar="A", help="GPU architecture of the .cu. [default: that of the GPU that is present]")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Overrides a field of the config.")
@click.option("--batch-size", type=int, metavar="N", help="Sequences in a training micro-batch.")
@click.option("--seq-len", type=int, metavar="N", help="Tokens in each of them.")
@click.option("--precision", metavar="P", help="bf16 or fp32.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Measurements of the best.")
@click.option("--export", metavar="FILE", help="Writes all that is kept for this GPU as a table like those that ship.")
@click.option("--out", metavar="DIR", help="The folder for the programs that try the kernels, instead of the cache.")
@click.option("--compile-only", is_flag=True, help="Only writes and compiles them; this needs no GPU.")
def tune(rounds, export, out, compile_only, arch, **choices):
    """Finds the fastest kernel of each matrix product of a config on the GPU that is present, for --tuned.

    Every candidate's results are verified before it is timed.
    """
    from llmgen import program
    from llmgen.tune import tune

    config = program.config(target="cuda", arch=arch, **choices)
    tune(config, arch, rounds, out, export, compile_only, click.echo)


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", metavar="FILE", help="The figure: .png, .svg or .pdf.")
@click.option("--x", "axis", type=click.Choice(["step", "tokens", "hours"]), default="step", show_default=True)
@click.option("--smooth", type=float, metavar="N", help="Steps to smooth over; 1 is not at all. [default: a 50th of the run]")
@click.option("--tensorboard", metavar="DIR", help="Writes event files below this folder, for tensorboard --logdir.")
def plot(runs, out, axis, smooth, tensorboard):
    """Compares runs, named by their log folders: loss curves in one figure."""
    if not out and not tensorboard:
        raise click.UsageError("Missing option '--out' (or '--tensorboard').")
    if out:
        from llmgen import plot

        click.echo(plot.plot(runs, out, axis, smooth))
    if tensorboard:
        from llmgen import metrics

        for run in map(metrics.read, runs):
            click.echo(metrics.write_events(run, os.path.join(tensorboard, run.name)))


@cli.command()
def doctor():
    """Checks compilers, OpenMP, CUDA, driver, GPU, vocabulary and disk, and says how to mend each."""
    from llmgen.doctor import doctor

    sys.exit(0 if doctor(click.echo) else 1)


def main():
    """The entry point: exit statuses and one-line errors, as for every failure."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # writers remove what is half done on the way out
    try:
        cli.main(standalone_mode=False)
    except UserError as error:
        fail(1, str(error))
    except click.UsageError as error:
        fail(2, _usage(error))
    except click.ClickException as error:
        fail(1, error.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        _close_stdout()
        sys.exit(1)
    except OSError as error:
        _close_stdout()
        fail(1, f"{error.filename or 'stdout'}: {error.strerror or error}")


def _usage(error: click.UsageError) -> str:
    """What is wrong with the command line, and what would be right, in one line."""
    command = error.ctx.command_path if error.ctx and error.ctx.parent else ""
    if not sys.argv[1:]:
        return "name a command (--help lists them)"
    hint = "--help lists what there is"
    if isinstance(error, click.NoSuchOption) and command.endswith(" run"):
        hint += "; flags of the program go behind --"
    return f"{command}: " * bool(command) + f"{error.format_message()} ({hint})".replace("\n", " ")


def _close_stdout() -> None:
    """What it holds cannot be written: without this the interpreter would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(status, message):
    click.echo(f"llmgen: {message}", err=True)
    sys.exit(status)
