"""Tests evaluation alone, before the first step, and what a run does with it at its end."""

import json
import math
import shutil
import signal
from collections import UserDict

import jax.numpy as jnp
import numpy as np
import pytest
from models import small_model
from short_runs import LORA, ROWS, SHORT, changed

from jaxpack import Callback, EarlyStopping
from jaxpack.errors import InputError
from jaxpack.train.evaluation import evaluate
from jaxpack.train.trainer import Trainer

HELD_OUT = ROWS[:9]


def model():
    return small_model("qwen3", lora=LORA)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose learning rate is so large that its evaluation gets worse after a while."""
    folder = tmp_path_factory.mktemp("run")
    more = {"eval_on_start": True, "load_best_model_at_end": True, "learning_rate": 0.3, "max_steps": 6}
    config = changed(SHORT, output_dir=str(folder), eval_steps=1, save_steps=1, **more)
    trainer = Trainer(model(), None, ROWS[9:], config, HELD_OUT)
    return trainer, trainer.train()


def test_an_evaluation_alone_is_that_of_a_run(run):
    trainer, result = run
    alone = evaluate(model(), None, HELD_OUT, SHORT)
    assert alone["eval_loss"] == pytest.approx(result.evaluations[0], rel=1e-6)
    assert set(alone) == {"eval_loss", "eval_perplexity"}
    assert min(result.evaluations) == 0
    assert trainer.evaluate(ROWS[9:])["eval_loss"] != trainer.evaluate()["eval_loss"]


def test_the_best_weights_are_taken_at_the_end(run):
    trainer, result = run
    saved = {step: loss for step, loss in result.evaluations.items() if step}
    best = min(saved, key=saved.__getitem__)
    assert best != 6  # Otherwise this test shows nothing.
    assert trainer.steps_in_model == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(saved[best], rel=1e-6)


def test_a_model_that_is_not_trained_is_evaluated():
    frozen = small_model("qwen3")
    assert evaluate(frozen, None, HELD_OUT, SHORT)["eval_loss"] > 0


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "ends_at"),
    [
        ([3.0, 2.0, 2.0, 1.0, 1.5, 1.6], 2, 0.0, 5),
        ([3.0, 2.95, 2.9, 2.85], 3, 0.1, 3),  # each is lower, but not by enough
        ([3.0, 2.0, 1.0], 1, 0.0, None),
    ],
)
def test_a_run_stops_where_its_evaluation_does_not_get_better(losses, patience, threshold, ends_at):
    stopping = EarlyStopping(patience, threshold)
    asked = [bool(stopping.on_evaluation(step, {"eval_loss": loss})) for step, loss in enumerate(losses)]
    assert (asked.index(True) if True in asked else None) == ends_at


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"eval_on_start": True}, "`eval_on_start` must be false without an `eval_dataset` or"),
        ({"load_best_model_at_end": True, "output_dir": "x"}, "`load_best_model_at_end` must be false without"),
        ({"early_stopping_patience": 3}, "`early_stopping_patience` must be None without an `eval_dataset` or an"),
    ],
)
def test_what_needs_evaluation_data_says_so(setting, message):
    with pytest.raises(InputError, match=message):
        Trainer(model(), None, ROWS, changed(SHORT, **setting))


# --- Early stopping ---------------------------------------------------------------------------------------------------

# The loss rises from the first step on, so a patience of 2 is exhausted by the third evaluation, after step 6.
RISING = changed(SHORT, learning_rate=0.3, max_steps=12, eval_steps=2, save_steps=2, save_total_limit=9)
PATIENT = {"early_stopping_patience": 2, "early_stopping_threshold": 100.0}
ENDS_AT = 7  # The next step has been started when the callback is told.


class Kills(Callback):
    """Ends a run after a step, as Ctrl-C would."""

    def __init__(self, step):
        self.step = step

    def on_step(self, step, metrics):
        if step == self.step:
            signal.raise_signal(signal.SIGINT)


def stopped_early(folder, *callbacks, **changes):
    config = changed(RISING, output_dir=str(folder), **PATIENT | changes)
    trainer = Trainer(model(), None, ROWS[9:], config, HELD_OUT, callbacks=callbacks)
    return trainer.train(), trainer


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early")
    return folder, stopped_early(folder)[0].losses


def test_a_setting_stops_a_run_whose_evaluation_does_not_get_better(undisturbed):
    assert len(undisturbed[1]) == ENDS_AT


@pytest.mark.parametrize("step", [2, 4, 6, ENDS_AT])
def test_a_resumed_run_ends_at_the_step_of_an_undisturbed_one(step, undisturbed, tmp_path, capfd):
    folder, losses = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    result, trainer = stopped_early(tmp_path / "run", resume_from_checkpoint="latest")
    np.testing.assert_array_equal(result.losses, losses)
    assert trainer.steps_in_model == ENDS_AT
    assert f"ended after step {ENDS_AT}, because the callback EarlyStopping asked for it" in capfd.readouterr().err
    checkpoints = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == [*range(2, ENDS_AT, 2), ENDS_AT]


@pytest.mark.parametrize("step", [3, 5, 6])
def test_a_run_that_is_interrupted_between_evaluations_ends_there_too(step, undisturbed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopped_early(tmp_path, Kills(step))
    result, _ = stopped_early(tmp_path, resume_from_checkpoint="latest")
    np.testing.assert_array_equal(result.losses, undisturbed[1])


def test_a_run_that_has_ended_goes_on_with_more_patience(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    result, _ = stopped_early(tmp_path / "run", resume_from_checkpoint="latest", early_stopping_patience=3)
    assert len(result.losses) == ENDS_AT + 2


def test_evaluations_of_repeated_steps_count_once():
    stopping = EarlyStopping(patience=2)
    for step, loss in [(2, 1.0), (4, 2.0), (4, 2.0), (2, 1.0), (4, 2.0)]:
        assert not stopping.on_evaluation(step, {"eval_loss": loss})
    assert stopping.on_evaluation(6, {"eval_loss": 2.0})


# --- Several sets -----------------------------------------------------------------------------------------------------

SETS = {"short": ROWS[:4], "long": ROWS[4:9]}


def last_token_is_right(losses, predictions, batch):
    there = batch.targets != -100
    return {"right": (jnp.sum(there & (predictions == batch.targets)), jnp.sum(there))}


class Keep(Callback):
    def __init__(self):
        self.found = {}

    def on_evaluation(self, step, metrics):
        self.found[step] = metrics


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A run with named sets, and what it told its callback."""
    folder, keep = tmp_path_factory.mktemp("named"), Keep()
    config = changed(SHORT, output_dir=str(folder), eval_steps=2, save_steps=2, max_steps=4, eval_on_start=True)
    sets = UserDict(SETS)  # any mapping
    more = {"callbacks": [keep], "compute_metrics": last_token_is_right}
    trainer = Trainer(model(), None, ROWS[9:], config, sets, **more)
    return trainer, trainer.train(), keep.found, folder


def test_each_set_has_metrics_of_its_own_and_the_loss_of_all_decides(named):
    trainer, result, found, _ = named
    weights = {name: batches.targets_per_epoch for name, batches in trainer.eval_batches.items()}
    for step, metrics in found.items():
        assert result.evaluations[step] == metrics["eval_loss"]
        for metric in ("loss", "right"):
            mean = sum(weights[name] * metrics[f"eval_{name}_{metric}"] for name in SETS) / sum(weights.values())
            assert metrics[f"eval_{metric}"] == pytest.approx(mean, rel=1e-6)
        assert metrics["eval_long_perplexity"] == pytest.approx(math.exp(metrics["eval_long_loss"]))
    for name, rows in SETS.items():
        alone = evaluate(model(), None, rows, SHORT)
        assert found[0][f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    assert evaluate(model(), None, HELD_OUT, SHORT)["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-6)
    assert trainer.evaluate() == pytest.approx(found[4], rel=1e-6)


def test_metrics_of_sets_are_recorded_and_reported(named):
    _, _, found, folder = named
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [0, 2, 4]
    assert all(found[record["step"]].items() <= record.items() for record in evaluated)
    report = (folder / "report.md").read_text()
    for name in SETS:
        assert f"| evaluation loss of {name}, last, and where that of all sets is lowest |" in report
        loss, perplexity = (found[4][f"eval_{name}_{metric}"] for metric in ("loss", "perplexity"))
        assert f" {loss:.4f}, perplexity {perplexity:.2f} (step 4)" in report
    assert "- evaluation of long: 5 documents" in report


def test_a_run_goes_on_only_with_the_same_sets(named):
    *_, folder = named
    config = changed(SHORT, output_dir=str(folder), max_steps=4, resume_from_checkpoint="latest")
    other = {"short": SETS["long"], "long": SETS["short"]}
    with pytest.raises(InputError, match=r"a checkpoint of the same run, .* with `eval_dataset`"):
        Trainer(model(), None, ROWS[9:], config, other).train()
    trainer = Trainer(model(), None, ROWS[9:], config, dict(reversed(SETS.items())))  # the order does not matter
    trainer.train()
    assert trainer.steps_in_model == 4


def test_programs_do_not_grow_with_the_sets():
    sets = {f"set{length}": [{"input_ids": [1] * length}] * 3 for length in range(20, 900, 50)}
    config = changed(SHORT, packing=False, max_length=1024)
    shared = Trainer(model(), None, ROWS, config, sets).eval_batches.values()
    assert len(shared) == len(sets) > 4
    assert len({(shape, batches.limits[shape[-1]]) for batches in shared for shape in batches.shapes}) <= 4


def test_a_set_that_cannot_be_read_is_named():
    with pytest.raises(InputError, match=r"^Evaluation set 'chat': `eval_dataset` must be an existing file"):
        Trainer(model(), None, ROWS, SHORT, {"math": ROWS, "chat": "nowhere.jsonl"})
    with pytest.raises(InputError, match=r"^`eval_dataset` must name at least one set, got an empty mapping"):
        Trainer(model(), None, ROWS, SHORT, {})


def test_a_name_that_makes_two_metrics_one_is_refused_before_the_first_step():
    def long_loss(losses, predictions, batch):
        return {"long_loss": (losses.sum(), 1.0)}

    with pytest.raises(
        InputError, match="got 'long': `eval_long_loss` would be its metric 'loss', and also the metric"
    ):
        evaluate(model(), None, SETS, SHORT, compute_metrics=long_loss)


def test_a_trainer_without_evaluation_data_asks_for_them():
    with pytest.raises(InputError, match="`dataset` must be given"):
        Trainer(model(), None, ROWS, SHORT).evaluate()
