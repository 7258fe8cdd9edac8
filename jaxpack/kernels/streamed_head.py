"""Computes the loss of tokens with a head that lies in the host's memory, and is fetched one piece at a time.

The pieces cut the vocabulary, and each is fetched once for all tokens, while the piece before is computed with. No
token's log-sum-exp is known before its last piece. So, as in attention that works by blocks, the sums are kept relative
to the largest logit so far (https://arxiv.org/abs/2205.14135). The gradient of a token's loss by its hidden state is
`sum_v p_v W[v] - W[target]`. The sum leaves out the target. Its term `(p - 1) W[target]` is added in float32 at the
end, because a p that is rounded to 16 bits loses digits near 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.constants import IGNORE
from jaxpack.kernels.host_weight import HostMatrix, loop_with
from jaxpack.kernels.logits import Chunks, LossOptions, capped_logits, chunked, nan_outside


class StreamedLoss(NamedTuple):
    """Holds the results for each token.

    Attributes:
      losses: the cross entropy, float32; 0 without a target.
      gradients: the gradient of the loss by the token's hidden state, in its dtype; None unless asked for.
      predictions: the likeliest next token, int32.
    """

    losses: Float[Array, " T"]
    gradients: Float[Array, "T D"] | None
    predictions: Int[Array, " T"]


class _Running(NamedTuple):
    """Holds what is known of each token after some pieces; the tokens are in chunks `[n, C]` within the loop."""

    largest: Float[Array, "*C"]  # the largest logit
    total: Float[Array, "*C"]  # the sum of exp(logit - largest)
    target: Float[Array, "*C"]  # the target's logit
    best: Int[Array, "*C"]  # the token with the largest logit
    # The sum over all rows of the head but the target's: the row times exp(logit - largest), and with a cap times
    # 1 - tanh^2.
    weighted: Float[Array, "*C D"] | None
    target_row: Float[Array, "*C D"] | None
    # With label smoothing, the sum of the logits, and of the rows of the head (with a cap times 1 - tanh^2).
    logits: Float[Array, "*C"] | None
    rows: Float[Array, "*C D"] | None


def streamed_losses(
    hidden: Float[Array, "T D"],
    head: HostMatrix,
    targets: Int[Array, " T"],
    options: LossOptions,
    *,
    wants_gradients: bool,
) -> StreamedLoss:
    """Returns the loss of each token, see `linear_cross_entropy`, and its gradient by the hidden state.

    Args:
      options: the cap of the logits, the number of tokens in a chunk, and what is added to the cross entropy; the rest
        is not read.
      wants_gradients: whether to compute the gradients, for a second matmul with each piece.
    """
    chunks, softcap = chunked(hidden, targets, options.chunk), options.softcap
    size = head.pieces.shape[1]

    def of_piece(number: Int[Array, ""], weights: Float[Array, "S D"], sums: _Running) -> _Running:
        first = number * size
        exists = first + jnp.arange(size) < head.rows
        weights = weights.astype(hidden.dtype)

        def of_chunk(_: None, scanned: tuple[Chunks, _Running]) -> tuple[None, _Running]:
            (hidden, targets), sums = scanned
            logits, tanh = capped_logits(hidden, weights, softcap)
            logits = jnp.where(exists[None, :], logits, -jnp.inf)
            place = targets - first
            is_here = (place >= 0) & (place < size)
            inside = jnp.clip(place, 0, size - 1)
            highest = jnp.max(logits, axis=1)
            largest = jnp.maximum(sums.largest, highest)
            scale, exponents = jnp.exp(sums.largest - largest), jnp.exp(logits - largest[:, None])
            weighted, target_row = sums.weighted, sums.target_row
            if weighted is not None and target_row is not None:
                is_target = place[:, None] == jnp.arange(size, dtype=place.dtype)[None, :]
                others = jnp.where(is_target, 0.0, exponents)
                others = others if tanh is None else others * (1 - tanh * tanh)
                product = jnp.einsum(
                    "TV,VD->TD", others.astype(hidden.dtype), weights, preferred_element_type=jnp.float32
                )
                weighted = scale[:, None] * weighted + product
                target_row = jnp.where(is_here[:, None], weights[inside], target_row)
            best = jnp.where(highest > sums.largest, first + jnp.argmax(logits, axis=1).astype(jnp.int32), sums.best)
            found = jnp.take_along_axis(logits, inside[:, None], axis=1)[:, 0]
            target = jnp.where(is_here, found, sums.target)
            total = scale * sums.total + exponents.sum(axis=1)
            logit_sum, rows = sums.logits, sums.rows
            if logit_sum is not None:
                logit_sum = logit_sum + jnp.where(exists[None, :], logits, 0.0).sum(axis=1)
            if rows is not None:
                slope = jnp.broadcast_to(exists[None, :], logits.shape)
                slope = slope if tanh is None else jnp.where(slope, 1 - tanh * tanh, 0.0)
                product = jnp.einsum(
                    "TV,VD->TD", slope.astype(hidden.dtype), weights, preferred_element_type=jnp.float32
                )
                rows = rows + product
            return None, _Running(largest, total, target, best, weighted, target_row, logit_sum, rows)

        return jax.lax.scan(of_chunk, None, (chunks, sums))[1]

    sums = loop_with(
        HostMatrix.fetch,
        head,
        len(head.pieces),
        of_piece,
        _start(chunks, wants_gradients, smooths=options.label_smoothing > 0),
    )
    sums = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(targets)], sums)  # without the chunks' padding
    return _results(sums, targets, head.rows, options, hidden.dtype)


def _start(chunks: Chunks, wants_gradients: bool, *, smooths: bool) -> _Running:
    shape, of_token = chunks.hidden.shape, chunks.targets.shape
    zeros = jnp.zeros(of_token, jnp.float32)
    both = None, None
    if wants_gradients:
        both = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, chunks.hidden.dtype)
    logits = zeros if smooths else None
    rows = jnp.zeros(shape, jnp.float32) if smooths and wants_gradients else None
    return _Running(jnp.full(of_token, -jnp.inf), zeros, zeros, jnp.zeros(of_token, jnp.int32), *both, logits, rows)


def _results(
    sums: _Running, targets: Int[Array, " T"], vocab_size: int, options: LossOptions, dtype: DTypeLike
) -> StreamedLoss:
    """Returns the results from the sums over all pieces, for each token."""
    lse = nan_outside(sums.largest + jnp.log(sums.total), targets, vocab_size)
    has_target = targets != IGNORE
    target, softcap, e = sums.target, options.softcap, options.label_smoothing
    if sums.logits is not None:
        target = (1 - e) * target + e * sums.logits / vocab_size
    losses, gradients = lse - target, None
    if options.z_loss:
        losses += options.z_loss * lse * lse
    losses = jnp.where(has_target, losses, 0.0)
    if sums.weighted is not None and sums.target_row is not None:
        slope = 1 + 2 * options.z_loss * lse if options.z_loss else None  # of the loss by the log-sum-exp
        factor = jnp.exp(sums.target - lse)
        factor = (factor if slope is None else slope * factor) - (1 - e)
        factor = factor if softcap is None else factor * (1 - (sums.target / softcap) ** 2)
        others = jnp.exp(sums.largest - lse)
        others = (others if slope is None else slope * others)[:, None] * sums.weighted
        whole = others + factor[:, None] * sums.target_row.astype(jnp.float32)
        if sums.rows is not None:
            whole -= e / vocab_size * sums.rows
        gradients = jnp.where(has_target[:, None], whole, 0.0).astype(dtype)
    return StreamedLoss(losses, gradients, sums.best)
