"""Two processes of `jaxpack train` train, save, stop, die and resume as one, and each ends with a sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from simulated_devices import TESTS, flags_for, variables_of_two
from tokenizers_for_tests import write_checkpoint

STEPS, EVERY = 60, 10
SETTINGS = ["--packing", "--max-length", "64", "--per-device-train-batch-size", "1", "--logging-steps", "1"]
SETTINGS += ["--max-steps", str(STEPS), "--save-steps", str(EVERY), "--learning-rate", "1e-3"]
SETTINGS += ["--compilation-cache-dir", "none"]
KINDS = {
    "adapter": ["--mesh", "data=2,fsdp=4", "--lora-r", "4", "--lora-dropout", "0.1"],
    "model": ["--mesh", "fsdp=8", "--full-finetuning"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": f"the cab {row} " * (1 + row % 3), "completion": f" ab {row}"} for row in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", write_checkpoint(folder / "base"), "--data", folder / "rows.jsonl"]


def start(arguments: list[object], log: Path, devices: int, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "XLA_FLAGS": flags_for(devices)} | variables
    command = [sys.executable, "-m", "jaxpack", "train", *map(str, arguments)]
    with log.open("w") as written:
        return subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=environment)


class Two:
    """Two processes of one run, with four devices each."""

    def __init__(self, arguments: list[object], folder: Path, of_second: Sequence[object] = ()):
        folder.mkdir(exist_ok=True)
        self.logs = [folder / "first.log", folder / "second.log"]
        self.processes = [
            start([*arguments, *more], log, 4, **variables)
            for log, more, variables in zip(self.logs, ([], of_second), variables_of_two(), strict=True)
        ]

    def signal_once(self, path: Path, process: int, number: int) -> None:
        """Waits until there is a file or folder, and sends a signal to one of the processes."""
        begin = time.monotonic()
        while not path.exists():
            assert time.monotonic() - begin < 300, self.said()
            assert self.processes[0].poll() is None, self.said()
            time.sleep(0.02)
        self.processes[process].send_signal(number)

    def end(self) -> list[int]:
        """Waits for both, and returns their statuses."""
        return [process.wait(timeout=300) for process in self.processes]

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_that_were_killed_go_on_and_write_what_one_process_writes(kind, inputs, tmp_path):
    arguments = [*inputs, *SETTINGS, *KINDS[kind]]
    one = start([*arguments, "--output", tmp_path / "one"], tmp_path / "one.log", 8)
    assert one.wait(timeout=300) == 0, (tmp_path / "one.log").read_text()

    arguments += ["--output", tmp_path / "two"]
    killed = Two(arguments, tmp_path / "killed")
    killed.signal_once(tmp_path / "two" / "checkpoints" / str(EVERY), 0, signal.SIGKILL)
    assert killed.end() == [-signal.SIGKILL, -signal.SIGABRT]
    assert not (tmp_path / "two" / kind).exists()
    for number, said in enumerate(killed.said()):
        assert said.splitlines()[-1].startswith(f"error: process {number} of 2 of the run was ended, because"), said

    resumed = Two([*arguments, "--resume-from-checkpoint", "latest"], tmp_path / "resumed")
    assert resumed.end() == [0, 0], resumed.said()
    first, second = resumed.said()
    assert "the run continues from" in first
    assert "step" not in second  # Only the first process prints and writes.
    files = {folder: {path.name for path in (tmp_path / folder).iterdir()} for folder in ("one", "two")}
    assert files["one"] == files["two"]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    expected, found = weights(tmp_path / "one" / kind), weights(tmp_path / "two" / kind)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(inputs, tmp_path):
    output = tmp_path / "out"
    arguments = [*inputs, *SETTINGS, "--output", output, *KINDS["adapter"], "--max-steps", "100000"]
    run = Two(arguments, tmp_path / "logs")
    run.signal_once(output / "checkpoints" / str(EVERY), 1, signal.SIGTERM)
    assert run.end() == [128 + signal.SIGTERM] * 2, run.said()
    steps = len(losses(output))
    assert (output / "checkpoints" / str(steps)).exists()
    assert f"stopped after step {steps}, saved as a checkpoint" in run.said()[0]
    assert weights(output / "adapter")


def test_an_error_of_one_process_ends_the_other(inputs, tmp_path):
    output = tmp_path / "out"
    run = Two([*inputs, *SETTINGS, "--output", output], tmp_path / "logs", ["--data", tmp_path / "missing.jsonl"])
    assert run.end() == [1, 2], run.said()
    why = f"`data` must be an existing file, got '{tmp_path / 'missing.jsonl'}'."
    first, second = run.said()
    assert first.splitlines()[-1] == f"error: process 0 of 2 ends, because process 1 of 2 failed: {why}"
    assert second.splitlines()[-1] == f"error: {why}"
    assert not output.exists()
