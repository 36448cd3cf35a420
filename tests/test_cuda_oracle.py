"""The CUDA program in bf16 beside PyTorch in bf16 autocast on the same GPU: gradients, and a hundred steps of training."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llmgen import config as configs
from llmgen import models, program, reference, verify
from llmgen.cuda import architecture
from llmgen.formats import debug_state, tokens, weights
from llmgen.models import transformer

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(architecture.present() is None or not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
LINEARS = ("qkv", "attproj", "fc", "fcproj")


def initial_weights(config: configs.Config) -> dict[str, np.ndarray]:
    """GPT-2's initialisation."""
    rng = np.random.default_rng(0)
    values = {}
    for p in models.build(config).parameters:
        mean, std = transformer.initial(p, config)
        noise = rng.standard_normal([d.size for d in p.stacked]) if std else 0.0
        values[p.name] = np.full([d.size for d in p.stacked], mean, np.float32) + np.float32(std) * np.float32(noise)
    verify.clear_padding(values, models.build(config), config.model.vocab_size)
    return values


def pytorch_model(config: configs.Config, values: dict[str, np.ndarray]):
    """examples/gpt2_pytorch.py's model with these weights, and the parameter of each of ours: a list of layers, or one."""
    script = (Path(__file__).parent.parent / "examples" / "gpt2_pytorch.py").read_text().split("parser =")[0]
    names: dict = {}
    exec(script, names)
    m = config.model
    model = names["GPT2"](m.num_layers, m.num_heads, m.channels, m.vocab_size, m.max_seq_len).cuda()
    ours = {"wte": model.wte.weight, "wpe": model.wpe.weight, "lnfw": model.lnf.weight, "lnfb": model.lnf.bias}
    for name in ("ln1", "ln2", *LINEARS):
        ours[name + "w"] = [getattr(block, name).weight for block in model.blocks]
        ours[name + "b"] = [getattr(block, name).bias for block in model.blocks]
    with torch.no_grad():
        for name, parameter in ours.items():
            layers = parameter if isinstance(parameter, list) else [parameter]
            stacked = values[name] if isinstance(parameter, list) else [values[name][: len(parameter)]]
            for layer, value in zip(layers, stacked, strict=True):
                layer.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return model, ours


def prepared(folder: Path, config: configs.Config, text: np.ndarray):
    """The program, built, beside its weights and its data."""
    values = initial_weights(config)
    built = program.build(config, "cuda", "native", None, folder)
    weights.write(folder / "model.bin", config, models.parameter_shapes(config), values.items())
    tokens.write(folder / "train.bin", text, config.model.vocab_size)
    return values, [built.program.resolve(), "--load", "model.bin", "--train-data", "train.bin"]


def test_errors_of_gradients_are_those_of_autocast(tmp_path):
    config = configs.load("gpt2-124m", target="cuda", overrides={"batch_size": 4, "seq_len": 64})
    text = np.random.default_rng(1).integers(config.model.vocab_size, size=4 * 64 + 1)
    values, command = prepared(tmp_path, config, text)
    subprocess.run([*command, "--debug-state", "state.bin"], cwd=tmp_path, check=True, capture_output=True)
    shapes = models.parameter_shapes(config)
    state = debug_state.read(tmp_path / "state.bin", config.model.vocab_size, shapes)

    inputs, targets = text[:-1].reshape(4, 64), text[1:].reshape(4, 64)
    known = {"tokens": inputs, "targets": targets, "loss_scale": 1 / text[1:].size}
    known |= {name: value.astype(np.float64) for name, value in values.items()}
    want = reference.run(models.build(config).function("forward_backward"), known, set())
    whole = np.sqrt(sum(np.sum(want["d" + name] ** 2) for name in values))

    model, theirs = pytorch_model(config, values)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(torch.from_numpy(inputs).cuda(), torch.from_numpy(targets).cuda())
    loss.backward()
    assert abs(float(state.loss) - want["losses"].mean()) < 2e-3
    print(f"loss: ours off by {abs(float(state.loss) - want['losses'].mean()):.1e}")
    worst = 0.0
    for name, parameter in theirs.items():
        layers = parameter if isinstance(parameter, list) else [parameter]
        gradient = np.stack([p.grad.float().cpu().numpy() for p in layers]).reshape(-1, *parameter_shape(layers[0]))
        wanted = want["d" + name].reshape(-1, *want["d" + name].shape[-len(parameter_shape(layers[0])) :])
        ours = np.asarray(state.gradients[name]).reshape(wanted.shape)
        rows = gradient.shape[1] if gradient.ndim > 1 else None
        mine = verify.error(ours, wanted, 1e-4 * whole)
        his = verify.error(gradient, wanted[:, :rows], 1e-4 * whole)
        print(f"{name:<10} ours {mine:.2e}, autocast {his:.2e}: {mine / his:.2f}")
        worst = max(worst, mine / his)
    assert worst <= 1.5


def parameter_shape(parameter) -> tuple[int, ...]:
    return tuple(parameter.shape)


def test_a_hundred_steps_go_as_with_autocast(tmp_path):
    b, t, steps = 8, 256, 100
    config = configs.load("gpt2-124m", target="cuda", overrides={"batch_size": b, "seq_len": t, "num_layers": 12})
    source = b"".join(path.read_bytes() for path in sorted(Path(subprocess.__file__).parent.glob("*.py")))
    text = np.frombuffer(source, np.uint8)[: steps * b * t + 1].astype(np.int64)
    values, command = prepared(tmp_path, config, text)
    training = ["--lr", "3e-4", "--lr-schedule", "constant", "--weight-decay", "0.1", "--grad-clip", "1.0", "--val-every", "0"]
    command += [*training, "--steps", str(steps), "--log-dir", "log"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    lines = map(json.loads, (tmp_path / "log" / "metrics.jsonl").read_text().splitlines())
    ours = np.array([line["loss"] for line in lines if "loss" in line])

    model, _ = pytorch_model(config, values)
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == d], "weight_decay": 0.1 * d} for d in (1, 0)]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    theirs = []
    for step in range(steps):
        batch = torch.from_numpy(text[step * b * t : (step + 1) * b * t + 1]).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch[:-1].view(b, t), batch[1:].view(b, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
    difference = np.abs(ours - np.array(theirs))
    print(
        f"mean difference of steps 50 to 100: {difference[50:].mean():.4f}; losses at the end {ours[-1]:.4f}, {theirs[-1]:.4f}"
    )
    assert difference[50:].mean() <= 0.01
