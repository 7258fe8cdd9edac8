"""Adam whose two moments are kept in 8 bits, as bitsandbytes' `AdamW8bit` keeps them (https://arxiv.org/abs/2110.02861).

A moment is cut into blocks of 256 values. For each value, a block holds the code of the nearest of 256 numbers (the
dynamic map), and one float32 factor, the largest magnitude in the block. Two moments so take 2.03 bytes instead of 8.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

from jaxpack.kernels.dynamic_map import dynamic_map, look_up, nearest_codes

BLOCK = 256
MIN_SIZE = 4096  # Smaller parameters keep float32 moments, as with bitsandbytes' `min_8bit_size`.


class Quantized(NamedTuple):
    """Holds M matrices of n float32 values each, in blocks; the last block of a matrix is filled up with zeros."""

    codes: UInt8[Array, "M blocks 256"]
    absmax: Float[Array, "M blocks"]


class ScaleByAdam8bitState(NamedTuple):
    """Holds the number of updates, and each parameter's moments: `Quantized`, or float32 in the parameter's shape."""

    count: Int[Array, ""]
    mu: optax.Params
    nu: optax.Params


def scale_by_adam_8bit(
    b1: float, b2: float, eps: float, num_matrices: Callable[[tuple, jax.Array], int] = lambda path, parameter: 1
) -> optax.GradientTransformation:
    """Returns Adam's transformation of gradients, as `optax.scale_by_adam`, with moments in 8 bits.

    The update is `(mu / (1 - b1**t)) / (sqrt(nu / (1 - b2**t)) + eps)`. It is computed in float32 from moments that
    have not been rounded to 8 bits yet; only the next update reads them rounded. Chained with decoupled weight decay
    and the learning rate, as in `optax.adamw`, it is bitsandbytes' `AdamW8bit`.

    Args:
      num_matrices: how many matrices of its own a parameter holds, by its path and array: 1, the number of layers of a
        stack, or 0 if its moments must stay in float32. No block crosses from one matrix into the next. Matrices of
        fewer than 4,096 elements keep float32 moments, too.
    """

    def init(params: optax.Params) -> ScaleByAdam8bitState:
        def zeros(path: tuple, parameter: jax.Array) -> Quantized | jax.Array:
            count = num_matrices(path, parameter)
            if count == 0 or parameter.size < MIN_SIZE * count:
                return jnp.zeros(parameter.shape, jnp.float32)
            blocks = -(-parameter.size // (count * BLOCK))
            return Quantized(jnp.zeros((count, blocks, BLOCK), jnp.uint8), jnp.zeros((count, blocks), jnp.float32))

        # Two calls, because a step donates its arrays: the moments must not share any.
        mu, nu = (jax.tree_util.tree_map_with_path(zeros, params) for _ in range(2))
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, ScaleByAdam8bitState)
        count = jnp.asarray(optax.safe_increment(state.count))
        correction1, correction2 = (_bias_correction(decay, count) for decay in (b1, b2))

        # All of this is elementwise but the largest magnitude of a block, so XLA makes about two passes over a leaf. A
        # CPU keeps both new moments in between: two float32 arrays of the leaf's size, three if the last blocks are
        # not full (not measured on a GPU). A Pallas kernel would take one pass, but its 32-bit offsets end at 2**31
        # elements, which a stack of layers can exceed.
        def moved(gradient: jax.Array, mu: Quantized | jax.Array, nu: Quantized | jax.Array) -> tuple:
            g = _in_blocks(gradient, mu) if isinstance(mu, Quantized) else gradient
            m = b1 * _dense(mu, signed=True) + (1 - b1) * g
            v = b2 * _dense(nu, signed=False) + (1 - b2) * g * g
            step = m / correction1 / (jnp.sqrt(v) / jnp.sqrt(correction2) + eps)
            if not isinstance(mu, Quantized):
                return step, m, v
            step = step.reshape(len(step), -1)[:, : gradient.size // len(step)].reshape(gradient.shape)
            return step, quantize(m, signed=True), quantize(v, signed=False)

        gradients, tree = jax.tree.flatten(updates)
        moments = (tree.flatten_up_to(moment) for moment in (state.mu, state.nu))
        steps, mu, nu = zip(*map(moved, gradients, *moments), strict=True) if gradients else ((), (), ())
        return tree.unflatten(steps), ScaleByAdam8bitState(count, tree.unflatten(mu), tree.unflatten(nu))

    return optax.GradientTransformation(init, update)


def _bias_correction(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """Returns `1 - decay**count`, by `expm1`: in float32, `1 - 0.999**1` itself has a relative error of 1e-5."""
    return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))


def _in_blocks(x: jax.Array, like: Quantized) -> Float[Array, "M blocks 256"]:
    count, blocks, _ = like.codes.shape
    rows = x.reshape(count, -1)
    return jnp.pad(rows, ((0, 0), (0, blocks * BLOCK - rows.shape[1]))).reshape(like.codes.shape)


def _dense(moment: Quantized | jax.Array, *, signed: bool) -> jax.Array:
    return dequantize(moment, signed=signed) if isinstance(moment, Quantized) else moment


def dequantize(x: Quantized, *, signed: bool) -> Float[Array, "M blocks 256"]:
    """Returns the values that codes stand for: the number of the map times the block's largest magnitude."""
    return look_up(dynamic_map(signed=signed), x.codes) * x.absmax[..., None]


def quantize(x: Float[Array, "M blocks 256"], *, signed: bool) -> Quantized:
    """Returns the code of the number of the map that is nearest to each value, in units of its block's largest."""
    absmax = jnp.max(jnp.abs(x), axis=-1)
    scaled = x * (1 / jnp.maximum(absmax, 2e-38))[..., None]  # The limit keeps a block of zeros free of NaN.
    return Quantized(nearest_codes(scaled, signed=signed), absmax)
