"""Tests that the training loop reports what it did, and leaves the model that it trained."""

import functools
import json
import signal
import threading
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import small_model
from short_runs import LORA, ROWS, SHORT, changed

from jaxpack.constants import Implementation, Remat
from jaxpack.errors import InputError
from jaxpack.model.weights import Frozen
from jaxpack.settings import LoraConfig
from jaxpack.train.signals import StopSignal
from jaxpack.train.trainer import Trainer


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_only_what_is_trained_changes_and_arrays_held_elsewhere_live_on(lora):
    model = small_model("qwen3", lora=lora)
    before = nnx.clone(model)
    Trainer(model, None, ROWS, SHORT).train()
    for (path, old), (_, new) in zip(
        *(nnx.to_flat_state(nnx.state(one, nnx.Any(nnx.Param, Frozen))) for one in (before, model)), strict=True
    ):
        trained = lora is None or path[-1] in ("lora_a", "lora_b")
        assert (np.asarray(old[...]) != np.asarray(new[...])).any() == trained, path


@pytest.mark.parametrize("lora", [pytest.param(LoraConfig(r=96), marks=pytest.mark.slow), None], ids=["lora", "full"])
def test_losses_with_moments_in_8_bits_follow_those_in_float32(lora):
    def losses(**changes: object) -> np.ndarray:
        config = changed(SHORT, max_steps=20, **changes)
        return Trainer(small_model("qwen3", lora=lora), None, rows, config).train().losses

    rows = [{"input_ids": list(range(start, start + 50))} for start in range(1, 41)]  # can be learned

    float32, in_8_bits = losses(), losses(optim="adamw_8bit")
    assert float32[-1] < 0.7 * float32[0]
    assert 0 < np.abs(in_8_bits - float32).max() < 0.005


def test_a_stop_that_is_asked_for_at_any_time_is_saved(monkeypatch, tmp_path):
    class Asked(StopSignal):
        @property
        def received(self) -> int:
            before = self._number
            if len(trainer.progress.losses) == 3:
                self._number = signal.SIGINT  # right after the check
            return before

        @received.setter
        def received(self, number: int) -> None:
            self._number = number

    monkeypatch.setattr("jaxpack.train.trainer.StopSignal", Asked)
    config = changed(SHORT, eval_steps=3, save_steps=6, output_dir=str(tmp_path))  # waits for step 3 without a save
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config, ROWS[:9])
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train()
    assert stopped.value.__notes__ == ['To go on, train with `resume_from_checkpoint="latest"`.']
    losses = trainer.progress.losses
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == [str(len(losses))]
    # The last step is logged, too, although `logging_steps` is 10.
    *_, record = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (record["step"], record["loss"]) == (len(losses), pytest.approx(np.mean(losses)))
    assert (tmp_path / "report.md").exists()


def test_an_interrupted_run_leaves_what_it_has_learned(monkeypatch):
    model = small_model("qwen3", lora=LORA)
    trainer = Trainer(model, None, ROWS, SHORT)
    get = type(trainer.batches).__getitem__

    def interrupt(batches, step):
        if step == 4:
            raise KeyboardInterrupt
        return get(batches, step)

    monkeypatch.setattr(type(trainer.batches), "__getitem__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    after_four = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in after_four)
    start = jax.tree.leaves(nnx.state(small_model("qwen3", lora=LORA), nnx.LoRAParam))
    assert any((a != b).any() for a, b in zip(after_four, start, strict=True))


def test_an_error_in_the_loop_ends_the_thread_that_makes_batches(monkeypatch):
    def interrupt(log, metrics):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxpack.train.progress.Log.step", interrupt)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt) as raised:
        Trainer(small_model("qwen3", lora=LORA), None, ROWS, SHORT).train()
    assert threading.active_count() == before, raised  # although the traceback holds the loop's variables


def test_metrics_of_an_earlier_run_are_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"`output_dir` must not hold metrics.jsonl"):
        Trainer(small_model("qwen3"), None, ROWS, changed(SHORT, output_dir=str(tmp_path)))
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_evaluation_changes_nothing_and_is_where_it_should_be(tmp_path, capsys):
    config = changed(SHORT, output_dir=str(tmp_path), eval_steps=3, logging_steps=5)
    model, plain = (small_model("qwen3", lora=LORA) for _ in range(2))
    result = Trainer(model, None, ROWS, config, ROWS[:9]).train()
    expected = Trainer(plain, None, ROWS, SHORT).train()
    np.testing.assert_array_equal(result.losses, expected.losses)
    for got, want in zip(*(jax.tree.leaves(nnx.state(one, nnx.LoRAParam)) for one in (model, plain)), strict=True):
        np.testing.assert_array_equal(got, want)
    assert list(result.evaluations) == [3, 6, 7]
    assert expected.evaluations == {}
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], "eval_loss" in record) for record in records] == [
        *((3, True), (5, False), (6, True), (7, False), (7, True))
    ]
    for record in records:
        if "eval_loss" in record:
            assert record["eval_loss"] == result.evaluations[record["step"]]
            assert record["eval_perplexity"] == pytest.approx(np.exp(record["eval_loss"]))
    shown = capsys.readouterr().err
    assert "checkpoints are saved every 501 steps and at the end" in shown
    assert f"step     6  eval loss {result.evaluations[6]:.4f}  perplexity {np.exp(result.evaluations[6]):.2f}" in shown


@pytest.mark.parametrize("latest", [None, "latest"])
def test_a_second_run_in_a_folder_is_refused_and_leaves_the_first_alone(latest, tmp_path):
    def trainer(**changes: object) -> Trainer:
        config = changed(SHORT, output_dir=str(tmp_path), max_steps=1, **changes)
        return Trainer(small_model("qwen3", lora=LORA), None, ROWS, config)

    first, second = trainer(), trainer(learning_rate=0.5, resume_from_checkpoint=latest)

    def meanwhile() -> None:
        about = (tmp_path / "about.json").read_text()
        with pytest.raises(InputError, match=r"`output_dir` must not be in use, got .*, which another run uses"):
            second.train()
        assert (tmp_path / "about.json").read_text() == about

    first.train(on_start=meanwhile)


def test_settings_that_leave_the_best_unknown_are_refused(tmp_path):
    for changes, data, message in (
        ({"eval_steps": 3}, None, "`eval_steps` must be None without an `eval_dataset` or an `eval_split`, got 3"),
        ({"eval_steps": 3, "save_steps": 4}, ROWS, r"`save_steps` must be a multiple of `eval_steps` \(3\)"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(small_model("qwen3"), None, ROWS, changed(SHORT, output_dir=str(tmp_path), **changes), data)


def test_shares_of_steps_are_those_of_the_run(tmp_path):
    """A share of 0.3 of 7 steps is 2.1, so every third step counts. Checkpoints wait for an evaluation."""
    shares = {"logging_steps": 0.3, "eval_steps": 0.3, "save_steps": 0.5, "output_dir": str(tmp_path)}
    trainer = Trainer(small_model("qwen3"), None, ROWS, changed(SHORT, **shares), ROWS)
    assert (trainer.config.logging_steps, trainer.config.eval_steps, trainer.config.save_steps) == (3, 3, 6)
    assert trainer.config.steps_between_saves == 6
    wrong = changed(SHORT, output_dir=str(tmp_path), eval_steps=0.3, save_steps=4)  # known once the steps are known
    with pytest.raises(InputError, match=r"`save_steps` must be a multiple of `eval_steps` \(3\)"):
        Trainer(small_model("qwen3"), None, ROWS, wrong, ROWS)


def test_evaluation_data_without_a_max_length_is_not_cut_at_that_of_training():
    config = changed(SHORT, packing=False, max_length=None)
    longer = [{"input_ids": [1] * 300}, {"input_ids": [2] * 20}]
    trainer = Trainer(small_model("qwen3"), None, ROWS, config, longer)
    assert trainer.config.max_length == max(len(row["input_ids"]) for row in ROWS) < 300
    assert trainer.eval_batches[""].truncation.tokens == 0


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
    """Losses of 20 steps differ by at most 1.5e-2, and 1e-3 in the mean (the bounds of TRL's invariance tests)."""
    losses = losses_of("bfloat16", remat)
    difference = losses - losses_of("float32", "full", "xla")
    assert 0 < np.abs(difference).max() < 1.5e-2
    assert abs(difference.mean()) < 1e-3
    # The choices fall into two groups, with recomputed projections or without. A group's arithmetic is the same, up to
    # how a compiler for a CPU fuses it.
    alike = "none" if remat in ("keep_projections", "none") else "full"
    np.testing.assert_allclose(losses, losses_of("bfloat16", alike), rtol=0, atol=2e-3)


@pytest.mark.gpu
def test_a_run_on_a_gpu_tells_the_memory_of_its_own():
    result = Trainer(small_model("qwen3", lora=LORA), None, ROWS, SHORT).train()
    assert 0 < result.peak_memory_bytes < 2**30  # memory of the allocator, not of the process


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("args", "(it is `config` here)"),
        ("processing_class", "(it is `tokenizer` here)"),
        ("peft_config", "(give the model its adapters before, with `add_lora`)"),
        ("eval_datset", "(did you mean `eval_dataset`?)"),
        ("learning_rate", "(it is a setting of `TrainConfig`)"),
    ],
)
def test_an_unknown_argument_is_answered(name, answer):
    with pytest.raises(InputError) as caught:
        Trainer(small_model("qwen3", lora=LORA), None, ROWS, **{name: None})
    assert str(caught.value) == f"`Trainer` has no argument `{name}` {answer}."
