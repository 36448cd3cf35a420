"""The program that generates, and `llmgen generate`: what it writes, how it draws, what it refuses."""

import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from command import fails, llmgen, succeeds
from test_decode import logits_at_once, random_parameters

from llmgen import config as configs
from llmgen import generation, models, render, toolchain
from llmgen.formats import tokenizer, weights

STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
SMALL = {"num_layers": 2, "num_heads": 2, "channels": 32, "vocab_size": 257, "max_seq_len": 900}


def config_of(family: str = "gpt2", **said) -> configs.Config:
    return configs.from_tables("small", {"family": family, "model": {**SMALL, **said}, "program": {"seq_len": 16}}, "small")


def compiled(config: configs.Config, folder: Path, *flags, compiler="gcc") -> Path:
    """The program of a config. Warnings are errors."""
    plan = generation.make(config, "c", "native")
    source, program = folder / f"generate_{config.family}.c", folder / f"generate_{config.family}"
    source.write_text(render.generation(plan))
    command = [compiler, *(flags or ("-O2", *plan.profile.flags)), *STRICT, source, "-lm", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return program


def run(program: Path, *flags) -> str:
    """What it prints."""
    command = [program, *map(str, flags)]
    done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0 and done.stderr == "", done
    return done.stdout


def refused(status: int, program: Path, *flags) -> str:
    """The one line of its stderr."""
    done = subprocess.run([program, *map(str, flags)], cwd=program.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == status and done.stderr.count("\n") == 1, done
    return done.stderr.strip()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model of bytes, its float64 parameters, and the program, in one folder."""
    folder, config = tmp_path_factory.mktemp("small"), config_of()
    values = {name: array.astype(np.float32) for name, array in random_parameters(config, np.random.default_rng(1)).items()}
    weights.write(folder / "model.bin", config, models.parameter_shapes(config), values.items())
    return compiled(config, folder), config, {name: array.astype(np.float64) for name, array in values.items()}


def write_prompts(folder: Path, *prompts) -> None:
    (folder / "prompts.txt").write_text("".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts))


def without_table(folder: Path) -> str:
    """A tokenizer whose tokens print as their ids: the text of id i is "i "."""
    tokenizer.write(folder / "ids.bin", [f"{i} ".encode() for i in range(257)], 256)
    return "ids.bin"


def ids(program: Path, *flags, prompts: tuple = ()) -> list[list[int]]:
    """The ids that are generated for each prompt, without the prompts."""
    given = ["--load", "model.bin", "--tokenizer", without_table(program.parent), "--quiet", *flags]
    if prompts:
        write_prompts(program.parent, *prompts)
        given += ["--prompt-tokens", "prompts.txt"]
    return [[int(word) for word in line.split()] for line in run(program, *given).splitlines()]


def greedy(config, parameters, prompt: list[int], count: int) -> list[int]:
    """By the float64 reference, without a cache."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(logits_at_once(config, parameters, np.array(text))[-1, : config.model.vocab_size].argmax()))
    return text[len(prompt) :]


def test_the_most_probable_tokens_are_those_of_the_reference(small):
    program, config, parameters = small
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 256, n).tolist() for n in (1, 7, 33)]
    got = ids(program, "--temperature", 0, "--tokens", 20, "--stop", 0, prompts=prompts)
    assert got == [greedy(config, parameters, prompt, 20) for prompt in prompts]


def test_a_prompt_of_several_pieces_goes_on_as_the_reference_does(small):
    program, config, parameters = small
    prompt = np.random.default_rng(3).integers(0, 256, 700).tolist()
    assert dict((n, v) for n, v, _ in generation.make(config).sizes)["PIECE"] < len(prompt)
    assert ids(program, "--temperature", 0, "--tokens", 3, "--stop", 0, prompts=[prompt]) == [
        greedy(config, parameters, prompt, 3)
    ]


def test_what_is_written_does_not_depend_on_the_batch_or_the_other_prompts(small):
    program, *_ = small
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 256, n).tolist() for n in (3, 1, 20, 5, 11, 2, 17)]
    drawn = ("--tokens", 30, "--temperature", 1.3, "--top-k", 50)
    together = ids(program, *drawn, prompts=prompts)
    assert len({tuple(text) for text in together}) == len(prompts)
    for batch in (1, 3):
        assert ids(program, *drawn, "--batch", batch, prompts=prompts) == together
    assert ids(program, *drawn, prompts=prompts[:1]) == together[:1]
    assert ids(program, *drawn, "--seed", 2, prompts=prompts) != together


def drawn_once(program: Path, prompt: list[int], times: int, *flags) -> np.ndarray:
    """How often each token is drawn behind a prompt."""
    got = ids(program, "--tokens", 1, "--stop", 0, *flags, prompts=[prompt] * times)
    return np.bincount([text[0] for text in got], minlength=257)


def test_tokens_are_drawn_as_temperature_top_k_and_top_p_say(small):
    program, config, parameters = small
    prompt, times = [7, 8, 9], 4000
    logits = logits_at_once(config, parameters, np.array(prompt))[-1, :257] / 1.5
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-chances)
    top_k = np.zeros(257, bool)
    top_k[order[:20]] = True
    least = int(np.searchsorted(np.cumsum(chances[order]), 0.4)) + 1
    top_p = np.zeros(257, bool)
    top_p[order[:least]] = True
    for flags, kept in (
        ((), np.ones(257, bool)),
        (("--top-k", 20), top_k),
        (("--top-p", 0.4), top_p),
        (("--top-k", 20, "--top-p", 1.0), top_k),
    ):
        counts = drawn_once(program, prompt, times, "--temperature", 1.5, *flags)
        wanted = np.where(kept, chances, 0) / chances[kept].sum() * times
        assert counts[~kept].sum() == 0
        often = wanted >= 5  # chi-square, with all that is rare as one
        pairs = [*zip(counts[often], wanted[often], strict=True), (counts[~often].sum(), wanted[~often].sum())]
        statistic = sum((got - want) ** 2 / want for got, want in pairs if want > 1e-9)
        freedom = len(pairs) - 1
        assert statistic < freedom + 5 * math.sqrt(2 * freedom), (flags, statistic, freedom)
    assert drawn_once(program, prompt, 50, "--top-p", 1e-6)[order[0]] == 50
    assert drawn_once(program, prompt, 50, "--top-k", 1)[order[0]] == 50


def test_a_text_ends_at_the_end_of_text_unless_told_otherwise(small):
    program, config, parameters = small
    shapes = models.parameter_shapes(config)
    ending = dict(parameters)
    ending["wte"] = parameters["wte"].copy()
    ending["wte"][256] = 40 * parameters["lnfw"] * np.sign(parameters["lnfb"])  # likely wherever the last norm is near its bias
    weights.write(program.parent / "ending.bin", config, shapes, ((n, ending[n].astype(np.float32)) for n in shapes))
    free = ids(program, "--load", "ending.bin", "--tokens", 40, "--stop", 0, "--temperature", 3, prompts=[[1, 2]])[0]
    assert len(free) == 40 and 256 in free, "this seed does not end: choose another"
    stopped = ids(program, "--load", "ending.bin", "--tokens", 40, "--temperature", 3, prompts=[[1, 2]])[0]
    assert stopped == free[: free.index(256)]


def test_a_sequence_ends_where_its_context_is_full(small):
    program, config, _ = small
    room = config.model.max_seq_len - 890
    assert len(ids(program, "--stop", 0, "--tokens", 500, prompts=[[5] * 890])[0]) == room
    assert f"{config.model.max_seq_len} at most" in refused(1, program, "--load", "model.bin", "--prompt", "x" * 900)


def test_both_layouts_and_both_number_formats_of_weights_are_read(small, tmp_path):
    program, config, parameters = small
    shapes = models.parameter_shapes(config)
    rounded = {
        n: weights.bf16_to_fp32(weights.fp32_to_bf16(a.astype(np.float32))).reshape(a.shape) for n, a in parameters.items()
    }
    weights.write(program.parent / "bf16.bin", config, shapes, ((n, rounded[n]) for n in shapes), "bf16")
    weights.write(program.parent / "rounded.bin", config, shapes, ((n, rounded[n]) for n in shapes))
    flags = ("--tokens", 20, "--temperature", 0, "--prompt", "abc")
    a, b = (run(program, "--load", f, "--quiet", *flags) for f in ("bf16.bin", "rounded.bin"))
    assert a == b and len(a) > 3

    own = config_of("qwen3", num_kv_heads=1, head_size=12, mlp_channels=40)
    shapes = models.parameter_shapes(own)
    values = random_parameters(own, np.random.default_rng(5))
    other = compiled(own, tmp_path, "-O1", "-fopenmp")
    for dtype in ("fp32", "bf16"):
        weights.write(tmp_path / f"{dtype}.bin", own, shapes, ((n, values[n].astype(np.float32)) for n in shapes), dtype)
        assert run(other, "--load", f"{dtype}.bin", *flags).startswith("abc")
    line = refused(1, other, "--load", program.parent / "model.bin", *flags)
    assert "not weights" in line and line.startswith("generate_qwen3: ")


def test_prompts_come_from_flags_and_files_and_are_printed_in_their_order(small):
    program, *_ = small
    (program.parent / "lines.txt").write_text("third\n\nfourth")
    (program.parent / "ids.txt").write_text("102 105\n")
    given = ("--prompt", "first", "--prompt=second", "--prompts", "lines.txt", "--prompt-tokens", "ids.txt")
    text = run(program, "--load", "model.bin", "--tokens", 0, *given)
    wanted = "".join(f"prompt {i} of 5:\n{t}\n" for i, t in enumerate(["first", "second", "third", "fourth", "fi"], 1))
    assert text.startswith(wanted)
    figures = r"\nread 0 tokens in [\d.]+ ms, [\d.]+ tok/s \| generated 0 in [\d.]+ ms, [\d.]+ tok/s \| threads: \d+\n"
    assert re.fullmatch(figures, text[len(wanted) :])
    assert run(program, "--load", "model.bin", "--quiet", "--tokens", 0, "--prompt", "unseen") == "\n"
    alone = run(program, "--load", "model.bin", "--tokens", 12, "--prompt", "abc")
    assert alone.startswith("abc") and "prompt 1" not in alone


def test_the_program_refuses_in_one_line(small):
    program, *_ = small
    (program.parent / "bad.txt").write_text("1 2 999\n")
    (program.parent / "empty.txt").write_text("\n")
    for status, flags, words in (
        (2, (), "--load is missing"),
        (2, ("--load", "model.bin", "--what"), "unknown flag '--what'"),
        (2, ("--load", "model.bin", "--tokens", "x"), "not a whole number"),
        (1, ("--load", "model.bin", "--tokens", "-1"), "too small"),
        (1, ("--load", "model.bin", "--top-p", "1.5"), "from 0 to 1"),
        (1, ("--load", "model.bin", "--batch", "99"), "at most 16"),
        (1, ("--load", "nothing.bin"), "cannot be read"),
        (1, ("--load", "model.bin", "--prompt-tokens", "bad.txt"), "'999' is not a token id below 257"),
        (1, ("--load", "model.bin", "--prompts", "empty.txt"), "no prompt"),
        (1, ("--load", "model.bin", "--prompts", "."), "is a folder"),
        (2, ("--load", "model.bin", "--tokenizer", ""), "--tokenizer needs a value"),
        (2, ("--load", "model.bin", "--prompt", "--quiet"), "--prompt needs a value"),
    ):
        assert words in refused(status, program, *flags), flags
    assert "usage: generate_gpt2" in run(program, "--help") and "may be given several times" in run(program, "--help")
    assert run(program, "--version").startswith("generate_gpt2: small, configuration ")


def test_an_interrupt_ends_the_text_where_it_is(small):
    program, *_ = small
    command = [program, "--load", "model.bin", "--tokens", "890", "--stop", "0", "--prompts", "many.txt", "--quiet"]
    (program.parent / "many.txt").write_text("x\n" * 3000)
    child = subprocess.Popen(command, cwd=program.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.read(5)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err == b"" and out.endswith(b"\n")


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("gcc", ("-std=c11", "-O1", "-fopenmp", "-march=x86-64-v3")),
        ("gcc", ("-std=c11", "-O1", "-Wno-psabi")),
        ("clang", ("-std=c11", "-O1", "-march=x86-64-v3")),
        ("clang", ("-std=gnu11", "-O1")),
    ],
)
@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gpt2", {}),
        ("gpt2", {"vocab_size": 5000, "activation": "gelu_exact", "tie_embeddings": False}),
        ("mistral", {"num_kv_heads": 1, "attention_window": [7, 0], "head_size": 12}),
        (
            "gemma",
            {"attention_softcap": 2.0, "logit_softcap": 3.0, "norm_position": "sandwich", "head_size": 5, "position": "none"},
        ),
        ("speedrun", {"embedding_scale": 2.0, "position": "none"}),
        ("qwen3", {"rope_fraction": 0.5, "head_size": 16, "rope_scaling": "llama3"}),
    ],
)
def test_no_compiler_warns(tmp_path, compiler, flags, family, said):
    compiled(config_of(family, **said), tmp_path, *flags, compiler=compiler)


def test_the_source_depends_on_the_model_alone():
    a = config_of()
    b = configs.from_tables("small", {**a.to_dict(), "program": {"batch_size": 3, "seq_len": 5}, "train": {"seed": 3}}, "b")
    assert generation.hash_of(a) == generation.hash_of(b) and a.hash != b.hash
    assert render.generation(generation.make(a)) == render.generation(generation.make(b))
    assert generation.hash_of(a) != generation.hash_of(config_of(num_layers=3))


def test_the_source_reads_as_if_written_by_hand():
    text = render.generation(generation.make(configs.load("gpt2-124m")))
    assert not re.search(r"{{|{%|{#|%}|\t| \n|\n\n\n\n", text), "traces of a template"
    assert max(map(len, text.split("\n"))) <= 128 and text.isascii()
    assert "backward" not in text and "gradient" not in text
    assert toolchain.compile_line("generate_gpt2", "c", generation.make(configs.load("gpt2-124m")).profile) in text


def test_sanitizers_find_nothing(tmp_path):
    for family, said in (
        ("gpt2", {"vocab_size": 300}),
        ("mistral", {"num_kv_heads": 1, "attention_window": [7], "head_size": 6}),
    ):
        config = config_of(family, max_seq_len=70, **said)
        shapes, values = models.parameter_shapes(config), random_parameters(config, np.random.default_rng(5))
        weights.write(tmp_path / "model.bin", config, shapes, ((n, values[n].astype(np.float32)) for n in shapes))
        sanitize = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi")
        program = compiled(config, tmp_path, *sanitize)
        tokenizer.write(tmp_path / "table.bin", [bytes([b]) for b in range(256)] + [b"<end>"], 256)
        flags = [
            "--tokenizer",
            "table.bin",
            "--tokens",
            100,
            "--top-k",
            9,
            "--top-p",
            0.9,
            "--prompt",
            "ab",
            "--prompt",
            "c" * 60,
        ]
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        command = [program, "--load", "model.bin", *map(str, flags)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, timeout=300)
        assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()[-3000:]


# The command.


@pytest.fixture(scope="module")
def model(small):
    """The folder with model.bin, and the environment in which programs are kept there."""
    return small[0].parent, {"XDG_CACHE_HOME": str(small[0].parent / "cache"), "CFLAGS": "-O1"}


def test_generate_writes_what_the_program_does(small, model):
    folder, environment = model
    flags = ("--tokens", 15, "--temperature", 0.7, "--top-k", 30, "--top-p", 0.9, "--seed", 5)
    lines = succeeds(
        "generate", "--model", "model.bin", "--prompt", "héllo", "--prompt", "", *flags, cwd=folder, env=environment
    )
    assert lines[:2] == ["prompt 1 of 2:", lines[1]] and lines[1].startswith("héllo")
    again = succeeds(
        "generate", "--model", "model.bin", "--prompt", "héllo", "--prompt", "", *flags, cwd=folder, env=environment
    )
    assert again[:-1] == lines[:-1]
    (kept,) = (folder / "cache" / "llmgen" / "generate").iterdir()
    assert sorted(p.name for p in kept.iterdir() if not p.name.startswith(".")) == ["generate_gpt2", "generate_gpt2.c"]
    (folder / "some.txt").write_text("héllo\n")
    quiet = ("--prompts", "some.txt", "--quiet", *flags)
    result = llmgen("generate", "--model", "model.bin", *quiet, cwd=folder, env=environment)
    direct = subprocess.run(
        [kept / "generate_gpt2", "--load", "model.bin", *map(str, quiet)], cwd=folder, capture_output=True, errors="replace"
    )
    assert result.returncode == 0 and result.stdout == direct.stdout


def test_a_begin_of_text_stands_before_prompts_where_the_tokenizer_says_so(model, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from llmgen import tokenization

    succeeds("import-weights", model[0] / "model.bin", "--out", "hf", cwd=tmp_path)
    file = tmp_path / "hf" / "tokenizer.json"
    assert tokenization.load_tokenizer(str(file)).before_prompt == ()
    made = tokenizers.Tokenizer.from_file(str(file))
    begin = [("<|endoftext|>", 256)]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=begin
    )
    made.save(str(file))
    assert tokenization.load_tokenizer(str(file)).before_prompt == (256,)
    flags = ("--tokens", 9, "--temperature", 0)
    given = ("--prompt", "ab", "--tokenizer", file)
    lines = succeeds("generate", "--model", "model.bin", *given, *flags, "--quiet", cwd=model[0], env=model[1])
    (model[0] / "begun.txt").write_text("256 97 98\n")
    program = model[0] / "generate_gpt2"
    direct = run(program, "--load", "model.bin", "--prompt-tokens", "begun.txt", *flags, "--quiet")
    assert "\n".join(lines) == direct.rstrip("\n")


def test_generate_refuses_in_one_line(model, tmp_path):
    folder, environment = model
    without_table(folder)
    for status, words, flags in (
        (2, "Missing option '--model'", ("--prompt", "x")),
        (2, "--tokens", ("--model", "model.bin", "--tokens", "many")),
        (1, "nothing.bin: no such file", ("--model", "nothing.bin")),
        (1, "magic number", ("--model", "ids.bin")),
        (1, "gpt2: has 50257 tokens, but the model only 257", ("--model", "model.bin", "--tokenizer", "gpt2")),
        (1, "is neither gpt2 nor bytes", ("--model", "model.bin", "--tokenizer", "klingon")),
        (1, "none.txt: no such file", ("--model", "model.bin", "--prompts", "none.txt")),
    ):
        assert words in fails(status, "generate", *flags, cwd=folder, env=environment), flags
    result = llmgen("generate", "--model", "model.bin", "--top-p", 7, cwd=folder, env=environment)
    assert result.returncode == 1 and result.stderr == "generate_gpt2: --top-p 7 must be from 0 to 1\n"
    config = config_of(vocab_size=300)
    shapes = models.parameter_shapes(config)
    weights.write(tmp_path / "odd.bin", config, shapes, ((n, np.zeros(shape, np.float32)) for n, shape in shapes.items()))
    assert "name the tokenizer with --tokenizer" in fails(1, "generate", "--model", "odd.bin", cwd=tmp_path, env=environment)


def test_build_makes_the_program_that_generates(tmp_path):
    lines = succeeds("build", "--config", "gpt2-nano", "--generate", "--no-compile", "--out", "here", cwd=tmp_path)
    assert lines[0] == "here/generate_gpt2.c" and lines[1].endswith("generate_gpt2.c -lm -o generate_gpt2")
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["generate_gpt2.c"]
