# ruff: noqa: F811
"""A run that is stopped, killed or starved of disk goes on to the same bits. One tiny model, compiled once."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from test_program import BT, SHAPES, B, T, V, compile_program, data, fails, losses, program, run, succeeds, text  # noqa: F401

from llmgen import config as configs
from llmgen import plan, render
from llmgen.formats import tokens, training_state, weights

SMALL_FILES = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-"]  # of 102,400 bytes: metrics fit, a checkpoint does not


@pytest.fixture
def train(run, data, tmp_path):
    """Trains with what a checkpoint must hold all in use, into a log folder; returns the finished process."""

    def train(logs: str, steps: int, *more, **kwargs):
        flags = ["--train-data", data, "--val-data", data, "--val-every", 7, "--val-steps", 1, "--shuffle", "--steps", steps]
        flags += ["--total-batch-size", 2 * BT, "--warmup-steps", 3, "--lr", 1e-2, "--save", f"{logs}.bin", "--log-dir", logs]
        return run(*flags, *more, **kwargs)

    return train


def metrics(folder: Path) -> list[tuple]:
    """What metrics.jsonl says, but for the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("lr"), row.get("val_loss")) for row in rows]


def ends_as(work: Path, one: str, other: str) -> None:
    """Two runs ended with the same model and wrote the same metrics."""
    assert (work / f"{one}.bin").read_bytes() == (work / f"{other}.bin").read_bytes()
    assert metrics(work / one) == metrics(work / other)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.fixture
def work(tmp_path) -> Path:
    return tmp_path / "work"


def test_twice_as_many_steps_equal_half_of_them_and_a_resume(train, work):
    succeeds(train("whole", 24))
    succeeds(train("parts", 12, "--checkpoint-every", 5))
    assert training_state.steps(work / "parts") == [5, 10, 12], "every fifth, and the last"
    lines = succeeds(train("parts", 24, "--resume"))
    assert "resumed after step 12 from parts/state_00000012_00000.bin" in lines
    assert len(losses(lines)) == 12
    rows = metrics(work / "parts")
    assert [row for row in rows if row[0] == 12 and row[4]], "a last step validates"
    assert [row for row in rows if row[0] != 12 or row[4] is None] == metrics(work / "whole")
    assert (work / "parts.bin").read_bytes() == (work / "whole.bin").read_bytes()


def test_a_run_resumed_at_any_step_ends_as_if_it_had_not_been_stopped(train, work):
    succeeds(train("whole", 20, "--checkpoint-every", 3))
    for step in training_state.steps(work / "whole")[:-1]:
        shutil.rmtree(work / "again", ignore_errors=True)
        shutil.copytree(work / "whole", work / "again")
        for later in training_state.steps(work / "whole"):
            for path in training_state.paths(work / "again", later) if later > step else ():
                path.unlink()
        (work / "again" / "metrics.jsonl").write_text((work / "whole" / "metrics.jsonl").read_text() + '{"step": 21, "lo')
        assert f"resumed after step {step} " in "\n".join(succeeds(train("again", 20, "-n", 3, "-y", 1)))
        ends_as(work, "whole", "again")
        for name in os.listdir(work / "whole"):
            same = (work / "whole" / name).read_bytes() == (work / "again" / name).read_bytes()
            assert same or name == "metrics.jsonl"


def test_the_state_file_holds_what_llm_c_has_there_and_more(train, work, data):
    succeeds(train("logs", 5, "--checkpoint-every", 5, "--seed", 7))
    model, state, _ = training_state.paths(work / "logs", 5)
    assert model.read_bytes() == (work / "logs.bin").read_bytes()
    assert training_state.is_whole(work / "logs", 5)
    ints = np.fromfile(state, np.int32, 256)
    assert [*ints[:7]] == [20240527, 2, 1, 0, 0, 1, 0] and ints[10] == 5 and ints[20] == 7
    entries, (first, second), (seen, norms) = training_state.read(state, SHAPES)
    assert entries["samples"] == 10 and (entries["batch_size"], entries["seq_len"]) == (B, T)
    assert entries["losses"] == entries["norms"] == 5 and entries["data_tokens"] == 15 * BT
    steps = [row for row in metrics(work / "logs") if row[1] is not None]
    assert seen[:5] == pytest.approx([row[1] for row in steps], rel=1e-8)
    assert norms[:5] == pytest.approx([row[2] for row in steps], rel=1e-8)
    assert all((second[name] >= 0).all() for name in SHAPES) and np.abs(first["wpe"]).max() > 0
    assert (first["wte"][V:] == 0).all()


def test_old_checkpoints_go_but_for_the_latest_and_the_major_ones(train, work):
    succeeds(train("logs", 20, "--checkpoint-every", 2, "--checkpoint-keep", 2, "--checkpoint-major", 6))
    assert training_state.steps(work / "logs") == [6, 12, 18, 20]
    assert len(os.listdir(work / "logs")) == 4 * 3 + 1
    succeeds(train("all", 6, "-n", 2, "-nk", 0))
    assert training_state.steps(work / "all") == [2, 4, 6]


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_points_it_ends_with_the_same_bits(program, data, tmp_path, seed):
    """20 times kill -9, at any moment; some hit the writing of a checkpoint, which is made every other step."""
    pick = random.Random(seed)
    flags = ["--train-data", data, "--shuffle", "--steps", 600, "-d", 2 * BT, "--val-data", data, "--val-steps", 1, "-v", 9]
    flags = [str(flag) for flag in [program, *flags]]
    subprocess.run([*flags, "--log-dir", "whole", "--save", "whole.bin"], cwd=tmp_path, check=True, capture_output=True)
    checkpoints = ["-n", "2", "-nk", "2", "--resume", "--log-dir", "killed", "--save", "killed.bin"]
    kills = 0
    while kills < 20:
        process = subprocess.Popen([*flags, *checkpoints], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(pick.uniform(0.01, 0.12))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        assert process.stderr.read() == b""
        if process.returncode == 0:
            break
    assert kills == 20, "the run was over too soon"
    result = subprocess.run([*flags, *checkpoints], cwd=tmp_path, capture_output=True, timeout=60)
    assert result.returncode == 0 and b"resumed after step" in result.stdout, result
    ends_as(tmp_path, "whole", "killed")
    assert not [name for name in os.listdir(tmp_path / "killed") if name.startswith(".")]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on(program, data, tmp_path, number, status):
    flags = [str(program), "--train-data", str(data), "--steps", "3000", "--shuffle", "-n", "100000", "--resume"]
    process = subprocess.Popen([*flags, "--log-dir", "parts"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith(b"step 5/"):
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status and err == b"" and b"saved checkpoint" in out
    (step,) = training_state.steps(tmp_path / "parts")
    assert 5 <= step < 3000 and f"stopped after step {step}\n".encode() in out
    flags[4] = str(step + 10)
    for logs in ("parts", "whole"):
        assert subprocess.run([*flags, "--log-dir", logs], cwd=tmp_path, capture_output=True).returncode == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_validation_that_a_signal_cut_short_is_made_up_for(program, data, tmp_path):
    flags = [str(program), "--train-data", str(data), "--val-data", str(data), "-v", "2", "--steps", "4", "-n", "2", "--resume"]
    long = Path(tmp_path, "long.bin")  # a validation of it takes a while
    tokens.write(long, np.resize(tokens.read(data), 200_000), V)
    flags[4] = str(long)
    command = [*flags, "--val-steps", "3000", "--log-dir"]
    process = subprocess.Popen([*command, "parts"], cwd=tmp_path, stdout=subprocess.PIPE)
    while not process.stdout.readline().startswith(b"step 2/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert training_state.steps(tmp_path / "parts") == [2] and process.returncode == 143
    for logs in ("parts", "whole"):
        assert subprocess.run([*command, logs], cwd=tmp_path, capture_output=True).returncode == 0
    ends = [metrics(tmp_path / logs) for logs in ("parts", "whole")]
    assert ends[0] == ends[1] and [row[0] for row in ends[0] if row[4]] == [0, 2, 4]


# what is damaged


@pytest.mark.parametrize("part", ["model", "state", "DONE"])
@pytest.mark.parametrize("damage", ["a flipped byte", "a missing end", "a missing file", "an empty file"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(train, work, part, damage):
    succeeds(train("whole", 12, "--checkpoint-every", 4))
    shutil.copytree(work / "whole", work / "again")
    path = dict(zip(("model", "state", "DONE"), training_state.paths(work / "again", 12), strict=True))[part]
    size = path.stat().st_size
    if damage == "a missing file":
        path.unlink()
    elif damage == "a flipped byte":
        flip(path, random.Random(part).randrange(size))
    else:
        os.truncate(path, size - 3 if damage == "a missing end" else 0)
    if damage != "a missing file" or part != "DONE":
        assert training_state.is_whole(work / "whole", 12) and not training_state.is_whole(work / "again", 12)
    lines = succeeds(train("again", 12, "--checkpoint-every", 4, "--resume"))
    said = [line for line in lines if "damaged" in line]
    if (part, damage) == ("DONE", "a missing file"):
        assert said == []  # a checkpoint without its mark was never finished
    else:
        (line,) = said
        assert line.startswith("again/" if part == "DONE" else f"again/{path.name} ")
        assert line.endswith(" is damaged or missing: the checkpoint of step 8 is used")
    assert any(line.startswith("resumed after step 8 ") for line in lines)
    ends_as(work, "whole", "again")


def test_every_byte_counts(train, work):
    """Of a checkpoint whose every 997th byte is flipped in turn none is taken."""
    succeeds(train("logs", 2, "--checkpoint-every", 2))
    for path in training_state.paths(work / "logs", 2):
        for at in range(0, path.stat().st_size, 997 if path.stat().st_size < 2e5 else 99_991):
            flip(path, at)
            assert not training_state.is_whole(work / "logs", 2)
            flip(path, at)
    assert training_state.is_whole(work / "logs", 2)


def test_without_any_whole_checkpoint_nothing_is_touched(train, work):
    succeeds(train("logs", 4, "--checkpoint-every", 2))
    for step in (2, 4):
        flip(training_state.paths(work / "logs", step)[1], 5000)
    before = (work / "logs" / "metrics.jsonl").read_bytes()
    fails(train("logs", 8, "--resume"), 1, "state_00000002", "no other checkpoint")
    assert (work / "logs" / "metrics.jsonl").read_bytes() == before


# what a long run meets


def test_a_full_disk_keeps_the_checkpoint_before(train, work):
    succeeds(train("whole", 12))
    succeeds(train("parts", 12, "--checkpoint-every", 100, "--steps", 4))
    names = sorted(os.listdir(work / "parts"))
    result = train("parts", 12, "--checkpoint-every", 4, "--resume", prefix=SMALL_FILES)
    fails(result, 1, "model_00000008.bin", "File too large")
    assert sorted(os.listdir(work / "parts")) == names and training_state.is_whole(work / "parts", 4)
    succeeds(train("parts", 12, "--checkpoint-every", 4, "--resume"))
    assert (work / "whole.bin").read_bytes() == (work / "parts.bin").read_bytes()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs the right to mount")
def test_a_full_file_system_keeps_the_checkpoint_before(train, work):
    small = work / "small"
    small.mkdir()
    room = 2 * weights.file_bytes(SHAPES) * 3 + 100_000  # of two checkpoints and not three
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        flags = ["--checkpoint-every", 4, "--save", "/dev/null"]
        fails(train("small", 12, *flags), 1, "00000012", "No space left")
        assert training_state.steps(small) == [4, 8] and training_state.is_whole(small, 8)
        assert not [name for name in os.listdir(small) if name.startswith(".") or "00000012" in name]
        lines = succeeds(train("small", 11, *flags, "--checkpoint-every", 0, "--resume"))
        assert any(line.startswith("resumed after step 8 ") for line in lines)
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_second_run_into_the_same_folder_is_refused(program, data, run, work):
    flags = ["--train-data", str(data), "--log-dir", "logs"]
    first = subprocess.Popen([program, *flags, "--steps", "1000000"], cwd=work, stdout=subprocess.PIPE)
    while not first.stdout.readline().startswith(b"step 3/"):
        assert first.poll() is None
    for more in ([], ["--resume"]):
        fails(run(*flags, "--steps", 1, *more), 1, "logs/metrics.jsonl", f"process {first.pid} ", "--log-dir")
    first.terminate()
    out, _ = first.communicate(timeout=20)
    done = int(out.split(b"stopped after step ")[1])
    assert [row[0] for row in metrics(work / "logs")] == list(range(1, done + 1)), "its metrics are whole"
    succeeds(run(*flags, "--steps", 1))


def test_a_new_run_does_not_mix_with_the_checkpoints_of_an_old_one(train, work):
    succeeds(train("logs", 4, "--checkpoint-every", 4))
    before = (work / "logs" / "metrics.jsonl").read_bytes()
    fails(train("logs", 8), 1, "logs", "earlier run", "--resume")
    assert (work / "logs" / "metrics.jsonl").read_bytes() == before


def test_resume_without_a_checkpoint_begins_at_the_first_step(train, work):
    lines = succeeds(train("logs", 3, "--resume"))
    assert "no checkpoint in logs: the run begins at its first step" in lines and len(losses(lines)) == 3
    succeeds(train("plain", 3))
    ends_as(work, "plain", "logs")
    succeeds(train("logs", 3, "--resume"))
    ends_as(work, "plain", "logs")


def test_a_run_that_is_over_says_so_and_saves_again(train, work):
    succeeds(train("logs", 4, "--checkpoint-every", 4))
    model = (work / "logs.bin").read_bytes()
    (work / "logs.bin").unlink()
    lines = succeeds(train("logs", 4, "--checkpoint-every", 4, "--resume"))
    assert not losses(lines) and (work / "logs.bin").read_bytes() == model
    fails(train("logs", 3, "--resume"), 1, "--steps 3", "4 already")


def test_flags_that_need_a_log_folder_say_so(run, data):
    for flag in ("--resume", "--checkpoint-every=5"):
        fails(run("--train-data", data, flag), 2, "--log-dir")
    fails(run("--steps", 0, "--resume", "--log-dir", "logs"), 2, "--train-data")


def test_a_folder_that_cannot_be_written_is_named(run, data, work):
    (work / "logs" / "metrics.jsonl").mkdir(parents=True)
    fails(run("--train-data", data, "--log-dir", "logs"), 1, "logs/metrics.jsonl")


# with other settings


def test_what_changed_since_the_checkpoint_is_said(train, work):
    succeeds(train("logs", 4, "--checkpoint-every", 4))
    lines = succeeds(train("logs", 6, "--resume", "--total-batch-size", BT, "--seed", 5, "--shuffle", 0))
    assert f"--total-batch-size was {2 * BT} and is {BT} now" in lines
    assert "--seed was 1337 and is 5 now" in lines and "--shuffle was 1 and is 0 now" in lines
    assert [row[0] for row in metrics(work / "logs") if row[1]] == [1, 2, 3, 4, 5, 6]


def test_another_micro_batch_goes_on_at_the_same_token(train, work, tmp_path, text):
    """Without shuffling and dropout a run in batches of 2 continues one in batches of 4 as if it had been its own."""
    config = configs.load("gpt2-nano", overrides={"num_layers": 2, "num_heads": 2, "channels": 32, "max_seq_len": 32,
                                                  "batch_size": 2, "seq_len": 16})  # fmt: skip
    other = tmp_path / "other"
    other.mkdir()
    (other / "train_gpt2.c").write_text(render.source(plan.make(config, "c", "x86-64-v2")))
    subprocess.run(["gcc", "-O1", "train_gpt2.c", "-lm", "-o", "train_gpt2"], cwd=other, check=True)
    succeeds(train("whole", 6, "--shuffle", 0))
    succeeds(train("parts", 3, "--shuffle", 0, "--checkpoint-every", 3))
    swap = ["bash", "-c", f'shift; exec {other / "train_gpt2"} "$@"', "-"]
    lines = succeeds(train("parts", 6, "--shuffle", 0, "--resume", prefix=swap))
    assert f"--batch-size was {B} and is 2 now" in lines
    whole, parts = (np.array([row[1] for row in metrics(work / logs) if row[1]]) for logs in ("whole", "parts"))
    assert (whole[:3] == parts[:3]).all() and whole == pytest.approx(parts, rel=1e-4)


def test_a_checkpoint_with_master_weights_goes_on_from_those(train, work):
    """As the CUDA program writes it in bf16: the model is rounded, the state holds what it was rounded from."""
    succeeds(train("whole", 8))
    succeeds(train("parts", 4, "--checkpoint-every", 4))
    model, state, done = training_state.paths(work / "parts", 4)
    tensors = weights.read(model, SHAPES)
    masters = b"".join(np.ascontiguousarray(tensors[name], "<f4").tobytes() for name in SHAPES)
    content = state.read_bytes()
    header = np.frombuffer(content[:1024], np.int32).copy()
    header[4] = 1
    state.write_bytes(header.tobytes() + content[1024 : -16 * 128] + masters + content[-16 * 128 :])
    succeeds(train("rounded", 4, "--save", "half.bin", "--save-dtype", "bf16"))
    shutil.copy(work / "half.bin", model)
    done.write_text("".join(f"{training_state.checksum(path):016x}\n" for path in (model, state)))
    succeeds(train("parts", 8, "--resume"))
    assert (work / "whole.bin").read_bytes() == (work / "parts.bin").read_bytes()


def test_a_checkpoint_of_another_model_is_refused(train, work, tmp_path, data):
    succeeds(train("logs", 2, "--checkpoint-every", 2))
    model, state, done = training_state.paths(work / "logs", 2)
    for path, index, words in ((model, 6, "channels is"), (state, 1, "version"), (state, 0, "magic number")):
        before = path.read_bytes()
        ints = np.frombuffer(before[:1024], np.int32).copy()
        ints[index] += 1
        path.write_bytes(ints.tobytes() + before[1024:])
        done.write_text("".join(f"{training_state.checksum(p):016x}\n" for p in (model, state)))
        fails(train("logs", 4, "--resume"), 1, path.name, words)
        path.write_bytes(before)


# outliers, one batch


def test_an_update_far_from_those_before_is_skipped(run, work, text):
    """In learnable text there is one sample of noise; its loss stands out, and the weights stay as they were."""
    quiet = np.tile(np.frombuffer(b"abcdefgh" * 8, np.uint8), 200).astype(np.uint16)
    noise = np.random.default_rng(0).integers(0, 256, BT).astype(np.uint16)
    ids = np.concatenate([quiet[: 150 * BT], noise, quiet[: 10 * BT]])
    tokens.write(work / "spiky.bin", ids, V)
    flags = ["--train-data", "spiky.bin", "--steps", 158, "--lr", 1e-3]
    plain = succeeds(run(*flags, "--log-dir", "plain"))
    assert not [line for line in plain if "no update" in line]
    values = np.array([row[1] for row in metrics(work / "plain")])
    window = values[151 - 128 : 151]
    z = (window[-1] - window.mean()) / window.std()
    assert z > 2
    for flag, what in (("--skip-loss-z", "loss"), ("-sg", "norm of the gradients")):
        lines = succeeds(run(*flags, flag, 2, "--log-dir", what))
        said = [line for line in lines if "no update" in line]
        assert said[0].startswith(f"step 151: no update: the {what} is ") and said[0].endswith(" those before")
        if what == "loss":
            assert float(said[0].split(" is ")[1].split()[0]) == pytest.approx(z, abs=0.051)
        rows = metrics(work / what)
        assert rows[:151] == metrics(work / "plain")[:151] and rows[151] != metrics(work / "plain")[151]
    lines = succeeds(run(*flags, "-sl", 50, "-sg", 50))
    assert losses(lines) == losses(plain)


def test_skipping_is_remembered_in_checkpoints(run, work, text, data):
    flags = ["--train-data", data, "--lr", 3e-2, "-sl", 0.5, "-sg", 0.5]
    whole = succeeds(run(*flags, "--steps", 170, "--save", "whole.bin"))
    assert [line for line in whole if "no update" in line]
    succeeds(run(*flags, "--steps", 100, "--log-dir", "logs", "-n", 100))
    succeeds(run(*flags, "--steps", 170, "--log-dir", "logs", "--resume", "--save", "parts.bin"))
    assert (work / "whole.bin").read_bytes() == (work / "parts.bin").read_bytes()


def test_one_batch_is_learnt_by_heart(run, data, work):
    lines = succeeds(run("--train-data", data, "-a", "--steps", 60, "--lr", 1e-2, "-d", 2 * BT))
    seen = [float(loss.split()[1]) for loss in losses(lines)]
    assert seen[-1] < 0.5
    still = succeeds(run("--train-data", data, "--overfit-batch", "--steps", 3, "--lr", 0, "-d", 2 * BT, "--shuffle"))
    assert len(set(losses(still))) == 1


# every compiler finds nothing


def test_sanitizers_find_nothing_in_checkpoints(tmp_path, data):
    options = ("-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp")
    program = compile_program(tmp_path, "gcc", *options)
    train = [program, "--train-data", data, "-d", BT, "--log-dir", "logs", "-n", 2, "-nk", 1, "-nm", 4, "-sl", 3, "--resume"]
    for more in (["--steps", 5, "--shuffle"], ["--steps", 9], ["--steps", 140]):
        command = [str(word) for word in (*train, *more)]
        result = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=120)
        assert result.returncode == 0 and result.stderr == b"", result.stderr.decode()
        flip(training_state.paths(tmp_path / "logs", 4)[0], 2000)
