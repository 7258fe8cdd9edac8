"""Tests that metrics reach each chosen destination alike, and that no destination disturbs another or the run."""

import errno
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from models import small_model
from tensorboard_events import events, expected_scalars, records, scalars

from jaxpack.errors import InputError, install_command
from jaxpack.settings import TrainConfig
from jaxpack.train.metrics import Reports, TensorBoard, open_reports
from jaxpack.train.trainer import Trainer

ABOUT = {"settings": {"max_length": 64}}
RECORDS = [{"step": 2, "loss": 3.5}, {"step": 4, "loss": 3.25}, {"step": 4, "eval_loss": 3.1, "eval_perplexity": 22.2}]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path), report_to="tensorboard")
    for after, steps in ((None, range(1, 7)), (4, range(5, 8))):
        with open_reports(config, ABOUT, after) as reports:
            for step in steps:
                reports.write({"step": step, "loss": step + (after or 0) / 8})
    assert scalars(tmp_path) == expected_scalars(tmp_path)
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.5), (6, 6.5), (7, 7.5)]
    written = [event.step for event in events(tmp_path) if event.summary.value]
    assert written == [1, 2, 3, 4, 5, 6, 5, 6, 7]  # the reader left two out


def test_what_was_written_is_in_the_file_at_once(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path), report_to="tensorboard")
    with open_reports(config, ABOUT, after=None) as reports:
        for record in RECORDS:
            reports.write(record)
            assert records(tmp_path)[-1] == record
            assert scalars(tmp_path) == expected_scalars(tmp_path)


def test_a_destination_that_fails_ends_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = TrainConfig(output_dir=str(tmp_path), report_to="tensorboard")
    with open_reports(config, ABOUT, after=None) as reports:
        reports.write(RECORDS[0])
        monkeypatch.setattr(TensorBoard, "write", fail)
        for record in RECORDS[1:]:
            reports.write(record)
    assert records(tmp_path) == RECORDS
    shown = capsys.readouterr().err
    why = "because it cannot be written to: No space left on device"
    assert shown == f"tensorboard ends here, {why}; the run goes on\n"


def test_a_failure_to_close_is_told_and_does_not_keep_others_from_it(capsys: pytest.CaptureFixture) -> None:
    closed = []

    def destination(name: str, error: OSError | None) -> Any:
        def close() -> None:
            closed.append(name)
            if error is not None:
                raise error

        return SimpleNamespace(name=name, close=close)

    with Reports([destination("one", OSError("it is full")), destination("two", None)]):
        pass
    assert closed == ["one", "two"]
    assert capsys.readouterr().err == "one ends here, because it cannot be written to: it is full; the run goes on\n"


@pytest.mark.parametrize(("name", "library"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_library_that_is_missing_is_told_before_any_work(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    config = TrainConfig(output_dir=str(tmp_path / "run"), report_to=name)
    with pytest.raises(InputError) as refused:
        Trainer(small_model("qwen3"), None, "nowhere.jsonl", config)  # the missing file is noticed later
    needs = f"`report_to` '{name}' needs the Python package {library}, which is not installed. Install it with "
    assert str(refused.value) == f"{needs}{install_command(name)}."
    assert not (tmp_path / "run").exists()


# --- Weights & Biases -------------------------------------------------------------------------------------------------


class WandBError(Exception):
    """Is raised by the stand-in for wandb."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Records the calls of a stand-in for wandb, which makes the files that the library makes."""
    calls: list[tuple[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        calls.append(("init", options))
        if os.environ.get("WANDB_PROJECT") == "forbidden":
            raise WandBError("No API key configured.\nUse `wandb login`.")
        name = options["id"] or f"id-{len(calls)}"
        run = Path(options["dir"], "wandb", f"run-20261124_120000-{name}")
        run.mkdir(parents=True, exist_ok=True)
        (run / f"run-{name}.wandb").touch()
        latest = run.with_name("latest-run")
        latest.unlink(missing_ok=True)
        latest.symlink_to(run.name)
        return SimpleNamespace(
            log=lambda values: calls.append(("log", values)),
            define_metric=lambda *metric, **axis: calls.append(("define_metric", (*metric, axis))),
            finish=lambda: calls.append(("finish", None)),
        )

    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init, module.Error = init, WandBError
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return calls


def test_wandb_is_given_the_settings_and_each_record_with_its_step(tmp_path: Path, calls: list) -> None:
    output = tmp_path / "run"
    config = TrainConfig(output_dir=str(output), report_to=["wandb", "tensorboard"])
    with open_reports(config, ABOUT, after=None) as reports:
        for record in RECORDS:
            reports.write(record)
    options = {"project": "jaxpack", "name": "run", "dir": str(output), "id": None, "resume": "allow"}
    assert calls == [
        ("init", options | {"config": {"max_length": 64}}),
        ("define_metric", ("step", {})),
        ("define_metric", ("*", {"step_metric": "step"})),
        ("log", {"train/loss": 3.5, "step": 2}),
        ("log", {"train/loss": 3.25, "step": 4}),
        ("log", {"eval/loss": 3.1, "eval/perplexity": 22.2, "step": 4}),
        ("finish", None),
    ]
    assert records(output) == RECORDS
    assert scalars(output) == expected_scalars(output)


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path, calls: list) -> None:
    config = TrainConfig(output_dir=str(tmp_path), report_to="wandb")
    for after in (None, 4, 8):
        with open_reports(config, ABOUT, after):
            pass
    assert [options["id"] for what, options in calls if what == "init"] == [None, "id-1", "id-1"]


def test_what_wandb_refuses_is_told_and_leaves_nothing(
    tmp_path: Path, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "forbidden")
    config = TrainConfig(output_dir=str(tmp_path), report_to="wandb")
    message = "`report_to` must be able to start, got 'wandb', which cannot: No API key configured. Use `wandb login`."
    with pytest.raises(InputError) as refused:
        open_reports(config, ABOUT, after=None)
    assert str(refused.value) == message
    assert list(tmp_path.iterdir()) == []


def test_wandb_itself_keeps_a_run_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = TrainConfig(output_dir=str(tmp_path), report_to="wandb")
    for after in (None, 4):
        with open_reports(config, ABOUT, after) as reports:
            for record in RECORDS:
                reports.write(record)
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    content = b"".join(file.read_bytes() for file in files)
    for name in (b"train/loss", b"eval/perplexity"):
        assert name in content


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
@pytest.mark.parametrize("after", [None, 4])
def test_cases_metrics_are_written_through_no_link(after: int | None, name: str, tmp_path: Path) -> None:
    """An output folder that somebody prepared may hold links to files of the user."""
    output, elsewhere = tmp_path / "output", tmp_path / "elsewhere"
    output.mkdir()
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (output / name).symlink_to(elsewhere / "mine" if name == "metrics.jsonl" else elsewhere)
    with pytest.raises(InputError, match="`output_dir` must"):
        open_reports(TrainConfig(output_dir=str(output), report_to="tensorboard"), ABOUT, after)
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]
    assert (elsewhere / "mine").read_text() == "mine"


def test_cases_a_run_s_settings_are_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "about.json").symlink_to(tmp_path / "mine")
    open_reports(TrainConfig(output_dir=str(tmp_path / "output")), ABOUT, None).__exit__()
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "output" / "about.json").is_symlink()
