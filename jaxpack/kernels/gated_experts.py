"""Computes a mixture of gated feed-forward experts, with or without LoRA adapters on them.

A token's output is the sum over its experts of the expert's share times `down(act(gate(x)) * up(x))`. As in
`residual_linear`, only gate and up are kept, and the gated activation is computed again in the backward pass.

The gradient of a share is the product of the output's gradient and the expert's output. That output is not kept: the
gradient of the activation, before it is scaled by the share, times the activation is the same number.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpack.constants import Activation, Implementation
from jaxpack.errors import InputError
from jaxpack.kernels.adapter import padded_rank
from jaxpack.kernels.gated_activation import gated_activation, gated_activation_backward
from jaxpack.kernels.grouped_matmul import grouped_matmul, grouped_outer
from jaxpack.kernels.routing import Routing, combine, gather_copies, spread
from jaxpack.kernels.weight import Weight, as_weight, instantiate, primal_of

Factors = tuple[Array, Array]  # all experts' A factors `[E, R, I]` and B factors `[E, O, R]`


def gated_experts(
    residual: Float[Array, "N D"],
    x: Float[Array, "N D"],
    shares: Float[Array, "N C"],
    routing: Routing,
    gate_up: Weight | Float[Array, "EFF D"],
    down: Weight | Float[Array, "ED F"],
    gate_up_factors: Factors | None = None,
    down_factors: Factors | None = None,
    *,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """Returns the residual plus the sum of each token's experts, in the dtype of `x`. Sums over experts are float32.

    Args:
      residual: the residual stream.
      x: the normed tokens.
      shares: the share of each of a token's experts, float32.
      routing: the rows of the experts, see `route`.
      gate_up: all experts' matrices of gate and up, one below the other, `[E * 2F, D]`.
      down: all experts' matrices `[E * D, F]`.
      gate_up_factors, down_factors: the factors of the experts' adapters, of which B includes the scaling.
      implementation: see `jaxpack.kernels`.

    Raises:
      InputError: the matrices do not fit each other or the experts.
    """
    gate_up, down = as_weight(gate_up), as_weight(down)
    E, D = routing.num_experts, x.shape[1]
    if gate_up.shape[0] % (2 * E) or gate_up.shape[1] != D:
        raise InputError(f"`gate_up` must have shape [{E} * 2F, {D}] for {E} experts, got {list(gate_up.shape)}.")
    F = gate_up.shape[0] // (2 * E)
    if down.shape != (E * D, F):
        raise InputError(f"`down` must have shape {[E * D, F]} for {E} experts, got {list(down.shape)}.")
    pairs = (_padded(gate_up_factors, (E, 2 * F, D), x.dtype), _padded(down_factors, (E, D, F), x.dtype))
    return _gated_experts(residual, x, shares, routing, gate_up, down, *pairs, activation, implementation)


def _padded(factors: Factors | None, shape: tuple[int, int, int], dtype: jnp.dtype) -> Factors | None:
    """Returns the factors in `dtype`, padded with zeros to a rank that the kernels take."""
    if factors is None:
        return None
    a, b = factors
    E, O, I = shape  # noqa: E741
    R = a.shape[1]
    if a.shape != (E, R, I) or b.shape != (E, O, R):
        raise InputError(f"An expert's factors must have shapes {(E, R, I)} and {(E, O, R)}, got {a.shape}, {b.shape}.")
    missing = padded_rank(R) - R
    none = (0, 0)
    return jnp.pad(a.astype(dtype), (none, (0, missing), none)), jnp.pad(b.astype(dtype), (none, none, (0, missing)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _gated_experts(
    residual, x, shares, routing, gate_up, down, gate_up_factors, down_factors, activation, implementation
):
    arguments = (residual, x, shares, routing, gate_up, down, gate_up_factors, down_factors)
    return _compute(*arguments, activation, implementation)[0]


def _forward(residual, x, shares, routing, gate_up, down, gate_up_factors, down_factors, activation, implementation):
    arrays = (residual, x, shares, routing, gate_up_factors, down_factors)
    residual, x, shares, routing, gate_up_factors, down_factors = jax.tree.map(lambda leaf: leaf.value, arrays)
    (gate_up, _), (down, _) = primal_of(gate_up), primal_of(down)
    arguments = (residual, x, shares, routing, gate_up, down, gate_up_factors, down_factors)
    return _compute(*arguments, activation, implementation)


def _compute(residual, x, shares, routing, gate_up, down, gate_up_factors, down_factors, activation, implementation):
    project = functools.partial(_project, routing=routing, implementation=implementation)
    hidden, gate_up_xa = project(x, gate_up, gate_up_factors, from_tokens=True)
    hidden = checkpoint_name(hidden, "gate_up")
    product = gated_activation(hidden, activation=activation, implementation=implementation)
    out, down_xa = project(product, down, down_factors)
    out = (residual.astype(jnp.float32) + combine(out, routing, shares)).astype(residual.dtype)
    return out, (x, shares, routing, gate_up, down, gate_up_factors, down_factors, hidden, gate_up_xa, down_xa)


def _backward(activation, implementation, residuals, d):
    x, shares, routing, gate_up, down, gate_up_factors, down_factors, hidden, gate_up_xa, down_xa = residuals
    d = instantiate(d)
    back = functools.partial(_project_back, routing=routing, implementation=implementation)
    outer = functools.partial(grouped_outer, routing=routing, implementation=implementation)
    row_shares = spread(shares, routing)[:, None]

    # The gradient of the activation, not yet scaled by the rows' shares.
    d_product, d_down_xa = back(d, down, down_factors, from_tokens=True)
    product = gated_activation(hidden, activation=activation, implementation=implementation)
    wide = d_product.astype(jnp.float32)
    d_shares = gather_copies(jnp.sum(wide * product.astype(jnp.float32), axis=1), routing)
    d_hidden, _, product = gated_activation_backward(
        hidden,
        None,
        (wide * row_shares).astype(d.dtype),
        activation=activation,
        with_product=True,
        in_place=True,
        implementation=implementation,
    )
    assert product is not None
    scaled = lambda rows: (rows.astype(jnp.float32) * row_shares).astype(rows.dtype)  # noqa: E731
    d_down = down.cotangent(lambda: _flat(outer(d, scaled(product), d_from_tokens=True)))
    d_down_factors = None
    if down_factors is not None:
        d_a, d_b = outer(scaled(d_down_xa), product), outer(d, scaled(down_xa), d_from_tokens=True)
        d_down_factors = d_a.astype(d.dtype), d_b.astype(d.dtype)

    d_rows, d_gate_up_xa = back(d_hidden, gate_up, gate_up_factors)
    d_gate_up = gate_up.cotangent(lambda: _flat(outer(d_hidden, x, x_from_tokens=True)))
    d_gate_up_factors = None
    if gate_up_factors is not None:
        d_a, d_b = outer(d_gate_up_xa, x, x_from_tokens=True), outer(d_hidden, gate_up_xa)
        d_gate_up_factors = d_a.astype(d.dtype), d_b.astype(d.dtype)
    d_x = combine(d_rows, routing).astype(x.dtype)
    nowhere = None  # for the integers of the routing
    return d, d_x, d_shares.astype(shares.dtype), nowhere, d_gate_up, d_down, d_gate_up_factors, d_down_factors


def _project(x, weight: Weight, factors: Factors | None, *, routing, implementation, from_tokens=False):
    """Returns the experts' projections of the rows, and the rows' product with the A factors, empty without any."""
    run = functools.partial(grouped_matmul, routing=routing, implementation=implementation)
    xa, more = x[:0], None
    if factors is not None:
        a, b = factors
        xa = checkpoint_name(run(x, a[None], from_tokens=from_tokens), "lora")
        more = xa, b
    (x,), weight = weight.after(x)
    matrices, layer = _stack(weight, x.dtype, routing.num_experts)
    return run(x, matrices, layer=layer, from_tokens=from_tokens, more=more), xa


def _project_back(d, weight: Weight, factors: Factors | None, *, routing, implementation, from_tokens=False):
    """Returns the gradient of the rows of `_project`, and of their product with the A factors, empty without any."""
    run = functools.partial(grouped_matmul, routing=routing, implementation=implementation, transposed=True)
    d_xa, more = d[:0], None
    if factors is not None:
        a, b = factors
        d_xa = run(d, b[None], from_tokens=from_tokens)
        more = d_xa, a
    (d,), weight = weight.after(d)
    matrices, layer = _stack(weight, d.dtype, routing.num_experts)
    return run(d, matrices, layer=layer, from_tokens=from_tokens, more=more), d_xa


def _stack(weight: Weight, dtype: jnp.dtype, num_experts: int) -> tuple[jax.Array, jax.Array | int]:
    """Returns a stack of all experts' matrices, `[L, E, O, I]`, and the layer to read in it."""
    stack, layer = weight.stacked(dtype)
    L, rows, I = stack.shape  # noqa: E741
    return stack.reshape(L, num_experts, rows // num_experts, I), layer


def _flat(matrices: Float[Array, "E O I"]) -> Float[Array, "EO I"]:
    return matrices.reshape(-1, matrices.shape[2])


_gated_experts.defvjp(_forward, _backward, symbolic_zeros=True)
