"""Makes the table of 256 values with which bitsandbytes stores numbers in 8 bits: its dynamic data type.

The values are dense near 0 and reach from -1 or 0 to 1, for numbers that are divided by the largest one of their block
(https://arxiv.org/abs/1511.04561).
"""

import functools

import jax
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


def nearest_codes(x: Float[Array, "*N"], *, signed: bool = True) -> UInt8[Array, "*N"]:
    """Returns for each number in [-1, 1] the code of the nearest value of the map; halfway, the lower one.

    The first 16 bits of a float32 (sign, exponent and 7 bits of the fraction) select a range of numbers in which one
    midpoint between two values lies at most. A table of these ranges gives the code at the lower end of the range, and
    one comparison with that midpoint decides whether it is the next one. XLA fuses all of this with what comes before
    and after. `jnp.searchsorted` takes a loop that is not fused, or 8 reads one after another, or 255 comparisons.
    """
    lowest, midpoints = _ranges(signed)
    code = look_up(lowest, jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16)
    return code + (x > look_up(midpoints, code)).astype(jnp.uint8)


def look_up(table: np.ndarray, index: Array) -> Array:
    """Returns `table[index]`, for indices that are known to be in the table."""
    return jnp.asarray(table).at[index.astype(jnp.int32)].get(mode="promise_in_bounds")


@functools.cache
def _ranges(signed: bool) -> tuple[UInt8[np.ndarray, "65536"], Float[np.ndarray, "256"]]:
    """Returns the lowest code of each range, and the midpoint between each code and the next one."""
    values = dynamic_map(signed=signed)
    midpoints = np.append((values[:-1] + values[1:]) / np.float32(2), np.float32(np.inf))
    ends = np.arange(2**16, dtype=np.uint32) << 16
    ends = np.stack([ends, ends | 0xFFFF]).view(np.float32)  # towards 0 and away from it
    ends = np.where(np.isnan(ends), np.float32(0), ends)  # NaN gets the code of 0
    lowest, highest = (np.searchsorted(midpoints, end) for end in (ends.min(0), ends.max(0)))
    assert (highest - lowest)[np.abs(ends).max(0) <= 1].max() == 1, "a range holds two midpoints"
    return lowest.astype(np.uint8), midpoints


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
