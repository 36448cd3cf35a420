"""What a run has written into metrics.jsonl: read, smoothed, handed on."""

import itertools
import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from llmgen.errors import UserError
from llmgen.formats import files


@dataclass
class Run:
    name: str
    rows: list[dict] = field(default_factory=list)  # of the training steps, in order
    validations: list[dict] = field(default_factory=list)

    def place(self, axis: str) -> dict[int, float]:
        """Step -> where it stands on an axis: step, tokens or hours of computing. Step 0 stands at 0."""
        at, places = 0.0, {0: 0.0}
        for row in self.rows:
            seconds = row.get("ms", 0.0) / 1e3
            at += {"tokens": row.get("tokens_per_second", 0.0) * seconds, "hours": seconds / 3600}.get(axis, 0.0)
            places[row["step"]] = row["step"] if axis == "step" else at
        return places


def read(path: str | os.PathLike) -> Run:
    """A run by its log folder or its metrics.jsonl. A last line that was cut short is left out. Raises UserError."""
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    run = Run(path.resolve().name if path.is_dir() else path.resolve().parent.name)
    with files.reading(file) as opened:
        lines = opened.readall().decode(errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            (run.rows if "loss" in row else run.validations).append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}: line {number} is not an object with a step; is it a run's metrics.jsonl?") from None
    if not run.rows and not run.validations:
        raise UserError(f"{file}: no steps yet; name a run that has taken some")
    return run


def smooth(values: list[float], span: float) -> list[float]:
    """An exponential moving average that reaches back over about `span` values; without the bias towards its beginning."""
    keep, total, weight, smoothed = 1 - 1 / max(span, 1), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def sparkline(values: list[float], width: int) -> str:
    """The values as a row of blocks, from the lowest to the highest."""
    if not values or width < 1:
        return ""
    cuts = [len(values) * i // width for i in range(width + 1)] if len(values) > width else range(len(values) + 1)
    means = [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, height = min(means), max(means) - min(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (m - low) / height) if height > 0 else 0] for m in means)


# TensorBoard's event files: records of length, payload and their checksums; a payload is a protocol buffer.

_TAGS = {
    "accuracy": "accuracy",
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "grad_norm": "grad_norm",
    "lr": "learning_rate",
}
_TAGS |= {"tokens_per_second": "speed/tokens_per_second", "flops_per_second": "speed/flops_per_second"}


def write_events(run: Run, folder: str | os.PathLike) -> Path:
    """An event file with the run's numbers, for `tensorboard --logdir`. The same run gives the same file. Raises UserError."""
    with files.folder(folder) as where, files.replacing(where / "events.out.tfevents.0000000000.llmgen") as output:
        output.write(_record(_double(1, 0.0) + _bytes(3, b"brain.Event:2")))
        times = run.place("hours")
        for row in sorted([*run.rows, *run.validations], key=lambda row: row["step"]):
            values = [
                _bytes(1, _bytes(1, _TAGS[key].encode()) + b"\x15" + struct.pack("<f", row[key])) for key in _TAGS if key in row
            ]
            if values:
                time = 3600 * times.get(row["step"], 0.0)
                step = b"\x10" + _varint(row["step"])
                output.write(_record(_double(1, time) + step + _bytes(5, b"".join(values))))
    return where / "events.out.tfevents.0000000000.llmgen"


def _varint(n: int) -> bytes:
    made = bytearray()
    while n >= 0x80:
        made.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*made, n])


def _bytes(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _double(number: int, value: float) -> bytes:
    return _varint(number << 3 | 1) + struct.pack("<d", value)


def _record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + _masked_crc(length) + payload + _masked_crc(payload)


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C = _crc_table()
