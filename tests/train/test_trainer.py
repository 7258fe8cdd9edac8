"""The loop: what it reports is what it did, and the model it leaves is the one it trained."""

import functools
import itertools
import json
import signal
import threading
import time
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import small_model

import jaxpack.train.trainer as trainer_module
from jaxpack.cli.demo import sample
from jaxpack.constants import Implementation, Remat
from jaxpack.errors import InputError
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.trainer import Trainer

LORA = LoraConfig(r=4)
ROWS = [
    {"input_ids": np.random.default_rng(i).integers(0, 97, 2 + 7 * i % 60).tolist(), "labels": None} for i in range(40)
]
SHORT = TrainConfig(max_length=64, packing=True, per_device_train_batch_size=2, max_steps=7, learning_rate=1e-2)


def changed(config: TrainConfig, **changes: object) -> TrainConfig:
    return TrainConfig(**(vars(config) | changes))


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_only_what_is_trained_changes_and_arrays_held_elsewhere_live_on(lora):
    model = small_model("qwen3", lora=lora)
    before = nnx.clone(model)
    Trainer(model, None, ROWS, SHORT).train()
    for (path, old), (_, new) in zip(
        nnx.to_flat_state(nnx.state(before, nnx.Param)), nnx.to_flat_state(nnx.state(model, nnx.Param)), strict=True
    ):
        trained = lora is None or path[-1] in ("lora_a", "lora_b")
        assert (np.asarray(old[...]) != np.asarray(new[...])).any() == trained, path


def test_the_records_are_those_of_the_run(tmp_path):
    trainer = Trainer(
        small_model("qwen3", lora=LORA), None, ROWS, changed(SHORT, output_dir=str(tmp_path), logging_steps=3)
    )
    result = trainer.train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 6, 7]
    means = [result.losses[:3].mean(), result.losses[3:6].mean(), result.losses[6]]
    np.testing.assert_allclose([record["loss"] for record in records], means, rtol=1e-6)
    batches = trainer.batches
    empty = 1 - batches.tokens_per_step[3:6].sum() / batches.positions_per_step[3:6].sum()
    assert records[1]["padding_share"] == pytest.approx(empty)
    assert records[-1]["learning_rate"] == pytest.approx(1e-2 * 1 / 7)
    assert {record["compiled_shapes"] for record in records} == {1}


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
    compiled: list[str] = []  # by XLA, the small programs between the steps, too
    by_step: list[int] = []

    def count(event: str, _: float, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    log_step = trainer_module._Log.step
    monkeypatch.setattr(trainer_module._Log, "step", lambda *args: (log_step(*args), by_step.append(len(compiled)))[0])
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        trainer.train()
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(by_step) == trainer.batches.steps_per_epoch > 5
    assert by_step[0] >= len(trainer.batches.shapes) + len(trainer.eval_batches.shapes)
    assert by_step[-1] == len(compiled) == by_step[0]


@pytest.mark.parametrize("save_steps", [0, 3])
def test_the_host_reads_nothing_in_the_loop_but_the_metrics_of_the_step_before(save_steps, monkeypatch, tmp_path):
    """A read waits for the step that makes what is read. So each step but the second is started before the one ahead of
    it is read, and the state is read where it is saved, and nowhere else.
    """
    config = changed(SHORT, logging_steps=1, output_dir=str(tmp_path), save_steps=save_steps)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config)
    events: list[tuple[str, object]] = []
    metrics_of: dict[int, int] = {}  # by id of the array; `started` keeps them alive, so that no id is used again
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
        (jax, "block_until_ready"),  # of several arrays, it does not call theirs
        (np, "asarray"),  # on a CPU, it takes a buffer
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
    assert shown.count(f"compiled programs are kept in {tmp_path} (") == 2
    assert "0 of 1 found compiled" in shown and "1 of 1 found compiled" in shown
    assert f"first step after {second.first_step_seconds:.1f} s, {second.compile_seconds:.1f} s of them" in shown


def test_a_run_goes_on_where_programs_cannot_be_kept(tmp_path, capsys):
    (tmp_path / "file").touch()
    config = changed(SHORT, max_steps=2, compilation_cache_dir=str(tmp_path / "file"))
    result = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config).train()
    assert len(result.losses) == 2
    assert f"compiled programs cannot be kept in {tmp_path}/file: File exists" in capsys.readouterr().err


def test_a_stop_that_is_asked_for_at_any_time_is_saved(monkeypatch, tmp_path):
    class Asked(trainer_module._Stop):
        @property
        def asked(self) -> bool:
            before = super().asked
            if len(trainer.progress.losses) == 3:
                self._received = signal.SIGINT  # right after it was looked for
            return before

    monkeypatch.setattr(trainer_module, "_Stop", Asked)
    config = changed(SHORT, eval_steps=3, save_steps=6, output_dir=str(tmp_path))  # step 3 is waited for, and not saved
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config, ROWS[:9])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    losses = trainer.progress.losses
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == [str(len(losses))]
    # Told, too, though `logging_steps` is 10.
    *_, record = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (record["step"], record["loss"]) == (len(losses), pytest.approx(np.mean(losses)))
    assert (tmp_path / "report.md").exists()


def test_an_interrupted_run_leaves_what_it_has_learned(monkeypatch):
    model = small_model("qwen3", lora=LORA)
    whole = Trainer(small_model("qwen3", lora=LORA), None, ROWS, SHORT)
    trainer = Trainer(model, None, ROWS, SHORT)
    get = type(trainer.batches).__getitem__

    def interrupt(batches, step):
        if step == 4:
            raise KeyboardInterrupt
        return get(batches, step)

    monkeypatch.setattr(type(trainer.batches), "__getitem__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    whole.train()
    after_four = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in after_four)
    start = jax.tree.leaves(nnx.state(small_model("qwen3", lora=LORA), nnx.LoRAParam))
    assert any((a != b).any() for a, b in zip(after_four, start, strict=True))


def test_an_error_in_the_loop_ends_the_thread_that_makes_batches(monkeypatch):
    def interrupt(log, metrics):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxpack.train.trainer._Log.step", interrupt)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt) as raised:
        Trainer(small_model("qwen3", lora=LORA), None, ROWS, SHORT).train()
    assert threading.active_count() == before, raised  # while the traceback holds the loop's variables


def test_metrics_of_an_earlier_run_are_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"`output_dir` must be without metrics.jsonl"):
        Trainer(small_model("qwen3"), None, ROWS, changed(SHORT, output_dir=str(tmp_path)))
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


# --- Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUTS[0], pytest.param(LAYOUTS[1], marks=pytest.mark.slow), LAYOUTS[2]], ids=str)
def test_evaluation_is_the_mean_over_the_targets_of_each_document_alone(layout):
    model = small_model("qwen3", lora=LoraConfig(r=4, lora_dropout=0.5))
    rows = [{"input_ids": row["input_ids"], "labels": [-100, *row["input_ids"][1:]]} for row in ROWS[:13]]
    rows[5]["labels"] = [-100] + [token if i % 3 else -100 for i, token in enumerate(rows[5]["input_ids"][1:])]
    config = changed(SHORT, max_steps=1, learning_rate=1e-9, gradient_accumulation_steps=2, **layout)
    result = Trainer(model, None, ROWS, config, rows).train()
    # Alone in its row: a token reads what is before it, and not the zeros after.
    tokens = np.array([row["input_ids"] + [0] * (64 - len(row["input_ids"])) for row in rows])
    losses = []
    for row, logits in zip(rows, np.asarray(model.logits(jnp.array(tokens)), np.float64), strict=True):
        logits = logits[: len(row["input_ids"])]
        surprise = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(logits)), np.roll(row["input_ids"], -1)]
        losses += surprise[:-1][np.array(row["labels"])[1:] != -100].tolist()
    assert result.evaluations == {1: pytest.approx(np.mean(losses), rel=1e-5)}


def test_evaluation_changes_nothing_and_is_where_it_should_be(tmp_path, capsys):
    config = changed(SHORT, output_dir=str(tmp_path), eval_steps=3, logging_steps=5)
    model, plain = (small_model("qwen3", lora=LORA) for _ in range(2))
    result = Trainer(model, None, ROWS, config, ROWS[:9]).train()
    expected = Trainer(plain, None, ROWS, SHORT).train()
    np.testing.assert_array_equal(result.losses, expected.losses)
    for got, want in zip(*(jax.tree.leaves(nnx.state(one, nnx.LoRAParam)) for one in (model, plain)), strict=True):
        np.testing.assert_array_equal(got, want)
    assert list(result.evaluations) == [3, 6, 7] and expected.evaluations == {}
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], "eval_loss" in record) for record in records] == [
        *((3, True), (5, False), (6, True), (7, False), (7, True))
    ]
    for record in records:
        if "eval_loss" in record:
            assert record["eval_loss"] == result.evaluations[record["step"]]
            assert record["eval_perplexity"] == pytest.approx(np.exp(record["eval_loss"]))
    shown = capsys.readouterr().err
    assert "saved every 501 steps and at the end" in shown
    assert f"step     6  eval loss {result.evaluations[6]:.4f}  perplexity {np.exp(result.evaluations[6]):.2f}" in shown


@pytest.mark.parametrize("latest", [None, "latest"])
def test_a_second_run_in_a_folder_is_refused_and_leaves_the_first_alone(latest, tmp_path):
    def trainer(**changes: object) -> Trainer:
        config = changed(SHORT, output_dir=str(tmp_path), max_steps=1, **changes)
        return Trainer(small_model("qwen3", lora=LORA), None, ROWS, config)

    first, second = trainer(), trainer(learning_rate=0.5, resume_from_checkpoint=latest)

    def meanwhile() -> None:
        about = (tmp_path / "about.json").read_text()
        with pytest.raises(InputError, match="`output_dir` must be without another run"):
            second.train()
        assert (tmp_path / "about.json").read_text() == about

    first.train(on_start=meanwhile)


def test_a_gradient_that_is_no_number_is_told(monkeypatch, tmp_path, capsys):
    step = trainer_module.Run.step

    def overflow(run, batch):
        metrics = step(run, batch)
        return metrics._replace(grad_norm=metrics.grad_norm * jnp.inf)

    monkeypatch.setattr(trainer_module.Run, "step", overflow)
    Trainer(small_model("qwen3", lora=LORA), None, ROWS, changed(SHORT, max_steps=1)).train()
    assert "the gradient of step 1 has norm inf: no step makes up for it" in capsys.readouterr().err


def test_an_evaluation_that_does_not_fit_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(trainer_module, "free_device_bytes", lambda device: 1000)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, changed(SHORT, max_steps=1), ROWS[:9])
    with pytest.raises(InputError, match=r"`eval_dataset` must leave room on the device: 1 x 2 x 128 tokens need"):
        trainer.train(on_start=lambda: pytest.fail("it has started"))


def test_settings_that_leave_the_best_unknown_are_refused(tmp_path):
    for changes, data, message in (
        ({"eval_steps": 3}, None, "`eval_steps` must be None without an `eval_dataset`, got 3"),
        ({"eval_steps": 3, "save_steps": 4}, ROWS, r"`save_steps` must be a multiple of `eval_steps` \(3\)"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(small_model("qwen3"), None, ROWS, changed(SHORT, output_dir=str(tmp_path), **changes), data)


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts_as_ever(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with trainer_module._Stop() as stop:
            assert not stop.asked
            signal.raise_signal(number)
            assert stop.asked and acted == []
            signal.raise_signal(number)
            assert acted == [number]
        signal.raise_signal(number)
        assert len(acted) == 2
        signal.signal(number, signal.SIG_IGN)
        with trainer_module._Stop() as stop:
            signal.raise_signal(number)
            assert not stop.asked
    finally:
        signal.signal(number, before)


def test_a_thread_can_train():
    results = []
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, SHORT)
    thread = threading.Thread(target=lambda: results.append(trainer.train()))
    thread.start()
    thread.join()
    assert len(results[0].losses) == SHORT.max_steps


@functools.cache
def losses_of(dtype: str, remat: Remat, implementation: Implementation | None = None) -> np.ndarray:
    model = small_model("qwen3", lora=LORA, dtype=jnp.dtype(dtype))
    config = changed(SHORT, max_steps=20, learning_rate=5e-4, remat=remat, implementation=implementation)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        result = Trainer(model, None, ROWS, config).train()
    assert result.compiled_shapes == 1
    return result.losses


@pytest.mark.slow
@pytest.mark.parametrize("remat", get_args(Remat))
def test_losses_follow_float32_whatever_is_kept(remat):
    """20 steps, within what bfloat16 costs: 1.5e-2 at most, 1e-3 in the mean (the bounds of TRL's invariance tests)."""
    losses = losses_of("bfloat16", remat)
    difference = losses - losses_of("float32", "full", "xla")
    assert 0 < np.abs(difference).max() < 1.5e-2
    assert abs(difference.mean()) < 1e-3
    # The same arithmetic: of what is computed again, and of what is not.
    alike = "none" if remat in ("keep_projections", "none") else "full"
    np.testing.assert_array_equal(losses, losses_of("bfloat16", alike))


@pytest.mark.gpu
def test_a_run_on_a_gpu_tells_the_memory_of_its_own():
    result = Trainer(small_model("qwen3", lora=LORA), None, ROWS, SHORT).train()
    assert 0 < result.peak_memory_bytes < 2**30  # the allocator's, not the process's
