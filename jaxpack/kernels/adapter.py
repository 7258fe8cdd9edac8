"""Checks and pads the factors of a LoRA adapter (https://arxiv.org/abs/2106.09685): `x W^T + (x A^T) B^T`."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpack.errors import InputError
from jaxpack.kernels.weight import Weight


def check_factors(weight: Weight, lora_a: jax.Array | None, lora_b: jax.Array | None) -> None:
    """Raises an InputError for factors that do not fit the weight or each other."""
    if (lora_a is None) != (lora_b is None):
        raise InputError("`lora_a` and `lora_b` must be given both or neither, got one.")
    if lora_a is None or lora_b is None:
        return
    if lora_a.shape[1] != weight.shape[1]:
        raise InputError(f"`lora_a` must have {weight.shape[1]} columns, as `weight` has, got {lora_a.shape[1]}.")
    if lora_b.shape != (weight.shape[0], lora_a.shape[0]):
        raise InputError(
            f"`lora_b` must have shape {(weight.shape[0], lora_a.shape[0])}: rows of `weight`, rows of `lora_a`, got "
            f"{lora_b.shape}."
        )


def padded_rank(rank: int) -> int:
    """Returns the smallest rank that kernels take and that is at least `rank`: 16, 32, 64 and so on."""
    return max(16, 1 << (rank - 1).bit_length())


def padded(
    lora_a: Float[Array, "R I"] | None,
    lora_b: Float[Array, "O R"] | None,
    weight: Weight,
    dtype: DTypeLike,
) -> tuple[Float[Array, "P I"], Float[Array, "O P"]]:
    """Returns both factors in `dtype`, padded with zeros to `padded_rank`; without factors, empty ones of rank 0."""
    if lora_a is None or lora_b is None:
        return jnp.zeros((0, weight.shape[1]), dtype), jnp.zeros((weight.shape[0], 0), dtype)
    missing = padded_rank(len(lora_a)) - len(lora_a)
    lora_a, lora_b = lora_a.astype(dtype), lora_b.astype(dtype)
    return jnp.pad(lora_a, ((0, missing), (0, 0))), jnp.pad(lora_b, ((0, 0), (0, missing)))


def outer(d: Float[Array, "*B O"], x: Float[Array, "*B I"]) -> Float[Array, "O I"]:
    """Returns the sum over tokens of `d x^T`, float32."""
    d, x = (array.reshape(math.prod(array.shape[:-1]), array.shape[-1]) for array in (d, x))
    return jnp.einsum("TO,TI->OI", d, x, preferred_element_type=jnp.float32)
