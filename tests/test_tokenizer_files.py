"""import-weights puts the tokenizer beside the model, so that transformers needs nothing else."""

import json
import subprocess

import numpy as np
import pytest
from command import fails, succeeds

from llmgen import config as configs
from llmgen import models, tokenization
from llmgen.formats import tokenizer, tokens, weights

SMALL = {"num_layers": 2, "num_heads": 2, "channels": 32, "max_seq_len": 64}
TEXT = "Hello  world's   'll 123 déjà vu\n\n\tif x:\n  return 漢字 🙂 <|endoftext|> \u3000end "


def model_file(folder, vocab_size: int, family: str = "gpt2") -> configs.Config:
    """A random model in model.bin."""
    tables = {"family": family, "model": {**SMALL, "vocab_size": vocab_size}, "program": {"batch_size": 1, "seq_len": 16}}
    config = configs.from_tables("m", tables, "m")
    rng, shapes = np.random.default_rng(1), models.parameter_shapes(config)
    values = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("wte", "headw"):
        if name in values:
            values[name][vocab_size:] = 0
    weights.write(folder / "model.bin", config, shapes, values.items())
    return config


@pytest.mark.parametrize(("name", "vocab_size"), [("gpt2", 50257), ("bytes", 257)])
def test_a_known_tokenizer_comes_along(tmp_path, name, vocab_size):
    transformers = pytest.importorskip("transformers")
    model_file(tmp_path, vocab_size)
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    assert succeeds("import-weights", "model.bin", "--out", "hf", cwd=tmp_path) == [f"hf/{name}" for name in names]
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), tokenization.load_tokenizer(name)
    text = TEXT.replace("<|endoftext|>", "")
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text)) == text and theirs.eos_token_id == ours.end_of_text
    assert theirs("a<|endoftext|>")["input_ids"][-1] == ours.end_of_text
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert said["eos_token_id"] == ours.end_of_text
    # The files serve as --tokenizer, too.
    again = tokenization.load_tokenizer(str(tmp_path / "hf"))
    assert again.encode(TEXT).tolist() == ours.encode(TEXT).tolist() and again.table == ours.table
    assert again.end_of_text == ours.end_of_text and again.cut == tokenization.CUT_GPT2


def test_a_pipeline_generates_and_the_loss_is_the_programs(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model_file(tmp_path, 50257)
    succeeds("import-weights", "model.bin", "--out", "hf", cwd=tmp_path)
    generator = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    (made,) = generator("Once upon a time", max_new_tokens=8, do_sample=False)
    greedy = ("--tokens", 8, "--temperature", 0)
    lines = succeeds("generate", "--model", "model.bin", "--prompt", "Once upon a time", *greedy, cwd=tmp_path)
    assert "\n".join(lines).startswith(made["generated_text"].replace("\r", ""))
    known = tokenization.load_tokenizer("gpt2")
    tokenizer.write(tmp_path / "table.bin", known.table, known.end_of_text)
    table = ("--tokenizer", "table.bin")  # of which the program itself encodes
    encoded = succeeds("generate", "--model", "model.bin", "--prompt", "Once upon a time", *greedy, *table, cwd=tmp_path)
    assert encoded[:-1] == lines[:-1]

    succeeds("build", "--config", "model.bin", "--batch-size", 1, "--seq-len", 16, "--out", "built", cwd=tmp_path)
    ids = generator.tokenizer(TEXT * 3)["input_ids"][:17]
    tokens.write(tmp_path / "val.bin", np.array(ids), 50257)
    command = [tmp_path / "built" / "train_gpt2", "--load", "model.bin", "--steps", "0", "--sample-length", "0"]
    done = subprocess.run([*command, "--val-data", "val.bin"], cwd=tmp_path, capture_output=True, text=True)
    (got,) = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("val loss")]
    with torch.no_grad():
        given = torch.tensor([ids])
        assert got == pytest.approx(generator.model(given, labels=given).loss.item(), abs=2e-6)


def test_a_folder_is_copied_and_a_file_gets_a_config(tmp_path):
    pytest.importorskip("tokenizers")
    model_file(tmp_path, 257)
    succeeds("import-weights", "model.bin", "--out", "bytes", cwd=tmp_path)
    (tmp_path / "bytes" / "chat_template.jinja").write_text("hello")
    model_file(tmp_path, 300, "llama")
    own = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    succeeds("import-weights", "model.bin", "--tokenizer", "bytes", "--out", "named", cwd=tmp_path)
    succeeds("import-weights", "model.bin", "--tokenizer", "./bytes", "--out", "copied", cwd=tmp_path)
    for name in own:
        assert (tmp_path / "copied" / name).read_bytes() == (tmp_path / "bytes" / name).read_bytes()
    assert json.loads((tmp_path / "copied" / "generation_config.json").read_text())["eos_token_id"] == 256
    succeeds("import-weights", "model.bin", "--tokenizer", "bytes/tokenizer.json", "--out", "file", cwd=tmp_path)
    assert json.loads((tmp_path / "file" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert not (tmp_path / "file" / "chat_template.jinja").exists()
    succeeds("import-weights", "model.bin", "--out", "without", cwd=tmp_path)
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    assert "gpt2: has 50257 tokens" in fails(
        1, "import-weights", "model.bin", "--tokenizer", "gpt2", "--out", "new", cwd=tmp_path
    )
    assert not (tmp_path / "new").exists()
