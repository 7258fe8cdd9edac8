"""Runs functions of a batch, kernels included, on each device's own rows, and adds up their results once."""

from collections.abc import Callable
from typing import Any

import jax

from jaxpack.parallel.mesh import DATA, DeviceMesh
from jaxpack.parallel.placement import BATCH, spec


def sum_over_shards(local: Callable[..., Any], mesh: DeviceMesh) -> Callable[..., Any]:
    """Returns `summed(batch, *whole)`: the sum of `local(rows, *whole)` over the devices' own rows of the batch.

    The compiler cannot partition a kernel: it would gather the kernel's operands on every device. So all of `local`
    runs under one `shard_map`, and one `psum` adds up its results (a loss, its weight, gradients of the *local* sum).
    If the sum over devices were differentiated instead, its gradient would be too large by a factor of the number of
    devices.

    Args:
      local: takes a batch `[A, rows, T]` and arrays that every device has whole, and returns a pytree of sums.
    """

    def of_shard(batch: Any, *whole: Any) -> Any:
        sums = local(batch, *whole)
        return sums if mesh.size == 1 else jax.lax.psum(sums, DATA)

    def summed(batch: Any, *whole: Any) -> Any:
        # `check_vma` is off because Pallas kernels do not support it.
        in_specs = (spec(*BATCH), *len(whole) * (spec(),))
        return jax.shard_map(of_shard, mesh=mesh, in_specs=in_specs, out_specs=spec(), check_vma=False)(batch, *whole)

    return summed


def shard_key(key: jax.Array | None, mesh: DeviceMesh) -> jax.Array | None:
    """Returns this device's own random key, within `sum_over_shards`; on a mesh of one, the key itself."""
    return key if key is None or mesh.size == 1 else jax.random.fold_in(key, jax.lax.axis_index(DATA))
