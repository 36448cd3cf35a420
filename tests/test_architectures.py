"""config.json of every architecture, as published: read, refused by name, written and read back."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmgen import architectures, config, huggingface, models
from llmgen.errors import UserError
from llmgen.formats import weights

LLAMA_3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED = {  # preset -> what its config.json on the hub says, as far as it matters
    "gpt2-124m": {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "resid_pdrop": 0.1},
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA_3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"],
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
}
LLAMA = PUBLISHED["llama-3.2-1b"]
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}


def folder(path: Path, given: dict) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(given))
    return str(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_its_preset(tmp_path, name):
    assert config.load(folder(tmp_path, PUBLISHED[name])).model == config.load(name).model


def test_older_and_newer_forms_of_the_rotary_settings_say_the_same(tmp_path):
    older = LLAMA
    newer = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {**LLAMA_3, "rope_theta": 500000.0}
    oldest = {**LLAMA, "rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA_3.items() if k != "rope_type"}}}
    read = [config.load(folder(tmp_path, given)).model for given in (older, newer, oldest)]
    assert read[0] == read[1] == read[2] == config.load("llama-3.2-1b").model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.rope_type = "linear" cannot be expressed'),
        ({"rope_scaling": {**LLAMA_3, "rope_type": "yarn"}}, '"yarn" cannot be expressed; only "default" or "llama3" can'),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_parameters.factor = null"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "only one object for all layers can"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"mlp_bias": True}, "mlp_bias = true cannot be expressed; only false can"),
        ({"hidden_act": "gelu_fastest"}, 'hidden_act = "gelu_fastest" cannot be expressed'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 5}, "num_heads = 32 is not a multiple of num_kv_heads = 5"),
        ({"architectures": ["LlamaForSequenceClassification"]}, 'only ["LlamaForCausalLM"] can'),
        ({"model_type": "deepseek_v3", "architectures": []}, 'model_type = "deepseek_v3" cannot be expressed'),
        ({"tie_word_embeddings": None}, "tie_word_embeddings = null"),
        ({"rms_norm_eps": "small"}, 'rms_norm_eps = "small"'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        config.load(folder(tmp_path, {**LLAMA, **changes}))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": None}, (0,)),
        ({"model_type": "mistral"}, (4096,)),
        ({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 0}, (0,)),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (0, 8, 8, 8)),
        ({"model_type": "gemma2"}, (4096, 0)),
        ({"model_type": "gemma2", "layer_types": ["full_attention"] * 4}, (0,)),
    ],
    ids=lambda value: "",
)
def test_windows_are_read_as_the_shortest_pattern(tmp_path, changes, window):
    given = {**SMALL, "num_hidden_layers": 4, "hidden_size": 1024, "head_dim": 256, **changes}
    assert config.load(folder(tmp_path, given)).model.attention_window == window


@pytest.mark.parametrize("name", config.presets())
def test_every_preset_that_can_be_written_reads_back(name):
    read = config.load(name)
    if read.family == "speedrun":
        with pytest.raises(UserError, match="no architecture of HuggingFace's says all of this model"):
            architectures.of(read, name)
        return
    architecture = architectures.of(read, name)
    assert architecture.family == {"gpt3": "gpt2"}.get(read.family, read.family)
    assert list(architectures.parts(architecture, read.model, models.parameter_shapes(read)))


def test_a_model_of_another_family_is_written_as_the_architecture_that_fits():
    plain = config.load("mistral-7b", overrides={"attention_window": [0]})
    assert architectures.of(plain, "plain").name == "MistralForCausalLM"
    biased = dataclasses.replace(plain, model=dataclasses.replace(plain.model, qkv_bias=True))
    assert architectures.of(biased, "biased").name == "Qwen2ForCausalLM"
    with pytest.raises(UserError, match=r"LlamaForCausalLM lacks residual_scale = 0\.5"):
        architectures.of(config.load("llama-3.2-1b", overrides={"residual_scale": 0.5}), "scaled")


# Sharded and half precision sources, and memory.


def save_shards(path: Path, given: dict, stored: str, values=None) -> dict[str, np.ndarray]:
    """A random model in two shards with an index; the float32 values of its tensors."""
    read = config.load(folder(path, given))
    architecture = architectures.of(read, "small")
    parts = architectures.parts(architecture, read.model, models.parameter_shapes(read))
    rng, found, index = np.random.default_rng(0), {}, {}
    encode = {"F16": lambda x: x.astype("<f2"), "BF16": weights.fp32_to_bf16}[stored]
    decode = {"F16": lambda x: x.astype("<f4"), "BF16": weights.bf16_to_fp32}[stored]
    for shard in range(2):
        header, raw = {}, b""
        for i, (name, part) in enumerate(parts.items()):
            if i % 2 == shard:
                value = encode(rng.standard_normal(part.shape, dtype=np.float32))
                full = name if name.startswith("lm_head") else architecture.prefix + name
                found[name], index[full] = decode(value), f"model-{shard}.safetensors"
                offsets = [len(raw), len(raw) + value.nbytes]
                header[full] = {"dtype": stored, "shape": part.shape, "data_offsets": offsets}
                raw += value.tobytes()
        text = json.dumps(header).encode()
        (path / f"model-{shard}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return found


@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_shards_of_half_precision_are_packed_into_our_tensors(tmp_path, stored):
    found = save_shards(tmp_path / "hf", SMALL, stored)
    made = huggingface.export_weights(str(tmp_path / "hf"), tmp_path / "w.bin")
    back = weights.read(tmp_path / "w.bin", models.parameter_shapes(made))
    for layer in range(2):
        packed = [found[f"layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv"]
        np.testing.assert_array_equal(back["qkvw"][layer], np.concatenate(packed))
        np.testing.assert_array_equal(back["gatew"][layer], found[f"layers.{layer}.mlp.gate_proj.weight"])
    np.testing.assert_array_equal(back["headw"][:101], found["lm_head.weight"])
    assert not back["wte"][101:].any() and not back["headw"][101:].any()


def test_a_model_of_bf16_comes_back_bit_by_bit(tmp_path):
    save_shards(tmp_path / "hf", SMALL, "BF16")
    huggingface.export_weights(str(tmp_path / "hf"), tmp_path / "w.bin", "bf16")
    huggingface.import_weights(tmp_path / "w.bin", tmp_path / "back")
    huggingface.export_weights(str(tmp_path / "back"), tmp_path / "again.bin", "bf16")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "w.bin").read_bytes()


MEASURE = """
import resource, sys
from llmgen import huggingface
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
huggingface.export_weights("hf", "w.bin", "bf16")
huggingface.import_weights("w.bin", "back")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in kilobytes")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Two layers of Llama 3.1 8B, 3 GB of bfloat16 and its largest tensors: sparse files, so nothing is there to read."""
    eight = {**LLAMA, "num_hidden_layers": 2, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128}
    eight["tie_word_embeddings"] = False
    read = config.load(folder(tmp_path / "hf", eight))
    parts = architectures.parts(architectures.of(read, "hf"), read.model, models.parameter_shapes(read))
    header, at = {}, 0
    for name, part in parts.items():
        end = at + 2 * int(np.prod(part.shape))
        header[name if name.startswith("lm_head") else f"model.{name}"] = {
            "dtype": "BF16",
            "shape": part.shape,
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    with open(tmp_path / "hf" / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    result = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True, check=True)
    print(f"\n{at:,} bytes of tensors, {int(result.stdout) * 1024:,} bytes more resident at most")
    assert at > 2.9e9 and int(result.stdout) * 1024 < 300e6, result.stdout
