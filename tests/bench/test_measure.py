"""Measuring a case times the steps that the trainer takes, and counts the tokens that their batches really hold."""

import dataclasses
import functools
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from models import random_documents, small_model

from jaxpack.bench.cases import Case, Planned, case_of
from jaxpack.bench.measure import WARM_UP, measure, timed_steps, train_config
from jaxpack.data.batching import Batches
from jaxpack.data.packing import PackedBatch
from jaxpack.settings import LoraConfig
from jaxpack.train.run import Run
from jaxpack.train.step import Metrics
from jaxpack.train.trainer import Trainer

LENGTHS = [5, 60, 33, 90, 12, 47, 71, 20] * 6
DOCUMENTS = random_documents(LENGTHS, masked=0.0)
ROWS = {"padded": 4, "padding-free": 4, "packed": 1}


def case(layout: str) -> Case:
    return Case(model="small", layout=layout, rows=ROWS[layout], max_length=128, steps=4, learning_rate=1e-2)


@functools.cache
def figures_of(layout: str) -> dict[str, Any]:
    return measure(case(layout), small_model("qwen3", lora=LoraConfig(r=4)), DOCUMENTS)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "packed" else pytest.mark.slow) for name in ROWS]
)
def test_figures_are_of_what_the_batches_hold(layout):
    figures, batches = figures_of(layout), Batches(DOCUMENTS, train_config(case(layout)))
    assert figures["shapes"] == batches.shapes
    filled = [batches[step] for step in range(len(batches))]
    held = np.array([(batch.segment_ids > 0).sum() for batch in filled])
    assert figures["tokens"] == held.tolist()
    assert len(held) == WARM_UP + 4
    assert 1 - figures["padding_share"] == pytest.approx(held.sum() / sum(batch.tokens.size for batch in filled))

    timed = timed_steps(batches)[WARM_UP:]
    seconds = np.array(figures["each_step_seconds"])
    np.testing.assert_allclose(seconds, np.diff(figures["loss_seconds"])[WARM_UP - 1 :], rtol=1e-6)
    rate = held[WARM_UP:][timed].sum() / seconds[timed].sum()
    assert figures["tokens_per_second"] == pytest.approx(rate)
    assert figures["warm_up_seconds"] == pytest.approx(figures["loss_seconds"][WARM_UP - 1])


def test_a_step_on_nan_is_not_measured():
    model = small_model("qwen3", lora=LoraConfig(r=4))
    model.norm.scale[...] = jnp.nan
    with pytest.raises(ValueError, match="losses are not finite"):
        measure(case("packed"), model, DOCUMENTS)


def test_a_record_says_which_case_it_measured():
    """No figure takes the place of a field of the case, by whose fields a record is found again."""
    planned = Planned("cases", "packed", case("packed"))
    record = planned.record(data="some documents", **figures_of("packed"))
    assert case_of(record) == planned.case
    with pytest.raises(TypeError, match="offload_weights"):
        planned.record(offload_weights=False)


def test_a_case_is_trained_as_it_says():
    assert {
        layout: {(A, B) for A, B, _ in Batches(DOCUMENTS, train_config(case(layout))).shapes} for layout in ROWS
    } == {
        "padded": {(1, 4)},
        "padding-free": {(1, 1)},
        "packed": {(1, 1)},
    }
    config = train_config(dataclasses.replace(case("packed"), remat="none", implementation="xla"))
    assert (config.packing, config.remat, config.implementation) == (True, "none", "xla")
    assert (config.learning_rate, config.lr_scheduler_type, config.max_length) == (1e-2, "constant", 128)


def test_a_case_says_what_lies_where_and_within_which_memory():
    settings = {"offload_weights": "on", "offload_embedding": "on", "memory_limit": 2.5, "optim": "adamw_8bit"}
    planned = dataclasses.replace(case("packed"), remat="auto", **settings)
    config = train_config(planned)
    assert {name: getattr(config, name) for name in settings} == settings
    for words in ("within 2.5 GiB", "weights on the host", "embedding on the host"):
        assert words in str(planned)
        assert words not in str(case("packed"))


def test_the_steps_are_those_of_the_trainer():
    pieces = zip(DOCUMENTS.starts, LENGTHS, strict=True)
    rows = [{"input_ids": DOCUMENTS.tokens[start : start + length].tolist()} for start, length in pieces]
    trainer = Trainer(small_model("qwen3", lora=LoraConfig(r=4)), None, rows, train_config(case("packed")))
    np.testing.assert_array_equal(figures_of("packed")["losses"], trainer.train().losses)


@pytest.mark.parametrize("layout", ["packed", pytest.param("padding-free", marks=pytest.mark.slow)])
def test_a_device_that_takes_launches_only_as_it_runs_them_is_timed_right(layout, monkeypatch):
    step_seconds, free_at = 0.1, 0.0

    class Loss(float):
        def __float__(self) -> float:
            time.sleep(max(0.0, free_at_of[self] - time.perf_counter()))
            return float.__float__(self)

    free_at_of: dict[float, float] = {}

    def launch(run: Run, batch: PackedBatch) -> Metrics:
        nonlocal free_at
        run.started += 1
        loss = Loss(run.started)
        free_at = max(free_at, time.perf_counter()) + step_seconds
        free_at_of[loss] = free_at
        time.sleep(max(0.0, free_at - 0.1 * step_seconds - time.perf_counter()))  # the queue takes the last tenth
        return Metrics(loss, jnp.zeros(()))

    monkeypatch.setattr(Run, "step", launch)
    figures = measure(case(layout), small_model("qwen3", lora=LoraConfig(r=4)), DOCUMENTS)
    assert figures["step_seconds"] == pytest.approx(step_seconds, rel=0.15)
    timed = timed_steps(Batches(DOCUMENTS, train_config(case(layout))))
    assert figures["tokens_per_second"] == pytest.approx(
        np.array(figures["tokens"])[timed].mean() / step_seconds, rel=0.15
    )


def test_neither_the_warm_up_nor_the_first_step_of_a_shape_is_timed():
    documents = random_documents([10] * 54 + [400])
    batches = Batches(documents, train_config(Case(model="small", layout="padding-free", rows=1, steps=52)))
    timed, shapes = timed_steps(batches), batches.row_lengths
    firsts = {int(np.flatnonzero(shapes == shape)[0]) for shape in shapes}
    assert len(firsts) == 2
    assert max(firsts) >= WARM_UP
    assert {step for step, counts in enumerate(timed) if not counts} == {*range(WARM_UP), *firsts}
