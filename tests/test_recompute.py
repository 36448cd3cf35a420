import subprocess

import numpy as np

from llmgen import config, program
from llmgen.formats import tokens

SMALL = {"num_layers": 3, "num_heads": 2, "channels": 24, "vocab_size": 101, "max_seq_len": 16, "batch_size": 2, "seq_len": 13}


def test_a_program_that_recomputes_ends_with_the_bits_of_one_that_keeps(tmp_path, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-O1")
    tokens.write(tmp_path / "train.bin", np.random.default_rng(1).integers(0, 101, 5 * 26 + 1), 101)
    models = []
    for how in ("none", "cheap"):
        built = program.build(
            config.load("gpt2-nano", overrides={**SMALL, "recompute": how}), "c", "native", None, tmp_path / how
        )
        flags = ["--train-data", "train.bin", "--steps", "5", "--val-every", "0", "--save", f"{how}.bin"]
        done = subprocess.run([built.program.resolve(), *flags], cwd=tmp_path, check=True, capture_output=True, text=True)
        models.append(((tmp_path / f"{how}.bin").read_bytes(), done.stdout))
    assert models[0][0] == models[1][0]
    memory = [int(out.split("memory: ")[1].split()[0]) for _, out in models]
    assert memory[1] < memory[0]
