"""Steps on eight devices have the gradients of one device (Adam hides a constant factor), and no needless traffic."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from models import small_model
from simulated_devices import on_simulated_devices

from jaxpack.errors import InputError
from jaxpack.model.shards import specs
from jaxpack.model.weights import split_trained
from jaxpack.parallel.mesh import AXES, make_mesh, parse_mesh
from jaxpack.parallel.placement import batch_spec, replicate
from jaxpack.settings import LoraConfig

# For each case and mesh, the collectives of the program. A loop over layers has four matrices (experts: five, with the
# router) in its forward body and four in its backward body. A trained embedding and head are gathered once each, which
# counts as twice in one of the two layers. A quantised matrix is in two arrays.
ONCE = {"all-reduce": 1}
COLLECTIVES = {
    "adapters, in micro-batches": {"8x1": ONCE, "2x4": ONCE | {"all-gather": 8}},
    "adapters, in shards": {"1x8": ONCE | {"all-gather": 8}},
    "all weights, padded": {"8x1": ONCE, "1x8": ONCE | {"all-gather": 10, "reduce-scatter": 6}},
    "4 bits, padding-free, offloaded": {"8x1": ONCE, "2x4": ONCE | {"all-gather": 16}},
    "experts": {"1x8": ONCE | {"all-gather": 8}},
    "experts, all weights": {"4x2": {"all-reduce": 2, "all-gather": 10, "reduce-scatter": 5}},
    "objective": {"8x1": ONCE},
}


@pytest.fixture(scope="module")
def results(request):
    """Returns what the script finds for the cases of the tests that were selected; one process has its start once."""
    chosen = {
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and "case" in getattr(getattr(item, "callspec", None), "params", {})
    }
    chosen.add("all weights kept")
    return json.loads(on_simulated_devices(Path(__file__).with_name("meshes.py"), *sorted(chosen)))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*COLLECTIVES, "all weights kept"])
def test_gradients_and_sums_are_those_of_one_device(case, results):
    meshes = results[case]
    assert len({found["weight"] for found in meshes.values()}) == 1
    for mesh, found in meshes.items():
        assert found["gradients"] < 1e-6, mesh
        assert found["sums"] < 1e-6, mesh


@pytest.mark.slow
def test_no_choice_keeps_what_was_gathered(results):
    # A CPU's compiler merges both gathers of a matrix where no loop parts them, so they are counted before it.
    assert results["all weights kept"]["2x4"]["traced"] >= 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("case", COLLECTIVES)
def test_the_program_has_one_all_reduce_and_what_shards_need(case, results):
    found = {mesh: figures["collectives"] for mesh, figures in results[case].items()}
    assert found == {"1x1": {}} | COLLECTIVES[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", COLLECTIVES)
def test_each_layer_is_gathered_once_in_each_direction(case, results):
    for mesh, found in results[case].items():
        assert found["gathered"] == 2 * found["of_a_layer"], mesh
        assert (found["of_a_layer"] > 0) == (not mesh.endswith("x1")), mesh


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["adapters", "all"])
def test_training_and_evaluation_follow_one_device(trained, results):
    one, *others = results[f"training {trained}"]
    assert one[3] < one[0]
    for other in others:
        np.testing.assert_allclose(other, one, rtol=1e-5)


def test_matrices_of_layers_are_cut_by_rows_and_all_else_is_whole():
    mesh = AbstractMesh((2, 4), AXES)
    assert batch_spec(mesh) == PartitionSpec(None, AXES)
    _, trained, frozen = split_trained(small_model("qwen3", lora=LoraConfig(r=4)))
    cut = PartitionSpec(None, "fsdp")
    found = specs(frozen, mesh)["blocks"]
    assert found["attention"]["qkv"]["weight"].get_value().value == cut
    assert found["attention"]["q_norm"]["scale"].get_value() == PartitionSpec()
    assert set(jax.tree.leaves(specs(trained, mesh), is_leaf=lambda x: isinstance(x, PartitionSpec))) == {
        PartitionSpec()
    }
    _, trained, _ = split_trained(small_model("qwen3", vocab_size=96))
    assert specs(trained, mesh)["embedding"].get_value() == PartitionSpec("fsdp")
    _, trained, _ = split_trained(small_model("qwen3", vocab_size=97))  # no multiple of 4
    assert specs(trained, mesh)["embedding"].get_value() == PartitionSpec()
    tree = {"a": jnp.ones(3)}
    assert replicate(tree, make_mesh()) is tree


def test_a_mesh_is_written_as_sizes_of_its_axes():
    assert parse_mesh("data=4,fsdp=2", 8) == {"data": 4, "fsdp": 2}
    assert parse_mesh(" fsdp=8", 8) == {"data": 1, "fsdp": 8}
    with pytest.raises(InputError, match="`mesh` must have sizes whose product is the number of devices, 8, got"):
        parse_mesh("data=4", 8)
    for wrong in ("", "8", "data", "data=", "data=0", "data=-8", "model=8", "data=4,data=2", "data=2.0,fsdp=4"):
        with pytest.raises(InputError, match="`mesh` must be 'auto', or sizes of the axes data and fsdp"):
            parse_mesh(wrong, 8)


def test_a_mesh_is_of_devices_that_are_there_once():
    device = jax.devices()[0]
    assert make_mesh([device]).size == make_mesh().size == 1
    for devices in ([], [device, device]):
        with pytest.raises(InputError, match="`devices` must be at least one device, each once"):
            make_mesh(devices)
