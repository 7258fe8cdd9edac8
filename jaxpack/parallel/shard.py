"""Runs functions of a batch, kernels included, on each device's own rows, and adds up their results once."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxpack.parallel.mesh import DeviceMesh, batch_axes
from jaxpack.parallel.placement import WHOLE, batch_spec, is_partition


def sum_over_shards(
    local: Callable[..., Any], mesh: DeviceMesh, given: tuple[Any, ...], sums: Any = WHOLE
) -> Callable[..., Any]:
    """Returns `summed(batch, *arguments)`: the sum of `local(rows, *arguments)` over the devices' own rows of a batch.

    The compiler cannot partition a kernel: it would gather the kernel's operands on every device. So all of `local`
    runs under one `shard_map`, and one `psum` adds up its results (a loss, its weight, gradients of the *local* sum).
    If the sum over devices were differentiated instead, its gradient would be too large by a factor of the number of
    devices.

    Args:
      local: takes a batch `[A, rows, T]` and arguments, and returns a pytree of sums.
      given: for each argument its partition, or a pytree of partitions.
      sums: the partition of the results. A result in shards is summed already over the axis that cuts it.
    """
    axes = [axis for axis in batch_axes(mesh) if mesh.shape[axis] > 1]

    def add_up(partition: PartitionSpec, value: Any) -> Any:
        others = tuple(axis for axis in axes if axis not in partition)
        return jax.lax.psum(value, others) if others else value

    def of_shard(batch: Any, *arguments: Any) -> Any:
        found = local(batch, *arguments)
        return found if mesh.size == 1 else jax.tree.map(add_up, sums, found, is_leaf=is_partition)

    def summed(batch: Any, *arguments: Any) -> Any:
        # `check_vma` is off because Pallas kernels do not support it.
        in_specs = (batch_spec(mesh), *given)
        run = jax.shard_map(of_shard, mesh=mesh, in_specs=in_specs, out_specs=sums, check_vma=False)
        return run(batch, *arguments)

    return summed
