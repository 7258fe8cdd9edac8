"""A step on two devices has the gradients of one device (Adam hides a constant factor) and one all-reduce."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpack.errors import InputError
from jaxpack.parallel.mesh import make_mesh
from jaxpack.parallel.placement import BATCH, replicate, spec

CASES = ["packed, in micro-batches", "padded, all weights", "objective"]


@pytest.fixture(scope="module")
def results():
    script = Path(__file__).with_name("two_devices.py")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    tests = Path(__file__).parent.parent
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    if jax.__version__.startswith("0.11."):
        # The Shardy partitioner of jax 0.11 crashes on a CPU with frozen weights; jax 0.10 and 0.12 do not.
        environment["JAX_USE_SHARDY_PARTITIONER"] = "false"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_sums_are_those_of_one_device(case, results):
    assert results[case]["gradients"] < 1e-6
    assert results[case]["sums"] < 1e-6
    assert results[case]["weights"][0] == results[case]["weights"][1] > 0


@pytest.mark.parametrize("case", CASES)
def test_the_program_has_one_all_reduce_and_on_one_device_none(case, results):
    assert results[case]["collectives"] == [{}, {"all-reduce": 1}]


def test_training_and_evaluation_follow_one_device(results):
    one, two = results["training"]
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert one[3] < one[0]


def test_the_rows_of_a_batch_are_dealt_and_all_else_is_whole():
    assert spec(*BATCH) == jax.sharding.PartitionSpec(None, "data", None)
    assert spec("layer", "out", "in") == jax.sharding.PartitionSpec(None, None, None)
    tree = {"a": np.ones(3)}
    assert replicate(tree, make_mesh()) is tree


def test_a_mesh_is_of_devices_that_are_there_once():
    device = jax.devices()[0]
    assert make_mesh([device]).size == make_mesh().size == 1
    for devices in ([], [device, device]):
        with pytest.raises(InputError, match="`devices` must be at least one device, each once"):
            make_mesh(devices)
