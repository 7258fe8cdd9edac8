"""Chooses the mesh of devices that a run is on."""

import dataclasses

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from jaxpack.errors import InputError
from jaxpack.model.shards import deal
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import split_trained
from jaxpack.parallel.device import current_device, free_device_bytes
from jaxpack.parallel.host_memory import is_pinned
from jaxpack.parallel.mesh import AXES, DATA, FSDP, DeviceMesh, make_mesh, num_shards, parse_mesh
from jaxpack.parallel.placement import bytes_on_device
from jaxpack.parallel.processes import least
from jaxpack.settings import TrainConfig

_ROOM = 0.8  # the share of a device that weights, gradients and the optimizer's state may take: the rest is a step's


def mesh_of(config: TrainConfig, model: Transformer) -> DeviceMesh:
    """Returns the mesh that `config.mesh` asks for.

    "auto" takes all devices: along "data" if each has room for all weights, and otherwise as many along "fsdp" as leave
    the least on each. If `jax.default_device` is set to a device, "auto" takes that one. A mesh that is set in JAX
    (`jax.set_mesh`) is kept.

    Raises:
      InputError: the sizes fit neither the number of devices nor the model, or weights are to lie in the host's memory
        on several devices.
    """
    mesh = _mesh_of(config, model)
    _check(mesh, config, model)
    return mesh


def _check(mesh: DeviceMesh, config: TrainConfig, model: Transformer) -> None:
    if num_shards(mesh) > 1 and bytes_on_mesh(model, mesh) == bytes_on_mesh(model, AbstractMesh((1, 1), AXES)):
        raise InputError(
            f"`mesh` must have a size of 'fsdp' that divides the rows of the model's matrices, got {num_shards(mesh)}:"
            " no matrix could be shared. Use a power of two, or `mesh` 'data=...'."
        )
    if mesh.size > 1 and any(map(is_pinned, jax.tree.leaves(nnx.state(model)))):
        raise InputError(
            f"`model` must have its weights on a device to be trained on {mesh.size}, got one whose weights an earlier"
            " run moved to the host's memory. Load the model anew."
        )
    for name in ("offload_weights", "offload_embedding"):
        if mesh.size > 1 and getattr(config, name) == "on":
            raise InputError(
                f'`{name}` must be "auto" or "off" on {mesh.size} devices, got "on": there weights are shared by the'
                " devices (`mesh` 'fsdp=...') and do not lie in the host's memory."
            )


def mesh_to_inspect(config: TrainConfig, model: Transformer | None, *, is_elsewhere: bool) -> DeviceMesh:
    """Returns the mesh of a run that is only predicted: that of this machine, or any for cards that are not here.

    Args:
      model: the model of the run; without one, "auto" is one device.
      is_elsewhere: whether the run is for a card that was named. "auto" is then one card.

    Raises:
      InputError: the sizes fit neither the number of devices of this machine nor the model.
    """
    if config.mesh == "auto" and (is_elsewhere or model is None):
        return AbstractMesh((1, 1), AXES)
    if not is_elsewhere and model is not None:
        return mesh_of(config, model)
    sizes = parse_mesh(config.mesh, None if is_elsewhere else len(jax.devices()))
    mesh = AbstractMesh((sizes[DATA], sizes[FSDP]), AXES)
    if model is not None:
        _check(mesh, config, model)
    return mesh


def _mesh_of(config: TrainConfig, model: Transformer) -> DeviceMesh:
    if config.mesh != "auto":
        devices = jax.devices()
        return make_mesh(devices, fsdp=parse_mesh(config.mesh, len(devices))[FSDP])
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is not None or DATA in jax.sharding.get_abstract_mesh().axis_names or len(jax.devices()) == 1:
        return make_mesh()
    free, count = least(free_device_bytes(current_device())), len(jax.devices())
    already = sum(bytes_on_device(x) for x in jax.tree.leaves(nnx.state(model)) if isinstance(x, jax.Array))
    if free is None or held_bytes(model) <= _ROOM * (free + already):
        return make_mesh(jax.devices())
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    fsdp = min(sizes, key=lambda size: bytes_on_mesh(model, AbstractMesh((count // size, size), AXES)))
    return make_mesh(jax.devices(), fsdp=fsdp)


def settings_on(config: TrainConfig, mesh: DeviceMesh) -> TrainConfig:
    """Returns the settings of a run on a mesh: weights that several devices hold do not move to the host's memory."""
    if mesh.size == 1:
        return config
    return dataclasses.replace(config, offload_weights="off", offload_embedding="off")


def on_mesh(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Returns an abstract copy of a model, whose arrays lie on a mesh as those of a run would."""
    graph, *states = split_trained(model)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states)
    return nnx.merge(graph, *(deal(state, mesh) for state in abstract))


def bytes_on_mesh(model: Transformer, mesh: DeviceMesh) -> int:
    """Returns the bytes of a model's parameters on each device of a mesh."""
    return sum(map(bytes_on_device, jax.tree.leaves(nnx.state(on_mesh(model, mesh)))))


def held_bytes(model: Transformer) -> int:
    """Returns the bytes of all weights, float32 copies of the trained ones, their gradients and AdamW's moments."""
    _, trained, frozen = split_trained(model)
    of_frozen = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    return of_frozen + 4 * 4 * sum(x.size for x in jax.tree.leaves(trained))
