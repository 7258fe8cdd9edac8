"""Tests that a run on a stream learns what a run on the whole dataset does, and resumes to the last bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from models import small_model
from short_runs import LORA, ROWS, SHORT, changed

from jaxpack.data.stream import StreamedBatches
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig
from jaxpack.train.callbacks import Callback
from jaxpack.train.run import Run
from jaxpack.train.trainer import Trainer

STREAMED = changed(SHORT, logging_steps=1)


class Endless:
    """Yields rows without an end, the same ones each time."""

    def __iter__(self) -> Iterator[dict]:
        rng = np.random.default_rng(0)
        while True:
            yield {"input_ids": rng.integers(0, 97, rng.integers(3, 50)).tolist()}


def trainer(dataset: object, config: TrainConfig = STREAMED, *more: object, **options: object) -> Trainer:
    return Trainer(small_model("qwen3", lora=LORA), None, dataset, config, *more, **options)


def weights(run: Trainer) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(run.model) if not isinstance(leaf, np.ndarray)]


def stop_after(step: int) -> Callback:
    class Stopper(Callback):
        def on_step(self, at: int, metrics: dict[str, float]) -> bool:
            return at == step

    return Stopper()


def test_a_stream_gives_the_losses_of_the_whole_dataset() -> None:
    whole, streamed = trainer(ROWS), trainer(iter(ROWS))
    assert isinstance(streamed.batches, StreamedBatches)
    assert whole.batches.steps_per_epoch > 7  # a window holds all that is read
    one, other = whole.train(), streamed.train()
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
    assert other.padding_share == one.padding_share


def test_a_dataset_that_is_streamed_begins_again() -> None:
    result = trainer(ROWS, changed(STREAMED, streaming=True, max_steps=12)).train()
    assert len(result.losses) == 12 > trainer(ROWS).batches.steps_per_epoch


def test_a_stopped_run_on_a_stream_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    config = changed(STREAMED, max_steps=9, save_steps=0)
    undisturbed = trainer(Endless(), config)
    want = undisturbed.train()
    stopped = trainer(Endless(), changed(config, output_dir=str(tmp_path)), callbacks=[stop_after(4)])
    stopped.train()
    done = stopped.steps_in_model
    assert 4 <= done < 9
    resumed = trainer(Endless(), changed(config, output_dir=str(tmp_path), resume_from_checkpoint="latest"))
    got = resumed.train()
    np.testing.assert_array_equal(got.losses, want.losses)
    for one, other in zip(weights(resumed), weights(undisturbed), strict=True):
        np.testing.assert_array_equal(one, other)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 10)]
    assert not any("epoch" in line for line in lines)


def test_a_stream_of_other_rows_is_not_the_same_run(tmp_path: Path) -> None:
    config = changed(STREAMED, max_steps=4, output_dir=str(tmp_path))
    trainer(Endless(), config, callbacks=[stop_after(2)]).train()
    other = trainer(iter(ROWS), changed(config, resume_from_checkpoint="latest"))
    with pytest.raises(InputError, match=r"of the same run, got .* with `train_dataset` 'a stream that begins with"):
        other.train()


def test_a_stream_that_ends_ends_the_run_with_all_that_it_has_learned(tmp_path: Path, capsys) -> None:
    config = changed(STREAMED, max_steps=100, output_dir=str(tmp_path), eval_steps=40, save_steps=40)
    run = trainer(iter(ROWS), config, ROWS[:3])
    result = run.train()
    done = len(result.losses)
    assert 2 < done < 20
    assert run.steps_in_model == done
    assert [*result.evaluations] == [done]
    assert (tmp_path / "checkpoints" / str(done)).is_dir()
    assert f"ended after step {done} of 100, because the stream ended" in " ".join(capsys.readouterr().err.split())
    again = trainer(iter(ROWS), changed(config, resume_from_checkpoint="latest"), ROWS[:3]).train()
    np.testing.assert_array_equal(again.losses, result.losses)


def test_a_stream_goes_back_if_memory_runs_out(monkeypatch, capsys) -> None:
    config = changed(STREAMED, remat="auto", memory_limit=1)
    want = trainer(Endless(), config).train()
    run_step, failures = Run.step, []

    def failing(run, batch):
        if run.started == 3 and not failures:
            failures.append(run.started)
            for leaf in jax.tree.leaves(run.state):
                leaf.delete()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4.55GiB")
        return run_step(run, batch)

    monkeypatch.setattr(Run, "step", failing)
    got = trainer(Endless(), config).train()
    assert "the run goes on after step 0; steps to repeat: 3" in capsys.readouterr().err
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)


def test_a_batch_beyond_the_limits_gets_a_program_of_its_own_and_the_same_losses(monkeypatch, capsys) -> None:
    want = trainer(Endless()).train()

    def tight(batches: StreamedBatches, T: int) -> object:
        (limits,) = batches.sample.limits.values()
        return limits._replace(max_segments=2)

    monkeypatch.setattr(StreamedBatches, "_limits_by_sample", tight)
    got = trainer(Endless()).train()
    assert capsys.readouterr().err.count("compiling a program for any number of them") == 1
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)


def test_what_a_stream_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match=r"`packing` must be true for rows without a length"):
        trainer(Endless(), changed(STREAMED, packing=False))
    with pytest.raises(InputError, match=r"`eval_split` must be None"):
        trainer(Endless(), changed(STREAMED, eval_split=0.5))
    for name, value in {"packing": False, "max_steps": -1, "eval_split": 0.1}.items():
        with pytest.raises(InputError, match=f"`{name}` must be .* with `streaming`"):
            changed(STREAMED, streaming=True, **{name: value})
