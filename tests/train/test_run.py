"""Tests that a run compiles its programs first, keeps the device busy, and evaluates what it has learned."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import small_model
from short_runs import LORA, ROWS, SHORT, changed

from jaxpack.cli.demo import sample
from jaxpack.errors import InputError
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.progress import Log
from jaxpack.train.trainer import Trainer


def test_the_shapes_of_a_run_are_compiled_before_it_and_no_other(monkeypatch):
    trainer = Trainer(
        small_model("qwen3", lora=LORA),
        None,
        ROWS,
        changed(SHORT, packing=False, max_steps=20, per_device_train_batch_size=8),
    )
    assert 1 < len(trainer.batches.shapes) <= 4
    compiled = []
    lower = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *args: compiled.append(args) or lower(*args))
    result = trainer.train()
    assert len(compiled) == result.compiled_shapes == len(trainer.batches.shapes)


LAYOUTS = [{"packing": True}, {"packing": False}, {"packing": False, "padding_free": False}]


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS[1:])], ids=str
)
def test_nothing_compiles_in_an_epoch_of_gsm8k_after_its_first_step(layout, monkeypatch, tmp_path):
    rows = [{"input_ids": [1 + i % 96 for i in range(len("".join(row.values())) // 16)]} for row in sample()]
    config = TrainConfig(max_length=128, per_device_train_batch_size=12, num_train_epochs=1, logging_steps=1, **layout)
    config = changed(config, output_dir=str(tmp_path), eval_steps=2, save_steps=4)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, rows, config, rows[:12])
    compiled: list[str] = []  # all that XLA compiles, also small programs between the steps
    by_step: list[int] = []

    def count(event: str, _: float, **about: object) -> None:
        # The search for NaN is compiled when a checkpoint is first saved.
        if event == "/jax/core/compile/backend_compile_duration" and "_all_finite" not in str(about.get("fun_name")):
            compiled.append(event)

    log_step = Log.step
    monkeypatch.setattr(Log, "step", lambda *args: (log_step(*args), by_step.append(len(compiled)))[0])
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        trainer.train()
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(by_step) == trainer.batches.steps_per_epoch > 5
    assert by_step[0] >= len(trainer.batches.shapes) + len(trainer.eval_batches[""].shapes)
    assert by_step[-1] == len(compiled) == by_step[0]


@pytest.mark.parametrize("save_steps", [0, 3])
def test_the_host_reads_nothing_in_the_loop_but_the_metrics_of_the_step_before(save_steps, monkeypatch, tmp_path):
    """A read waits for the step that computes the value.

    So the host starts each step but the second before it reads the metrics of the step before. It reads the state only
    to save it.
    """
    config = changed(SHORT, logging_steps=1, output_dir=str(tmp_path), save_steps=save_steps)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config)
    events: list[tuple[str, object]] = []
    metrics_of: dict[int, int] = {}  # by id of the array; `started` keeps the arrays alive, so ids stay unique
    started = []
    run = jax.stages.Compiled.__call__

    def start(program, *args):
        state, metrics = run(program, *args)
        metrics_of.update((id(leaf), len(started)) for leaf in metrics)
        events.append(("start", len(started)))
        started.append((state, metrics))
        return state, metrics

    def reading(read):
        def spy(x, *args, **options):
            if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
                events.append(("read", metrics_of.get(id(x), "something else")))
            return read(x, *args, **options)

        return spy

    monkeypatch.setattr(jax.stages.Compiled, "__call__", start)
    kind = type(jnp.zeros(()))
    monkeypatch.setattr(kind, "_value", property(reading(kind._value.fget)))  # float(x), x.item(), device_get
    for owner, name in (
        (kind, "block_until_ready"),
        (jax, "block_until_ready"),  # for several arrays, it bypasses the method
        (np, "asarray"),  # on a CPU, it reads the buffer directly
        (np, "array"),
    ):
        monkeypatch.setattr(owner, name, reading(getattr(owner, name)))
    trainer.train()
    monkeypatch.undo()

    loop = events[events.index(("start", 0)) :]
    steps = trainer.batches.num_steps
    expected: list[tuple[str, object]] = []
    waiting: list[tuple[str, object]] = []
    for step in range(steps):
        expected += [("start", step), *waiting]
        waiting = [("read", step)]
        if save_steps and ((step + 1) % save_steps == 0 or step + 1 == steps):
            expected += [*waiting, ("read", "something else")]
            waiting = []
        elif step == 0:
            expected += waiting
            waiting = []
    expected += waiting
    if not save_steps:
        expected.append(("read", "something else"))  # whether the weights after the last step are finite
    assert [event for event, _ in itertools.groupby(loop)] == expected


def test_a_second_start_finds_its_programs_and_does_the_same(tmp_path, capsys):
    config = changed(SHORT, max_steps=3, compilation_cache_dir=str(tmp_path))
    begin = time.perf_counter()
    first, second = (Trainer(small_model("qwen3", lora=LORA), None, ROWS, config).train() for _ in range(2))
    both = time.perf_counter() - begin
    assert (first.found_programs, second.found_programs) == (0, second.compiled_shapes)
    np.testing.assert_array_equal(first.losses, second.losses)
    for result in (first, second):
        assert 0 < result.compile_seconds < result.first_step_seconds
    assert first.first_step_seconds + second.first_step_seconds < both
    shown = capsys.readouterr().err
    assert shown.count(f"compiled programs are kept in {tmp_path} for later runs (") == 2
    assert "0 of 1 were found compiled" in shown
    assert "1 of 1 were found compiled" in shown
    seconds = f"{second.first_step_seconds:.1f} s, of which compiling took {second.compile_seconds:.1f} s"
    assert f"the first step ended after {seconds}" in shown


def test_a_run_goes_on_where_programs_cannot_be_kept(tmp_path, capsys):
    (tmp_path / "file").touch()
    config = changed(SHORT, max_steps=2, compilation_cache_dir=str(tmp_path / "file"))
    result = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config).train()
    assert len(result.losses) == 2
    assert f"compiled programs cannot be kept in {tmp_path}/file: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("layout", [LAYOUTS[0], pytest.param(LAYOUTS[1], marks=pytest.mark.slow), LAYOUTS[2]], ids=str)
def test_evaluation_is_the_mean_over_the_targets_of_each_document_alone(layout):
    model = small_model("qwen3", lora=LoraConfig(r=4, lora_dropout=0.5))
    rows = [{"input_ids": row["input_ids"], "labels": [-100, *row["input_ids"][1:]]} for row in ROWS[:13]]
    rows[5]["labels"] = [-100] + [token if i % 3 else -100 for i, token in enumerate(rows[5]["input_ids"][1:])]
    config = changed(SHORT, max_steps=1, learning_rate=1e-9, gradient_accumulation_steps=2, **layout)
    result = Trainer(model, None, ROWS, config, rows).train()
    # Each document is alone in its row. A token reads what is before it, so the zeros behind the document do not count.
    tokens = np.array([row["input_ids"] + [0] * (64 - len(row["input_ids"])) for row in rows])
    losses = []
    for row, logits in zip(rows, np.asarray(model.logits(jnp.array(tokens)), np.float64), strict=True):
        logits = logits[: len(row["input_ids"])]
        surprise = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(logits)), np.roll(row["input_ids"], -1)]
        losses += surprise[:-1][np.array(row["labels"])[1:] != -100].tolist()
    assert result.evaluations == {1: pytest.approx(np.mean(losses), rel=1e-5)}


def test_an_evaluation_that_does_not_fit_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr("jaxpack.train.run.free_device_bytes", lambda device: 2**40)
    monkeypatch.setattr("jaxpack.train.evaluation.free_device_bytes", lambda device: 1000)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, changed(SHORT, max_steps=1), ROWS[:9])
    with pytest.raises(InputError, match=r"`eval_dataset` must fit on the device: a batch of 1 x 2 x 128 tokens needs"):
        trainer.train(on_start=lambda: pytest.fail("it has started"))
