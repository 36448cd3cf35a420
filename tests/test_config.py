import pytest

from llmgen import config, models
from llmgen.errors import UserError


def refused(**overrides) -> str:
    with pytest.raises(UserError) as error:
        config.load("gpt2-nano", overrides=overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


PUBLISHED = {  # parameters, as model cards or papers give them
    "gpt2-nano": None,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "gpt3-125m": 125e6,
    "gpt3-350m": 356e6,
    "gpt3-760m": 760e6,
    "gpt3-1.3b": 1.3e9,
    "gpt3-2.7b": 2.65e9,
    "gpt3-6.7b": 6.7e9,
    "smollm2-135m": 134_515_008,
    "speedrun-124m": 124_439_808 + 50257 * 768,  # a head of its own
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "gemma-2b": 2_506_172_416,
    "mistral-7b": 7_241_732_096,
    "llama-3.1-8b": 8_030_261_248,
}


def test_the_presets_have_the_published_numbers_of_parameters():
    assert set(config.presets()) == set(PUBLISHED)
    for name, published in PUBLISHED.items():
        if published:  # a float is rounded
            rounded = isinstance(published, float) or name == "speedrun-124m"
            assert models.count(config.load(name)) == pytest.approx(published, rel=0.02 if rounded else 0), name


def test_presets_are_listed_smallest_first():
    counts = [models.count(config.load(name)) for name in config.presets()]
    assert counts == sorted(counts)


def test_program_tables_of_a_target_override_the_shared_one():
    assert config.load("gpt2-124m").program == config.ProgramConfig(4, 64, "fp32")
    assert config.load("gpt2-124m", target="cuda").program == config.ProgramConfig(16, 1024, "bf16")


def test_a_preset_printed_as_toml_reads_back_as_itself(tmp_path):
    for name in config.presets():
        written = config.load(name)
        path = tmp_path / f"{name}.toml"
        path.write_text(written.to_toml())
        assert config.load(str(path)) == written


def test_an_overridden_field_changes_hash_and_folder_name():
    plain, changed = config.load("gpt2-nano"), config.load("gpt2-nano", overrides={"num_layers": 2})
    assert changed.hash != plain.hash
    assert plain.name == "gpt2-nano" and changed.name == f"gpt2-nano-{changed.hash}"


def test_a_file_may_need_an_override_to_be_whole(tmp_path):
    """Its max_seq_len is below the usual seq_len, and it lacks num_layers: what is given besides mends both."""
    file = tmp_path / "short.toml"
    file.write_text('family = "gpt2"\n[model]\nnum_heads = 1\nchannels = 64\nvocab_size = 120\nmax_seq_len = 24\n')
    with pytest.raises(UserError, match="lacks 'num_layers'"):
        config.load(str(file), overrides={"seq_len": 24})
    with pytest.raises(UserError, match="lower seq_len to 24"):
        config.load(str(file), overrides={"num_layers": 1})
    made = config.load(str(file), overrides={"num_layers": 1, "seq_len": 24})
    assert (made.model.num_layers, made.program.seq_len) == (1, 24)
    assert made.name == f"short-{made.hash}"


def test_an_override_that_says_what_is_so_already_changes_nothing():
    assert config.load("gpt2-nano", overrides={"num_layers": 4}) == config.load("gpt2-nano")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_heads": 3}, ["channels = 128", "num_heads = 3", "num_heads = 2 or 4", "channels = 126 or 129"]),
        ({"channels": 1, "num_heads": 2}, ["num_heads = 1 or channels = 2"]),
        ({"seq_len": 257}, ["seq_len = 257", "max_seq_len = 256"]),
        ({"num_layers": 0}, ["num_layers = 0", "at least 1"]),
        ({"vocab_size": 1}, ["vocab_size = 1", "at least 2"]),
        ({"batch_size": -4}, ["batch_size = -4"]),
        ({"batch_size": 2**31}, ["too many", "batch_size ="]),
        ({"channels": 2**31, "num_heads": 1}, ["channels", "too large"]),
        ({"precision": "bf16"}, ['precision = "bf16"', "target c", "fp32"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"learning_rate": "fast"}, ["learning_rate = 'fast'", "a number"]),
        ({"num_layers": 2.5}, ["num_layers = 2.5", "whole number"]),
        ({"num_layers": True}, ["num_layers = True", "whole number"]),
        ({"beta2": 1.0}, ["beta2 = 1.0", "below 1"]),
        ({"total_batch_size": 700}, ["total_batch_size = 700", "512", "1024 would work"]),
        ({"steps": -2}, ["steps = -2"]),
        ({"num_layer": 2}, ["unknown field 'num_layer'", "did you mean 'num_layers'"]),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(overrides, words):
    message = refused(**overrides)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["family = None", "gpt2"]),
        ('family = "gpt5"', ["'gpt5'", "gpt2"]),
        ('family = "gpt2"\n[modell]\nchannels = 3', ["'modell'", "did you mean 'model'"]),
        ('family = "gpt2"\n[model]\nchanels = 3', ["[model]", "'chanels'", "did you mean 'channels'"]),
        ('family = "gpt2"\n[model]\nchannels = 32', ["lacks 'num_layers'"]),
        ('family = "gpt2"\nmodel = 3', ["[model] must be a table"]),
        ('family = "gpt2"\n[program.cuda]\nbatchsize = 3', ["[program.cuda]", "did you mean 'batch_size'"]),
        ("family = gpt2", ["not valid TOML"]),
    ],
)
def test_a_faulty_file_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "faulty.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(str(path))
    for word in (str(path), *words):
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_what_does_not_exist_is_named_with_the_nearest_preset():
    with pytest.raises(UserError, match="did you mean 'gpt2-124m'"):
        config.load("gpt2-125m")
    with pytest.raises(UserError, match="no such file"):
        config.load("missing.toml")


def test_set_values_are_toml_or_else_strings():
    assert config.parse_overrides(("num_layers=2", "learning_rate=1e-3", "precision=fp32")) == {
        "num_layers": 2,
        "learning_rate": 1e-3,
        "precision": "fp32",
    }
    with pytest.raises(UserError, match="expected key=value"):
        config.parse_overrides(("num_layers",))
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        config.parse_overrides(("batchsize=2",))
