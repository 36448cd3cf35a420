"""Multiple choice: the file, its exporter, and the trainer's answers against transformers' own."""

import dataclasses
import json
import struct
import subprocess

import numpy as np
import pytest
from command import fails, succeeds

from llmgen import config as configs
from llmgen import models
from llmgen.errors import UserError
from llmgen.formats import evaluation, files, tokens, weights
from llmgen.formats.evaluation import Example

QUESTIONS = [
    {
        "ind": 24,
        "ctx": "A man sits on a roof. He",
        "endings": ["is using wrap.", "rips.", "holds a cube.", "pulls."],
        "label": 3,
    },
    {"ctx": "Two and two make", "endings": ["four", "five"], "label": "0"},
    {"ctx": "é", "endings": ["a", "b b", "ccc"], "label": 1},
]


def write_questions(path, questions) -> None:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))


def test_export_eval_writes_llm_cs_layout(tmp_path):
    write_questions(tmp_path / "questions.jsonl", QUESTIONS)
    (line,) = succeeds("export-eval", "questions.jsonl", "--out", "questions.bin", cwd=tmp_path)
    data = (tmp_path / "questions.bin").read_bytes()
    assert line == f"questions.bin: 3 examples, {len(data)} bytes"
    header = struct.unpack("<256i", data[:1024])
    values = struct.unpack(f"<{(len(data) - 1024) // 2}H", data[1024:])

    from llmgen import tokenization

    encode = tokenization.gpt2_tokenizer().encode
    at, longest = 0, 0
    for i, question in enumerate(QUESTIONS):
        begin, size, index, label, count = values[at : at + 5]
        assert (begin, index, label, count) == (65535, i, int(question["label"]), len(question["endings"]))
        longest, end, at = max(longest, size), at + size // 2, at + 5
        for text in [question["ctx"], *(" " + ending for ending in question["endings"])]:
            length = values[at]
            assert list(values[at + 1 : at + 1 + length]) == encode(text).tolist()
            at += 1 + length
        assert at == end
    assert header == (20240522, 1, 3, longest, *[0] * 252) and at == len(values)
    assert [example.right for example in evaluation.read(tmp_path / "questions.bin")] == [3, 0, 1]
    succeeds("export-eval", "questions.jsonl", "--tokenizer", "bytes", "--examples", 2, "--out", "bytes.bin", cwd=tmp_path)
    _, second = evaluation.read(tmp_path / "bytes.bin")
    assert bytes(second.context) == b"Two and two make" and [bytes(e) for e in second.endings] == [b" four", b" five"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "line 2: it is not a JSON object"),
        ("{", "line 2: "),
        ('{"ctx": "a", "endings": ["b"]}', "line 2: it needs label"),
        ('{"ctx": "a", "endings": "b", "label": 0}', "line 2: it needs ctx"),
        ('{"ctx": "a", "endings": ["b"], "label": 1}', "line 2: its label is 1, but it has 1 endings"),
        ('{"ctx": "", "endings": ["b"], "label": 0}', "line 2: its context or one of its endings is empty"),
        (json.dumps({"ctx": "a b " * 20000, "endings": ["b"], "label": 0}), "bytes, but 65535 fit"),
    ],
)
def test_a_line_that_is_no_question_is_refused(tmp_path, line, words):
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    assert words in fails(1, "export-eval", "q.jsonl", "--out", "q.bin", cwd=tmp_path)
    assert not (tmp_path / "q.bin").exists()


def test_other_refusals(tmp_path):
    assert "no such file" in fails(1, "export-eval", "none.jsonl", "--out", "q.bin", cwd=tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "no question" in fails(1, "export-eval", "empty.jsonl", "--out", "q.bin", cwd=tmp_path)
    assert "--out" in fails(2, "export-eval", "empty.jsonl", cwd=tmp_path)
    with pytest.raises(ValueError, match="too large for this layout"):
        evaluation.encode(Example([70000], [[1]], 0), 0)
    evaluation.write(tmp_path / "cut.bin", [evaluation.encode(Example([1], [[2], [3, 4]], 1), 0)])
    data = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match="it is cut short"):
        evaluation.read(tmp_path / "cut.bin")


# The trainer.

SMALL = {"num_layers": 2, "num_heads": 2, "channels": 32, "vocab_size": 101, "max_seq_len": 40}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A folder with a random model, its program, and the examples it is asked."""
    folder = tmp_path_factory.mktemp("trainer")
    config = configs.from_tables("m", {"family": "gpt2", "model": SMALL, "program": {"batch_size": 2, "seq_len": 16}}, "m")
    rng = np.random.default_rng(7)
    shapes = models.parameter_shapes(config)
    values = {name: rng.normal(0, 0.15, shape).astype(np.float32) for name, shape in shapes.items()}
    values["wte"][config.model.vocab_size :] = 0
    for name in ("ln1w", "ln2w", "lnfw"):
        values[name] += 1
    weights.write(folder / "model.bin", config, shapes, values.items())
    (folder / "m.toml").write_text(config.to_toml())
    succeeds("build", "--config", "m.toml", "--out", "built", cwd=folder, env={"CFLAGS": "-O1"})
    examples = []
    for _ in range(60):
        endings = [rng.integers(0, 101, rng.integers(1, 9)).tolist() for _ in range(rng.integers(2, 6))]
        examples.append(Example(rng.integers(0, 101, rng.integers(1, 30)).tolist(), endings, int(rng.integers(len(endings)))))
    examples.append(Example(rng.integers(0, 101, 70).tolist(), [[1, 2, 3], [5]], 1))  # longer than the model's sequences
    evaluation.write(folder / "examples.bin", [evaluation.encode(e, i) for i, e in enumerate(examples)])
    tokens.write(folder / "train.bin", rng.integers(0, 101, 500), 101)
    return folder, examples


def run(folder, *flags) -> subprocess.CompletedProcess:
    command = [str(folder / "built" / "train_gpt2"), *map(str, flags)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_accuracy_is_that_of_transformers_logits(trainer):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, examples = trainer
    succeeds("import-weights", "model.bin", "--out", "hf", cwd=folder)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf").double().eval()
    right = 0
    for example in examples:
        losses = []
        for ending in example.endings:
            ids = torch.tensor([*example.context, *ending])[-SMALL["max_seq_len"] :]
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
            chosen = torch.log_softmax(logits[:-1], -1)[torch.arange(len(ids) - 1), ids[1:]]
            losses.append(-chosen[-len(ending) :].mean().item())
        right += int(np.argmin(losses)) == example.right
    done = run(
        folder, "--load", "model.bin", "--steps", 0, "--sample-length", 0, "--eval-data", "examples.bin", "--log-dir", "log"
    )
    assert done.returncode == 0 and done.stderr == "", done
    assert "examples.bin: 61 examples" in done.stdout
    assert f"accuracy {right / 61:.4f} ({right} of 61)" in done.stdout.splitlines()
    (row,) = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    assert row == {"step": 0, "accuracy": pytest.approx(right / 61, rel=1e-8)}
    assert 5 < right < 55


def test_it_answers_whenever_it_validates(trainer):
    folder, _ = trainer
    flags = ("--train-data", "train.bin", "--steps", 5, "--val-every", 2, "--log-dir", "log2")
    done = run(folder, *flags, "--eval-data", "examples.bin")
    assert done.returncode == 0, done
    rows = [json.loads(line) for line in (folder / "log2" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "accuracy" in row] == [0, 2, 4, 5]
    without = run(folder, *flags[:-2])
    losses = [[line for line in d.stdout.splitlines() if "loss" in line] for d in (done, without)]
    assert [line.split("|")[1] for line in losses[0]] == [line.split("|")[1] for line in losses[1]]


def test_a_file_that_does_not_fit_is_refused_in_one_line(trainer):
    folder, examples = trainer
    good = [evaluation.encode(e, i) for i, e in enumerate(examples[:3])]

    def refusal(name: str, data: bytes) -> str:
        (folder / name).write_bytes(data)
        done = run(folder, "--load", "model.bin", "--steps", 0, "--eval-data", name)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done
        return done.stderr

    def file(*values, count=None) -> bytes:
        body = b"".join(v.tobytes() for v in values)
        return files.header(20240522, 1, len(values) if count is None else count, 0) + body

    assert "not an evaluation file" in refusal("a.bin", files.header(20240522, 2, 1, 0) + good[0].tobytes())
    assert "damaged" in refusal("b.bin", file(*good)[:-2])
    assert "damaged" in refusal("c.bin", file(*good, count=2))
    assert "damaged" in refusal("d.bin", file(*good, count=4))
    assert "not below vocab_size" in refusal("e.bin", file(evaluation.encode(Example([1], [[101], [2]], 0), 0)))
    long = Example([1], [[3] * 40, [2]], 0)
    assert "longer than the model's sequences" in refusal("f.bin", file(evaluation.encode(long, 0)))
    wrong = evaluation.encode(dataclasses.replace(examples[0], right=0), 0)
    wrong[3] = 99
    assert "none of its endings is the right one" in refusal("g.bin", file(wrong))
    rng = np.random.default_rng(8)
    for _ in range(30):  # whatever is broken, it ends with a line or an answer, never with a crash
        broken = bytearray(file(*good))
        broken[int(rng.integers(1024, len(broken)))] = int(rng.integers(256))
        (folder / "h.bin").write_bytes(broken)
        done = run(folder, "--load", "model.bin", "--steps", 0, "--sample-length", 0, "--eval-data", "h.bin")
        assert done.returncode in (0, 1) and done.stderr.count("\n") == done.returncode, done
