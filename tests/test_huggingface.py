"""HuggingFace models to weights and back: identical tensors, refusals by name, the hub through its real client."""

import dataclasses
import http.server
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from llmgen import architectures, config, huggingface, models
from llmgen.config import ModelConfig
from llmgen.errors import UserError
from llmgen.formats import debug_state, weights

MODEL = ModelConfig(num_layers=2, num_heads=2, channels=6, vocab_size=101, max_seq_len=5)
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 6, "vocab_size": 101, "n_positions": 5}
CONFIG = config.from_tables(
    "t", {"family": "gpt2", "model": dataclasses.asdict(MODEL), "program": {"seq_len": MODEL.max_seq_len}}, "t"
)
MODEL = CONFIG.model  # with the sizes that follow
SHAPES = models.parameter_shapes(CONFIG)


def hf_tensors(seed=0, prefix="transformer.") -> dict[str, np.ndarray]:
    """A GPT-2's state dict, written out independently of llmgen's tables."""
    rng = np.random.default_rng(seed)
    c, v, t = 6, 101, 5
    shapes = {"wte.weight": (v, c), "wpe.weight": (t, c), "ln_f.weight": (c,), "ln_f.bias": (c,)}
    for layer in range(2):
        h = f"h.{layer}."
        shapes |= {h + "ln_1.weight": (c,), h + "ln_1.bias": (c,), h + "ln_2.weight": (c,), h + "ln_2.bias": (c,)}
        shapes |= {h + "attn.c_attn.weight": (c, 3 * c), h + "attn.c_attn.bias": (3 * c,)}
        shapes |= {h + "attn.c_proj.weight": (c, c), h + "attn.c_proj.bias": (c,)}
        shapes |= {h + "mlp.c_fc.weight": (c, 4 * c), h + "mlp.c_fc.bias": (4 * c,)}
        shapes |= {h + "mlp.c_proj.weight": (4 * c, c), h + "mlp.c_proj.bias": (c,)}
    return {prefix + name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def save_raw(path: Path, tensors: dict[str, tuple[str, tuple, bytes]]) -> None:
    """A safetensors file of (type, shape, bytes)."""
    header, at = {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(raw for _, _, raw in tensors.values()))


def save(folder: Path, tensors: dict[str, np.ndarray], **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    given = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **SIZES, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in given.items() if v != "absent"}))
    save_raw(folder / "model.safetensors", {n: ("F32", t.shape, t.tobytes()) for n, t in tensors.items()})
    return folder


def check_weights(path, tensors, prefix="transformer.", rtol=0.0):
    got = weights.read(path, SHAPES)
    np.testing.assert_allclose(got["wte"][:101], tensors[prefix + "wte.weight"], rtol=rtol)
    assert not got["wte"][101:].any()
    np.testing.assert_allclose(got["lnfb"], tensors[prefix + "ln_f.bias"], rtol=rtol)
    for layer in range(2):
        h = f"{prefix}h.{layer}."
        np.testing.assert_allclose(got["qkvw"][layer], tensors[h + "attn.c_attn.weight"].T, rtol=rtol)
        np.testing.assert_allclose(got["attprojw"][layer], tensors[h + "attn.c_proj.weight"].T, rtol=rtol)
        np.testing.assert_allclose(got["fcw"][layer], tensors[h + "mlp.c_fc.weight"].T, rtol=rtol)
        np.testing.assert_allclose(got["fcprojw"][layer], tensors[h + "mlp.c_proj.weight"].T, rtol=rtol)
        np.testing.assert_allclose(got["fcb"][layer], tensors[h + "mlp.c_fc.bias"], rtol=rtol)
        np.testing.assert_allclose(got["ln2w"][layer], tensors[h + "ln_2.weight"], rtol=rtol)


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        huggingface.export_weights(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Folders and files


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_folder_becomes_weights_with_linear_layers_transposed_and_rows_padded(tmp_path, prefix):
    tensors = hf_tensors(prefix=prefix)
    source = save(tmp_path / "hf", tensors)
    made = huggingface.export_weights(str(source), tmp_path / "w.bin")
    assert made.model == CONFIG.model
    check_weights(tmp_path / "w.bin", tensors, prefix)
    assert (tmp_path / "w.bin").stat().st_size == weights.file_bytes(SHAPES)


def test_large_tensors_pass_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "BLOCK", 7)
    tensors = hf_tensors()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    huggingface.export_weights(str(save(tmp_path / "hf", tensors)), tmp_path / "w.bin")
    check_weights(tmp_path / "w.bin", tensors)
    huggingface.import_weights(tmp_path / "w.bin", tmp_path / "back")
    huggingface.export_weights(str(tmp_path / "back"), tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "w.bin").read_bytes()


@pytest.mark.parametrize("stored", ["F64", "F16", "BF16"])
def test_other_number_formats_are_read(tmp_path, stored):
    tensors = hf_tensors()
    source = save(tmp_path / "hf", tensors)
    encode = {
        "F64": lambda t: t.astype("<f8"),
        "F16": lambda t: t.astype("<f2"),
        "BF16": lambda t: weights.fp32_to_bf16(t),
    }[stored]
    save_raw(source / "model.safetensors", {n: (stored, t.shape, encode(t).tobytes()) for n, t in tensors.items()})
    huggingface.export_weights(str(source), tmp_path / "w.bin")
    check_weights(tmp_path / "w.bin", tensors, rtol={"F64": 0, "F16": 2**-10, "BF16": 2**-8}[stored])
    if stored == "BF16":
        huggingface.export_weights(str(source), tmp_path / "b.bin", "bf16")
        fp32, bf16 = weights.read(tmp_path / "w.bin", SHAPES), weights.read(tmp_path / "b.bin", SHAPES)
        for name in SHAPES:
            np.testing.assert_array_equal(fp32[name], bf16[name])


def test_shards_are_read_by_their_index(tmp_path):
    tensors = hf_tensors()
    source = save(tmp_path / "hf", tensors)
    (source / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, kept in parts.items():
        save_raw(source / file, {n: ("F32", tensors[n].shape, tensors[n].tobytes()) for n in kept})
    index = {"weight_map": {n: file for file, kept in parts.items() for n in kept}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    huggingface.export_weights(str(source), tmp_path / "w.bin")
    check_weights(tmp_path / "w.bin", tensors)
    (source / "model-2.safetensors").unlink()
    assert "has no model-2.safetensors, which" in refusal(str(source), tmp_path / "w.bin")
    for bad in ({}, {"weight_map": {"x": 3}}, {"weight_map": {"x": "../secret.safetensors"}}):
        (source / "model.safetensors.index.json").write_text(json.dumps(bad))
        assert "index.json" in refusal(str(source), tmp_path / "w.bin")


def test_a_file_needs_a_config_beside_it_or_given(tmp_path):
    tensors = hf_tensors()
    source = save(tmp_path / "hf", tensors)
    file = str(source / "model.safetensors")
    huggingface.export_weights(file, tmp_path / "a.bin")
    (source / "config.json").unlink()
    assert "there is no config.json beside it; put it there or name one with --config" in refusal(file, tmp_path / "b.bin")
    huggingface.export_weights(file, tmp_path / "b.bin", config=CONFIG)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    large = CONFIG.replace(vocab_size=102)
    assert "wte.weight has shape (101, 6), expected (102, 6)" in refusal(file, tmp_path / "c.bin", config=large)


def test_masks_that_old_files_hold_are_left_out(tmp_path):
    tensors = hf_tensors()
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = np.ones((1, 1, 5, 5), np.float32)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    huggingface.export_weights(str(save(tmp_path / "hf", tensors)), tmp_path / "w.bin")
    check_weights(tmp_path / "w.bin", tensors)


def damaged(name, value):
    tensors = hf_tensors()
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    return tensors


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("transformer.h.1.mlp.c_fc.bias", None, "tensor h.1.mlp.c_fc.bias is missing"),
        ("transformer.h.0.attn.c_attn.weight", np.zeros((18, 6), "f4"), "has shape (18, 6), expected (6, 18)"),
        ("transformer.h.2.ln_1.weight", np.zeros(6, "f4"), "transformer.h.2.ln_1.weight is not part of this GPT2LMHeadModel"),
        ("score.weight", np.zeros(6, "f4"), "score.weight is not part of this GPT2LMHeadModel"),
        ("lm_head.weight", np.zeros((101, 6), "f4"), "lm_head.weight differs from transformer.wte.weight, though the config"),
        ("lm_head.weight", np.zeros((100, 6), "f4"), "lm_head.weight differs"),
        ("wpe.weight", np.zeros((5, 6), "f4"), "is there twice"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path, name, value, words):
    source = save(tmp_path / "hf", damaged(name, value))
    assert words in refusal(str(source), tmp_path / "w.bin")
    assert not (tmp_path / "w.bin").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "bert"}, 'model_type = "bert" cannot be expressed; only "gpt2", "llama"'),
        ({"model_type": "llama"}, 'architectures = ["GPT2LMHeadModel"] cannot be expressed; only ["LlamaForCausalLM"] can'),
        ({"architectures": ["GPT2ForSequenceClassification"]}, 'architectures = ["GPT2ForSequenceClassification"]'),
        ({"activation_function": "tanh"}, 'activation_function = "tanh" cannot be expressed; only "gelu_new" or'),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon = 0 cannot be expressed; only a positive number"),
        ({"n_inner": 12.5}, "n_inner = 12.5 cannot be expressed; only a positive whole number"),
        ({"scale_attn_weights": False}, "scale_attn_weights = false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true"),
        ({"add_cross_attention": True}, "add_cross_attention = true"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no" cannot be expressed; only true or false'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_head": 4}, "channels = 6 is not divisible by num_heads = 4"),
        ({"n_layer": "2"}, 'n_layer = "2" cannot be expressed'),
        ({"model_type": "absent", "architectures": "absent"}, "it is not a model's config.json"),
    ],
)
def test_a_config_that_cannot_be_expressed_is_refused_by_name(tmp_path, changes, words):
    source = save(tmp_path / "hf", hf_tensors(), **changes)
    assert words in refusal(str(source), tmp_path / "w.bin")


def test_what_computes_the_same_is_accepted_and_dropout_is_ignored_with_a_line(tmp_path):
    same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 24, "reorder_and_upcast_attn": True}
    source = save(tmp_path / "hf", hf_tensors(), **same, attn_pdrop=0.1, resid_pdrop=0.0)
    notes = []
    huggingface.export_weights(str(source), tmp_path / "w.bin", note=notes.append)
    assert len(notes) == 1 and "dropout is ignored (attn_pdrop = 0.1)" in notes[0]


def test_a_huggingface_folder_is_a_config(tmp_path, capsys):
    source = save(tmp_path / "hf", hf_tensors(), attn_pdrop=0.1)
    assert config.load(str(source)).model == CONFIG.model
    assert capsys.readouterr() == ("", "")


def test_a_weights_file_is_a_config(tmp_path):
    huggingface.export_weights(str(save(tmp_path / "hf", hf_tensors())), tmp_path / "w.bin")
    assert config.load(str(tmp_path / "w.bin")).model == CONFIG.model
    os.truncate(tmp_path / "w.bin", 2000)
    with pytest.raises(UserError, match="is 2000 bytes, expected"):
        config.load(str(tmp_path / "w.bin"))


def test_pickles_are_refused_with_a_hint(tmp_path):
    source = save(tmp_path / "hf", hf_tensors())
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "only a pickle (pytorch_model.bin)" in refusal(str(source), tmp_path / "w.bin")
    assert "save_pretrained" in refusal(str(source / "pytorch_model.bin"), tmp_path / "w.bin")


@pytest.mark.parametrize(
    "name, words",
    [
        ("./none", "./none: no such file or folder"),
        ("/none/at/all", "/none/at/all: no such file or folder"),
        ("none.safetensors", "none.safetensors: no such file or folder"),
        ("empty", "empty: there is no config.json beside it"),
        ("text.txt", "text.txt: is no .safetensors file"),
        ("w.bin", "w.bin: is a weights file of ours already"),
        ("bad.safetensors", "bad.safetensors: is not a safetensors file"),
        ("not a/hub/id", "neither an existing path nor a hub id"),
    ],
)
def test_a_source_that_is_none_gives_one_line(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    (Path("empty") / "model.safetensors").write_bytes(b"")
    Path("text.txt").write_text("text")
    Path("bad.safetensors").write_bytes(b"\xff" * 100)
    Path("config.json").write_text(json.dumps({"model_type": "gpt2", **SIZES}))
    tensors = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    weights.write("w.bin", CONFIG, SHAPES, tensors.items())
    assert words in refusal(name, "out.bin")
    assert not Path("out.bin").exists()


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    source = save(tmp_path / "hf", hf_tensors())
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    assert "model.safetensors: is not a safetensors file" in refusal(str(source), tmp_path / "w.bin")


def test_a_full_device_gives_one_line(tmp_path):
    source = save(tmp_path / "hf", hf_tensors())
    assert refusal(str(source), "/dev/full").startswith("/dev/full: cannot be written: No space left on device")


# The way back


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_come_back_as_a_folder_with_the_same_tensors(tmp_path, dtype):
    from safetensors import safe_open

    tensors = hf_tensors()
    huggingface.export_weights(str(save(tmp_path / "hf", tensors)), tmp_path / "w.bin", dtype)
    written = huggingface.import_weights(tmp_path / "w.bin", tmp_path / "new" / "back")
    assert sorted(p.name for p in written) == ["config.json", "generation_config.json", "model.safetensors"]
    with safe_open(tmp_path / "new" / "back" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors)
        if dtype == "fp32":
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(file.get_tensor(name), tensor)
    huggingface.export_weights(str(tmp_path / "new" / "back"), tmp_path / "again.bin", dtype)
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "w.bin").read_bytes()


def test_gradients_of_a_debug_state_come_under_the_same_names(tmp_path):
    from safetensors.numpy import load_file

    huggingface.export_weights(str(save(tmp_path / "hf", hf_tensors())), tmp_path / "w.bin", "bf16")
    wanted = hf_tensors(seed=5)
    huggingface.export_weights(str(save(tmp_path / "grads", wanted)), tmp_path / "g.bin")
    gradients = weights.read(tmp_path / "g.bin", SHAPES)
    ids, logits = np.zeros((2, 3), int), np.zeros((2, 3, 101))
    debug_state.write(tmp_path / "s.bin", ids, ids, logits, 1.0, SHAPES, gradients.items())
    huggingface.import_weights(tmp_path / "w.bin", tmp_path / "back", state=tmp_path / "s.bin")
    got = load_file(tmp_path / "back" / "gradients.safetensors")
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(got[name], tensor)


@pytest.mark.parametrize("file, out, words", [("none.bin", "o", "none.bin: no such file"), ("w.bin", "w.bin", "stands where")])
def test_what_cannot_be_imported_gives_one_line(tmp_path, monkeypatch, file, out, words):
    monkeypatch.chdir(tmp_path)
    huggingface.export_weights(str(save(tmp_path / "hf", hf_tensors())), "w.bin")
    with pytest.raises(UserError, match=words):
        huggingface.import_weights(file, out)
    with pytest.raises(UserError, match="magic number"):
        huggingface.import_weights("w.bin", "o", state="w.bin")
    assert not Path("o").exists()


def randomised(torch, **sizes):
    """transformers' own GPT-2, all values random: with biases 0 and norms 1, as initialised, mistakes go unseen."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
                parameter.copy_(mean + 0.1 * torch.randn_like(parameter))
    return model


def test_transformers_loads_what_comes_back_with_identical_tensors_and_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = randomised(torch, **SIZES)
    model.save_pretrained(tmp_path / "hf")
    huggingface.export_weights(str(tmp_path / "hf"), tmp_path / "w.bin")
    huggingface.import_weights(tmp_path / "w.bin", tmp_path / "back")
    back, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), (_, b) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.arange(10).reshape(2, 5) * 7
    with torch.no_grad():
        assert torch.equal(model(ids).logits, back.eval()(ids).logits)
    assert back.config.eos_token_id is None


def test_a_bf16_file_comes_back_as_a_bf16_model(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = randomised(torch, **SIZES).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    huggingface.export_weights(str(tmp_path / "hf"), tmp_path / "w.bin", "bf16")
    huggingface.import_weights(tmp_path / "w.bin", tmp_path / "back")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back", dtype="auto")
    assert back.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype, size", [("fp32", 497_904_640), ("bf16", 248_952_832)])
def test_gpt2_124m_has_its_size_and_comes_back(tmp_path, dtype, size):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).save_pretrained(tmp_path / "hf")
    huggingface.export_weights(str(tmp_path / "hf"), tmp_path / "w.bin", dtype)
    assert (tmp_path / "w.bin").stat().st_size == size
    huggingface.import_weights(tmp_path / "w.bin", tmp_path / "back")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back", dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))


# The hub


@pytest.fixture
def hub(tmp_path):
    """A hub on the loopback that serves org/name from a folder; org/locked is gated."""
    root = tmp_path / "hub"

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, body: bool):
            repo, _, name = self.path.strip("/").partition("/resolve/main/")
            file = root / repo / name
            self.server.asked.append(self.path)
            if not (root / repo).is_dir() or not name or not file.is_file() or repo == "org/locked":
                code = "RepoNotFound" if not (root / repo).is_dir() else "EntryNotFound"
                code = "GatedRepo" if repo == "org/locked" else code
                self.send_response({"RepoNotFound": 401, "GatedRepo": 403}.get(code, 404))
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", "no")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = file.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{abs(hash(data)):040x}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.root = [], root
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


EXPORT = """
import sys
from llmgen import huggingface
from llmgen.errors import UserError
try:
    print(huggingface.export_weights(sys.argv[1], sys.argv[2]).name)
except UserError as error:
    sys.exit(f"{error}")
"""


def export_from(hub, tmp_path, name, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    kept |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
    } | environment
    command = [sys.executable, "-c", EXPORT, name, str(tmp_path / "w.bin")]
    here = str(Path(huggingface.__file__).parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [here, kept.get("PYTHONPATH")]))
    return subprocess.run(command, env=kept, cwd=tmp_path, capture_output=True, text=True, timeout=60)


def test_a_hub_id_is_fetched_from_the_endpoint_and_kept(hub, tmp_path):
    tensors = hf_tensors()
    save(hub.root / "org" / "name", tensors)
    done = export_from(hub, tmp_path, "org/name")
    assert (done.returncode, done.stderr) == (0, "")
    check_weights(tmp_path / "w.bin", tensors)
    asked = len(hub.asked)
    done = export_from(hub, tmp_path, "org/name", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(hub.asked) == asked


def test_an_existing_path_wins_over_the_hub(hub, tmp_path):
    save(hub.root / "org" / "name", hf_tensors(1))
    tensors = hf_tensors(2)
    save(tmp_path / "org" / "name", tensors)
    assert export_from(hub, tmp_path, "org/name").returncode == 0
    check_weights(tmp_path / "w.bin", tensors)
    assert hub.asked == []


@pytest.mark.parametrize(
    "name, words",
    [
        ("org/none", "neither an existing path nor a model on the hub"),
        ("org/locked", "accept it there and log in"),
        ("org/pickle", "only a pickle (pytorch_model.bin)"),
        ("org/empty", "has neither model.safetensors nor"),
        ("org/bare", "has no config.json on the hub"),
    ],
)
def test_what_the_hub_does_not_have_gives_one_line(hub, tmp_path, name, words):
    for repo in ("locked", "pickle", "empty"):
        save(hub.root / "org" / repo, hf_tensors())
    (hub.root / "org" / "bare").mkdir()
    (hub.root / "org" / "pickle" / "model.safetensors").rename(hub.root / "org" / "pickle" / "pytorch_model.bin")
    (hub.root / "org" / "empty" / "model.safetensors").unlink()
    done = export_from(hub, tmp_path, name)
    assert done.returncode == 1
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "w.bin").exists()


def test_what_is_not_in_the_cache_cannot_be_had_offline(hub, tmp_path):
    done = export_from(hub, tmp_path, "org/name", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.startswith("org/name: cannot be fetched from the hub: ") and done.stderr.count("\n") == 1


@pytest.mark.slow  # the client tries again for half a minute
def test_a_hub_that_does_not_answer_gives_one_line(hub, tmp_path):
    done = export_from(hub, tmp_path, "org/name", HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("org/name: cannot be fetched from the hub: ") and done.stderr.count("\n") == 1


def test_the_names_of_a_gpt2_are_all_there():
    assert list(architectures.ARCHITECTURES[0].tensors) == [*SHAPES, "headw"]
    assert sum(math.prod(shape) for shape in SHAPES.values()) == weights.file_bytes(SHAPES) // 4 - 256
