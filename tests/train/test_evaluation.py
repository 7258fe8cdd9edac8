"""Tests evaluation alone, before the first step, and what a run does with it at its end."""

import pytest
from models import small_model
from short_runs import LORA, ROWS, SHORT, changed

from jaxpack import EarlyStopping
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
    ],
)
def test_what_needs_evaluation_data_says_so(setting, message):
    with pytest.raises(InputError, match=message):
        Trainer(model(), None, ROWS, changed(SHORT, **setting))


def test_a_trainer_without_evaluation_data_asks_for_them():
    with pytest.raises(InputError, match="`dataset` must be given"):
        Trainer(model(), None, ROWS, SHORT).evaluate()
