import json

import numpy as np
import pytest

from llmgen import config, models, plan


@pytest.fixture(scope="module")
def gpt2():
    return plan.make(config.load("gpt2-124m"))


def test_the_parameter_table_of_gpt2_124m_is_that_of_llm_c(gpt2):
    rows = {p.name: (tuple(d.size for d in p.tensor.stacked), p.file_offset) for p in gpt2.parameters}
    assert list(rows) == [
        "wte",
        "wpe",
        "ln1w",
        "ln1b",
        "qkvw",
        "qkvb",
        "attprojw",
        "attprojb",
        "ln2w",
        "ln2b",
        "fcw",
        "fcb",
        "fcprojw",
        "fcprojb",
        "lnfw",
        "lnfb",
    ]
    assert rows["wte"] == ((50304, 768), 0)
    assert rows["qkvw"] == ((12, 2304, 768), 157_754_368 - 1024)
    assert rows["lnfb"][1] + 768 * 4 == 497_903_616
    assert models.count(config.load("gpt2-124m")) == 124_439_808


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2-355m", 354_823_168), ("gpt2-774m", 774_030_080), ("gpt2-1558m", 1_557_611_200)],
)
def test_the_larger_presets_have_their_published_number_of_parameters(name, count):
    assert models.count(config.load(name)) == count


def test_the_json_plan_has_the_fields_it_promises(gpt2):
    made = json.loads(json.dumps(gpt2.to_json(threads=2)))
    assert {"config", "target", "parameters", "activations", "memory", "flops_per_token"} <= made.keys()
    for row in made["parameters"]:
        assert row.keys() == {"name", "shape", "dtype", "offset", "file_offset", "bytes"}
        assert row["bytes"] == 4 * int(np.prod(row["shape"]))
        assert row["offset"] % 64 == 0
    for row in made["activations"]:
        assert row.keys() == {"name", "shape", "dtype", "offset", "bytes", "per_layer"}
        assert row["offset"] % 64 == 0 and row["bytes"] >= 4 * int(np.prod(row["shape"]))
    memory = made["memory"]
    parts = ("parameters", "gradients", "optimizer", "activations", "arena")
    assert memory["total"] == sum(memory[p] for p in parts) + 2 * memory["scratch_per_thread"]
    assert memory["arena"] >= memory["arena_lower_bound"]
    end = max(row["offset"] + row["bytes"] for row in made["activations"])
    assert end <= memory["activations"] + memory["arena"]
    assert memory["activations"] == sum(row["bytes"] for row in made["activations"] if row["per_layer"])


def test_the_flops_of_a_token_are_those_of_the_products_and_little_more(gpt2):
    model = gpt2.config.model
    c, layers, vp = model.channels, model.num_layers, model.padded_vocab_size
    attention = layers * 7 * c * 64  # forward 2, backward 5, a half for causality
    products = 6 * (12 * layers * c * c + vp * c) + attention
    assert products < gpt2.flops_per_token < 1.01 * products


def test_every_layer_of_every_parameter_is_aligned_in_memory_but_not_in_the_file():
    odd = config.load("gpt2-nano", overrides={"channels": 100, "num_heads": 5, "vocab_size": 101})
    made = plan.make(odd)
    end = file_end = 0
    for p in made.parameters:
        assert p.offset == end and p.file_offset == file_end
        assert p.offset % 16 == 0 and p.stride % 16 == 0 and p.stride >= p.count
        end += p.stride * p.layers
        file_end += 4 * p.count * p.layers
    assert made.parameter_values == end


def test_decay_falls_on_matrices_alone(gpt2):
    assert {p.name for p in gpt2.parameters if p.decay} == {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}


def test_initial_values_are_those_of_gpt2(gpt2):
    initial = {p.name: (p.initial_mean, p.initial_std) for p in gpt2.parameters}
    assert initial["wte"] == (0, 0.02) and initial["ln1w"] == (1, 0) and initial["fcb"] == (0, 0)
    assert initial["fcprojw"] == (0, pytest.approx(0.02 / 24**0.5))
    assert next(p.valid for p in gpt2.parameters if p.name == "wte") == 50257 * 768


def test_evaluate_fits_in_the_memory_of_training(gpt2):
    assert gpt2.evaluate.bytes <= gpt2.forward_backward.bytes


def test_what_muon_needs_between_steps_counts_in_the_arena_and_its_lower_bound():
    wide = {"optimizer": "muon", "num_layers": 1, "channels": 512, "batch_size": 1, "seq_len": 1, "max_seq_len": 1}
    made = plan.make(config.load("gpt2-nano", overrides=wide))
    needed = 4 * made.update_scratch
    assert made.memory.activations + made.memory.arena == needed > made.forward_backward.bytes
    assert made.memory.activations + made.memory.arena_lower_bound == needed
