"""A frozen projection with a low-rank adapter (LoRA, https://arxiv.org/abs/2106.09685): `x W^T + (x A^T) B^T`.

Added up as written, the adapter's share costs more than its arithmetic: another array of the output's size is written,
and read again to be added. Instead its factors ride along in the projection's own matmul, as a few more of the channels
that it sums over, wherever that side is the narrow one:

    out = [x, x A^T] [W, B]^T          (O > I: copies x, of I channels)
    d_x = [d, d B] [W; A]              (I >= O: copies the output's gradient d, of O channels)

and on the other side, the sum is of arrays of the narrow size. Both sums are float32.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpack.errors import InputError


def lora_linear(
    x: Float[Array, "*B I"],
    weight: Float[Array, "O I"],
    lora_a: Float[Array, "R I"],
    lora_b: Float[Array, "O R"],
    adapted: Float[Array, "*B I"] | None = None,
) -> Float[Array, "*B O"]:
    """`x @ weight.T + adapted @ lora_a.T @ lora_b.T`, in the dtype of `x`, to which all others are cast.

    Args:
      weight: frozen, or not; its gradient is computed where it is asked for.
      lora_b: with the adapter's scaling in it.
      adapted: what the adapter reads where that is not `x`: `x` after dropout.
    """
    if weight.shape[1] != x.shape[-1]:
        raise InputError(f"`weight` must have {x.shape[-1]} columns, as `x` has channels, got {weight.shape[1]}.")
    check_factors(weight, lora_a, lora_b)
    if adapted is not None and adapted.shape != x.shape:
        raise InputError(f"`adapted` must have the shape of `x`, {list(x.shape)}, got {list(adapted.shape)}.")
    return _lora_linear(x, weight, lora_a, lora_b, adapted)


def check_factors(weight: jax.Array, lora_a: jax.Array, lora_b: jax.Array) -> None:
    """Refuses factors that do not fit the weight, or each other."""
    if lora_a.shape[1] != weight.shape[1]:
        raise InputError(f"`lora_a` must have {weight.shape[1]} columns, as `weight` has, got {lora_a.shape[1]}.")
    if lora_b.shape != (weight.shape[0], lora_a.shape[0]):
        raise InputError(
            f"`lora_b` must have shape {(weight.shape[0], lora_a.shape[0])}: rows of `weight`, rows of `lora_a`, got "
            f"{lora_b.shape}."
        )


def lora_linear_reference(
    x: Float[Array, "*B I"],
    weight: Float[Array, "O I"],
    lora_a: Float[Array, "R I"],
    lora_b: Float[Array, "O R"],
    adapted: Float[Array, "*B I"] | None = None,
) -> Float[Array, "*B O"]:
    """`lora_linear` as it is written down."""
    weight, lora_a, lora_b = (w.astype(x.dtype) for w in (weight, lora_a, lora_b))
    return x @ weight.T + ((x if adapted is None else adapted) @ lora_a.T) @ lora_b.T


@jax.custom_vjp
def _lora_linear(x, weight, lora_a, lora_b, adapted):
    return forward(x, weight, lora_a, lora_b, adapted)[0]


# Forward and backward in parts, for `gated_linear`, too.


def forward(x, weight, lora_a, lora_b, adapted=None) -> tuple[jax.Array, jax.Array]:
    """The output, and what is between the factors: `[*B, R]`."""
    a, b, w = (matrix.astype(x.dtype) for matrix in (lora_a, lora_b, weight))
    narrow = checkpoint_name((x if adapted is None else adapted) @ a.T, "lora")
    if _is_wide(weight):
        out = jnp.concatenate([x, narrow], axis=-1) @ jnp.concatenate([w, b], axis=1).T
    else:
        out = x @ w.T + narrow @ b.T
    return out, narrow


def input_gradients(
    d_out, weight, lora_a, lora_b, *, apart: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Gradients of `x` and of what is between the factors; where the adapter reads another input, of that, `apart`."""
    a, b, w = (matrix.astype(d_out.dtype) for matrix in (lora_a, lora_b, weight))
    if _is_wide(weight):
        d_x, d_narrow = jnp.split(d_out @ jnp.concatenate([w, b], axis=1), [w.shape[1]], axis=-1)
        d_adapted = d_narrow @ a
        return (d_x, d_narrow, d_adapted) if apart else (d_x + d_adapted, d_narrow, None)
    d_narrow = d_out @ b
    if apart:
        return d_out @ w, d_narrow, d_narrow @ a
    return jnp.concatenate([d_out, d_narrow], axis=-1) @ jnp.concatenate([w, a], axis=0), d_narrow, None


def outer(d: Float[Array, "*B O"], x: Float[Array, "*B I"]) -> Float[Array, "O I"]:
    """Sum over tokens of `d x^T`, float32."""
    d, x = (array.reshape(-1, array.shape[-1]) for array in (d, x))
    return jnp.einsum("TO,TI->OI", d, x, preferred_element_type=jnp.float32)


def _is_wide(weight: jax.Array) -> bool:
    return weight.shape[0] > weight.shape[1]


def _forward(x, weight, lora_a, lora_b, adapted):
    out, narrow = forward(x, weight, lora_a, lora_b, adapted)
    return out, (x, weight, lora_a, lora_b, adapted, narrow)


def _backward(residuals, d_out):
    x, weight, lora_a, lora_b, adapted, narrow = residuals
    d_x, d_narrow, d_adapted = input_gradients(d_out, weight, lora_a, lora_b, apart=adapted is not None)
    d_a = outer(d_narrow, x if adapted is None else adapted).astype(lora_a.dtype)
    d_b = outer(d_out, narrow).astype(lora_b.dtype)
    d_weight = outer(d_out, x).astype(weight.dtype)  # never computed where nothing asks for it
    return d_x, d_weight, d_a, d_b, d_adapted


_lora_linear.defvjp(_forward, _backward)
