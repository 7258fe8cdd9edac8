"""Tests that predicted times follow from a device's rates, its link, and the time it takes to start kernels."""

import pytest
from models import random_documents
from planned_steps import H200, LORA, abstract_model

from jaxpack import TrainConfig
from jaxpack.data.batching import Batches
from jaxpack.parallel.mesh import make_mesh
from jaxpack.planning.choose import predict
from jaxpack.planning.cost import StepShape
from jaxpack.planning.scaling import run_seconds
from jaxpack.planning.time import step_seconds


def test_a_slow_link_is_waited_for():
    step = StepShape.of(abstract_model("Qwen3-4B", LORA), (1, 16, 1024))
    seconds = [predict(step, H200._replace(link=link))["offload"].seconds for link in (100e9, 50e9, 5e9)]
    copy = 35 * 16 * 1024 * 2 * 2560 * 2 / 5e9  # seconds in each direction, longer than a pass
    assert seconds[0] == seconds[1]  # the copies hide behind computation
    assert 2 * copy < seconds[2] < 2 * copy + seconds[0]


def test_steps_of_few_tokens_that_offload_take_as_long_as_starting_their_kernels():
    def seconds(remat, *shape):
        return step_seconds(StepShape.of(abstract_model("Qwen3-0.6B", LORA), shape), remat, H200)

    for remat in ("offload", "offload_heads"):  # their kernels start one by one
        assert seconds(remat, 1, 1, 128) == seconds(remat, 1, 1, 256) < seconds(remat, 1, 8, 1024)
        assert seconds(remat, 2, 1, 128) == 2 * seconds(remat, 1, 1, 128)
    for remat in ("full", "none"):  # their kernels start many at a time, in CUDA graphs
        assert seconds(remat, 1, 1, 128) < seconds(remat, 1, 1, 256) < seconds("offload", 1, 1, 256)


def test_a_run_takes_the_time_of_its_steps():
    model = abstract_model("Qwen3-4B", LORA)
    uneven = Batches(
        random_documents([20, 500, 90, 260, 700, 40, 333]), TrainConfig(per_device_train_batch_size=3, max_steps=9)
    )
    each = [step_seconds(StepShape.of_run(model, uneven, int(T)), "full", H200) for T in uneven.row_lengths]
    assert len(set(each)) > 1
    assert run_seconds(model, uneven, "full", H200, make_mesh()) == pytest.approx(sum(each))
