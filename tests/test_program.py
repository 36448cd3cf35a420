"""What a generated program does with its flags, its files, signals and full disks. One tiny model, compiled once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmgen import config as configs
from llmgen import flags, plan, render
from llmgen.formats import debug_state, files, tokenizer, tokens, weights

CONFIG = configs.load(
    "gpt2-nano",
    overrides={"num_layers": 2, "num_heads": 2, "channels": 32, "max_seq_len": 32, "batch_size": 4, "seq_len": 16},
)
B, T, V, MAXT = 4, 16, 257, 32
BT = B * T
PLAN = plan.make(CONFIG, "c", "x86-64-v2")
SHAPES = {p.name: tuple(d.size for d in p.tensor.stacked) for p in PLAN.parameters}
NUMBER = r"[0-9.e+-]+"
STEP = re.compile(rf"step (\d+)/(\d+) \| loss {NUMBER} \| norm {NUMBER} \| lr {NUMBER} \| {NUMBER} ms \| \d+ tok/s")


def compile_program(folder: Path, compiler: str, *options: str, more: str = "") -> Path:
    source, program = folder / "train_gpt2.c", folder / "train_gpt2"
    source.write_text(render.source(PLAN) + more)
    command = [compiler, *options, *PLAN.profile.flags, source, "-lm", "-o", program]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return program


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    return compile_program(tmp_path_factory.mktemp("program"), "gcc", "-std=gnu11", "-O1", "-fopenmp")


@pytest.fixture(scope="session")
def text() -> np.ndarray:
    """1,000 tokens that a model can learn: the first bytes of this file."""
    return np.frombuffer(Path(__file__).read_bytes()[:1000], np.uint8).astype(np.uint16)


@pytest.fixture
def data(tmp_path, text) -> Path:
    """One shard in a folder of its own."""
    (tmp_path / "data").mkdir()
    tokens.write(tmp_path / "data" / "train_000000.bin", text, V)
    return tmp_path / "data" / "train_000000.bin"


@pytest.fixture
def run(program, tmp_path):
    """Runs the program in a folder of its own and returns the finished process."""
    (tmp_path / "work").mkdir()

    def run(*flags, threads=2, prefix=(), **more):
        command = [*prefix, program, *flags]
        return subprocess.run(
            [str(word) for word in command],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path / "work"} | more,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            timeout=60,
        )

    return run


def succeeds(result) -> list[str]:
    """The lines of stdout."""
    assert result.returncode == 0 and result.stderr == b"", result
    return result.stdout.decode(errors="replace").split("\n")


def fails(result, status: int, *words: str) -> None:
    """One line on stderr with these words, this exit status, and no temporary left anywhere near."""
    message = result.stderr.decode()
    assert result.returncode == status, result
    assert message.startswith("train_gpt2: ") and message.count("\n") == 1 and message.endswith("\n"), message
    for word in words:
        assert str(word) in message, message


def losses(lines: list[str]) -> list[str]:
    return [line.split(" | ")[1] for line in lines if STEP.fullmatch(line)]


def state(path: Path) -> debug_state.DebugState:
    return debug_state.read(path, V, SHAPES)


# flags


def test_help_prints_every_flag_with_its_default(run):
    lines = succeeds(run("--help"))
    for flag in flags.program_flags(CONFIG):
        (line,) = [line for line in lines if f"--{flag.name} {flag.metavar}" in line]
        default = {None: "none"}.get(flag.default, f"{flag.default:g}" if flag.kind != "text" else flag.default)
        assert line.endswith(f"(default {default})")
        assert not flag.short or line.split()[0] == f"-{flag.short}"
    assert succeeds(run("-h")) == lines


def test_version_names_the_configuration(run):
    assert CONFIG.hash in succeeds(run("--version"))[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["--resume", "1"],
        ["-k", "cosine"],
        ["-bx", "4"],
        ["file.bin"],
        ["--steps"],
        ["--load", "--steps", "0"],
        ["--save="],
        ["--steps", "many"],
        ["--steps", "1.5"],
        ["--lr", "fast"],
        ["--lr", ""],
        ["--seed", "0x"],
        ["-b", "four"],
        [],
        ["--steps", "3"],
        ["--debug-state", "state.bin", "--steps", "0"],
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_line_and_status_2(run, arguments):
    fails(run(*arguments), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "-2"],
        ["--steps", "99999999999999999999"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--lr", "1e999"],
        ["--beta1", "1"],
        ["--epsilon", "0"],
        ["--weight-decay", "-0.1"],
        ["--save-dtype", "fp64"],
        ["--total-batch-size", "100"],
        ["--total-batch-size", "0"],
        ["--total-batch-size", "2147483647"],
        ["--val-every", "-1"],
        ["-b", "5"],
        ["-t", "32"],
        ["-z", "1"],
        ["-r", "2"],
    ],
    ids=" ".join,
)
def test_an_impossible_value_is_one_line_and_status_1(run, data, arguments):
    fails(run("--train-data", data, *arguments), 1, arguments[0])


def test_flags_take_equals_short_names_and_the_last_one_counts(run, data):
    lines = succeeds(run(f"--train-data={data}", "--steps=9", "-x", 5, "--steps", 2, "-b", B, "-t", T, "-l", "1e-4"))
    steps = [line for line in lines if STEP.fullmatch(line)]
    assert len(steps) == 2 and steps[0].startswith("step 1/2 ") and "| lr 1.00e-04 |" in steps[0]


# training


def test_training_lowers_the_loss_and_logs_what_it_prints(run, data, tmp_path):
    logs = tmp_path / "deep" / "logs"
    lines = succeeds(
        run(
            "--train-data",
            data,
            "--val-data",
            data,
            "--steps",
            40,
            "--val-every",
            15,
            "--val-steps",
            3,
            "--log-dir",
            logs,
        )
    )
    assert lines[0] == "threads: 2"
    assert f"memory: {PLAN.memory.total(2)} bytes" in lines
    rows = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 41))
    keys = {"step", "loss", "grad_norm", "lr", "ms", "tokens_per_second", "flops_per_second", "memory"}
    assert all(set(row) == keys and row["memory"] == PLAN.memory.total(2) for row in steps)
    flops = [row["flops_per_second"] / row["tokens_per_second"] for row in steps]
    assert flops == pytest.approx([PLAN.flops_per_token] * 40, rel=1e-6)
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 15, 30, 40]
    assert losses(lines) == [f"loss {row['loss']:.6f}" for row in steps]
    assert [line for line in lines if "val loss" in line] == [
        f"val loss {row['val_loss']:.6f}" for row in rows if "val_loss" in row
    ]
    assert steps[0]["loss"] == pytest.approx(np.log(V), abs=0.1) and steps[-1]["loss"] < 4.7


def test_the_same_command_gives_the_same_bits(run, data):
    saved = []
    for name in ("a.bin", "b.bin"):
        saved.append(succeeds(run("--train-data", data, "--steps", 5, "--save", name)))
    work = data.parent.parent / "work"
    assert losses(saved[0]) == losses(saved[1])
    assert (work / "a.bin").read_bytes() == (work / "b.bin").read_bytes()


def test_initial_weights_do_not_depend_on_the_number_of_threads(run, tmp_path):
    for threads in (1, 2):
        succeeds(run("--steps", 0, "--sample-length", 0, "--save", f"{threads}.bin", threads=threads))
    succeeds(run("--steps", 0, "--sample-length", 0, "--save", "other.bin", "--seed", 1))
    one, two, other = ((tmp_path / "work" / name).read_bytes() for name in ("1.bin", "2.bin", "other.bin"))
    assert one == two != other


def test_initial_weights_are_those_of_gpt2(run, tmp_path):
    succeeds(run("--steps", 0, "--save", "init.bin"))
    tensors = weights.read(tmp_path / "work" / "init.bin", SHAPES)
    for name, std in {"wte": 0.02, "wpe": 0.02, "qkvw": 0.02, "fcw": 0.02, "attprojw": 0.01, "fcprojw": 0.01}.items():
        values = tensors[name][:V] if name == "wte" else tensors[name]
        assert values.std() == pytest.approx(std, rel=0.05) and abs(values.mean()) < 0.1 * std
    assert (tensors["wte"][V:] == 0).all()
    assert (tensors["ln1w"] == 1).all() and (tensors["qkvb"] == 0).all()


def test_one_epoch_is_all_samples_once(run, data):
    lines = succeeds(run("--train-data", data))
    assert f"train-data: 1 file, 1000 tokens, 15 samples of {B} x {T}; 40 tokens at the ends of files are left out" in lines
    assert len(losses(lines)) == 999 // BT
    assert len(losses(succeeds(run("--train-data", data, "-d", 2 * BT)))) == 999 // BT // 2


def test_steps_0_loads_validates_samples_and_saves(run, data, tmp_path):
    succeeds(run("--steps", 0, "--save", "first.bin"))
    lines = succeeds(run("--steps", 0, "--load", "first.bin", "--val-data", data, "--save", "second.bin"))
    assert any(line.startswith("val loss ") for line in lines) and "sample at step 0:" in lines
    assert not losses(lines)
    work = tmp_path / "work"
    assert (work / "first.bin").read_bytes() == (work / "second.bin").read_bytes()


def test_zero_is_never(run, data):
    lines = succeeds(run("--train-data", data, "--val-data", data, "--val-every", 0, "--sample-every", 0, "--steps", 2))
    assert not any("val loss" in line or "sample" in line for line in lines[4:])


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_samples_come_in_the_order_of_the_paths_bytes(run, tmp_path, text, dtype):
    """With a learning rate of 0 a step's loss tells which sample it saw: each is compared with the sample by itself."""
    shards = {"b.bin": text[:300], "a10.bin": text[300:500], "a2.bin": text[500:565], "Z.bin": text[565:620]}
    for name, ids in shards.items():
        (tmp_path / name).write_bytes(tokens.header(len(ids), np.dtype(dtype)) + ids.astype(dtype).tobytes())
    want = []
    for name in sorted(shards):
        for k in range((len(shards[name]) - 1) // BT):
            sample = shards[name][k * BT : k * BT + BT + 1]
            tokens.write(tmp_path / "work" / "one.bin", sample, V)
            succeeds(run("--train-data", "one.bin", "--debug-state", "state.bin"))
            got = state(tmp_path / "work" / "state.bin")
            assert (got.inputs.ravel() == sample[:-1]).all() and (got.targets.ravel() == sample[1:]).all()
            want.append(got.loss)
    lines = succeeds(run("--train-data", tmp_path / "*.bin", "--lr", 0, "--steps", len(want) + 2))
    assert len(want) == 3 + 1 + 4
    seen = [float(loss.split()[1]) for loss in losses(lines)]
    assert seen == pytest.approx(want + want[:2], abs=1e-6), "the first samples come again after the last"


def test_a_step_of_several_micro_batches_is_their_mean(run, data, tmp_path, text):
    states = []
    for k in range(3):
        tokens.write(tmp_path / "work" / "one.bin", text[k * BT : k * BT + BT + 1], V)
        succeeds(run("--train-data", "one.bin", "--debug-state", f"{k}.bin"))
        states.append(state(tmp_path / "work" / f"{k}.bin"))
    succeeds(run("--train-data", data, "--total-batch-size", 3 * BT, "--debug-state", "all.bin"))
    step = state(tmp_path / "work" / "all.bin")
    assert (step.inputs == states[0].inputs).all() and (step.logits == states[0].logits).all()
    assert step.loss == pytest.approx(np.mean([s.loss for s in states]), abs=1e-6)
    for name in SHAPES:
        want = np.mean([s.gradients[name] for s in states], axis=0, dtype=np.float64)
        assert np.linalg.norm(step.gradients[name] - want) <= 1e-5 * np.linalg.norm(want)


def test_debug_state_trains_and_saves_nothing_else(run, data, tmp_path):
    lines = succeeds(run("--train-data", data, "--debug-state", "state.bin", "--save", "model.bin"))
    assert not losses(lines)
    assert sorted(os.listdir(tmp_path / "work")) == ["state.bin"]
    got = state(tmp_path / "work" / "state.bin")
    shifted = got.logits - got.logits.max(-1, keepdims=True)
    picked = np.take_along_axis(shifted, got.targets[..., None].astype(int), -1)[..., 0]
    assert got.loss == pytest.approx((np.log(np.exp(shifted).sum(-1)) - picked).mean(), abs=1e-5)
    assert (got.gradients["wte"][V:] == 0).all()


# samples


def sample_of(lines: list[str]) -> str:
    start = max(i for i, line in enumerate(lines) if line.startswith("sample at step"))
    end = next((i for i, line in enumerate(lines) if i > start and line.startswith("saved ")), len(lines))
    return "\n".join(lines[start + 1 : end])


def test_sampling_does_not_disturb_training(run, data):
    plain = succeeds(run("--train-data", data, "--steps", 4))
    lines = succeeds(run("--train-data", data, "--steps", 4, "--sample-every", 2, "--sample-length", 3 * MAXT))
    assert losses(plain) == losses(lines)
    assert [line for line in lines if line.startswith("sample")] == ["sample at step 2:", "sample at step 4:"]


def test_a_sample_depends_on_the_seed_alone(run, data):
    succeeds(run("--train-data", data, "--steps", 30, "--save", "model.bin"))
    first, again, other = (sample_of(succeeds(run("--steps", 0, "--load", "model.bin", "--seed", seed))) for seed in (1, 1, 2))
    assert first == again != other


def test_a_tokenizer_table_gives_the_text_of_samples(run, data, tmp_path):
    tokenizer.write(tmp_path / "table.bin", [b"<%d>" % i for i in range(V)], V - 1)
    lines = succeeds(run("--steps", 0, "--tokenizer", tmp_path / "table.bin", "--sample-length", 7))
    assert re.fullmatch(r"(<\d+>){7}", sample_of(lines).strip())


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        ([1, 2, V, V - 1], b"\1a" * V, "magic"),
        ([files.MAGIC["tokenizer"], 3, V, V - 1], b"\1a" * V, "version 3"),
        ([files.MAGIC["tokenizer"], 2, V + 1, V - 1], b"\1a" * (V + 1), "another model"),
        ([files.MAGIC["tokenizer"], 2, V, V], b"\1a" * V, "end-of-text"),
        ([files.MAGIC["tokenizer"], 2, V, V - 1], b"\1a" * (V - 1), "too early"),
        ([files.MAGIC["tokenizer"], 2, V, V - 1], b"\1a" * (V + 1), "longer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_tokenizer_is_refused(run, tmp_path, header, body, words):
    (tmp_path / "table.bin").write_bytes(files.header(*header) + body)
    fails(run("--steps", 0, "--tokenizer", tmp_path / "table.bin"), 1, "table.bin", words)


def test_greedy_samples_go_on_from_a_prompt(run, data, tmp_path):
    """Token by token, as the logits of a debug state say, which see the prompt and what was sampled."""
    succeeds(run("--train-data", data, "--steps", 20, "--save", "model.bin"))
    (tmp_path / "work" / "prompt.txt").write_text("72 101\n\t108\n")
    tokenizer.write(tmp_path / "table.bin", [b"%d " % i for i in range(V)], V - 1)
    load = ["--load", "model.bin", "--tokenizer", tmp_path / "table.bin"]
    greedy = [*load, "--steps", 0, "--prompt-tokens", "prompt.txt", "--temperature", 0, "--sample-length", 8]
    lines = succeeds(run(*greedy, "--seed", 1))
    assert sample_of(lines) == sample_of(succeeds(run(*greedy, "--seed", 2)))
    ids = [72, 101, 108, *map(int, sample_of(lines).split())]
    tokens.write(tmp_path / "work" / "one.bin", np.array(ids + [0] * (BT + 1 - len(ids))), V)
    succeeds(run("--load", "model.bin", "--train-data", "one.bin", "--debug-state", "state.bin"))
    logits = state(tmp_path / "work" / "state.bin").logits[0]
    assert ids[3:] == logits[2:10].argmax(-1).tolist()


def test_temperature_1_is_the_default_and_a_low_one_is_nearly_greedy(run):
    plain, one, low, zero = (
        sample_of(succeeds(run("--steps", 0, "--sample-length", 20, *more)))
        for more in ([], ["--temperature", 1], ["--temperature", 1e-4], ["--temperature", 0])
    )
    assert plain == one != low == zero


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("72 x", ["'x' is not a token id below 257"]),
        ("72 257", ["'257' is not a token id"]),
        ("-1", ["'-1'"]),
        ("1.5", ["'1.5'"]),
        ("99999999999999999999", ["is not a token id"]),
        (" \n", ["no token ids"]),
        ("7 " * (MAXT + 1), ["more than", "shorter"]),
        (None, ["No such file"]),
    ],
    ids=lambda value: repr(value)[:12] if isinstance(value, str) else "",
)
def test_a_wrong_prompt_is_refused(run, tmp_path, text, words):
    if text is not None:
        (tmp_path / "work" / "prompt.txt").write_text(text)
    fails(run("--steps", 0, "--prompt-tokens", "prompt.txt"), 1, "prompt.txt", *words)


# files that are wrong


@pytest.fixture
def model(run, tmp_path) -> Path:
    succeeds(run("--steps", 0, "--sample-length", 0, "--save", tmp_path / "model.bin"))
    return tmp_path / "model.bin"


def edited(path: Path, index: int, value: int) -> Path:
    ints = np.fromfile(path, np.int32, 256)
    ints[index] = value
    path.write_bytes(ints.tobytes() + path.read_bytes()[1024:])
    return path


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (0, 7, ["magic number is 7"]),
        (1, 1, ["version 1"]),
        (2, 64, ["max_seq_len is 64", f"built for {MAXT}", "llmgen build"]),
        (4, 12, ["num_layers is 12", "built for 2"]),
        (7, 512, ["padded_vocab_size is 512", "built for 384"]),
    ],
    ids=["magic", "version", "max_seq_len", "num_layers", "padded_vocab_size"],
)
def test_weights_that_do_not_fit_are_refused_by_name(run, model, index, value, words):
    fails(run("--steps", 0, "--load", edited(model, index, value)), 1, model, *words)


def test_weights_of_the_wrong_length_are_refused(run, model):
    whole = model.read_bytes()
    for size in (0, 1000, 1024, len(whole) - 1):
        model.write_bytes(whole[:size])
        fails(run("--steps", 0, "--load", model), 1, model)
    model.write_bytes(whole + b"\0")
    fails(run("--steps", 0, "--load", model), 1, model, len(whole) + 1, len(whole))
    fails(run("--steps", 0, "--load", "nowhere.bin"), 1, "nowhere.bin", "No such file")
    fails(run("--steps", 0, "--load", model.parent), 1, "folder")


def test_tokens_that_are_wrong_are_refused(run, data, tmp_path):
    whole = data.read_bytes()
    train = ("--steps", 1, "--train-data", data)
    for size in (0, 1023, len(whole) - 1):
        data.write_bytes(whole[:size])
        fails(run(*train), 1, data)
    data.write_bytes(whole)
    fails(run("--steps", 1, "--train-data", edited(data, 0, 3)), 1, data, "magic number is 3")
    data.write_bytes(whole)
    fails(run("--steps", 1, "--train-data", edited(data, 1, 9)), 1, data, "version 9")
    data.write_bytes(whole)
    fails(run("--steps", 1, "--train-data", edited(data, 2, -5)), 1, data, "-5")
    fails(run("--steps", 1, "--train-data", tmp_path / "none_*.bin"), 1, "none_*.bin", "no such file")
    tokens.write(data, np.zeros(BT, int), V)
    fails(run(*train), 1, data, BT, BT + 1)
    fails(run("--train-data", "x", "--val-data", "y"), 1, "'x'")


def test_a_token_outside_the_vocabulary_is_named_with_its_place(run, data):
    ids = np.zeros(1000, np.uint16)
    ids[3 * BT + 5] = V
    data.write_bytes(tokens.header(len(ids), ids.dtype) + ids.tobytes())
    result = run("--train-data", data, "--save", "model.bin")
    fails(result, 1, data, f"token {V} at position {3 * BT + 5}")
    assert len(losses(result.stdout.decode().split("\n"))) == 3
    assert os.listdir(data.parent.parent / "work") == []


def test_a_batch_longer_than_the_data_is_refused(run, data):
    fails(run("--train-data", data, "--total-batch-size", 16 * BT), 1, "--total-batch-size")
    assert len(losses(succeeds(run("--train-data", data, "--total-batch-size", 16 * BT, "--steps", 1)))) == 1


# weights


def test_bf16_weights_are_converted_with_a_line(run, model, tmp_path):
    succeeds(run("--steps", 0, "--sample-length", 0, "--save", "half.bin", "--save-dtype", "bf16"))
    half = tmp_path / "work" / "half.bin"
    assert half.stat().st_size == weights.file_bytes(SHAPES, "bf16")
    lines = succeeds(run("--steps", 0, "--sample-length", 0, "--load", "half.bin", "--save", "back.bin"))
    assert "half.bin: bf16, converted to fp32" in lines
    full, back = weights.read(model, SHAPES), weights.read(tmp_path / "work" / "back.bin", SHAPES)
    for name in SHAPES:
        assert (weights.bf16_to_fp32(weights.fp32_to_bf16(full[name])) == back[name]).all()


# nothing half written


@pytest.mark.parametrize(
    ("target", "words"),
    [("missing/model.bin", "folder"), ("file/model.bin", "folder"), ("folder", "folder"), ("folder/", "folder")],
)
@pytest.mark.parametrize("flag", ["--save", "--debug-state"])
def test_an_impossible_target_is_noticed_before_the_first_step(run, data, tmp_path, flag, target, words):
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder").mkdir()
    result = run("--train-data", data, flag, f"{tmp_path}/{target}")
    fails(result, 1, f"{tmp_path}/{target}", words)
    assert b"step" not in result.stdout and os.listdir(tmp_path / "folder") == []


def test_a_file_in_the_way_of_the_log_folder_is_named(run, data, tmp_path):
    (tmp_path / "file").write_text("here")
    fails(run("--train-data", data, "--log-dir", tmp_path / "file" / "logs"), 1, tmp_path / "file")
    fails(run("--train-data", data, "--log-dir", tmp_path / "file"), 1, "not a folder")


def test_proving_a_target_leaves_what_was_there(run, data, tmp_path):
    (tmp_path / "work" / "model.bin").write_text("before")
    ids = np.full(1000, V, np.uint16)
    data.write_bytes(tokens.header(len(ids), ids.dtype) + ids.tobytes())
    fails(run("--train-data", data, "--save", "model.bin"), 1)
    assert (tmp_path / "work" / "model.bin").read_text() == "before"
    assert os.listdir(tmp_path / "work") == ["model.bin"]


@pytest.mark.parametrize(
    "flags", [["--save", "out"], ["--debug-state", "out"], ["--log-dir", "logs"]], ids=lambda flags: flags[0]
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(run, data, tmp_path, flags):
    (tmp_path / "work" / "out").write_text("before")
    result = run("--train-data", data, "--steps", 30, *flags, prefix=["bash", "-c", 'ulimit -f 1; exec "$@"', "-"])
    fails(result, 1, "File too large", "metrics.jsonl" if flags[1] == "logs" else "out")
    assert (tmp_path / "work" / "out").read_text() == "before"
    assert not [name for name in os.listdir(tmp_path / "work") if name.startswith(".")]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs the right to mount")
def test_a_full_file_system_is_one_line_and_leaves_nothing(run, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        fails(run("--steps", 0, "--save", small / "model.bin"), 1, small / "model.bin", "No space left")
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_devices_are_written_in_place_and_survive(run, data, tmp_path):
    for flag in ("--save", "--debug-state"):
        fails(run("--train-data", data, "--steps", 1, flag, "/dev/full"), 1, "/dev/full", "No space left")
        assert os.path.exists("/dev/full") and not os.path.isfile("/dev/full")
    succeeds(run("--steps", 0, "--save", "/dev/null"))
    assert not os.path.isfile("/dev/null")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").symlink_to("/dev/full")
    fails(run("--train-data", data, "--log-dir", tmp_path / "logs"), 1, "metrics.jsonl", "No space left")


def test_a_link_stays_a_link(run, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "real.bin").write_text("before")
    (tmp_path / "link.bin").symlink_to("target/real.bin")
    succeeds(run("--steps", 0, "--save", tmp_path / "link.bin"))
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "target" / "real.bin").stat().st_size == weights.file_bytes(SHAPES)
    assert os.listdir(tmp_path / "target") == ["real.bin"]


def test_a_full_or_closed_stdout_is_an_error(run, data):
    with open("/dev/full", "wb") as full:
        for arguments in (["--help"], ["--train-data", data]):
            fails(run(*arguments, stdout=full), 1, "stdout")
    reader, writer = os.pipe()
    os.close(reader)
    fails(run("--help", stdout=writer), 1, "stdout", "Broken pipe")
    os.close(writer)


# a run that goes wrong or is stopped


def test_a_loss_that_is_not_finite_ends_the_run_and_overwrites_nothing(run, data, tmp_path):
    (tmp_path / "work" / "model.bin").write_text("before")
    result = run("--train-data", data, "--lr", "1e30", "--save", "model.bin", "--log-dir", "logs")
    fails(result, 1, "step 2", "not finite", "--lr")
    assert (tmp_path / "work" / "model.bin").read_text() == "before"
    rows = (tmp_path / "work" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1]


class Started:
    """The program, running; `wait_for` reads its lines until one has this start."""

    def __init__(self, program, folder, *flags):
        command = [str(word) for word in (program, *flags)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)

    def wait_for(self, start: bytes) -> None:
        while not self.process.stdout.readline().startswith(start):
            assert self.process.poll() is None, self.process.stderr.read()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_finish_and_the_model_be_saved(program, data, tmp_path, number, status):
    started = Started(program, tmp_path, "--train-data", data, "--steps", 10**6, "--save", "model.bin")
    started.wait_for(b"step 3/")
    started.process.send_signal(number)
    out, err = started.process.communicate(timeout=20)
    assert started.process.returncode == status and err == b""
    assert out.decode().split("\n")[-3].startswith("stopped after step ")
    assert (tmp_path / "model.bin").stat().st_size == weights.file_bytes(SHAPES)


def test_a_second_signal_ends_the_program_at_once(program, data, tmp_path):
    flags = ("--train-data", data, "--val-data", data, "--steps", 2, "-d", BT * 10**6, "--save", "model.bin")
    started = Started(program, tmp_path, *flags)
    started.wait_for(b"val loss")  # the last line before the first step
    time.sleep(0.5)
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert started.process.poll() is None, "it finishes its step"
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(20) == 143
    assert sorted(os.listdir(tmp_path)) == ["data"]


COUNTER = """
static size_t counted;
void *__real_malloc(size_t n);
void *__real_calloc(size_t m, size_t n);
void *__real_aligned_alloc(size_t a, size_t n);
int __real_posix_memalign(void **p, size_t a, size_t n);
void *__wrap_malloc(size_t n) { counted += n; return __real_malloc(n); }
void *__wrap_calloc(size_t m, size_t n) { counted += m * n; return __real_calloc(m, n); }
void *__wrap_aligned_alloc(size_t a, size_t n) { counted += n; return __real_aligned_alloc(a, n); }
int __wrap_posix_memalign(void **p, size_t a, size_t n) { counted += n; return __real_posix_memalign(p, a, n); }
__attribute__((destructor)) static void show(void) { printf("counted: %zu bytes\\n", counted); }
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a linker with --wrap")
def test_the_model_allocates_what_the_plan_says_and_nothing_else(tmp_path, run):
    wrapped = [f"-Wl,--wrap={name}" for name in ("malloc", "calloc", "aligned_alloc", "posix_memalign")]
    program = compile_program(tmp_path, "gcc", "-O0", "-fopenmp", *wrapped, more=COUNTER)
    for threads in (1, 2):
        lines = succeeds(run("--steps", 0, threads=threads, prefix=["bash", "-c", f'shift; exec {program} "$@"', "-"]))
        total = PLAN.memory.total(threads)
        assert f"memory: {total} bytes" in lines and f"counted: {total} bytes" in lines


# every compiler


@pytest.mark.parametrize(
    ("compiler", "standard", "options"),
    [
        ("gcc", "c11", ["-O1"]),
        ("gcc", "gnu11", ["-O2", "-fopenmp"]),
        ("gcc", "gnu11", ["-Ofast"]),
        ("clang", "c11", ["-O1", "-fopenmp"]),
        ("clang", "gnu11", ["-Ofast", "-fopenmp"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_strict_flags_find_nothing_and_nan_is_still_noticed(tmp_path, data, compiler, standard, options):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    strict = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
    program = compile_program(tmp_path, compiler, f"-std={standard}", *options, *strict)
    flags = ["--train-data", data, "--lr", "1e30"]
    result = subprocess.run([program, *flags], capture_output=True, timeout=60)
    fails(result, 1, "not finite")
    assert (b"compiled without OpenMP" in result.stdout) == ("-fopenmp" not in options)


def test_sanitizers_find_nothing(tmp_path, data):
    options = ("-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp")
    program = compile_program(tmp_path, "gcc", *options)
    tokenizer.write(tmp_path / "table.bin", [b"<%d>" % i for i in range(V)], V - 1)
    train = ["--train-data", data, "--val-data", data, "--tokenizer", "table.bin", "--log-dir", "logs", "-d", 2 * BT]
    commands = [
        [*train, "--steps", 3, "--sample-every", 2, "--sample-length", 2 * MAXT, "--save", "model.bin"],
        [*train, "--steps", 0, "--load", "model.bin", "--save", "half.bin", "--save-dtype", "bf16"],
        [*train, "--load", "half.bin", "--debug-state", "state.bin"],
        ["--help"],
    ]
    for arguments in commands:
        command = [str(word) for word in (program, *arguments)]
        result = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=120)
        assert result.returncode == 0 and result.stderr == b"", result.stderr.decode()
