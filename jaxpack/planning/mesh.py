"""Chooses the mesh of devices that a run is on."""

import jax
from flax import nnx

from jaxpack.errors import InputError
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import split_trained
from jaxpack.parallel.device import current_device, free_device_bytes
from jaxpack.parallel.host_memory import is_pinned
from jaxpack.parallel.mesh import DATA, FSDP, DeviceMesh, make_mesh, parse_mesh
from jaxpack.settings import TrainConfig

_ROOM = 0.8  # the share of a device that weights, gradients and the optimizer's state may take: the rest is a step's


def mesh_of(config: TrainConfig, model: Transformer) -> DeviceMesh:
    """Returns the mesh that `config.mesh` asks for.

    "auto" takes all devices: along "data" if each has room for all weights, and otherwise along "fsdp". If
    `jax.default_device` is set to a device, "auto" takes that one; a mesh that is set in JAX (`jax.set_mesh`) is kept.

    Raises:
      InputError: the sizes do not fit the number of devices, weights are to lie in the host's memory on several, or
        several processes are to write to one folder.
    """
    mesh = _mesh_of(config, model)
    if jax.process_count() > 1 and config.output_dir is not None:
        raise InputError(
            f"`output_dir` must be None in a run of {jax.process_count()} processes, got {config.output_dir!r}: such a"
            " run does not write files yet. Use one process for all GPUs of the machine."
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
    return mesh


def _mesh_of(config: TrainConfig, model: Transformer) -> DeviceMesh:
    if config.mesh != "auto":
        devices = jax.devices()
        return make_mesh(devices, fsdp=parse_mesh(config.mesh, len(devices))[FSDP])
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is not None or DATA in jax.sharding.get_abstract_mesh().axis_names or len(jax.devices()) == 1:
        return make_mesh()
    free = free_device_bytes(current_device())
    needed = held_bytes(model)
    return make_mesh(jax.devices(), fsdp=1 if free is None or needed <= _ROOM * free else len(jax.devices()))


def held_bytes(model: Transformer) -> int:
    """Returns the bytes of all weights, float32 copies of the trained ones, their gradients and AdamW's moments."""
    _, trained, frozen = split_trained(model)
    sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))]
    sizes += [4 * 4 * sum(x.size for x in jax.tree.leaves(trained))]
    return sum(sizes)
