"""A run on several devices is the run of one device: its losses, its checkpoints, and what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from models import small_model
from safetensors.numpy import load_file
from simulated_devices import on_simulated_devices, variables_of_two
from train.meshes import trainer_of

from jaxpack.errors import InputError
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.trainer import Trainer


def on_devices(count: int, *arguments: object, **more: str) -> dict:
    script = Path(__file__).with_name("meshes.py")
    return json.loads(on_simulated_devices(script, *map(str, arguments), count=count, **more))


def assert_same(found: dict, expected: dict) -> None:
    for name in ("losses", "evaluations", "weights"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6)


@pytest.mark.parametrize("kind", ["adapters", pytest.param("all", marks=pytest.mark.slow)])
def test_a_checkpoint_of_eight_devices_resumes_on_fewer(kind, tmp_path):
    eight = on_devices(8, kind, "data=2,fsdp=4", 1, 1, tmp_path / "eight")
    assert len(eight["losses"]) == 4
    assert eight["imbalance"] < 0.5
    begun = tmp_path / "eight" / "checkpoints" / "2"
    assert_same(on_devices(4, kind, "fsdp=4", 2, 1, tmp_path / "four", begun), eight)
    assert_same(on_devices(2, kind, "auto", 2, 2, tmp_path / "two", begun), eight)
    trainer = trainer_of(kind, "auto", 2, 4, str(tmp_path / "one"), str(begun))
    assert trainer.mesh.size == 1
    result = trainer.train()
    np.testing.assert_allclose(result.losses, eight["losses"], rtol=2e-6)


@pytest.mark.slow
def test_a_stream_is_dealt_over_devices_and_resumes_on_fewer(tmp_path):
    four = on_devices(4, "streamed", "data=4", 1, 1, tmp_path / "four")
    assert len(four["losses"]) == 4
    begun = tmp_path / "four" / "checkpoints" / "2"
    assert_same(on_devices(2, "streamed", "data=2", 1, 2, tmp_path / "two", begun), four)
    alone = trainer_of("streamed", "auto", 4, 1, None, None)
    np.testing.assert_allclose(alone.train().losses, four["losses"], rtol=2e-6)


def test_a_checkpoint_does_not_resume_with_another_number_of_rows_in_a_step(tmp_path):
    whole = trainer_of("adapters", "auto", 2, 1, str(tmp_path / "whole"), None)
    whole.train()
    half = trainer_of("adapters", "auto", 1, 1, str(tmp_path / "half"), str(tmp_path / "whole" / "checkpoints" / "2"))
    with pytest.raises(InputError, match=r"`per_device_train_batch_size x devices x .*` 2 \(here 1\)"):
        half.train()


def test_a_wrong_mesh_is_refused_before_data_is_read():
    model = small_model("qwen3", lora=LoraConfig(r=4))
    unread = Path("there is no such file.jsonl")
    count = len(jax.devices())
    for mesh, why in (
        ("data=3", f"whose product is the number of devices, {count}, got 'data=3'"),
        ("tensor=2", "sizes of the axes data and fsdp such as 'data=4,fsdp=2', got 'tensor=2'"),
    ):
        with pytest.raises(InputError, match="`mesh` must") as caught:
            Trainer(model, None, unread, TrainConfig(mesh=mesh))
        assert why in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("adapters", "data=2,fsdp=4"), ("all", "fsdp=8"), ("adapters", "data=8"), ("streamed", "data=8")],
)
def test_two_processes_train_and_write_as_one(kind, mesh, tmp_path):
    alone = on_devices(8, kind, mesh, 1, 1, tmp_path / "alone")

    def process(variables: dict[str, str]) -> dict:
        return on_devices(4, kind, mesh, 1, 1, tmp_path / "both", **variables)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(process, variables_of_two()):
            assert_same(found, alone)
    expected, found = (load_file(tmp_path / of / "written" / "model.safetensors") for of in ("alone", "both"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)
