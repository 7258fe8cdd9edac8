"""Root mean square norm (https://arxiv.org/abs/1910.07467), which keeps only its inputs for the backward pass."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpack.errors import InputError


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], *, eps: float) -> Float[Array, "*B D"]:
    """Computes `scale * x / sqrt(mean(x^2) + eps)` over the last axis, in float32; the result has the dtype of `x`.

    For Gemma, `scale` is `1 + weight`. JAX's own derivative would keep three float32 arrays of the size of `x`.
    """
    if scale.shape != x.shape[-1:]:
        raise InputError(f"`scale` must have shape {x.shape[-1:]}, got {scale.shape}.")
    return _rms_norm(x, scale, eps)


def rms_norm_reference(x: Float[Array, "*B D"], scale: Float[Array, " D"], *, eps: float) -> Float[Array, "*B D"]:
    """Computes `rms_norm` in plain jnp."""
    return (_normed(x, eps)[0] * _wide(scale, x.ndim)).astype(x.dtype)


def _normed(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide * inverse, inverse


def _wide(scale: jax.Array, ndim: int) -> jax.Array:
    return scale.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, scale, eps):
    return rms_norm_reference(x, scale, eps=eps)


def rms_norm_backward(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], d_out: Float[Array, "*B D"], *, eps: float
) -> tuple[Float[Array, "*B D"], Float[Array, " D"]]:
    """Returns the gradients of `x` and `scale`, float32."""
    n, inverse = _normed(x, eps)
    d_out = d_out.astype(jnp.float32)
    g = d_out * _wide(scale, x.ndim)
    d_x = inverse * (g - n * jnp.mean(g * n, axis=-1, keepdims=True))
    return d_x, jnp.sum(d_out * n, axis=tuple(range(x.ndim - 1)))


def _backward(eps, residuals, d_out):
    x, scale = residuals
    d_x, d_scale = rms_norm_backward(x, scale, d_out, eps=eps)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


_rms_norm.defvjp(lambda x, scale, eps: (_rms_norm(x, scale, eps), (x, scale)), _backward)
