"""Runs of `jaxpack train` on all GPUs of this machine are the run of one GPU, and end and go on as they should."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from simulated_devices import TESTS, variables_of_two
from tokenizers_for_tests import write_checkpoint

COUNT = jax.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(COUNT < 2, reason="needs several GPUs")]

ROWS = 8  # in a step, of all GPUs
SETTINGS = ["--packing", "--max-length", "64", "--save-steps", "10", "--logging-steps", "1", "--dtype", "bfloat16"]
SETTINGS += ["--learning-rate", "5e-4", "--lr-scheduler-type", "constant", "--compilation-cache-dir", "none"]
SHORT, LONG = ["--max-steps", "20"], ["--max-steps", "400"]  # their first steps are the same
KINDS = {"adapter": ["--lora-r", "8"], "in_4_bits": ["--lora-r", "8", "--load-in-4bit"], "model": ["--full-finetuning"]}
MESHES = [f"data={COUNT}", f"fsdp={COUNT}"] + [f"data=2,fsdp={COUNT // 2}"] * (COUNT > 2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": f"the cab {row} " * (1 + row % 3), "completion": f" ab {row}"} for row in range(400)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", write_checkpoint(folder / "base"), "--data", folder / "rows.jsonl"]


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory):
    """Returns the losses that one GPU has with a kind of training; each run is made once."""

    @functools.cache
    def of(kind: str) -> np.ndarray:
        output = tmp_path_factory.mktemp("one") / kind
        arguments = [*inputs, *SETTINGS, *SHORT, *KINDS[kind], *on(1), "--output", output]
        finish([start(arguments, output.with_suffix(".log"), CUDA_VISIBLE_DEVICES="0")])
        return losses(output)

    return of


def on(devices: int, mesh: str = "auto") -> list[str]:
    return ["--mesh", mesh, "--per-device-train-batch-size", str(ROWS // devices)]


def start(arguments: Sequence[object], log: Path, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | variables
    command = [sys.executable, "-m", "jaxpack", "train", *map(str, arguments)]
    with log.open("w") as written:
        return subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=environment)


def finish(processes: list[subprocess.Popen]) -> None:
    assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)


def losses(output: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()])


def weights(output: Path) -> dict[str, np.ndarray]:
    return {str(file.name) + name: x for file in output.rglob("*.safetensors") for name, x in load_file(file).items()}


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    """The bounds of TRL's invariance tests."""
    assert len(found) == len(expected) == 20
    assert np.abs(found - expected).max() < 1.5e-2
    assert abs((found - expected).mean()) < 1e-3


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_one_gpu_and_a_second_run_has_the_same_bits(kind, mesh, inputs, one, tmp_path):
    arguments = [*inputs, *SETTINGS, *SHORT, *KINDS[kind], *on(COUNT, mesh)]
    for run in ("first", "second"):
        finish([start([*arguments, "--output", tmp_path / run], tmp_path / f"{run}.log")])
    assert_near(losses(tmp_path / "first"), one(kind))
    np.testing.assert_array_equal(losses(tmp_path / "first"), losses(tmp_path / "second"))
    first, second = (weights(tmp_path / run) for run in ("first", "second"))
    assert first.keys() == second.keys() != set()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name], err_msg=name)


@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2"])
def test_a_run_of_two_processes_that_was_killed_goes_on_with_one_gpu(mesh, inputs, one, tmp_path):
    """Each process has a GPU. When one is killed, the other says so and ends."""
    output, logs = tmp_path / "out", [tmp_path / "first.log", tmp_path / "second.log"]
    of_run = [*inputs, *SETTINGS, *LONG, *KINDS["adapter"]]
    arguments = [*of_run, *on(2, mesh), "--output", output]
    both = [
        start(arguments, log, CUDA_VISIBLE_DEVICES=str(number), **variables)
        for number, (log, variables) in enumerate(zip(logs, variables_of_two(), strict=True))
    ]
    begin = time.monotonic()
    while not (output / "checkpoints" / "10").exists():
        assert time.monotonic() - begin < 200
        assert both[0].poll() is None, [log.read_text() for log in logs]
        time.sleep(0.02)
    both[1].send_signal(signal.SIGKILL)
    assert both[1].wait(timeout=60) == -signal.SIGKILL
    assert both[0].wait(timeout=100) != 0
    said = logs[0].read_text().splitlines()
    assert said[-1].startswith("error: process 0 of 2 of the run was ended, because"), said[-20:]

    resumed, begun = tmp_path / "resumed", output / "checkpoints" / "10"
    arguments = [*of_run, *on(1), "--resume-from-checkpoint", begun, "--output", resumed]
    finish([start(arguments, tmp_path / "resumed.log", CUDA_VISIBLE_DEVICES="0")])
    assert_near(np.concatenate([losses(output)[:10], losses(resumed)[:10]]), one("adapter"))
