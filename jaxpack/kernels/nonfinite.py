"""Keeps NaN and infinity within their document: attention gives another document's values weight 0, and 0 x NaN is NaN.

In the values of attention, an element that is not finite becomes 0, and its key becomes NaN instead. The scores of
other documents are masked, whatever they are, so their tokens read only the 0. The scores of its own document become
NaN, so the document gets NaN, as it would alone.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpack.kernels._launch import launch, pl, plt, power_of_two_divisor, powers_of_two

_BLOCK, _NUM_WARPS = 2048, 4  # elements of a program, the fastest on an H200: 10 us for 33 MB of values


def contain_reference(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Returns `k` and `v` with non-finite values of `v` moved to `k`, in plain jnp."""
    finite = jnp.isfinite(v)
    return jnp.where(finite.all(axis=-1, keepdims=True), k, jnp.nan), jnp.where(finite, v, 0)


def contain(
    k: Float[Array, "B T A H"],
    v: Float[Array, "B T C H"],
    num_kv_heads: int,
    *,
    first_key: int = 0,
    first_value: int = 0,
) -> tuple[Float[Array, "B T A H"], Float[Array, "B T C H"]]:
    """Does the work of `contain_reference` in place, on the heads from `first_key` and `first_value` on.

    `k` and `v` may be one array. The kernel reads all values, and writes only where one is not finite.
    """
    arrays = [v] if k is v else [k, v]
    B, T, _, H = v.shape
    count = power_of_two_divisor(T, limit=max(1, _BLOCK // H))

    def kernel(*refs: Any) -> None:
        k_in, v_in, k_out, v_out = refs[0], refs[len(arrays) - 1], refs[len(arrays)], refs[-1]
        head, block = jnp.divmod(pl.program_id(0), T // count)
        here = pl.program_id(1), pl.ds(block * count, count)
        pieces = [pl.ds(*piece) for piece in powers_of_two(H)]
        values = [v_in[*here, first_value + head, piece] for piece in pieces]
        finite = [jnp.abs(x.astype(jnp.float32)) < jnp.inf for x in values]
        bad = functools.reduce(operator.add, (jnp.sum((~x).astype(jnp.int32), axis=1) for x in finite))

        @pl.when(jnp.sum(bad) > 0)
        def _() -> None:
            for piece, value, keeps in zip(pieces, values, finite, strict=True):
                plt.store(v_out.at[*here, first_value + head, piece], jnp.where(keeps, value, 0).astype(value.dtype))
                keys = k_in[*here, first_key + head, piece]
                keys = jnp.where((bad > 0)[:, None], jnp.nan, keys).astype(keys.dtype)
                plt.store(k_out.at[*here, first_key + head, piece], keys)

    outputs = launch(
        kernel,
        *arrays,
        name="contain",
        grid=(num_kv_heads * (T // count), B),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        num_warps=_NUM_WARPS,
        input_output_aliases={i: i for i in range(len(arrays))},
    )
    return outputs[0], outputs[-1]
