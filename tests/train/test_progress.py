"""Tests that a run's records and printed lines agree with its steps."""

import json

import numpy as np
import pytest
from models import small_model
from short_runs import LORA, ROWS, SHORT, changed

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
