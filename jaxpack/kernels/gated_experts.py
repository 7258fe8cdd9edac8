"""Computes a mixture of gated feed-forward experts, with or without LoRA adapters on them.

A token's output is the sum over its experts of the expert's share times `down(act(gate(x)) * up(x))`. As in
`residual_linear`, only gate and up are kept, and the gated activation is computed again in the backward pass.

Under `jax.checkpoint`, gate and up are mostly not kept, but computed again as well. Then each pass needs one of two
results: the forward pass needs the activation's product, and the recomputation needs gate and up. Each result has an
operation of its own, and in each pass JAX leaves out the operation whose result nobody reads.

The gradient of a share is the product of the output's gradient and the expert's output, which is not kept. Up to the
part of the bias, it equals the product of the activation and its gradient, before this is scaled by the share.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpack.constants import Activation, Implementation
from jaxpack.errors import InputError
from jaxpack.kernels.adapter import padded_rank
from jaxpack.kernels.gated_activation import gated_activation_backward
from jaxpack.kernels.grouped_matmul import grouped_gated, grouped_matmul, grouped_outer
from jaxpack.kernels.routing import Routing, combine, gather_copies, spread
from jaxpack.kernels.weight import Weight, as_weight, instantiate, primal_of


class ExpertLinear(NamedTuple):
    """Holds a projection of all experts, for `gated_experts`.

    Attributes:
      weight: all experts' matrices, stacked along the rows, `[E * O, I]`.
      bias: all experts' biases.
      factors: the adapters' factors A `[E, R, I]` and B `[E, O, R]`; B is already multiplied by the scaling.
    """

    weight: Any  # a `Weight`; `Any`, because JAX also puts other leaves in its place
    bias: Float[Array, "E O"] | None = None
    factors: tuple[Array, Array] | None = None


def gated_experts(
    residual: Float[Array, "N D"],
    x: Float[Array, "N D"],
    shares: Float[Array, "N C"],
    routing: Routing,
    gate_up: ExpertLinear,
    down: ExpertLinear,
    *,
    activation: Activation = "silu",
    keeps_gate_up: bool = True,
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """Returns the residual plus the sum of each token's experts, in the dtype of `x`. Sums over experts are float32.

    Args:
      residual: the residual stream.
      x: the normed tokens.
      shares: the share of each of a token's experts, float32.
      routing: the rows of the experts, see `route`.
      gate_up: the projection to gate and up, O = 2 F: of each expert, gate is above up.
      down: the projection of the gated activation, O = D.
      keeps_gate_up: whether gate and up, which have the name "gate_up", are kept for the backward pass. Set it to False
        if a `jax.checkpoint` around this function computes them again: the forward pass then does not write them. The
        results are the same either way. But a wrong setting computes more: gate and up twice in the forward pass if
        they are kept after all, or the activation in the recomputation if they are not.
      implementation: see `jaxpack.kernels`.

    Raises:
      InputError: the matrices, biases or factors do not fit each other or the experts.
    """
    E, D = routing.num_experts, x.shape[1]
    F = as_weight(gate_up.weight).shape[0] // (2 * E)
    gate_up = _checked("gate_up", gate_up, (E, 2 * F, D), x.dtype)
    down = _checked("down", down, (E, D, F), x.dtype)
    return _gated_experts(residual, x, shares, routing, gate_up, down, activation, keeps_gate_up, implementation)


def _checked(name: str, linear: ExpertLinear, shape: tuple[int, int, int], dtype: jnp.dtype) -> ExpertLinear:
    """Returns the projection with its factors in `dtype`, padded with zeros to a rank that the kernels take."""
    weight, bias = as_weight(linear.weight), linear.bias
    E, O, I = shape  # noqa: E741
    if weight.shape != (E * O, I):
        raise InputError(f"`{name}` must have a matrix of shape {(E * O, I)} for {E} experts, got {weight.shape}.")
    if bias is not None and bias.shape != (E, O):
        raise InputError(f"`{name}` must have biases of shape {(E, O)}, got {bias.shape}.")
    if linear.factors is None:
        return ExpertLinear(weight, bias)
    a, b = linear.factors
    R = a.shape[1]
    if a.shape != (E, R, I) or b.shape != (E, O, R):
        raise InputError(f"`{name}` must have factors of shapes {(E, R, I)} and {(E, O, R)}, got {a.shape}, {b.shape}.")
    missing, none = padded_rank(R) - R, (0, 0)
    a, b = a.astype(dtype), b.astype(dtype)
    factors = jnp.pad(a, (none, (0, missing), none)), jnp.pad(b, (none, none, (0, missing)))
    return ExpertLinear(weight, bias, factors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _gated_experts(residual, x, shares, routing, gate_up, down, activation, keeps_gate_up, implementation):
    keeps_gate_up = False  # without a derivative, nothing reads them
    return _compute(residual, x, shares, routing, gate_up, down, activation, keeps_gate_up, implementation)[0]


def _forward(residual, x, shares, routing, gate_up, down, activation, keeps_gate_up, implementation):
    for linear in (gate_up, down):
        primal_of(linear.weight)  # refuses a frozen weight that is differentiated
    arguments = (residual, x, shares, routing, gate_up, down)
    residual, x, shares, routing, gate_up, down = jax.tree.map(lambda leaf: leaf.value, arguments)
    return _compute(residual, x, shares, routing, gate_up, down, activation, keeps_gate_up, implementation)


def _compute(residual, x, shares, routing, gate_up, down, activation, keeps_gate_up, implementation):
    options = {"routing": routing, "implementation": implementation}
    arguments, gate_up_xa = _arguments(x, gate_up, from_tokens=True, **options)
    product, hidden = grouped_gated(**arguments, activation=activation, with_gate_up=keeps_gate_up)
    if hidden is None:
        hidden = grouped_matmul(**arguments)  # runs in the recomputation alone
    hidden = checkpoint_name(hidden, "gate_up")
    arguments, down_xa = _arguments(product, down, **options)
    out = combine(grouped_matmul(**arguments), routing, shares)
    out = (residual.astype(jnp.float32) + out).astype(residual.dtype)
    return out, (x, shares, routing, gate_up, down, hidden, gate_up_xa, down_xa)


def _backward(activation, keeps_gate_up, implementation, residuals, d):
    x, shares, routing, gate_up, down, hidden, gate_up_xa, down_xa = residuals
    d = instantiate(d)
    back = functools.partial(_project_back, routing=routing, implementation=implementation)
    gradients = functools.partial(_gradients, routing=routing, implementation=implementation)
    row_shares = spread(shares, routing)[:, None]

    # The gradient of the activation, not yet scaled by the rows' shares.
    d_product, d_down_xa = back(d, down, from_tokens=True)
    d_hidden, _, product = gated_activation_backward(
        hidden,
        None,
        _scaled(d_product, row_shares),
        activation=activation,
        with_product=True,
        in_place=True,
        implementation=implementation,
    )
    assert product is not None
    row_products = jnp.sum(d_product.astype(jnp.float32) * product.astype(jnp.float32), axis=1)
    d_shares = gather_copies(row_products + _bias_products(d, down, routing), routing)
    # A row's gradient is its token's gradient times its share. The share multiplies the other factor of each outer
    # product, so that the tokens' gradients are read in place.
    d_down = gradients(
        d,
        product,
        down,
        _scaled(down_xa, row_shares),
        _scaled(d_down_xa, row_shares),
        d_from_tokens=True,
        row_shares=row_shares,
    )
    d_rows, d_gate_up_xa = back(d_hidden, gate_up)
    d_gate_up = gradients(d_hidden, x, gate_up, gate_up_xa, d_gate_up_xa, x_from_tokens=True)
    d_x = combine(d_rows, routing).astype(x.dtype)
    return d, d_x, d_shares.astype(shares.dtype), None, d_gate_up, d_down


def _arguments(x, linear: ExpertLinear, *, from_tokens=False, **options) -> tuple[dict[str, Any], jax.Array]:
    """Returns the arguments that `grouped_matmul` takes for a projection of the rows, and the rows' product with A.

    This product has no channels without an adapter.
    """
    options["from_tokens"] = from_tokens
    xa, more = jnp.zeros((options["routing"].copies.shape[0], 0), x.dtype), None
    if linear.factors is not None:
        a, b = linear.factors
        xa = checkpoint_name(grouped_matmul(x, a[None], **options), "lora")
        more = xa, b
    (x,), weight = linear.weight.after(x)
    matrices, layer = _stack(weight, x.dtype, options["routing"].num_experts)
    return {"x": x, "matrices": matrices, "layer": layer, "bias": linear.bias, "more": more, **options}, xa


def _project_back(d, linear: ExpertLinear, *, routing, implementation, from_tokens=False):
    """Returns the gradient of a projection's rows, and that of their product with A."""
    run = functools.partial(grouped_matmul, routing=routing, implementation=implementation, transposed=True)
    d_xa, more = jnp.zeros((routing.copies.shape[0], 0), d.dtype), None
    if linear.factors is not None:
        a, b = linear.factors
        d_xa = run(d, b[None], from_tokens=from_tokens)
        more = d_xa, a
    (d,), weight = linear.weight.after(d)
    matrices, layer = _stack(weight, d.dtype, routing.num_experts)
    return run(d, matrices, layer=layer, from_tokens=from_tokens, more=more), d_xa


def _gradients(
    d,
    x,
    linear: ExpertLinear,
    xa,
    d_xa,
    *,
    routing,
    implementation,
    d_from_tokens=False,
    x_from_tokens=False,
    row_shares=None,
) -> ExpertLinear:
    """Returns the gradients of a projection: of its matrix and biases if they are trained, and of its factors.

    Args:
      d, x: the gradient of the output, and the input; `xa` and `d_xa` belong to the product with the A factors.
      row_shares: the shares by which `x` is still to be multiplied; `xa` and `d_xa` are multiplied already.
    """
    outer = functools.partial(grouped_outer, routing=routing, implementation=implementation)
    of_rows = functools.partial(outer, d_from_tokens=d_from_tokens)

    def of_matrix() -> jax.Array:
        matrices = of_rows(d, _scaled(x, row_shares), x_from_tokens=x_from_tokens)
        return matrices.reshape(-1, matrices.shape[2])

    d_bias = None
    if linear.bias is not None:  # XLA leaves it out where biases are frozen
        ones = _scaled(jnp.ones((routing.copies.shape[0], 16), d.dtype), row_shares)
        d_bias = of_rows(d, ones)[:, :, 0].astype(linear.bias.dtype)
    if linear.factors is None:
        return ExpertLinear(linear.weight.cotangent(of_matrix), d_bias)
    d_a, d_b = outer(d_xa, x, x_from_tokens=x_from_tokens), of_rows(d, xa)
    return ExpertLinear(linear.weight.cotangent(of_matrix), d_bias, (d_a.astype(d.dtype), d_b.astype(d.dtype)))


def _scaled(rows: jax.Array, shares: jax.Array | None) -> jax.Array:
    """Returns the rows times their shares, multiplied in float32; without shares, the rows."""
    return rows if shares is None else (rows.astype(jnp.float32) * shares).astype(rows.dtype)


def _bias_products(d, linear: ExpertLinear, routing: Routing) -> jax.Array | float:
    """Returns the product of each row's output gradient, that of its token, with its expert's bias."""
    if linear.bias is None:
        return 0.0
    products = jnp.einsum("ND,ED->NE", d, linear.bias.astype(d.dtype), preferred_element_type=jnp.float32)
    expert = jnp.repeat(routing.experts, routing.copies.shape[0] // routing.experts.shape[0])
    is_expert = expert[:, None] == jnp.arange(routing.num_experts, dtype=jnp.int32)[None, :]
    return jnp.sum(jnp.where(is_expert, products[jnp.maximum(routing.tokens, 0)], 0), axis=1)


def _stack(weight: Weight, dtype: jnp.dtype, num_experts: int) -> tuple[jax.Array, jax.Array | int]:
    """Returns a stack of all experts' matrices, `[L, E, O, I]`, and the layer to read in it."""
    stack, layer = weight.stacked(dtype)
    L, rows, I = stack.shape  # noqa: E741
    return stack.reshape(L, num_experts, rows // num_experts, I), layer


_gated_experts.defvjp(_forward, _backward, symbolic_zeros=True)
