"""Computes the cross entropy from hidden states, without ever holding the logits of the whole batch.

Whatever is computed from the summed loss, the gradients of the hidden states and of the head only change by a factor.
So the forward pass computes these gradients beside the loss, from the same logits, one chunk of tokens at a time. It
takes three matmuls for a trained head and two for a frozen one; recomputing logits in the backward pass would take
another.
With `max_targets`, tokens without a target are left out beforehand.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpack.constants import Implementation
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
    put_back,
    select,
)
from jaxpack.kernels.logsumexp import logsumexp
from jaxpack.kernels.streamed_head import streamed_losses
from jaxpack.kernels.weight import Weight, as_weight, instantiate, primal_of


def linear_cross_entropy(
    hidden: Float[Array, "*B D"],
    head: Weight | Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    softcap: float | None = None,
    max_targets: int | None = None,
    chunk: int = CHUNK,
    implementation: Implementation | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Returns the sum over all targets of `logsumexp(head @ hidden) - (head @ hidden)[target]`, float32.

    Matmuls are in the dtype of `hidden` and accumulate in float32, and so does the head's gradient over all tokens.
    Logits are float32. A target of -100 contributes nothing; if all targets are -100, loss and gradients are exactly 0.
    Other targets must be in [0, V). A compiled program cannot raise an error for a target that is not. Such a target
    makes the loss NaN, and every gradient that it contributes to.

    Args:
      softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
      max_targets: an upper bound on the number of targets, if known. Only that many tokens are then computed. More
        targets make the loss NaN.
      chunk: the number of tokens whose logits exist at a time. Fewer tokens take less memory, and more time.
      implementation: how to compute the log-sum-exp, see `jaxpack.kernels`; the rest is always XLA, and so is all of
        the loss if the head lies in host memory.
      label_smoothing: the share of the target's probability that all tokens of the vocabulary get instead.
      z_loss: the coefficient of `logsumexp(logits)**2`, which is added to the loss of each target.
    """
    head = as_weight(head)
    options = LossOptions(softcap, max_targets, chunk, implementation, label_smoothing, z_loss)
    check(hidden, head, targets, options)
    return _summed(hidden, head, targets, options)


def token_losses(
    hidden: Float[Array, "*B D"],
    head: Weight | Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    softcap: float | None = None,
    chunk: int = CHUNK,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, "*B"]:
    """Returns the loss of each token, 0 without a target: the terms that `linear_cross_entropy` adds up.

    It is plain jnp, and the reference for `linear_cross_entropy`.
    """
    head = as_weight(head)
    options = LossOptions(softcap, chunk=chunk, label_smoothing=label_smoothing, z_loss=z_loss)
    check(hidden, head, targets, options)
    head = head.dense(hidden.dtype)
    chunks = chunked(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), chunk)

    @jax.checkpoint
    def of_chunk(_: None, chunk: Chunks) -> tuple[None, Float[Array, " C"]]:
        logits = capped_logits(chunk.hidden, head, softcap)[0]
        lse = nan_outside(jax.nn.logsumexp(logits, axis=-1), chunk.targets, len(head))
        return None, losses_of(logits, chunk.targets, lse, options)

    _, losses = jax.lax.scan(of_chunk, None, chunks)
    return losses.reshape(-1)[: targets.size].reshape(targets.shape)


# The sum of the losses, with its gradients computed beside it.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed(hidden, head, targets, options):
    return _loss_and_gradients(hidden, head, targets, options, wanted=(False, False))[0]


def _forward(hidden, head, targets, options):
    head, trains_head = primal_of(head)
    arguments = hidden.value, head, targets.value, options
    loss, *gradients = _loss_and_gradients(*arguments, wanted=(hidden.perturbed, trains_head))
    return loss, gradients


def _backward(options, gradients, d_loss):
    del options
    d_loss = instantiate(d_loss)
    return *jax.tree.map(lambda x: (d_loss * x.astype(jnp.float32)).astype(x.dtype), gradients), None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _loss_and_gradients(
    hidden: Float[Array, "*B D"],
    head: Weight,
    targets: Int[Array, "*B"],
    options: LossOptions,
    *,
    wanted: tuple[bool, bool],
) -> tuple[Float[Array, ""], Float[Array, "*B D"] | None, Weight | None]:
    """Returns the loss and the gradients of hidden states and head; a gradient that is not `wanted` is None."""
    shape, dtype = hidden.shape, hidden.dtype
    hidden, targets, selection = select(hidden, targets, options.max_targets)
    if isinstance(head, HostMatrix):
        assert not wanted[1], "a head in host memory is frozen"
        streamed = streamed_losses(hidden, head, targets, options, wants_gradients=wanted[0])
        d_hidden = streamed.gradients
        if d_hidden is not None:
            d_hidden = put_back(d_hidden, selection).reshape(shape)
        return nan_if_too_many(jnp.sum(streamed.losses), selection, options.max_targets), d_hidden, None
    chunks = chunked(hidden, targets, options.chunk)
    weights, trained = head.dense(dtype), head.trained_inputs

    def step(carry, chunk: Chunks):
        total, d_head = carry
        logits, tanh = capped_logits(chunk.hidden, weights, options.softcap)
        lse = nan_outside(logsumexp(logits, implementation=options.implementation), chunk.targets, len(weights))
        total = total + jnp.sum(losses_of(logits, chunk.targets, lse, options))
        if not any(wanted):
            return (total, None), None
        # Cast to the dtype of the matmuls: a float32 operand would make them tf32, at half the speed.
        d_logits = logit_gradients(logits, tanh, lse, chunk.targets, options).astype(dtype)
        d_hidden = None
        if wanted[0]:
            d_hidden = jnp.einsum("TV,VD->TD", d_logits, weights, preferred_element_type=jnp.float32).astype(dtype)
        if wanted[1]:
            d_head = d_head + jnp.einsum(
                "TV,TD->VD", d_logits, trained(chunk.hidden), preferred_element_type=jnp.float32
            )
        return (total, d_head), d_hidden

    d_head = jnp.zeros((len(weights), trained(hidden).shape[-1]), jnp.float32) if wanted[1] else None
    (total, d_head), d_hidden = jax.lax.scan(step, (jnp.float32(0), d_head), chunks)
    total = nan_if_too_many(total, selection, options.max_targets)
    if d_hidden is not None:
        d_hidden = put_back(d_hidden.reshape(-1, shape[-1])[: len(targets)], selection).reshape(shape)
    return total, d_hidden, None if d_head is None else head.cotangent(lambda: d_head)
