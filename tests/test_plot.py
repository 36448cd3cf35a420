"""Curves of runs: as a figure, as TensorBoard events, as a row of blocks."""

import json
import math
import struct
import xml.dom.minidom
from pathlib import Path

import pytest
from command import fails, succeeds

from llmgen import metrics
from llmgen.errors import UserError


def made_run(folder: Path, steps: int = 200, shift: float = 0.0) -> Path:
    """A run as the program writes it, with a last line that was cut short."""
    folder.mkdir(parents=True)
    rows = [{"step": 0, "val_loss": 6 + shift}]
    for step in range(1, steps + 1):
        loss = 2 + 4 * math.exp(-step / 40) + 0.1 * math.sin(17 * step) + shift
        rows.append({"step": step, "loss": loss, "grad_norm": 1.5, "lr": 1e-3, "ms": 36.0, "tokens_per_second": 1e4})
        if step % 50 == 0:
            rows.append({"step": step, "val_loss": loss + 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 20')
    return folder


def test_several_runs_in_one_figure(tmp_path):
    pytest.importorskip("matplotlib")
    for name, shift in (("first", 0.0), ("second", 0.3)):
        made_run(tmp_path / name, shift=shift)
    lines = succeeds("plot", "first", "second/metrics.jsonl", "--out", "curve.png", cwd=tmp_path)
    assert lines[0].startswith("first: step 200, loss 2.0") and "val loss 2." in lines[0] and lines[1].startswith("second:")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    succeeds("plot", "first", "second", "--out", "curve.svg", "--x", "tokens", "--smooth", "10", cwd=tmp_path)
    text = (tmp_path / "curve.svg").read_text()
    xml.dom.minidom.parseString(text)
    for words in ("first, training", "second, validation", "training tokens", "loss (nats per token)", "60k"):
        assert f"<!-- {words} -->" in text, "axes have units, curves have names"
    succeeds("plot", "first", "second", "--out", "again.svg", "--x", "tokens", "--smooth", "10", cwd=tmp_path)
    assert (tmp_path / "again.svg").read_text() == text
    succeeds("plot", "first", "--out", "curve.pdf", "--x", "hours", cwd=tmp_path)
    assert (tmp_path / "curve.pdf").read_bytes().startswith(b"%PDF")


def test_what_cannot_be_plotted_is_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    made_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    for text, words in (("", "no steps yet"), ('{"step": 1, "loss": 2}\nnonsense\n', "line 2"), ('{"loss": 2}\n', "line 1")):
        (tmp_path / "other" / "metrics.jsonl").write_text(text)
        assert words in fails(1, "plot", "other", "--out", "curve.png", cwd=tmp_path)
    assert ".svg or .pdf" in fails(1, "plot", "run", "--out", "curve.gif", cwd=tmp_path)
    assert "no such file" in fails(1, "plot", "nowhere", "--out", "curve.png", cwd=tmp_path)
    assert "--smooth 0" in fails(1, "plot", "run", "--out", "curve.png", "--smooth", "0", cwd=tmp_path)
    assert "--out" in fails(2, "plot", "run", cwd=tmp_path)
    fails(2, "plot", "--out", "curve.png", cwd=tmp_path)
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    root = str(Path(metrics.__file__).parent.parent)
    message = fails(1, "plot", "run", "--out", "curve.png", cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{root}"})
    assert "pip install 'llmgen[plot]'" in message


def test_smoothing_is_a_mean_without_the_bias_of_its_beginning():
    assert metrics.smooth([5.0] * 10, 4) == pytest.approx([5.0] * 10)
    assert metrics.smooth([3.0, 1.0, 2.0], 1) == [3.0, 1.0, 2.0]
    values = [float(i) for i in range(1000)]
    assert metrics.smooth(values, 50)[-1] == pytest.approx(values[-1] - 49, abs=1)


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert metrics.sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8) == "▁▂▃▄▅▆▇█"
    assert metrics.sparkline([7.0, 7.0, 0.0, 0.0], 2) == "█▁"
    assert metrics.sparkline([1.0, 1.0], 5) == "▁▁" and metrics.sparkline([], 5) == ""
    assert len(metrics.sparkline([float(i) for i in range(1001)], 12)) == 12


def test_events_are_what_tensorboard_reads(tmp_path):
    made_run(tmp_path / "run", 3)
    (line,) = succeeds("plot", "run", "--tensorboard", "events", cwd=tmp_path)
    data, records = (tmp_path / line).read_bytes(), []
    assert Path(line).parts[:2] == ("events", "run")
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == metrics._masked_crc(data[:8]) and data[12 + length : 16 + length] == metrics._masked_crc(
            data[12 : 12 + length]
        )
        records.append(data[12 : 12 + length])
        data = data[16 + length :]
    assert records[0].endswith(b"brain.Event:2") and len(records) == 1 + 1 + 3
    assert b"loss/validation" in records[1] and b"loss/train" in records[2] and b"learning_rate" in records[2]
    assert records[2][9:11] == b"\x10\x01", "its step"
    first = metrics.read(tmp_path / "run").rows[0]
    assert struct.pack("<f", first["loss"]) in records[2]


def test_the_checksum_is_crc32c():
    crc = 0xE3069283  # of "123456789", as RFC 3720 and its errata have it
    assert metrics._masked_crc(b"123456789") == struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def test_tensorboard_reads_them(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    file = metrics.write_events(metrics.read(made_run(tmp_path / "run")), tmp_path / "events")
    events = loader.EventAccumulator(str(file)).Reload()
    assert [e.step for e in events.Scalars("loss/train")] == list(range(1, 201))


def test_a_run_without_steps_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        metrics.read(tmp_path)
