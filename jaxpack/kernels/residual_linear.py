"""Computes the projection at the end of a branch of the residual stream, with or without a LoRA adapter.

The residual is added in the same pass. As separate operations, a gated activation and the projection after it would
keep the activation's result, or recompute it in the backward pass with a kernel of its own. Together they keep only
gate and up. In the backward pass, one kernel writes the gradients of gate and up over gate and up, and also computes
the activation's result again, from which the gradients of the weights are computed.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float

from jaxpack.constants import Activation, Implementation
from jaxpack.errors import InputError
from jaxpack.kernels.adapter import check_factors, outer, padded
from jaxpack.kernels.extended import add_extended, append_lora_input
from jaxpack.kernels.gated_activation import gated_activation, gated_activation_backward
from jaxpack.kernels.weight import Weight, as_weight, instantiate, primal_of


def residual_linear(
    residual: Float[Array, "*B O"] | None,
    x: Float[Array, "*B I"],
    weight: Weight | Float[Array, "O I"],
    lora_a: Float[Array, "R I"] | None = None,
    lora_b: Float[Array, "O R"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*B O"]:
    """Returns `residual + x W^T + (x A^T) B^T`, in the dtype of `x`.

    Args:
      residual: None for the projection alone, for models that norm it before they add it.
      weight: an array, or a `Weight` in any form; its gradient is computed only if it is requested.
      lora_a, lora_b: the adapter's factors; `lora_b` includes the adapter's scaling.
      implementation: see `jaxpack.kernels`.
    """
    weight = as_weight(weight)
    if weight.shape[1] != x.shape[-1]:
        raise InputError(f"`weight` must have {x.shape[-1]} columns, as `x` has channels, got {weight.shape[1]}.")
    factors = _factors(residual, x, weight, lora_a, lora_b)
    return _residual_linear(residual, x, weight, *factors, residual is not None, implementation)


def gated_residual_linear(
    residual: Float[Array, "*B O"] | None,
    gate_up: Float[Array, "*B FF"],
    weight: Weight | Float[Array, "O F"],
    lora_a: Float[Array, "R F"] | None = None,
    lora_b: Float[Array, "O R"] | None = None,
    *,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
) -> Float[Array, "*B O"]:
    """Applies `residual_linear` to `gated_activation(gate_up)`.

    Args:
      gate_up: gate and up side by side on the last axis; FF is 2 F.
    """
    weight = as_weight(weight)
    if gate_up.shape[-1] != 2 * weight.shape[1]:
        raise InputError(
            f"`gate_up` must have twice as many channels as `weight` has columns, {2 * weight.shape[1]}, got "
            f"{gate_up.shape[-1]}."
        )
    factors = _factors(residual, gate_up, weight, lora_a, lora_b)
    return _gated_residual_linear(residual, gate_up, weight, *factors, residual is not None, activation, implementation)


def _factors(residual, x, weight, lora_a, lora_b) -> tuple[jax.Array, jax.Array]:
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise InputError(f"`residual` must have shape {[*x.shape[:-1], weight.shape[0]]}, got {list(residual.shape)}.")
    check_factors(weight, lora_a, lora_b)
    return padded(lora_a, lora_b, weight, x.dtype)


# `has_residual` says whether there is a residual: the backward pass cannot tell from what the forward pass kept.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _residual_linear(residual, x, weight, a, b, has_residual, implementation):
    return _add_projected(residual, x, weight, a, b, implementation)[0]


def _forward(residual, x, weight, a, b, has_residual, implementation):
    residual, x, a, b = _values(residual, x, a, b)
    weight, _ = primal_of(weight)
    out, xa = _add_projected(residual, x, weight, a, b, implementation)
    return out, (x, weight, a, b, xa)


def _backward(has_residual, implementation, residuals, d):
    x, weight, a, b, xa = residuals
    d = instantiate(d)
    d_x, d_xa = _input_gradients(d, weight, a, b, implementation)
    return d if has_residual else None, d_x, *_weight_gradients(d, d_xa, x, weight, a, b, xa)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _gated_residual_linear(residual, gate_up, weight, a, b, has_residual, activation, implementation):
    return _gated_primal(residual, gate_up, weight, a, b, activation, implementation)[0]


def _gated_forward(residual, gate_up, weight, a, b, has_residual, activation, implementation):
    residual, gate_up, a, b = _values(residual, gate_up, a, b)
    weight, _ = primal_of(weight)
    return _gated_primal(residual, gate_up, weight, a, b, activation, implementation)


def _gated_primal(residual, gate_up, weight, a, b, activation, implementation):
    product = gated_activation(gate_up, activation=activation, implementation=implementation)
    out, xa = _add_projected(residual, product, weight, a, b, implementation)
    return out, (gate_up, weight, a, b, xa)


def _gated_backward(has_residual, activation, implementation, residuals, d):
    gate_up, weight, a, b, xa = residuals
    d = instantiate(d)
    d_product, d_xa = _input_gradients(d, weight, a, b, implementation)
    d_gate_up, _, product = gated_activation_backward(
        gate_up, None, d_product, activation=activation, with_product=True, in_place=True, implementation=implementation
    )
    d_weight, d_a, d_b = _weight_gradients(d, d_xa, product, weight, a, b, xa)
    d_gate_up, d_a = jax.lax.optimization_barrier((d_gate_up, d_a))  # so that the product can be freed
    return d if has_residual else None, d_gate_up, d_weight, d_a, d_b


def _add_projected(residual, x, weight, a, b, implementation) -> tuple[jax.Array, jax.Array]:
    """Returns the output, and the product `x A^T` between the adapter's factors, `[*B, R]`."""
    (x, a), weight = weight.after(x, a)
    rows = x @ weight.append_rows(a).T
    xa = checkpoint_name(rows[..., weight.shape[0] :], "lora")
    return add_extended(rows, b, residual, implementation=implementation), xa


def _input_gradients(d, weight, a, b, implementation) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `x` and of `x A^T`."""
    d_rows = append_lora_input(d, b.T, implementation) if len(a) else d
    (d_rows, a), weight = weight.after(d_rows, a)
    return d_rows @ weight.append_rows(a), d_rows[..., weight.shape[0] :]


def _weight_gradients(d, d_xa, x, weight, a, b, xa) -> tuple[Weight | None, jax.Array, jax.Array]:
    d_weight = weight.cotangent(lambda: outer(d, x))
    return d_weight, outer(d_xa, x).astype(a.dtype), outer(d, xa).astype(b.dtype)


def _values(*arguments: CustomVJPPrimal | None) -> list[jax.Array | None]:
    """Returns the arrays in the arguments of a forward rule with symbolic zeros."""
    return [None if argument is None else argument.value for argument in arguments]


# Symbolic zeros tell `primal_of` whether a frozen weight is differentiated.
_residual_linear.defvjp(_forward, _backward, symbolic_zeros=True)
_gated_residual_linear.defvjp(_gated_forward, _gated_backward, symbolic_zeros=True)
