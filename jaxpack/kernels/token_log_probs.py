"""Computes the log-probability of each token's target, without ever holding the logits of the whole batch.

The gradient of a token's hidden state is `d (W[target] - sum_v p_v W[v])`. Only the number `d`, the gradient of the
token's log-probability, is unknown before the backward pass. So the forward pass computes the vector in brackets from
the same logits as the log-probability, with as many matmuls as `linear_cross_entropy`. The gradient of a trained head
sums over tokens, each with its own `d`, so the backward pass computes the logits again for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpack.constants import IGNORE, Implementation
from jaxpack.kernels.host_weight import HostMatrix
from jaxpack.kernels.logits import (
    CHUNK,
    Chunks,
    LossOptions,
    capped_logits,
    check,
    chunked,
    logit_gradients,
    losses_of,
    nan_if_too_many,
    nan_outside,
    pick,
    put_back,
    select,
)
from jaxpack.kernels.logsumexp import logsumexp
from jaxpack.kernels.streamed_head import streamed_losses
from jaxpack.kernels.weight import Weight, as_weight, instantiate, primal_of


def token_log_probs(
    hidden: Float[Array, "*B D"],
    head: Weight | Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    softcap: float | None = None,
    max_targets: int | None = None,
    chunk: int = CHUNK,
    implementation: Implementation | None = None,
) -> Float[Array, "*B"]:
    """Returns `log_softmax(head @ hidden)[target]` for each token, float32.

    A token without a target (-100) gets 0, with a gradient of 0. Matmuls and the gradients of logits are in the dtype
    of `hidden`; logits are float32. A target that is neither -100 nor in [0, V) makes its log-probability NaN.

    Args:
      softcap, max_targets, chunk, implementation: see `linear_cross_entropy`. With more than `max_targets` targets, all
        log-probabilities are NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, head = jnp.zeros((3, 8)), jnp.zeros((4, 8))
      >>> token_log_probs(hidden, head, jnp.array([1, -100, 3])).round(2).tolist()
      [-1.3899999856948853, 0.0, -1.3899999856948853]
    """
    head = as_weight(head)
    options = LossOptions(softcap, max_targets, chunk, implementation)
    check(hidden, head, targets, options)
    return _log_probs(hidden, head, targets, options)


def token_log_probs_reference(
    hidden: Float[Array, "*B D"],
    head: Weight | Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*B"]:
    """Computes `token_log_probs` in plain jnp, which holds all logits at once."""
    logits, _ = capped_logits(hidden.reshape(-1, hidden.shape[-1]), as_weight(head).dense(hidden.dtype), softcap)
    found = pick(jax.nn.log_softmax(logits, axis=-1), targets.reshape(-1)).reshape(targets.shape)
    return jnp.where(targets == IGNORE, 0.0, found)


class TokenScores(NamedTuple):
    """Holds the scores of each token for evaluation: its loss (0 without a target) and the likeliest next token."""

    losses: Float[Array, "*B"]
    predictions: Int[Array, "*B"]


def token_scores(
    hidden: Float[Array, "*B D"],
    head: Weight | Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    softcap: float | None = None,
    chunk: int = CHUNK,
    implementation: Implementation | None = None,
) -> TokenScores:
    """Returns the loss of each token, float32, and the likeliest next token, int32. It has no derivative."""
    head = as_weight(head)
    options = LossOptions(softcap, chunk=chunk)
    check(hidden, head, targets, options)
    if isinstance(head, HostMatrix):
        flat = hidden.reshape(-1, hidden.shape[-1])
        streamed = streamed_losses(flat, head, targets.reshape(-1), options, wants_gradients=False)
        return TokenScores(streamed.losses.reshape(targets.shape), streamed.predictions.reshape(targets.shape))
    weights = head.dense(hidden.dtype)
    chunks = chunked(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), chunk)

    def step(_: None, chunk: Chunks) -> tuple[None, TokenScores]:
        logits = capped_logits(chunk.hidden, weights, softcap)[0]
        lse = nan_outside(logsumexp(logits, implementation=implementation), chunk.targets, len(weights))
        losses = losses_of(logits, chunk.targets, lse)
        return None, TokenScores(losses, jnp.argmax(logits, axis=-1).astype(jnp.int32))

    _, scores = jax.lax.scan(step, None, chunks)
    return jax.tree.map(lambda x: x.reshape(-1)[: targets.size].reshape(targets.shape), scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probs(hidden, head, targets, options):
    return _with_direction(hidden, head, targets, options, wanted=False)[0]


def _forward(hidden, head, targets, options):
    head, trains_head = primal_of(head)
    hidden_is_perturbed, hidden, targets = hidden.perturbed, hidden.value, targets.value
    out, direction = _with_direction(hidden, head, targets, options, wanted=hidden_is_perturbed)
    return out, (direction, targets, (hidden, head) if trains_head else None)


def _with_direction(hidden, head, targets, options, *, wanted: bool):
    """Returns the log-probabilities of all tokens and, if `wanted`, their derivatives by the hidden states.

    The derivatives may be in chunks, and cover the selected tokens only; they are None if not wanted.
    """
    flat, labels, selection = select(hidden, targets, options.max_targets)
    if isinstance(head, HostMatrix):
        streamed = streamed_losses(flat, head, labels, options, wants_gradients=wanted)
        direction = None if streamed.gradients is None else -streamed.gradients
        return _for_all_tokens(0.0 - streamed.losses, selection, targets, options), direction
    weights = head.dense(hidden.dtype)

    def step(_: None, chunk: Chunks):
        logits, tanh = capped_logits(chunk.hidden, weights, options.softcap)
        lse = nan_outside(logsumexp(logits, implementation=options.implementation), chunk.targets, len(weights))
        out = 0.0 - losses_of(logits, chunk.targets, lse)  # 0, and not -0, without a target
        if not wanted:
            return None, (out, None)
        d_logits = -logit_gradients(logits, tanh, lse, chunk.targets).astype(hidden.dtype)
        direction = jnp.einsum("TV,VD->TD", d_logits, weights, preferred_element_type=jnp.float32)
        return None, (out, direction.astype(hidden.dtype))

    _, (out, direction) = jax.lax.scan(step, None, chunked(flat, labels, options.chunk))
    return _for_all_tokens(out.reshape(-1)[: len(labels)], selection, targets, options), direction


def _for_all_tokens(out, selection, targets, options) -> Float[Array, "*B"]:
    """Puts the log-probabilities of the selected tokens back at their places; all are NaN if there are too many."""
    out = put_back(out[:, None], selection)[:, 0].reshape(targets.shape)
    return nan_if_too_many(out, selection, options.max_targets)


def _backward(options, residuals, d_out):
    direction, targets, of_head = residuals
    d_out = instantiate(d_out)
    d_hidden = d_head = None
    if direction is not None:
        channels = direction.shape[-1]
        d_selected, labels, selection = select(d_out[..., None], targets, options.max_targets)
        scaled = d_selected * direction.reshape(-1, channels)[: len(labels)].astype(jnp.float32)
        d_hidden = put_back(scaled.astype(direction.dtype), selection).reshape(*targets.shape, channels)
    if of_head is not None:
        hidden, head = of_head
        d_head = head.cotangent(lambda: _head_gradient(hidden, head, targets, d_out, options))
    return d_hidden, d_head, None


def _head_gradient(hidden, head, targets, d_out, options) -> Float[Array, "V D"]:
    weights, trained = head.dense(hidden.dtype), head.trained_inputs
    flat, labels, _ = select(hidden, targets, options.max_targets)
    d_selected, _, _ = select(d_out[..., None], targets, options.max_targets)
    chunks = chunked(flat, labels, options.chunk)
    d_chunks = chunked(d_selected, labels, options.chunk).hidden[..., 0]

    def step(total, chunk):
        (hidden, targets), d = chunk
        logits, tanh = capped_logits(hidden, weights, options.softcap)
        lse = nan_outside(logsumexp(logits, implementation=options.implementation), targets, len(weights))
        d_logits = (-d[:, None] * logit_gradients(logits, tanh, lse, targets)).astype(hidden.dtype)
        return total + jnp.einsum("TV,TD->VD", d_logits, trained(hidden), preferred_element_type=jnp.float32), None

    total = jnp.zeros((len(weights), trained(flat).shape[-1]), jnp.float32)
    return jax.lax.scan(step, total, (chunks, d_chunks))[0]


_log_probs.defvjp(_forward, _backward, symbolic_zeros=True)
