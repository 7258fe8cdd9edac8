"""Computes what DoRA (https://arxiv.org/abs/2402.09353) adds to a LoRA adapter: norms of rows, and scaled channels.

DoRA gives each row of the adapted weight `W + B A` a norm that is trained by itself, its magnitude. To scale the rows
of a weight is to scale the channels of its product, which takes one pass over the output and no copy of the weight.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpack.kernels.weight import Weight, as_weight

_LEAST = 1e-30  # of a squared norm: a row of zeros has a norm by which its magnitude, 0, can be divided


def row_norms(
    weight: Weight | Float[Array, "O I"],
    lora_a: Float[Array, "R I"],
    lora_b: Float[Array, "O R"],
    after: Float[Array, "*B F"],
) -> Float[Array, " O"]:
    """Returns the norms of the rows of `W + B A`, float32. They have no gradient, as DoRA defines it.

    With `|W + B A|^2 = |W|^2 + 2 B (W A^T) + B (A A^T) B^T`, row by row, no matrix of the size of W is made but the
    dense form of a weight that is stored in another one.

    Args:
      lora_b: includes the adapter's scaling.
      after: an array of the same layer in the dtype of the matmuls. The weight becomes dense only after it is computed:
        without a loop over layers, XLA could otherwise make those of all layers at once.
    """
    weight, lora_a, lora_b, after = jax.lax.stop_gradient((as_weight(weight), lora_a, lora_b, after))
    (_, a), weight = weight.after(after, lora_a.astype(after.dtype))
    dense = weight.dense(after.dtype)
    crossed = jnp.matmul(dense, a.T, preferred_element_type=jnp.float32)  # W A^T, [O, R]
    a, b = a.astype(jnp.float32), lora_b.astype(after.dtype).astype(jnp.float32)
    of_weight = jnp.sum(jnp.square(dense.astype(jnp.float32)), axis=1)
    of_adapter = jnp.sum((2 * crossed + b @ (a @ a.T)) * b, axis=1)
    return jnp.sqrt(jnp.maximum(of_weight + of_adapter, _LEAST))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale_channels(y: Float[Array, "*B O"], scale: Float[Array, " O"], name: str | None = None) -> Float[Array, "*B O"]:
    """Returns `y * scale` in the dtype of `y`, as an activation of this name (`jax.ad_checkpoint.checkpoint_name`).

    The derivative reads the result, and not `y`: whoever keeps the result needs no second array of its size.

    Args:
      scale: float32; its gradient is 0 in a channel whose scale is 0.
    """
    return _scaled(y, scale, name)


def _scaled(y, scale, name):
    out = (y.astype(jnp.float32) * _along_channels(scale, y)).astype(y.dtype)
    return out if name is None else checkpoint_name(out, name)


def _forward(y, scale, name):
    out = _scaled(y, scale, name)
    return out, (out, scale)


def _backward(name, residuals, d):
    out, scale = residuals
    d = d.astype(jnp.float32)
    products = jnp.sum(d * out.astype(jnp.float32), axis=tuple(range(d.ndim - 1)))
    d_scale = jnp.where(scale == 0, 0.0, products / jnp.where(scale == 0, 1.0, scale))
    return (d * _along_channels(scale, d)).astype(out.dtype), d_scale


def _along_channels(scale, y):
    return scale.reshape((1,) * (y.ndim - 1) + scale.shape)


scale_channels.defvjp(_forward, _backward)
