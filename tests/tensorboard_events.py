"""Reads event files as TensorBoard does, and derives from `metrics.jsonl` what they should hold."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog

Scalars = dict[str, list[tuple[int, float]]]  # (step, value) pairs by tag


def events(folder: Path) -> Iterator[Event]:
    """Yields the events of all event files in a run's folder, in the order of the files' names."""
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])  # a checksum stands before and behind
            content = content[16 + length :]


def scalars(folder: Path) -> Scalars:
    """Returns what TensorBoard shows: a process that starts replaces all points from its step on."""
    shown: Scalars = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            for points in shown.values():
                points[:] = [(step, value) for step, value in points if step < event.step]
        for value in event.summary.value:
            shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def expected_scalars(folder: Path) -> Scalars:
    expected: Scalars = {}
    for record in records(folder):
        group = "eval" if "eval_loss" in record else "train"
        for name, value in record.items():
            if name != "step":
                points = expected.setdefault(f"{group}/{name.removeprefix('eval_')}", [])
                points.append((record["step"], float(np.float32(value))))
    return expected
