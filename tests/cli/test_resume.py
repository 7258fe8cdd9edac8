"""Tests that `jaxpack train`, killed or stopped at any moment and resumed, equals an undisturbed run bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
from forked_runs import Runs
from tokenizers_for_tests import write_checkpoint

from jaxpack.train.checkpoint import steps_in

STEPS = 24
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
MEASURED = {
    "tokens_per_second",
    "peak_memory_bytes",
    "compile_seconds",
    "first_step_seconds",
}  # metrics that differ between any two runs


class Setting(NamedTuple):
    """Holds the command, the process that runs it, and the folder of an undisturbed run with all its checkpoints."""

    run: Runs
    command: list[object]
    undisturbed: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("resume")
    rows = [{"prompt": f"the cab {row} " * (1 + row % 3), "completion": f" ab {row}"} for row in range(30)]
    for name, some in (("rows", rows), ("eval", rows[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    files = ["--model", write_checkpoint(folder / "base"), "--data", folder / "rows.jsonl"]
    evaluation = ["--eval-data", folder / "eval.jsonl", "--eval-steps", 3, "--save-steps", 3]
    shape = ["--packing", "--max-length", 64, "--per-device-train-batch-size", 2, "--lora-r", 4]
    course = ["--max-steps", STEPS, "--learning-rate", 1e-2, "--lora-dropout", 0.1, "--logging-steps", 2]
    command = ["train", *files, *evaluation, *shape, *course]
    run = Runs(folder / "programs")
    undisturbed = folder / "undisturbed"
    log = folder / "log"
    assert run(*command, "--output", undisturbed, "--save-total-limit", STEPS, log=log) == 0, log.read_text()
    yield Setting(run, command, undisturbed)
    run.close()


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in MEASURED} for line in lines]


def require_same_end(folder: Path, undisturbed: Path) -> None:
    require_same_adapter(folder, undisturbed)
    assert records(folder) == records(undisturbed)


def require_same_adapter(folder: Path, undisturbed: Path) -> None:
    for name in ADAPTER:
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    kept = {str(path.relative_to(folder)) for path in folder.glob("*")}
    files = {"about.json", "metrics.jsonl", "report.md", "report.png", "run.yaml"}
    assert kept == {"adapter", "checkpoints"} | files  # nothing temporary is left
    assert all(path.name.isdecimal() for path in (folder / "checkpoints").iterdir())


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a checkpoint with orbax alone."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler("state", "run")) as checkpointer:
        found = checkpointer.restore(
            checkpoint, args=ocp.args.Composite(state=ocp.args.StandardRestore(), run=ocp.args.JsonRestore())
        )
    assert found.run["step"] == int(checkpoint.name)
    return {name: np.asarray(array) for name, array in found.state.items()}


def require_whole_checkpoints(folder: Path, undisturbed: Path) -> list[int]:
    """Requires that every folder with a checkpoint's name equals the checkpoint of the undisturbed run."""
    steps = steps_in(folder / "checkpoints")
    for step in steps:
        found, expected = (arrays(run / "checkpoints" / str(step)) for run in (folder, undisturbed))
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
    return steps


def moments(seed: int) -> list[list]:
    """Draws four moments, each far enough from the end to occur. The last comes after a whole save, at any speed."""
    draw = random.Random(seed)
    return [
        ["step", draw.randint(1, 4), draw.uniform(0, 0.02)],
        ["save", draw.randint(1, 2), draw.uniform(0, 0.12)],  # a save takes about 0.1 s
        ["file", draw.randint(1, 90)],
        ["save", 2, draw.uniform(0, 0.12)],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_four_times_ends_as_if_it_never_was(seed: int, setting: Setting, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    command = [*setting.command, "--output", output, "--resume-from-checkpoint", "latest"]
    for moment in moments(seed):
        before = steps_in(output / "checkpoints")
        status = setting.run(*command, log=log, moment=moment)
        assert status == -signal.SIGKILL, (moment, log.read_text())
        steps = require_whole_checkpoints(output, setting.undisturbed)
        assert max(steps, default=0) >= max(before, default=0)
    assert setting.run(*command, log=log) == 0, log.read_text()
    assert f"the run continues from {output}/checkpoints/{steps[-1]}: {steps[-1]} of" in log.read_text()
    require_same_end(output, setting.undisturbed)
    require_whole_checkpoints(output, setting.undisturbed)


@pytest.mark.slow
def test_a_signal_saves_and_then_stops(setting: Setting, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    command = [*setting.command, "--output", output, "--resume-from-checkpoint", "latest", "--save-steps", 0]
    adapters, before = [], 0
    for number in (signal.SIGINT, signal.SIGTERM):
        status = setting.run(*command, "--eval-steps", 100, log=log, moment=["step", 7, 0.0], number=number)
        assert status == 128 + number, log.read_text()
        step = steps_in(output / "checkpoints")[-1]
        assert 7 <= step - before <= 9  # the run ended the step that was running
        assert f"stopped after step {step}, saved" in log.read_text()
        adapters.append((output / ADAPTER[1]).read_bytes())
        before = step
    assert setting.run(*command, log=log) == 0, log.read_text()
    for name in ADAPTER:
        assert (output / name).read_bytes() == (setting.undisturbed / name).read_bytes()
    assert len({*adapters, (output / ADAPTER[1]).read_bytes()}) == 3


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
INTERRUPTIONS = int(os.environ.get("JAXPACK_INTERRUPTIONS", "4"))  # 60 take ten minutes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(INTERRUPTIONS))
def test_cases_a_run_that_is_interrupted_ends_as_if_it_never_was(seed: int, setting: Setting, tmp_path: Path) -> None:
    output, log, draw = tmp_path / "run", tmp_path / "log", random.Random(seed)
    command = [*setting.command, "--output", output, "--resume-from-checkpoint", "latest"]
    moment = draw.choice(
        [
            ["step", draw.randint(1, STEPS - 4), draw.uniform(0, 0.02)],
            ["save", draw.randint(1, 6), draw.uniform(0, 0.12)],
            ["file", draw.randint(1, 250)],
        ]
    )
    number = SIGNALS[seed % len(SIGNALS)]
    status = setting.run(*command, log=log, moment=moment, number=number)
    assert status in (-number, 128 + number, 0), (moment, log.read_text())  # 0: it had ended before
    if status == 128 + number and "stopped after step" in log.read_text():
        assert (output / ADAPTER[1]).exists()
    if status:
        assert setting.run(*command, log=log) == 0, (moment, log.read_text())
    require_same_adapter(output, setting.undisturbed)  # The metrics have one more record, of the step of the stop.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a disk of 8 MB, which only root may do."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"only root may mount a disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(-(-INTERRUPTIONS // 4)))
def test_cases_a_run_whose_disk_is_full_can_be_resumed(seed: int, setting: Setting, small_disk: Path) -> None:
    output, log, filler = small_disk / "run", small_disk / "log", small_disk / "filler"
    command = [*setting.command, "--output", output, "--resume-from-checkpoint", "latest"]
    step = random.Random(seed).randint(1, STEPS)
    assert setting.run(*command, log=log, moment=["fill", step, str(filler)]) == 2  # the adapter could not be saved
    filler.unlink()
    assert setting.run(*command, log=log) == 0, log.read_text()
    require_same_adapter(output, setting.undisturbed)


@pytest.mark.slow
def test_a_second_run_does_not_touch_the_first(setting: Setting, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(setting.undisturbed, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    refusals = {
        (): "`output` must be empty or not exist yet",
        ("--resume-from-checkpoint", output / "checkpoints" / "3"): "`output` must not hold checkpoints/, unless",
        ("--resume-from-checkpoint", "latest", "--learning-rate", "2e-2"): "`learning_rate` 0.01 (here 0.02)",
    }
    for flags, message in refusals.items():
        assert setting.run(*setting.command, "--output", output, *flags, log=log) == 2
        assert message in log.read_text()
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_in_cases_of_damage_latest_falls_back_and_never_starts_anew(setting: Setting, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(setting.undisturbed, output)
    command = [*setting.command, "--output", output, "--save-total-limit", STEPS, "--resume-from-checkpoint"]
    checkpoints = output / "checkpoints"
    for step in (STEPS, STEPS - 3):
        arrays = max((checkpoints / str(step) / "state").rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 4
        arrays.write_bytes(content)
    assert setting.run(*command, checkpoints / str(STEPS), log=log) == 2
    assert f"The one before it, '{checkpoints / str(STEPS - 6)}', is whole: resume from that." in log.read_text()
    assert setting.run(*command, "latest", log=log) == 0, log.read_text()
    said = log.read_text()
    assert f"the checkpoint {checkpoints / str(STEPS)} is damaged, so it is not used: state/" in said
    assert f"the run resumes from it and repeats steps {STEPS - 5} to {STEPS}" in said
    for name in ADAPTER:
        assert (output / name).read_bytes() == (setting.undisturbed / name).read_bytes()
    assert records(output) == records(setting.undisturbed)
    assert require_whole_checkpoints(output, setting.undisturbed) == steps_in(setting.undisturbed / "checkpoints")

    for step in steps_in(checkpoints):
        (checkpoints / str(step) / "run" / "metadata").write_text("{}")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert setting.run(*command, "latest", log=log) == 2
    assert f"where all {STEPS // 3} are damaged: {STEPS} (run/metadata" in log.read_text()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
