"""The projection behind a gated activation, `(act(gate) * up) W^T`, with or without a LoRA adapter.

Apart, the two would keep the product between them, or compute it in the backward pass by a kernel of its own. Together,
only gate and up are kept: the kernel that turns the product's gradient into theirs, in their place, writes the product
again on its way, as the gradients of the weights read it.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpack.errors import InputError
from jaxpack.kernels import lora_linear
from jaxpack.kernels._launch import Implementation
from jaxpack.kernels.gated_activation import Activation, gated_activation, gated_activation_backward


def gated_linear(
    gate_up: Float[Array, "*B FF"],
    weight: Float[Array, "O F"],
    lora_a: Float[Array, "R F"] | None = None,
    lora_b: Float[Array, "O R"] | None = None,
    *,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
) -> Float[Array, "*B O"]:
    """`gated_activation(gate_up) @ weight.T`, and the adapter's share where there is one, see `lora_linear`.

    Args:
      gate_up: gate and up side by side on the last axis.
      implementation: see `jaxpack.kernels`.
    """
    if gate_up.shape[-1] != 2 * weight.shape[1]:
        raise InputError(
            f"`gate_up` must have twice as many channels as `weight` has columns, {2 * weight.shape[1]}, got "
            f"{gate_up.shape[-1]}."
        )
    if (lora_a is None) != (lora_b is None):
        raise InputError("`lora_a` and `lora_b` must be given both or neither, got one.")
    if lora_a is not None:
        lora_linear.check_factors(weight, lora_a, lora_b)
    return _gated_linear(gate_up, weight, lora_a, lora_b, activation, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gated_linear(gate_up, weight, lora_a, lora_b, activation, implementation):
    return _forward(gate_up, weight, lora_a, lora_b, activation, implementation)[0]


def _forward(gate_up, weight, lora_a, lora_b, activation, implementation):
    gate_up = checkpoint_name(gate_up, "gate_up")
    product = gated_activation(gate_up, activation=activation, implementation=implementation)
    if lora_a is None:
        return product @ weight.astype(product.dtype).T, (gate_up, weight, None, None, None)
    out, narrow = lora_linear.forward(product, weight, lora_a, lora_b)
    return out, (gate_up, weight, lora_a, lora_b, narrow)


def _backward(activation, implementation, kept, d_out):
    gate_up, weight, lora_a, lora_b, narrow = kept
    if lora_a is None:
        d_product = d_out @ weight.astype(d_out.dtype)
    else:
        d_product, d_narrow, _ = lora_linear.input_gradients(d_out, weight, lora_a, lora_b)
    d_gate_up, _, product = gated_activation_backward(
        gate_up, None, d_product, activation=activation, with_product=True, in_place=True, implementation=implementation
    )
    d_weight = lora_linear.outer(d_out, product).astype(weight.dtype)  # never computed where nothing asks for it
    if lora_a is None:
        return d_gate_up, d_weight, None, None
    d_a = lora_linear.outer(d_narrow, product).astype(lora_a.dtype)
    d_b = lora_linear.outer(d_out, narrow).astype(lora_b.dtype)
    return d_gate_up, d_weight, d_a, d_b


_gated_linear.defvjp(_forward, _backward)
