"""Deals an optimizer's state over the devices of a mesh, as the parameters are dealt."""

import math
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec
from jax.tree_util import tree_flatten_with_path, tree_map_with_path

from jaxpack.model.shards import specs
from jaxpack.optimizers.adamw_8bit import Quantized
from jaxpack.parallel.mesh import FSDP, DeviceMesh, num_shards
from jaxpack.parallel.placement import WHOLE, is_partition

Tree = TypeVar("Tree")
Path = tuple[Any, ...]


def state_specs(state: Tree, trainable: Any, mesh: DeviceMesh) -> Tree:
    """Returns the partition of each array of an optimizer's state: that of the parameter which it belongs to.

    An array belongs to a parameter if its path ends in the parameter's path and its shape is the parameter's shape.
    Moments in 8 bits are cut between their blocks.
    """
    placed = jax.tree.leaves(specs(trainable, mesh), is_leaf=is_partition)
    found = {
        _names(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(tree_flatten_with_path(trainable)[0], placed, strict=True)
    }

    def of_value(path: Path, value: Any) -> Any:
        names = _names(path)
        suffixes = [names[first:] for first in range(len(names)) if names[first:] in found]
        shape, spec = found[suffixes[0]] if suffixes else (None, WHOLE)
        if isinstance(value, Quantized):
            of_blocks: Any = _of_blocks(value.codes.shape, shape or (), spec, num_shards(mesh))
            return Quantized(of_blocks, of_blocks)
        return spec if shape == value.shape else WHOLE

    return tree_map_with_path(of_value, state, is_leaf=lambda value: isinstance(value, Quantized))


def _of_blocks(blocks: tuple[int, ...], shape: tuple[int, ...], spec: PartitionSpec, shards: int) -> PartitionSpec:
    """Returns the partition of moments in blocks `(matrices, blocks, 256)`, of a parameter that is cut by rows.

    Blocks run along the rows. So those of some rows belong to the same device as the rows, unless a block crosses from
    one device's rows into another's: then each device holds all blocks.
    """
    matrices = math.prod(shape[: tuple(spec).index(FSDP)]) if FSDP in spec else None
    is_cut = blocks[0] == matrices and blocks[1] % shards == 0 and math.prod(blocks) == math.prod(shape)
    return PartitionSpec(None, FSDP) if is_cut else WHOLE


def _names(path: Path) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
