"""Tests that a run's records and printed lines agree with its steps."""

import json

import numpy as np
import pytest
from models import small_model
from short_runs import LORA, ROWS, SHORT, changed

from jaxpack.train.progress import fitted
from jaxpack.train.trainer import Trainer


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


PARTS = [
    "step   100",
    "loss 12.1280",
    "reward 0.1234",
    "gradient norm 1234.567",
    "learning rate 2.00e-04",
    "1,234,567 tokens/s",
    "padding 12.3%",
    "peak memory 120.4 GiB",
]


@pytest.mark.parametrize("room", range(1, 160))
def test_cases_a_line_that_is_too_long_loses_its_end(room):
    line = fitted(PARTS, room)
    assert line.startswith("step   100  loss 12.1280")
    assert len(line) <= max(room, len("step   100  loss 12.1280"))
    names = [part.split()[-1] for part in PARTS]
    kept = [number for number in names if number in line.split()]
    assert kept in (names[: len(kept)], [*names[:5], "tokens/s", *names[6 : len(kept)]])
    if room >= len("  ".join(PARTS)):
        assert line == "  ".join(PARTS) == fitted(PARTS, None)


def test_a_usual_line_keeps_its_rate_at_80_columns():
    assert fitted([part for part in PARTS if "reward" not in part], 80).endswith("lr 2.00e-04  1,234,567 tokens/s")
