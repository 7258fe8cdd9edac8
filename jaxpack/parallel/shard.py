"""Functions of a batch that run on each device's own rows, kernels included, and are added up once."""

from collections.abc import Callable
from typing import Any

import jax

from jaxpack.parallel.mesh import DATA, DeviceMesh
from jaxpack.parallel.placement import BATCH, spec


def sum_over_shards(local: Callable[..., Any], mesh: DeviceMesh) -> Callable[..., Any]:
    """Returns `summed(batch, *whole)`: the sum of `local(rows, *whole)` over the devices' own rows of the batch.

    A kernel cannot be partitioned by the compiler, which would gather its operands on every device. So all of `local`
    runs under one `shard_map`, and what it returns (a loss, its weight, gradients of the *local* sum) is added up by
    one `psum`. The gradient of a sum that was added up before it is differentiated would be too large by the number of
    devices.

    Args:
      local: of a batch `[A, rows, T]` and of arrays that every device has whole; returns a pytree of sums.
    """

    def of_shard(batch: Any, *whole: Any) -> Any:
        sums = local(batch, *whole)
        return sums if mesh.size == 1 else jax.lax.psum(sums, DATA)

    def summed(batch: Any, *whole: Any) -> Any:
        # Without `check_vma`, which Pallas kernels do not take part in.
        in_specs = (spec(*BATCH), *len(whole) * (spec(),))
        return jax.shard_map(of_shard, mesh=mesh, in_specs=in_specs, out_specs=spec(), check_vma=False)(batch, *whole)

    return summed


def shard_key(key: jax.Array | None, mesh: DeviceMesh) -> jax.Array | None:
    """Returns, within `sum_over_shards`, a random key for each device: on a mesh of one, the key itself."""
    return key if key is None or mesh.size == 1 else jax.random.fold_in(key, jax.lax.axis_index(DATA))
