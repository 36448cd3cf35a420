import json
import subprocess

import numpy as np
import pytest

from llmgen import config, models, program, reference
from llmgen.formats import tokens, weights
from llmgen.ops.muon import orthogonal
from llmgen.verify import clear_padding, random_parameters

SMALL = {"num_layers": 2, "num_heads": 2, "channels": 20, "vocab_size": 101, "max_seq_len": 16, "batch_size": 2, "seq_len": 13}


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_newton_schulz_brings_the_singular_values_near_one(shape):
    x = np.random.default_rng(0).normal(size=shape)
    values = np.linalg.svd(orthogonal(x), compute_uv=False)
    assert np.all(values > 0.3) and np.all(values < 1.3)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    assert np.sum(orthogonal(x) * (u @ vt)) / min(shape) > 0.6, "near the orthogonal factor of x itself"


@pytest.mark.parametrize("extra", [{}, {"num_kv_heads": 1, "mlp": "gated", "mlp_channels": 36, "norm": "rmsnorm"}])
def test_twenty_steps_of_muon_on_fresh_batches_give_the_losses_of_the_reference(tmp_path, monkeypatch, extra):
    monkeypatch.setenv("CFLAGS", "-O1")
    built = config.load("gpt2-nano", overrides={**SMALL, "optimizer": "muon", **extra})
    graph, shapes = models.build(built), models.parameter_shapes(built)
    start = random_parameters(graph, 0)
    clear_padding(start, graph, built.model.vocab_size)
    text = np.random.default_rng(1).integers(0, 101, 20 * 26 + 1)
    weights.write(tmp_path / "model.bin", built, shapes, start.items())
    tokens.write(tmp_path / "train.bin", text, 101)
    run = program.build(built, "c", "native", None, tmp_path).program
    flags = ["--load", "model.bin", "--train-data", "train.bin", "--log-dir", ".", "--steps", "20", "--val-every", "0"]
    flags += ["--lr", "0.02", "--weight-decay", "0.1", "--grad-clip", "1.0"]
    subprocess.run([run.resolve(), *flags], cwd=tmp_path, check=True, capture_output=True)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    parameters = {name: p.astype(np.float64) for name, p in start.items()}
    moments = tuple({name: np.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    assert len(losses) == 20
    for i, loss in enumerate(losses):
        piece = text[i * 26 : i * 26 + 27]
        batch = (piece[:-1].reshape(2, 13), piece[1:].reshape(2, 13))
        settings = {"step": i + 1, "learning_rate": 0.02, "weight_decay": 0.1, "grad_clip": 1.0}
        want, _ = reference.training_step(graph, parameters, moments, [batch], **settings)
        assert loss == pytest.approx(want, abs=1e-5), f"step {i + 1}"
    changed = np.linalg.norm(parameters["fcw"] - start["fcw"]) / np.linalg.norm(start["fcw"])
    assert changed > 0.1, "the steps were large enough to tell optimizers apart"
