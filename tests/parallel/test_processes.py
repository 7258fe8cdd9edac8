"""Tests what tells several processes from one; `tests/cli/test_processes.py` runs two."""

import pytest

from jaxpack.errors import InputError
from jaxpack.parallel.mesh import make_mesh
from jaxpack.parallel.processes import Consensus, _of_environment, exchange, initialize_distributed, least

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "CUDA_VISIBLE_DEVICES")
STEP = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "node1:4000", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(**variables: str) -> None:
        for name in (*NAMES, *STEP, "SLURM_GPUS_ON_NODE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4"}, None),  # in a batch script, before `srun`
        (STEP | {"SLURM_NTASKS": "1"}, None),
        (STEP, {}),  # JAX takes the GPU of the task's number
        (STEP | {"CUDA_VISIBLE_DEVICES": "0,1"}, {}),
        (STEP | {"CUDA_VISIBLE_DEVICES": "3"}, {"local_device_ids": [0]}),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"}, {"local_device_ids": [*range(8)]}),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "4,5"}, {"local_device_ids": [0, 1]}),
        (ADDRESS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ],
)
def test_the_environment_says_how_many_processes_there_are(variables, expected, environment):
    environment(**variables)
    assert _of_environment() == expected


def test_an_address_and_numbers_make_a_process(environment):
    environment(**ADDRESS)
    arguments = _of_environment()
    assert arguments is not None
    named = [arguments[name] for name in ("coordinator_address", "num_processes", "process_id")]
    assert named == ["node1:4000", 2, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JAX_PROCESS_ID": "2"}, r"`JAX_PROCESS_ID` must be below JAX_NUM_PROCESSES \(2\), got 2"),
        ({"JAX_PROCESS_ID": "first"}, "`JAX_PROCESS_ID` must be a number .*, got 'first'"),
        ({"JAX_NUM_PROCESSES": ""}, "`JAX_NUM_PROCESSES` must be a number .*, got ''"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "`JAX_COORDINATOR_ADDRESS` must be host:port of process 0"),
    ],
)
def test_a_wrong_variable_is_named(changed, message, environment):
    environment(**ADDRESS | changed)
    with pytest.raises(InputError, match=message):
        initialize_distributed()


def test_a_single_process_agrees_with_itself_at_once():
    assert exchange({"a": 1}) == [{"a": 1}]
    assert least(3) == 3
    assert least(None) is None
    number = 0
    asked = Consensus(lambda: number, make_mesh())
    asked.ask()
    number = 5
    assert asked.answer == 5
