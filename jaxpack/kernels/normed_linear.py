"""Computes a norm and the projection after it, at the start of a branch of the residual stream.

The projection may have a LoRA adapter.

In the forward pass, one kernel norms the tokens and computes the adapter's product `n A^T`. In the backward pass, one
kernel adds up the three gradients of the residual stream: through the projection, through its adapter and past both.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpack.constants import Implementation
from jaxpack.errors import InputError
from jaxpack.kernels.adapter import check_factors, outer, padded
from jaxpack.kernels.extended import norm_append_lora_input, norm_append_lora_input_backward
from jaxpack.kernels.weight import Weight, as_weight, instantiate, primal_of


def normed_linear(
    x: Float[Array, "*B I"],
    scale: Float[Array, " I"],
    weight: Weight | Float[Array, "O I"],
    lora_a: Float[Array, "R I"] | None = None,
    lora_b: Float[Array, "O R"] | None = None,
    *,
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*B I"], Float[Array, "*B O"]]:
    """Returns `x` itself, and `n W^T + (n A^T) B^T` with `n = rms_norm(x, scale)`, in the dtype of `x`.

    Use the returned `x` for the residual connection: its gradient is then added in the norm's own backward kernel.

    Args:
      weight: an array, or a `Weight` in any form; its gradient is computed only if it is requested.
      lora_a, lora_b: the adapter's factors; `lora_b` includes the adapter's scaling.
      implementation: see `jaxpack.kernels`.
    """
    if scale.shape != x.shape[-1:]:
        raise InputError(f"`scale` must have shape {x.shape[-1:]}, got {scale.shape}.")
    weight = as_weight(weight)
    if weight.shape[1] != x.shape[-1]:
        raise InputError(f"`weight` must have {x.shape[-1]} columns, as `x` has channels, got {weight.shape[1]}.")
    check_factors(weight, lora_a, lora_b)
    return _normed_linear(x, scale, weight, *padded(lora_a, lora_b, weight, x.dtype), eps, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _normed_linear(x, scale, weight, a, b, eps, implementation):
    return _primal(x, scale, weight, a, b, eps, implementation)[0]


def _primal(x, scale, weight, a, b, eps, implementation):
    rows = norm_append_lora_input(x, scale, a, eps=eps, implementation=implementation)
    (rows, b), weight = weight.after(rows, b)
    cast = weight.cast(b.dtype)
    # The copy `[W, B]` is made anew in each direction, at a time that a barrier fixes, and is never kept.
    return (x, rows @ cast.append_columns(b).T), (x, scale, weight, cast, a, b, rows)


def _forward(x, scale, weight, a, b, eps, implementation):
    weight, _ = primal_of(weight)
    out, residuals = _primal(x.value, scale.value, weight, a.value, b.value, eps, implementation)
    # A frozen norm needs no gradient. The structure of the residuals says so: the backward rule knows nothing else
    # about them when it is traced.
    return out, (*residuals, jnp.zeros(()) if scale.perturbed else None)


def _backward(eps, implementation, residuals, d):
    x, scale, weight, cast, a, b, rows, trained = residuals
    d_x, d_out = map(instantiate, d)
    (d_out, b), cast = cast.after(d_out, b)
    I = x.shape[-1]  # noqa: E741
    d_rows = d_out @ cast.append_columns(b)
    # `outer` computes a few columns too many. This costs less than first copying the other columns together.
    d_weight = weight.cotangent(lambda: outer(d_out, rows)[:, :I])
    d_a = outer(d_rows[..., I:], rows)[:, :I].astype(a.dtype)
    d_b = outer(d_out, rows[..., I:]).astype(b.dtype)
    d_rows, d_a, d_b = jax.lax.optimization_barrier((d_rows, d_a, d_b))  # so that `d_out` can be freed
    options = {"eps": eps, "with_scale": trained is not None, "implementation": implementation}
    d_x, d_scale = norm_append_lora_input_backward(d_rows, rows, x, scale, a, d_x, **options)
    return d_x, None if d_scale is None else d_scale.astype(scale.dtype), d_weight, d_a, d_b


_normed_linear.defvjp(_forward, _backward, symbolic_zeros=True)
