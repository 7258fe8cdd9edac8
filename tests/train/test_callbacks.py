"""Tests what a run tells its callbacks and when, and a user's own metrics, optimizer and schedule."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import random_documents, small_model

from jaxpack import Callback, InputError, LoraConfig, TrainConfig, Trainer
from jaxpack.planning.choose import predict
from jaxpack.planning.memory import argument_bytes
from jaxpack.train.run import Run


def trainer(tmp_path=None, *, eval_lengths=None, config=(), **options):
    settings = {"max_length": 64, "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2}
    settings |= {"output_dir": None if tmp_path is None else str(tmp_path / "run"), "logging_steps": 2} | dict(config)
    rows = None if eval_lengths is None else random_documents(eval_lengths, seed=1)
    model = small_model("qwen3", lora=LoraConfig(r=4))
    return Trainer(model, None, random_documents([30] * 12), TrainConfig(**settings), rows, **options)


class Recorder(Callback):
    def __init__(self, started):
        self.told, self.started = [], started

    def on_step(self, step, metrics):
        self.told.append(("step", step, self.started[0], metrics))

    def on_evaluation(self, step, metrics):
        self.told.append(("evaluation", step, self.started[0], metrics))

    def on_save(self, step, path):
        self.told.append(("save", step, self.started[0], path))

    def on_end(self, result):
        self.told.append(("end", len(result.losses), self.started[0], result))


@pytest.fixture
def started(monkeypatch):
    """Counts the steps that have been started."""
    count = [0]
    step = Run.step

    def counting(self, batch):
        count[0] += 1
        return step(self, batch)

    monkeypatch.setattr(Run, "step", counting)
    return count


def test_all_is_told_in_order_and_after_the_next_step_was_started(tmp_path, started):
    recorder = Recorder(started)
    config = {"eval_steps": 3, "save_steps": 3}
    result = trainer(tmp_path, eval_lengths=[40], config=config, callbacks=[recorder]).train()
    told = recorder.told
    assert [(name, step) for name, step, *_ in told if name == "step"] == [("step", i) for i in range(1, 7)]
    assert [(name, step) for name, step, *_ in told if name == "evaluation"] == [("evaluation", 3), ("evaluation", 6)]
    assert [(name, step) for name, step, *_ in told if name == "save"] == [("save", 3), ("save", 6)]
    assert told[-1][0] == "end"
    assert told[-1][3] is result
    for name, step, count, _ in told:
        assert count > step or step == 6, f"{name} of step {step} was told when {count} were started"
    losses = [metrics["loss"] for name, _, _, metrics in told if name == "step"]
    np.testing.assert_array_equal(losses, result.losses)
    evaluated = {step: metrics["eval_loss"] for name, step, _, metrics in told if name == "evaluation"}
    assert evaluated == result.evaluations
    assert all(path.is_dir() for name, _, _, path in told if name == "save")


def test_a_callback_ends_a_run_in_order(tmp_path):
    class Enough(Callback):
        def on_step(self, step, metrics):
            return step == 2

    result = trainer(tmp_path, callbacks=[Enough()], config={"save_steps": 0}).train()
    assert 2 < len(result.losses) <= 4
    again = trainer(tmp_path, config={"resume_from_checkpoint": "latest", "save_steps": 0}).train()
    np.testing.assert_array_equal(again.losses, trainer().train().losses)


def test_what_a_callback_raises_ends_the_run_and_keeps_what_was_trained():
    class Wrong(Callback):
        def on_step(self, step, metrics):
            raise RuntimeError("mine")

    training = trainer(callbacks=[Wrong()])
    before = np.array(training.model.blocks.attention.qkv.lora["q_proj"].lora_a[...])
    with pytest.raises(RuntimeError, match="mine"):
        training.train()
    assert not np.array_equal(training.model.blocks.attention.qkv.lora["q_proj"].lora_a[...], before)


def accuracy(losses, predictions, batch):
    there = batch.targets != -100
    right = jnp.sum(there & (predictions == batch.targets))
    return {"accuracy": (right, jnp.sum(there)), "loss_again": (jnp.sum(losses), jnp.sum(there))}


@pytest.mark.parametrize("size", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_metrics_are_means_over_the_whole_dataset_however_it_is_cut(size, tmp_path):
    found = []

    class Keep(Callback):
        def on_evaluation(self, step, metrics):
            found.append(metrics)

    config = {"per_device_train_batch_size": size, "max_steps": 1}
    folder = tmp_path / str(size)
    folder.mkdir()
    lengths = [40, 12, 33, 21, 8]
    trained = trainer(folder, eval_lengths=lengths, compute_metrics=accuracy, callbacks=[Keep()], config=config)
    trained.train()
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [record for record in records if "eval_loss" in record]
    assert evaluated["eval_accuracy"] == found[-1]["eval_accuracy"]
    np.testing.assert_allclose(found[-1]["eval_loss_again"], found[-1]["eval_loss"], rtol=1e-6)
    documents, right, count = random_documents(lengths, seed=1), 0, 0
    for start, length in zip(documents.starts, documents.lengths, strict=True):
        tokens = jnp.asarray(documents.tokens[start : start + length])
        likeliest = jnp.argmax(trained.model.logits(tokens[None])[0, :-1], axis=-1)
        there = documents.labels[start + 1 : start + length] != -100
        right, count = right + int(np.sum(there & (likeliest == tokens[1:]))), count + there.sum()
    np.testing.assert_allclose(found[-1]["eval_accuracy"], right / count, rtol=1e-6)


@pytest.mark.slow
def test_a_schedule_takes_the_place_of_the_configs(tmp_path):
    schedule = optax.linear_schedule(1e-2, 0.0, 6)
    mine = trainer(tmp_path, optimizer=schedule, config={"learning_rate": 1.0}).train()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["learning_rate"] == pytest.approx(float(schedule(1)))
    np.testing.assert_allclose(mine.losses, trainer().train().losses, rtol=1e-6)


def test_an_optax_transformation_takes_the_place_of_adamw(tmp_path):
    config = {"max_grad_norm": 0, "max_steps": 2}
    training = trainer(tmp_path, optimizer=optax.sgd(0.5), config=config)
    adapter = training.model.blocks.attention.qkv.lora["q_proj"]
    run = Run(training.model, training.batches, training.config, optimizer=optax.sgd(0.5))
    assert jax.tree.leaves(run.state.optimizer) == []
    before = np.array(adapter.lora_a[...])
    training.train()
    assert not np.array_equal(adapter.lora_a[...], before)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "learning_rate" not in record


def test_memory_is_predicted_with_the_state_of_ones_own_optimizer(monkeypatch):
    on_device = {"offload_weights": "off", "offload_embedding": "off"}
    training = trainer(config={"memory_limit": 100, "max_length": 128} | on_device)

    steps = []
    monkeypatch.setattr(
        "jaxpack.planning.choose.predict", lambda step, rates: steps.append(step) or predict(step, rates)
    )
    runs = [
        Run(training.model, training.batches, training.config, optimizer=optimizer)
        for optimizer in (None, optax.sgd(0.5), optax.sgd(0.5, momentum=0.9))
    ]
    for run, step, moments in zip(runs, steps, (2, 0, 1), strict=True):
        assert step.optimizer_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(run.state.optimizer))
        assert step.optimizer_bytes == pytest.approx(moments * 4 * step.trained, abs=8)
        assert argument_bytes(step) - step.optimizer_bytes == argument_bytes(steps[1])


@pytest.mark.slow
def test_adam_as_a_transformation_is_adamw():
    slow = trainer(optimizer=optax.chain(optax.scale_by_adam(), optax.scale(-1e-2)), config={"max_grad_norm": 0})
    flat = trainer(optimizer=optax.constant_schedule(1e-2), config={"max_grad_norm": 0})
    np.testing.assert_allclose(slow.train().losses, flat.train().losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"optimizer": 1e-3}, "`optimizer` must be an optax transformation .* or a schedule"),
        ({"callbacks": [print]}, "`callbacks` must be a list of `jaxpack.Callback`s"),
        ({"compute_metrics": 3}, "`compute_metrics` must be a function"),
        ({"compute_metrics": accuracy}, "`compute_metrics` must be None without an `eval_dataset`"),
    ],
)
def test_bad_arguments(options, rule):
    with pytest.raises(InputError, match=rule):
        trainer(**options)
