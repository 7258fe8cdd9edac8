"""Logits of one chunk of tokens at a time, shared by the summed loss and the log-probabilities of tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpack.constants import IGNORE, Implementation
from jaxpack.errors import InputError
from jaxpack.kernels.weight import Weight

CHUNK = 1024  # tokens whose logits exist at a time: 0.6 GB in float32 for a vocabulary of 152k


class LossOptions(NamedTuple):
    """Holds the settings of a loss that its derivative needs, too; see `linear_cross_entropy`."""

    softcap: float | None = None
    max_targets: int | None = None
    chunk: int = CHUNK
    implementation: Implementation | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def check(hidden: jax.Array, head: Weight, targets: jax.Array, options: LossOptions) -> None:
    """Raises an InputError for arguments of a loss that do not fit each other or are out of range."""
    if hidden.shape[:-1] != targets.shape:
        raise InputError(f"`targets` must have shape {list(hidden.shape[:-1])}, got {list(targets.shape)}.")
    if hidden.shape[-1] != head.shape[1]:
        raise InputError(f"`head` must have {hidden.shape[-1]} columns, as `hidden` has channels, got {head.shape[1]}.")
    for name in ("softcap", "max_targets", "chunk"):
        if (value := getattr(options, name)) is not None and not value > 0:
            raise InputError(f"`{name}` must be positive, got {value}.")
    if not 0 <= options.label_smoothing < 1:
        raise InputError(f"`label_smoothing` must be in [0, 1), got {options.label_smoothing}.")
    if not options.z_loss >= 0:
        raise InputError(f"`z_loss` must be 0 or a positive number, got {options.z_loss}.")


def select(
    values: Float[Array, "*B D"], targets: Int[Array, "*B"], max_targets: int | None
) -> tuple[Float[Array, "K D"], Int[Array, " K"], Bool[Array, " T"] | None]:
    """Returns the tokens that have a target, with their targets, so that nothing is computed for other tokens.

    Args:
      max_targets: how many tokens to return. None, or at least as many as there are tokens, returns all tokens.

    Returns:
      The values and targets of the tokens, and which of all tokens have a target: None if all tokens are returned.
    """
    values, targets = values.reshape(-1, values.shape[-1]), targets.reshape(-1)
    if max_targets is None or max_targets >= len(targets):
        return values, targets, None
    present = targets != IGNORE
    places = jnp.flatnonzero(present, size=max_targets, fill_value=len(targets))
    values = values.at[places].get(mode="fill", fill_value=0)
    return values, targets.at[places].get(mode="fill", fill_value=IGNORE), present


def put_back(rows: Float[Array, "K D"], present: Bool[Array, " T"] | None) -> Float[Array, "T D"]:
    """Puts the rows of `select` back at the tokens that they were taken from, with zeros elsewhere."""
    if present is None:
        return rows
    place = jnp.clip(jnp.cumsum(present) - 1, 0, len(rows) - 1)
    return jnp.where(present[:, None], rows[place], 0)  # a gather: a scatter would be slow


def nan_if_too_many(
    out: Float[Array, "*S"], present: Bool[Array, " T"] | None, max_targets: int | None
) -> Float[Array, "*S"]:
    """Returns `out`, or NaN if more tokens have a target than `max_targets`, so that `select` left some out."""
    if present is None or max_targets is None:
        return out
    return jnp.where(jnp.sum(present) > max_targets, jnp.nan, out)


class Chunks(NamedTuple):
    """Holds tokens in chunks of equal size; the last chunk may end with padding, which has no targets."""

    hidden: Float[Array, "n C D"]
    targets: Int[Array, "n C"]


def chunked(hidden: Float[Array, "T D"], targets: Int[Array, " T"], most: int) -> Chunks:
    """Cuts tokens into chunks of at most `most` tokens."""
    length = max(1, len(targets))  # for no tokens, one token of padding
    count, unit = -(-length // most), min(128, most, length)  # multiples of 128 are fast in matmuls
    size = -(-length // (count * unit)) * unit
    missing = count * size - len(targets)
    return Chunks(
        jnp.pad(hidden, ((0, missing), (0, 0))).reshape(count, size, -1),
        jnp.pad(targets, (0, missing), constant_values=IGNORE).reshape(count, size),
    )


def capped_logits(
    hidden: Float[Array, "C D"], head: Float[Array, "V D"], softcap: float | None
) -> tuple[Float[Array, "C V"], Float[Array, "C V"] | None]:
    """Returns float32 logits, and the tanh in them if they are capped (None otherwise)."""
    logits = jnp.einsum("TD,VD->TV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is None:
        return logits, None
    tanh = jnp.tanh(logits / softcap)
    return softcap * tanh, tanh


def nan_outside(lse: Float[Array, " C"], targets: Int[Array, " C"], vocab_size: int) -> Float[Array, " C"]:
    """Returns the log-sum-exp, but NaN where a target is out of range.

    Loss and gradients read the log-sum-exp, so they become NaN, too.
    """
    in_range = (targets == IGNORE) | ((targets >= 0) & (targets < vocab_size))
    return lse * jnp.where(in_range, 1.0, jnp.nan)  # a product, so that its derivative is NaN, too


def pick(logits: Float[Array, "C V"], targets: Int[Array, " C"]) -> Float[Array, " C"]:
    """Returns the logit of each target; the value for a token without a target has no meaning."""
    return jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]


def losses_of(
    logits: Float[Array, "C V"],
    targets: Int[Array, " C"],
    lse: Float[Array, " C"],
    options: LossOptions = LossOptions(),  # noqa: B008
) -> Float[Array, " C"]:
    """Returns the cross entropy of each token, and 0 where there is no target.

    With `label_smoothing` e it is `lse - (1 - e) * logit[target] - e * mean(logits)`; `z_loss` adds `z_loss * lse**2`.
    """
    has_none, e = targets == IGNORE, options.label_smoothing
    target = pick(logits, targets)
    if e:
        target = (1 - e) * target + e * jnp.mean(logits, axis=-1)
    losses = lse - target
    if options.z_loss:
        losses += options.z_loss * lse * lse
    return jnp.where(has_none, 0.0, losses)


def logit_gradients(
    logits: Float[Array, "C V"],
    tanh: Float[Array, "C V"] | None,
    lse: Float[Array, " C"],
    targets: Int[Array, " C"],
    options: LossOptions = LossOptions(),  # noqa: B008
) -> Float[Array, "C V"]:
    """Returns the float32 gradient of each token's loss (`losses_of`) by its logits before the cap."""
    is_target, e = (
        targets[:, None] == jnp.arange(logits.shape[1], dtype=targets.dtype)[None, :],
        options.label_smoothing,
    )
    probabilities = jnp.exp(logits - lse[:, None])
    if options.z_loss:
        probabilities *= 1 + 2 * options.z_loss * lse[:, None]
    d_logits = probabilities - ((1 - e) * is_target + e / logits.shape[1] if e else is_target)
    if tanh is not None:
        d_logits = d_logits * (1 - tanh * tanh)
    return jnp.where(targets[:, None] == IGNORE, 0.0, d_logits)
