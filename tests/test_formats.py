"""The binary files: layouts at fixed offsets, round trips, one line for every corruption, nothing half written."""

import dataclasses
import os
import resource
import struct
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgen import config as configs
from llmgen import models
from llmgen.config import Config, ModelConfig
from llmgen.errors import UserError
from llmgen.formats import debug_state, files, tokenizer, tokens, weights

NANO = ModelConfig(num_layers=2, num_heads=2, channels=6, vocab_size=101, max_seq_len=5)
GPT2 = ModelConfig(num_layers=12, num_heads=12, channels=768, vocab_size=50257, max_seq_len=1024)


def gpt2_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """An independent copy of the table, to compare the graph's with."""
    layers, c = model.num_layers, model.channels
    return {
        "wte": (model.padded_vocab_size, c),
        "wpe": (model.max_seq_len, c),
        "ln1w": (layers, c),
        "ln1b": (layers, c),
        "qkvw": (layers, 3 * c, c),
        "qkvb": (layers, 3 * c),
        "attprojw": (layers, c, c),
        "attprojb": (layers, c),
        "ln2w": (layers, c),
        "ln2b": (layers, c),
        "fcw": (layers, 4 * c, c),
        "fcb": (layers, 4 * c),
        "fcprojw": (layers, c, 4 * c),
        "fcprojb": (layers, c),
        "lnfw": (c,),
        "lnfb": (c,),
    }


SHAPES = gpt2_shapes(NANO)
CONFIG = Config("nano", "gpt2", NANO)


def random_tensors(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_nano(path, dtype="fp32"):
    tensors = random_tensors(SHAPES)
    weights.write(path, CONFIG, SHAPES, tensors.items(), dtype)
    return tensors


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp"))


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# weights


@pytest.mark.parametrize("dtype, size", [("fp32", 497_904_640), ("bf16", 248_952_832)])
def test_gpt2_124m_weights_have_the_size_that_llmc_gives_them(dtype, size):
    assert weights.file_bytes(gpt2_shapes(GPT2), dtype) == size


def test_tensors_of_gpt2_124m_stand_at_the_offsets_of_llmc():
    offsets = weights.Tensors("unread", gpt2_shapes(GPT2)).offsets
    assert offsets["wte"] == 1_024
    assert offsets["wpe"] == 154_534_912
    assert offsets["qkvw"] == 157_754_368
    assert offsets["fcprojb"] == 497_861_632
    assert offsets["lnfb"] == 497_901_568


def test_the_weights_header_is_that_of_llmc(tmp_path):
    write_nano(tmp_path / "w.bin")
    data = (tmp_path / "w.bin").read_bytes()
    assert struct.unpack("<8i", data[:32]) == (20240326, 3, 5, 101, 2, 2, 6, 128)
    assert data[32:1024] == bytes(992)
    assert len(data) == weights.file_bytes(SHAPES)


def test_fp32_weights_come_back_as_they_were(tmp_path):
    tensors = write_nano(tmp_path / "w.bin")
    back = weights.read(tmp_path / "w.bin", SHAPES)
    assert list(back) == list(SHAPES)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
    raw = np.fromfile(tmp_path / "w.bin", "<f4", offset=1024)
    np.testing.assert_array_equal(raw, np.concatenate([t.ravel() for t in tensors.values()]))


def test_bf16_weights_come_back_rounded(tmp_path):
    tensors = write_nano(tmp_path / "w.bin", "bf16")
    assert struct.unpack("<2i", (tmp_path / "w.bin").read_bytes()[:8]) == (20240326, 5)
    back = weights.read(tmp_path / "w.bin", SHAPES)
    assert back.dtype == "bf16"
    for name, tensor in tensors.items():
        np.testing.assert_allclose(back[name], tensor, rtol=2**-8)
        assert back[name].dtype == np.float32


def test_a_tensor_may_be_written_in_pieces(tmp_path):
    tensors = random_tensors(SHAPES)
    weights.write(tmp_path / "w.bin", CONFIG, SHAPES, ((name, row) for name, t in tensors.items() for row in t))
    for name, tensor in weights.read(tmp_path / "w.bin", SHAPES).items():
        np.testing.assert_array_equal(tensor, tensors[name])


@pytest.mark.parametrize(
    "damage",
    [
        lambda items: items[1:],
        lambda items: items[:-1],
        lambda items: [items[0], *items],
        lambda items: [items[1], items[0], *items[2:]],
        lambda items: [(items[0][0], items[0][1][:-1]), *items[1:]],
        lambda items: [*items, ("extra", np.zeros(1))],
    ],
)
def test_tensors_that_are_not_those_of_the_table_are_refused(tmp_path, damage):
    with pytest.raises(ValueError):
        weights.write(tmp_path / "w.bin", CONFIG, SHAPES, damage(list(random_tensors(SHAPES).items())))
    assert list(tmp_path.iterdir()) == []


@given(st.integers(0, 2**32 - 1))
def test_bf16_rounds_to_the_nearest_and_ties_to_even(bits):
    value = np.array([bits], "<u4").view("<f4")
    got = weights.fp32_to_bf16(value)
    if np.isnan(value[0]):
        assert np.isnan(weights.bf16_to_fp32(got)[0])
        return
    low, high = bits & 0xFFFF0000, (bits & 0xFFFF0000) + 0x10000
    below, above = bits - low, high - bits
    want = low if below < above or (below == above and (low >> 16) % 2 == 0) else high
    assert int(got[0]) == want >> 16


@given(st.integers(0, 2**16 - 1))
def test_bf16_values_survive_the_way_through_fp32(bits):
    value = weights.bf16_to_fp32(np.array([bits], "<u2"))
    if not np.isnan(value[0]):
        assert weights.fp32_to_bf16(value)[0] == bits


@pytest.mark.parametrize(
    "at, value, words",
    [
        (0, 7, "magic number 7, expected 20240326 (weights) or 20261101 (described weights)"),
        (0, 20240520, "magic number 20240520 (uint16 tokens), expected 20240326 (weights)"),
        (1, 1, "weights version 1, expected 3 (fp32) or 5 (bf16)"),
        (2, 0, "max_seq_len = 0"),
        (4, -3, "num_layers = -3"),
        (7, 101, "padded_vocab_size = 101, expected 128"),
    ],
)
def test_a_wrong_weights_header_gives_one_line(tmp_path, at, value, words):
    path = tmp_path / "w.bin"
    write_nano(path)
    with open(path, "r+b") as file:
        file.seek(4 * at)
        file.write(struct.pack("<i", value))
    with pytest.raises(UserError) as error:
        weights.read(path, SHAPES)
    assert str(path) in one_line(error) and words in one_line(error)


@pytest.mark.parametrize("length", [0, 3, 500, 1024, 5000, -1])
def test_a_cut_or_grown_weights_file_gives_one_line_with_both_lengths(tmp_path, length):
    path = tmp_path / "w.bin"
    write_nano(path)
    size = path.stat().st_size
    os.truncate(path, length if length >= 0 else size + 1)
    with pytest.raises(UserError) as error:
        weights.read(path, SHAPES)
    assert f"is {length if length >= 0 else size + 1} bytes" in one_line(error)


def test_a_missing_file_and_a_folder_give_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.bin: no such file"):
        weights.read(tmp_path / "none.bin", SHAPES)
    with pytest.raises(UserError, match="is a folder"):
        weights.read(tmp_path, SHAPES)


# weights that describe themselves

LLAMA = configs.from_tables(
    "llama",
    {
        "family": "llama",
        "model": {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "channels": 24, "vocab_size": 101, "max_seq_len": 64},
        "program": {"seq_len": 9},
    },
    "llama",
)
LLAMA_SHAPES = models.parameter_shapes(LLAMA)


def write_llama(path, dtype="fp32"):
    tensors = random_tensors(LLAMA_SHAPES)
    weights.write(path, LLAMA, LLAMA_SHAPES, tensors.items(), dtype)
    return tensors


@pytest.mark.parametrize(
    "changes, layout",
    [
        ({}, weights.LLMC),
        ({"z_loss": 1e-4, "label_smoothing": 0.1, "zero_projections": True}, weights.LLMC),
        ({"rope_theta": 5e5, "rope_factor": 2.0, "qk_norm_weight": False, "attention_window": (0, 0)}, weights.LLMC),
        ({"num_kv_heads": 2, "head_size": 3, "mlp_channels": 24, "attention_scale": 3**-0.5}, weights.LLMC),
        ({"norm_epsilon": 1e-6}, weights.OWN),
        ({"activation": "gelu_exact"}, weights.OWN),
        ({"attention_window": (4,)}, weights.OWN),
        ({"attention_softcap": 50.0}, weights.OWN),
        ({"logit_softcap": 30.0}, weights.OWN),
        ({"attention_scale": 0.5}, weights.OWN),
        ({"embedding_scale": 2.0}, weights.OWN),
        ({"residual_scale": 0.5}, weights.OWN),
        ({"tie_embeddings": False}, weights.OWN),
        ({"mlp_bias": False}, weights.OWN),
        ({"position": "none"}, weights.OWN),
        ({"num_kv_heads": 1}, weights.OWN),
        ({"head_size": 5}, weights.OWN),
        ({"qk_norm": True}, weights.OWN),
    ],
    ids=str,
)
def test_llmcs_layout_is_for_what_its_header_can_say_and_no_more(changes, layout):
    assert weights.layout(dataclasses.replace(NANO, **changes)) == layout


def test_weights_of_another_architecture_describe_themselves(tmp_path):
    write_llama(tmp_path / "w.bin")
    data = (tmp_path / "w.bin").read_bytes()
    magic, version, size, count = struct.unpack("<4i", data[:16])
    assert (magic, version, size % 64, count) == (20261101, 1, 0, len(LLAMA_SHAPES))
    text = data[1024 : 1024 + size].decode()
    lines = text.rstrip("\n").split("\n")
    assert lines[:3] == ['family = "llama"', 'dtype = "fp32"', "model.num_layers = 2"]
    assert "model.num_kv_heads = 2" in lines and 'model.activation = "silu"' in lines
    assert lines[-len(LLAMA_SHAPES) :][1:3] == ["tensors.ln1w = [2, 24]", "tensors.qkvw = [2, 48, 24]"]
    assert len(data) == weights.file_bytes(LLAMA_SHAPES, text_bytes=size)
    assert configs.load(str(tmp_path / "w.bin")).model == LLAMA.model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_described_weights_come_back_as_they_were(tmp_path, dtype):
    tensors = write_llama(tmp_path / "w.bin", dtype)
    back = weights.read(tmp_path / "w.bin", LLAMA_SHAPES)
    assert back.dtype == dtype and list(back) == list(LLAMA_SHAPES)
    for name, tensor in tensors.items():
        same = tensor if dtype == "fp32" else weights.bf16_to_fp32(weights.fp32_to_bf16(tensor))
        np.testing.assert_array_equal(back[name], same)


@pytest.mark.parametrize(
    "old, new, words",
    [
        (b"num_layers = 2", b"num_layers = 3", "tensor ln1w is (2, 24), expected (3, 24)"),
        (b"model.norm = ", b"model.nrom = ", "has no field 'nrom'"),
        (b"tensors.ln1w = [2, 24]", b"tensors.ln1w = [2, 25]", "tensor ln1w is (2, 25), expected (2, 24)"),
        (b'dtype = "fp32"', b'dtype = "fp64"', "does not say what the tensors are"),
        (b"tensors.", b"tensors ", "does not say what the tensors are"),
        (struct.pack("<2i", 20261101, 1), struct.pack("<2i", 20261101, 2), "weights version 2, expected 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_described_weights_that_are_damaged_give_one_line(tmp_path, old, new, words):
    path = tmp_path / "w.bin"
    write_llama(path)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(UserError) as error:
        configs.load(str(path))
    assert words in one_line(error)


# debug states


def write_state(path, b=2, t=3):
    rng = np.random.default_rng(1)
    inputs, targets = rng.integers(0, 101, (2, b, t))
    logits = rng.standard_normal((b, t, 101), dtype=np.float32)
    gradients = random_tensors(SHAPES, 2)
    debug_state.write(path, inputs, targets, logits, 4.5, SHAPES, gradients.items())
    return inputs, targets, logits, gradients


def test_a_debug_state_comes_back_as_it_was(tmp_path):
    inputs, targets, logits, gradients = write_state(tmp_path / "s.bin")
    state = debug_state.read(tmp_path / "s.bin", 101, SHAPES)
    assert (state.batch_size, state.seq_len, state.loss) == (2, 3, 4.5)
    np.testing.assert_array_equal(state.inputs, inputs)
    np.testing.assert_array_equal(state.targets, targets)
    np.testing.assert_array_equal(state.logits, logits)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(state.gradients[name], gradient)


def test_a_debug_state_is_laid_out_as_in_llmc(tmp_path):
    inputs, targets, logits, gradients = write_state(tmp_path / "s.bin")
    data = (tmp_path / "s.bin").read_bytes()
    assert struct.unpack("<5i", data[:20]) == (20240327, 2, 2, 3, 0)
    assert data[1024:1048] == inputs.astype("<i4").tobytes()
    assert data[1048:1072] == targets.astype("<i4").tobytes()
    assert data[1072 : 1072 + 4 * 6 * 101] == logits.tobytes()
    assert data[3496:3500] == struct.pack("<f", 4.5)
    assert data[3500:] == b"".join(g.tobytes() for g in gradients.values())
    assert debug_state.file_bytes(4, 64, 50257, gpt2_shapes(GPT2)) == 549_369_860


def test_a_debug_state_of_another_model_gives_one_line(tmp_path):
    write_state(tmp_path / "s.bin")
    with pytest.raises(UserError, match="does it belong to these weights"):
        debug_state.read(tmp_path / "s.bin", 100, SHAPES)


@pytest.mark.parametrize("at, value, words", [(0, 1, "magic number 1"), (1, 9, "version 9, expected 2"), (2, 0, "B = 0")])
def test_a_wrong_debug_state_header_gives_one_line(tmp_path, at, value, words):
    path = tmp_path / "s.bin"
    write_state(path)
    with open(path, "r+b") as file:
        file.seek(4 * at)
        file.write(struct.pack("<i", value))
    with pytest.raises(UserError) as error:
        debug_state.read(path, 101, SHAPES)
    assert words in one_line(error)


def test_a_debug_state_of_described_weights_says_its_sizes(tmp_path):
    ids, logits = np.zeros((2, 3), int), np.zeros((2, 3, 101), np.float32)
    gradients = random_tensors(LLAMA_SHAPES)
    path = tmp_path / "s.bin"
    debug_state.write(path, ids, ids, logits, 1.0, LLAMA_SHAPES, gradients.items(), weights.OWN)
    assert struct.unpack("<8i", path.read_bytes()[:32]) == (20240327, 3, 2, 3, 101, 128, len(LLAMA_SHAPES), 0)
    np.testing.assert_array_equal(debug_state.read(path, 101, LLAMA_SHAPES).gradients["gatew"], gradients["gatew"])
    with pytest.raises(UserError, match="V = 101, expected 100; does it belong"):
        debug_state.read(path, 100, LLAMA_SHAPES)


# tokens


@pytest.mark.parametrize("vocab_size, magic, version, size", [(65536, 20240520, 1, 2), (65537, 20240801, 7, 4)])
def test_tokens_take_two_bytes_where_the_vocabulary_fits(tmp_path, vocab_size, magic, version, size):
    ids = np.array([0, 7, vocab_size - 1])
    tokens.write(tmp_path / "t.bin", ids, vocab_size)
    data = (tmp_path / "t.bin").read_bytes()
    assert struct.unpack("<4i", data[:16]) == (magic, version, 3, 0)
    assert len(data) == 1024 + 3 * size
    np.testing.assert_array_equal(tokens.read(tmp_path / "t.bin"), ids)


@pytest.mark.parametrize("ids", [[101], [-1]])
def test_ids_outside_the_vocabulary_are_not_written(tmp_path, ids):
    with pytest.raises(ValueError):
        tokens.write(tmp_path / "t.bin", np.array(ids), 101)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "at, value, words",
    [
        (0, 20240326, "magic number 20240326 (weights), expected 20240520 (uint16 tokens) or 20240801 (uint32 tokens)"),
        (1, 2, "token file version 2, expected 1"),
        (2, 4, "is 1030 bytes, expected 1032 (4 tokens of uint16); it is cut short"),
        (2, 2, "it holds more than it should"),
        (2, -5, "-5 tokens"),
    ],
)
def test_a_wrong_token_header_gives_one_line(tmp_path, at, value, words):
    path = tmp_path / "t.bin"
    tokens.write(path, np.array([1, 2, 3]), 101)
    with open(path, "r+b") as file:
        file.seek(4 * at)
        file.write(struct.pack("<i", value))
    with pytest.raises(UserError) as error:
        tokens.read(path)
    assert words in one_line(error)


def test_more_tokens_than_a_file_can_count_are_refused():
    with pytest.raises(UserError, match="at most 2147483647 tokens"):
        tokens.header(2**31, np.dtype("<u2"))


def test_a_shard_may_be_empty(tmp_path):
    tokens.write(tmp_path / "t.bin", np.array([], int), 101)
    assert tokens.read(tmp_path / "t.bin").size == 0


# tokenizer tables


@given(st.lists(st.binary(min_size=1, max_size=255), min_size=1, max_size=20))
def test_a_tokenizer_table_comes_back_as_it_was(tmp_path_factory, table):
    path = tmp_path_factory.getbasetemp() / "tokenizer.bin"
    tokenizer.write(path, table, len(table) - 1)
    assert struct.unpack("<5i", path.read_bytes()[:20]) == (20240328, 2, len(table), len(table) - 1, 0)
    assert tokenizer.read(path) == (table, len(table) - 1)


def test_version_1_of_the_tokenizer_is_read_as_gpt2s(tmp_path):
    (tmp_path / "t.bin").write_bytes(files.header(20240328, 1, 50257) + b"\x01a" * 50257)
    table, end_of_text = tokenizer.read(tmp_path / "t.bin")
    assert (len(table), table[5], end_of_text) == (50257, b"a", 50256)


@pytest.mark.parametrize(
    "data, words",
    [
        (files.header(20240328, 3, 1, 0) + b"\x01a", "tokenizer version 3, expected 1 or 2"),
        (files.header(20240328, 1, 9) + b"\x01a" * 9, "version 1 holds 50257 tokens, not 9"),
        (files.header(20240328, 2, 1, 1) + b"\x01a", "1 tokens and end-of-text 1"),
        (files.header(20240328, 2, 2, 0) + b"\x01a", "token 1 of 2 is past the end"),
        (files.header(20240328, 2, 2, 0) + b"\x01a\x02b", "token 1 of 2 is past the end"),
        (files.header(20240328, 2, 2, 0) + b"\x01a\x00", "token 1 of 2 has no bytes"),
        (files.header(20240328, 2, 1, 0) + b"\x01ab", "is 1027 bytes, expected 1026"),
        (files.header(20240328, 2, 1, 0)[:100], "shorter than its 1024-byte header"),
    ],
)
def test_a_broken_tokenizer_table_gives_one_line(tmp_path, data, words):
    (tmp_path / "t.bin").write_bytes(data)
    with pytest.raises(UserError) as error:
        tokenizer.read(tmp_path / "t.bin")
    assert words in one_line(error)


@pytest.mark.parametrize("text", [b"", b"x" * 256])
def test_tokens_the_table_cannot_hold_are_refused(text):
    with pytest.raises(ValueError):
        tokenizer.encode([text], 0)


# writing


def test_a_failure_keeps_the_old_file_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as output:
        output.write(b"new")
        assert leftovers(tmp_path) == [".w.bin.tmp"]
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_several_files_appear_together_or_not_at_all(tmp_path):
    with pytest.raises(UserError, match="missing"), files.replacing_all() as open_output:
        open_output(tmp_path / "a").write(b"a")
        open_output(tmp_path / "missing" / "b")
    assert list(tmp_path.iterdir()) == []
    with files.replacing_all() as open_output:
        open_output(tmp_path / "a").write(b"a")
        open_output(tmp_path / "b").write(b"b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_stale_temporary_is_replaced(tmp_path):
    (tmp_path / ".w.bin.tmp").write_bytes(b"from a crash")
    with files.replacing(tmp_path / "w.bin") as output:
        output.write(b"new")
    assert (tmp_path / "w.bin").read_bytes() == b"new"
    assert leftovers(tmp_path) == []


def test_a_link_stays_and_the_file_it_points_to_is_replaced(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with files.replacing(tmp_path / "link") as output:
        output.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_full_device_gives_one_line_and_survives():
    with pytest.raises(UserError) as error:
        write_nano("/dev/full")
    assert one_line(error).startswith("/dev/full: cannot be written: No space left on device; ")
    assert not os.path.isfile("/dev/full")
    assert not os.path.lexists("/dev/.full.tmp")


def test_a_fifo_is_written_in_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_nano(tmp_path / "pipe")
    reader.join()
    assert len(got[0]) == weights.file_bytes(SHAPES)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_a_regular_file_among_the_devices_is_replaced_whole():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "w.bin")
        path.write_bytes(b"old")
        with pytest.raises(KeyboardInterrupt), files.replacing(path) as output:
            output.write(b"new")
            raise KeyboardInterrupt
        assert path.read_bytes() == b"old" and os.listdir(folder) == ["w.bin"]


def test_a_limit_on_file_sizes_gives_one_line_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError) as error:
            write_nano(tmp_path / "w.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "w.bin: cannot be written: File too large" in one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, words", [("none/w.bin", "No such file"), ("file/w.bin", "Not a directory"), ("dir", "Is a")])
def test_a_place_that_cannot_be_written_gives_one_line(tmp_path, name, words):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dir").mkdir()
    with pytest.raises(UserError) as error:
        write_nano(tmp_path / name)
    assert words in one_line(error) and name in one_line(error)


def test_a_folder_made_for_nothing_is_removed_again(tmp_path):
    with pytest.raises(UserError), files.folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    for taken in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(UserError, match="the folder cannot be made"), files.folder(taken):
            pass
