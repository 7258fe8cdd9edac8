"""Makes the table of 256 values with which bitsandbytes stores numbers in 8 bits: its dynamic data type.

The values are dense near 0 and reach from -1 or 0 to 1, for numbers that are divided by the largest one of their block
(https://arxiv.org/abs/1511.04561).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


@functools.cache
def dynamic_map(*, signed: bool = True) -> Float[np.ndarray, "256"]:
    """Returns the values of the 256 codes in ascending order, float32, equal to bitsandbytes' to the last bit."""
    values = [0.0, 1.0]
    for exponent in range(-6, 1):
        # Each power of ten has twice as many values as the one before.
        means = _interval_means(2 ** (exponent + 6 + (not signed)))
        for sign in (1, -1) if signed else (1,):
            values += [sign * np.float32(10**exponent) * mean for mean in means]
    return np.sort(np.array(values, np.float32))


def nearest_codes(x: Float[Array, "*N"], table: Float[np.ndarray, "256"]) -> UInt8[Array, "*N"]:
    """Returns for each number the code of the nearest value of an ascending table; halfway, the lower one."""
    return jnp.searchsorted(jnp.asarray((table[:-1] + table[1:]) / 2), x, method="scan_unrolled").astype(jnp.uint8)


def _interval_means(count: int) -> Float[np.ndarray, " count"]:
    """Returns the centres of `count` equal intervals from 0.1 to 1, rounded as torch does.

    `torch.linspace` counts from both ends, and rounds a product and a sum at once. In float64, both are exact enough
    to be rounded only by the cast.
    """
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count))
    index = np.arange(count + 1)
    bounds = np.where(index < (count + 1) // 2, first + step * index, last - step * (count - index)).astype(np.float32)
    return (bounds[:-1] + bounds[1:]) / np.float32(2)
