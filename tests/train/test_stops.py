"""Tests that a run that ends early keeps its last whole state, whatever ends it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import small_model
from short_runs import LORA, ROWS, SHORT, changed

from jaxpack import Callback, InputError, LoraConfig, TrainConfig
from jaxpack.errors import TrainingError
from jaxpack.train.run import Run
from jaxpack.train.trainer import Trainer

# Padding-free, so that the run has several shapes; with a limit, "auto" has several choices on a CPU as well.
SEVERAL = changed(
    SHORT,
    packing=False,
    padding_free=True,
    per_device_train_batch_size=4,
    max_steps=8,
    remat="auto",
    memory_limit=4.0,
)
OTHER_STOPS = ((4, False), (0, True))


class Fails(Callback):
    """Raises an error when a step is told."""

    def __init__(self, step: int, error: BaseException):
        self.step, self.error = step, error

    def on_step(self, step, metrics):
        if step == self.step:
            raise self.error


def trained(model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def assert_equal(one: Trainer, weights: list[np.ndarray]) -> None:
    for a, b in zip(trained(one.model), weights, strict=True):
        np.testing.assert_array_equal(a, b)


def steps_in(folder) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def resumed(config: TrainConfig, lora: LoraConfig | None) -> Trainer:
    trainer = Trainer(small_model("qwen3", lora=lora), None, ROWS, changed(config, resume_from_checkpoint="latest"))
    trainer.train()
    return trainer


@functools.cache
def undisturbed(lora: LoraConfig | None, config: TrainConfig = SHORT) -> tuple[list[np.ndarray], list[float]]:
    """Returns the weights and the losses of a run that nothing ends early."""
    trainer = Trainer(small_model("qwen3", lora=lora), None, ROWS, config)
    losses = trainer.train().losses
    return trained(trainer.model), losses


@pytest.mark.parametrize(
    ("lora", "error"),
    [(LORA, RuntimeError("it failed")), (LORA, SystemExit("it failed")), (None, RuntimeError("it failed"))],
    ids=["lora", "exit", "full"],
)
def test_cases_an_error_saves_a_checkpoint_and_leaves_the_weights_in_the_model(lora, error, tmp_path, capsys):
    config = changed(SHORT, output_dir=str(tmp_path))
    trainer = Trainer(small_model("qwen3", lora=lora), None, ROWS, config, callbacks=[Fails(3, error)])
    with pytest.raises(type(error), match="it failed"):
        trainer.train()
    done = trainer.steps_in_model
    assert done in (3, 4)  # The callback is told when the next step has been started.
    assert steps_in(tmp_path) == [done]
    assert len(trainer.progress.losses) == done
    assert f"its last whole state is that after step {done}, saved as a checkpoint" in capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == done
    assert_equal(resumed(config, lora), undisturbed(lora)[0])


def test_cases_data_that_fails_midway_saves_what_was_done(monkeypatch, tmp_path):
    config = changed(SHORT, output_dir=str(tmp_path))
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config)
    get = type(trainer.batches).__getitem__

    def fail(batches, step):
        if step == 5:
            raise OSError("the disk is gone")
        return get(batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.batches), "__getitem__", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            trainer.train()
    assert trainer.steps_in_model == 5
    assert steps_in(tmp_path) == [5]
    assert_equal(resumed(config, LORA), undisturbed(LORA)[0])


def test_cases_an_error_before_the_first_step_saves_nothing(monkeypatch, tmp_path, capsys):
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, changed(SHORT, output_dir=str(tmp_path)))
    monkeypatch.setattr(Run, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.steps_in_model == 0
    assert not (tmp_path / "checkpoints").exists()
    assert "there is no whole state of a finished step to save" in capsys.readouterr().err


def spoil(step: int, monkeypatch, **metric: float) -> None:
    """Makes the weights NaN in a step, and puts `metric` in the place of the step's own."""
    run_step = Run.step

    def spoiled(run, batch):
        metrics = run_step(run, batch)
        if run.started == step:
            trainable = jax.tree.map(lambda x: x * jnp.nan, run.state.trainable)
            run.state = run.state._replace(trainable=trainable)
            metrics = metrics._replace(**{name: jnp.float32(value) for name, value in metric.items()})
        return metrics

    monkeypatch.setattr(Run, "step", spoiled)


@pytest.mark.parametrize(
    ("lora", "metric"), [(LORA, {"loss": np.nan}), (None, {"grad_norm": np.inf})], ids=["lora", "full"]
)
def test_cases_weights_that_are_not_finite_end_the_run_with_the_last_good_checkpoint(
    lora, metric, monkeypatch, tmp_path
):
    config = changed(SHORT, output_dir=str(tmp_path), save_steps=2)
    trainer = Trainer(small_model("qwen3", lora=lora), None, ROWS, config)
    with monkeypatch.context() as patch:
        spoil(5, patch, **metric)
        with pytest.raises(
            TrainingError, match=r"after step [56], .*hold NaN or infinity: the loss of step 5 is .*"
        ) as raised:
            trainer.train()
    assert "`learning_rate` (it was 0.01)" in str(raised.value)
    assert trainer.steps_in_model == 4
    assert steps_in(tmp_path)[-1] == 4
    assert all(np.isfinite(x).all() for x in trained(trainer.model))
    assert_equal(resumed(config, lora), undisturbed(lora)[0])


def test_cases_weights_that_the_last_step_spoils_are_found(monkeypatch):
    spoil(2, monkeypatch)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, changed(SHORT, max_steps=2))
    with pytest.raises(TrainingError, match="after step 2"):
        trainer.train()
    assert trainer.steps_in_model == 0  # There was no copy but that of the start.


def test_a_gradient_that_is_not_finite_is_told_if_the_optimizer_skips_it(monkeypatch, capsys):
    run_step = Run.step

    def overflow(run, batch):
        metrics = run_step(run, batch)
        return metrics._replace(grad_norm=metrics.grad_norm * jnp.inf)

    monkeypatch.setattr(Run, "step", overflow)
    Trainer(small_model("qwen3", lora=LORA), None, ROWS, changed(SHORT, max_steps=1)).train()
    told = capsys.readouterr().err
    assert "its gradient norm inf, but the weights are finite, so the run goes on" in told


def run_out_of_memory(at: int, monkeypatch, *, times: int = 1) -> None:
    """Lets a step fail as on a GPU: the state is lost."""
    run_step, failures = Run.step, []

    def failing(run, batch):
        if run.started == at and len(failures) < times:
            failures.append(at)
            for leaf in jax.tree.leaves(run.state):
                leaf.delete()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4.55GiB")
        return run_step(run, batch)

    monkeypatch.setattr(Run, "step", failing)


@pytest.mark.parametrize(
    ("at", "saves"), [(4, True), (0, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_STOPS)]
)
def test_cases_a_run_that_runs_out_of_memory_goes_on_with_the_next_choice(at, saves, monkeypatch, tmp_path, capsys):
    config = changed(SEVERAL, save_steps=3, **({"output_dir": str(tmp_path)} if saves else {}))
    run_out_of_memory(at, monkeypatch)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config)
    result = trainer.train()
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert 'remat "none" does not fit: the device ran out of memory in a step' in told
    assert "the run goes on after step" in told
    np.testing.assert_allclose(result.losses, undisturbed(LORA, SEVERAL)[1], rtol=1e-5)
    if saves:
        assert steps_in(tmp_path)[-1] == 8
        steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))


def test_cases_a_large_state_goes_back_to_the_last_checkpoint(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("jaxpack.train.run._COPIED_BYTES", 0)
    run_out_of_memory(5, monkeypatch)
    config = changed(SEVERAL, save_steps=3, output_dir=str(tmp_path))
    result = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config).train()
    monkeypatch.undo()
    assert "the run goes on after step 3; steps to repeat: 2" in capsys.readouterr().err
    np.testing.assert_allclose(result.losses, undisturbed(LORA, SEVERAL)[1], rtol=1e-5)


def test_cases_without_another_choice_the_error_says_what_to_do(monkeypatch, tmp_path):
    run_out_of_memory(4, monkeypatch)
    config = changed(SEVERAL, remat="full", memory_limit=None, output_dir=str(tmp_path))
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config)
    assert len(trainer.batches.shapes) > 1
    with pytest.raises(InputError, match=r'got "full": the device ran out of memory in a step\. Choose a smaller'):
        trainer.train()
    assert steps_in(tmp_path) == [trainer.steps_in_model]
    assert trainer.steps_in_model > 0


def test_cases_a_program_that_needs_more_than_is_free_is_not_run(monkeypatch, capsys):
    asked = []

    def has_block(size, device):
        asked.append(size)
        return len(asked) > 1

    monkeypatch.setattr("jaxpack.train.run.free_device_bytes", lambda device: 2**40)
    monkeypatch.setattr("jaxpack.train.run.has_block", has_block)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, SEVERAL)
    trainer.train()
    assert len(asked) == 2 < 1 + len(trainer.batches.shapes)  # the others need less than the largest shape
    largest = max(trainer.batches.shapes)[-1]
    assert f'remat "none" does not fit: a step of 1 x 1 x {largest} tokens needs' in capsys.readouterr().err
