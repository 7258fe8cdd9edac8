"""Cross entropy from hidden states, without ever holding the logits of the whole batch.

The gradient of a loss that is a sum does not depend on what comes after it but for a factor, so it is computed beside
the loss, from the same logits, chunk by chunk of tokens: three matmuls for a head that is trained, two for one that is
not, where recomputing logits in the backward pass would take another. Tokens without a target are left out beforehand.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from jaxpack.constants import IGNORE, Implementation
from jaxpack.errors import InputError
from jaxpack.kernels.logsumexp import logsumexp
from jaxpack.kernels.weight import Weight, as_weight, primal_of

CHUNK = 1024  # tokens whose logits exist at a time: 0.6 GB in float32 for a vocabulary of 152k


def linear_cross_entropy(
    hidden: Float[Array, "*B D"],
    head: Weight | Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    softcap: float | None = None,
    max_targets: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, ""]:
    """Sum over all targets of `logsumexp(head @ hidden) - (head @ hidden)[target]`, float32.

    Matmuls are in the dtype of `hidden` and add up in float32, as the head's gradient does over all tokens; logits are
    float32. A target of -100 contributes nothing: without any other, loss and gradients are exactly 0. All others must
    be in [0, V), which no program can check: one that is not makes the loss NaN, and the gradients that it is part of.

    Args:
      softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
      max_targets: what there are no more targets than, where that is known: nothing is computed for other tokens. More
        make the loss NaN.
      implementation: of the log-sum-exp, see `jaxpack.kernels`; the rest is XLA's.
    """
    head = as_weight(head)
    _check(hidden, head, targets, softcap)
    if max_targets is not None and max_targets < 1:
        raise InputError(f"`max_targets` must be positive, got {max_targets}.")
    return _summed(hidden, head, targets, softcap, max_targets, implementation)


def token_losses(
    hidden: Float[Array, "*B D"],
    head: Weight | Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*B"]:
    """What `linear_cross_entropy` adds up: the loss of each token, 0 without a target. Plain jnp, and the reference."""
    head = as_weight(head)
    _check(hidden, head, targets, softcap)
    head = head.dense(hidden.dtype)
    chunks = _chunks(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))

    @jax.checkpoint
    def losses_of(_: None, chunk: _Chunks) -> tuple[None, Float[Array, " C"]]:
        logits, _ = _logits(chunk.hidden, head, softcap)
        lse = _nan_outside(jax.nn.logsumexp(logits, axis=-1), chunk.targets, len(head))
        return None, _losses(logits, chunk.targets, lse)

    _, losses = jax.lax.scan(losses_of, None, chunks)
    return losses.reshape(-1)[: targets.size].reshape(targets.shape)


def _check(hidden: jax.Array, head: Weight, targets: jax.Array, softcap: float | None) -> None:
    if hidden.shape[:-1] != targets.shape:
        raise InputError(f"`targets` must have shape {list(hidden.shape[:-1])}, got {list(targets.shape)}.")
    if hidden.shape[-1] != head.shape[1]:
        raise InputError(f"`head` must have {hidden.shape[-1]} columns, as `hidden` has channels, got {head.shape[1]}.")
    if softcap is not None and not softcap > 0:
        raise InputError(f"`softcap` must be positive, got {softcap}.")


class _Chunks(NamedTuple):
    """Tokens in chunks of equal size; the last may reach past the end, where there are no targets."""

    hidden: Float[Array, "n C D"]
    targets: Int[Array, "n C"]


def _chunks(hidden: Float[Array, "T D"], targets: Int[Array, " T"]) -> _Chunks:
    length = max(1, len(targets))  # of no tokens, one that is padding
    count, unit = -(-length // CHUNK), min(128, CHUNK, length)  # matmuls like multiples of 128
    size = -(-length // (count * unit)) * unit
    missing = count * size - len(targets)
    return _Chunks(
        jnp.pad(hidden, ((0, missing), (0, 0))).reshape(count, size, -1),
        jnp.pad(targets, (0, missing), constant_values=IGNORE).reshape(count, size),
    )


def _logits(
    hidden: Float[Array, "C D"], head: Float[Array, "V D"], softcap: float | None
) -> tuple[Float[Array, "C V"], Float[Array, "C V"] | None]:
    """Logits, and where they are capped their tanh."""
    logits = jnp.einsum("TD,VD->TV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is None:
        return logits, None
    tanh = jnp.tanh(logits / softcap)
    return softcap * tanh, tanh


def _nan_outside(lse: Float[Array, " C"], targets: Int[Array, " C"], vocab_size: int) -> Float[Array, " C"]:
    """The log-sum-exp, NaN where the target is out of range: loss and gradients, which read it, are then."""
    in_range = (targets == IGNORE) | ((targets >= 0) & (targets < vocab_size))
    return lse * jnp.where(in_range, 1.0, jnp.nan)  # multiplied, as that has a derivative that is NaN, too


def _losses(logits: Float[Array, "C V"], targets: Int[Array, " C"], lse: Float[Array, " C"]) -> Float[Array, " C"]:
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(targets == IGNORE, 0.0, lse - picked)


# The sum, and its gradients beside it.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _summed(hidden, head, targets, softcap, max_targets, implementation):
    settings = softcap, max_targets, implementation
    return _loss_and_gradients(hidden, head, targets, *settings, wanted=(False, False))[0]


def _forward(hidden, head, targets, softcap, max_targets, implementation):
    head, trains_head = primal_of(head)
    arguments = hidden.value, head, targets.value, softcap, max_targets, implementation
    loss, *gradients = _loss_and_gradients(*arguments, wanted=(hidden.perturbed, trains_head))
    return loss, gradients


def _backward(softcap, max_targets, implementation, gradients, d_loss):
    del softcap, max_targets, implementation
    if isinstance(d_loss, SymbolicZero):
        d_loss = jnp.zeros(d_loss.shape, d_loss.dtype)
    return *jax.tree.map(lambda x: (d_loss * x.astype(jnp.float32)).astype(x.dtype), gradients), None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _loss_and_gradients(
    hidden: Float[Array, "*B D"],
    head: Weight,
    targets: Int[Array, "*B"],
    softcap: float | None,
    max_targets: int | None,
    implementation: Implementation | None,
    *,
    wanted: tuple[bool, bool],
) -> tuple[Float[Array, ""], Float[Array, "*B D"] | None, Weight | None]:
    """The loss, and the gradients of hidden states and head, those that are wanted."""
    shape, dtype = hidden.shape, hidden.dtype
    hidden, targets = hidden.reshape(-1, shape[-1]), targets.reshape(-1)
    present = targets != IGNORE
    if leave_out := max_targets is not None and max_targets < len(targets):
        kept = jnp.flatnonzero(present, size=max_targets, fill_value=len(targets))
        hidden = hidden.at[kept].get(mode="fill", fill_value=0)
        targets = targets.at[kept].get(mode="fill", fill_value=IGNORE)
    chunks = _chunks(hidden, targets)
    weights = head.dense(dtype)

    def step(carry, chunk: _Chunks):
        total, d_head = carry
        logits, tanh = _logits(chunk.hidden, weights, softcap)
        lse = _nan_outside(logsumexp(logits, implementation=implementation), chunk.targets, len(weights))
        total = total + jnp.sum(_losses(logits, chunk.targets, lse))
        if not any(wanted):
            return (total, None), None
        is_target = chunk.targets[:, None] == jnp.arange(len(weights), dtype=chunk.targets.dtype)[None, :]
        d_logits = jnp.exp(logits - lse[:, None]) - is_target
        if tanh is not None:
            d_logits = d_logits * (1 - tanh * tanh)
        # In the dtype of the matmuls: a float32 operand would make them tf32, at half the speed.
        d_logits = jnp.where(chunk.targets[:, None] == IGNORE, 0.0, d_logits).astype(dtype)
        d_hidden = None
        if wanted[0]:
            d_hidden = jnp.einsum("TV,VD->TD", d_logits, weights, preferred_element_type=jnp.float32).astype(dtype)
        if wanted[1]:
            d_head = d_head + jnp.einsum("TV,TD->VD", d_logits, chunk.hidden, preferred_element_type=jnp.float32)
        return (total, d_head), d_hidden

    d_head = jnp.zeros(head.shape, jnp.float32) if wanted[1] else None
    (total, d_head), d_hidden = jax.lax.scan(step, (jnp.float32(0), d_head), chunks)
    if leave_out:
        total = jnp.where(jnp.sum(present) > max_targets, jnp.nan, total)
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(-1, shape[-1])[: len(targets)]
        d_hidden = (_put_back(d_hidden, present) if leave_out else d_hidden).reshape(shape)
    return total, d_hidden, None if d_head is None else head.cotangent(lambda: d_head)


def _put_back(kept: Float[Array, "K D"], present: Bool[Array, " T"]) -> Float[Array, "T D"]:
    """Rows to where they were taken from, zeros elsewhere; a gather, since a scatter would be slow."""
    place = jnp.clip(jnp.cumsum(present) - 1, 0, len(kept) - 1)
    return jnp.where(present[:, None], kept[place], 0)
