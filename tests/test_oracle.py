"""The whole way against PyTorch in float64: a transformers model to weights, to a program, to logits, loss and gradients.

Nothing of llmgen's own arithmetic is on the other side of these comparisons: they hold even if its reference were wrong.
"""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command import succeeds

from llmgen.formats import debug_state, tokens, weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 101, "n_positions": 40}
GPT2_124M = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}
FILE_BYTES = {"fp32": 497_904_640, "bf16": 248_952_832}  # of gpt2-124m, as llm.c writes it


def random_model(**sizes):
    """A GPT-2 with every value random: with biases 0 and norms 1, as initialised, a mistake in them would go unseen."""
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                norm = ".ln_" in name and name.endswith("weight")
                value.copy_(1 + 0.1 * torch.randn_like(value) if norm else 0.05 * torch.randn_like(value))
    return model.eval()  # without dropout


def program_of(model, folder: Path, *flags) -> tuple[Path, Path]:
    """The model's weights file, and the program built for it by the file's own header."""
    model.save_pretrained(folder / "hf")
    succeeds("export-weights", "hf", "--out", "model.bin", cwd=folder)
    succeeds("build", "--config", "model.bin", *flags, "--out", "built", cwd=folder)
    return folder / "model.bin", folder / "built" / "train_gpt2"


def run(program: Path, *flags) -> None:
    command = [str(word) for word in (program, *flags)]
    result = subprocess.run(command, cwd=program.parent.parent, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stderr == "", result


def batch(text: np.ndarray, b: int, t: int, step: int = 0) -> tuple:
    """Inputs and targets (B, T) of a step."""
    piece = torch.from_numpy(text[step * b * t : (step + 1) * b * t + 1].astype(np.int64))
    return piece[:-1].reshape(b, t), piece[1:].reshape(b, t)


def loss_of(model, inputs, targets):
    """Mean cross entropy over all tokens, and the logits (B, T, V)."""
    logits = model(inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


def compare_with_transformers(folder: Path, b: int, t: int, **sizes) -> dict[str, float]:
    """The errors of logits, loss and every gradient, by name: of a tensor relative to its norm, of the loss absolute."""
    model = random_model(**sizes)
    exported, program = program_of(model, folder, "--batch-size", b, "--seq-len", t)
    text = np.random.default_rng(2).integers(0, sizes["vocab_size"], b * t + 1)
    tokens.write(folder / "train.bin", text, sizes["vocab_size"])
    run(program, "--load", "model.bin", "--train-data", "train.bin", "--debug-state", "state.bin")
    succeeds("import-weights", "model.bin", "--out", "back", "--state", "state.bin", cwd=folder)
    got = safetensors_of(folder / "back" / "gradients.safetensors")
    read = weights.config_tables(exported)["model"]
    made = json.loads("\n".join(succeeds("plan", "--config", "model.bin", "--json", cwd=folder)))
    shapes = {row["name"]: tuple(row["shape"]) for row in made["parameters"]}
    state = debug_state.read(folder / "state.bin", read["vocab_size"], shapes)

    model = model.double()
    loss, logits = loss_of(model, *batch(text, b, t))
    loss.backward()
    wanted = {name: value.grad.numpy() for name, value in model.named_parameters()}
    assert sorted(got) == sorted(wanted)
    whole = math.sqrt(sum(np.sum(w**2) for w in wanted.values()))
    errors = {"logits": relative(state.logits, logits.detach().numpy()), "loss": abs(state.loss - loss.item())}
    # The norm of a true gradient can be zero (that of the keys' biases, say): then the floor counts.
    return errors | {name: relative(got[name], want, 1e-4 * whole) for name, want in wanted.items()}


def safetensors_of(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def relative(got: np.ndarray, want: np.ndarray, floor: float = 0.0) -> float:
    return float(np.linalg.norm((got - want).ravel()) / max(np.linalg.norm(want.ravel()), floor))


def worst(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {errors[name]:.1e}" for name in sorted(errors, key=errors.get)[:-4:-1])


def test_logits_loss_and_every_gradient_are_those_of_transformers(tmp_path):
    errors = compare_with_transformers(tmp_path, b=3, t=37, **SMALL)
    assert len(errors) == 2 + 2 + 3 * 12 + 2
    assert max(errors.values()) <= 1e-5, worst(errors)


@pytest.mark.slow
def test_gpt2_124m_is_that_of_transformers(tmp_path, capsys):
    errors = compare_with_transformers(tmp_path, b=4, t=64, **GPT2_124M)
    with capsys.disabled():
        print(f"\ngpt2-124m, 4 x 64: logits {errors['logits']:.1e}, loss {errors['loss']:.1e}; worst {worst(errors)}")
    assert len(errors) == 2 + 2 + 12 * 12 + 2
    assert max(errors.values()) <= 1e-5, worst(errors)
    succeeds("export-weights", "hf", "--out", "half.bin", "--dtype", "bf16", cwd=tmp_path)
    sizes = {"fp32": (tmp_path / "model.bin").stat().st_size, "bf16": (tmp_path / "half.bin").stat().st_size}
    assert sizes == FILE_BYTES


def test_ten_steps_of_adamw_are_those_of_pytorch(tmp_path):
    b, t, steps, clip, rate = 4, 20, 10, 0.7, 2e-3
    model = random_model(**SMALL)
    _, program = program_of(model, tmp_path, "--batch-size", b, "--seq-len", t)
    text = np.random.default_rng(3).integers(0, SMALL["vocab_size"], steps * b * t + 1)
    tokens.write(tmp_path / "train.bin", text, SMALL["vocab_size"])
    given = ["--lr", rate, "--weight-decay", 0.1, "--grad-clip", clip, "--steps", steps, "--log-dir", "log"]
    run(program, "--load", "model.bin", "--train-data", "train.bin", *given)
    rows = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]

    model = model.double()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)
    wanted = []
    for step in range(steps):
        loss, _ = loss_of(model, *batch(text, b, t, step))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        wanted.append((loss.item(), norm.item()))
    assert max(norm for _, norm in wanted) > clip > 0, "some step is clipped"
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in wanted], abs=1e-5, rel=0)
    assert [row["grad_norm"] for row in rows] == pytest.approx([norm for _, norm in wanted], rel=1e-4)
