"""Runs the model over prompts, then token by token, with the keys and values of earlier tokens in a cache.

The blocks are the same as in training, with unmerged adapters. Everything but the attention of prompts is plain jnp.
Adapters are multiplied separately from their base weights: with one token a row, most of the time is spent reading
weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxpack.kernels.attention import SegmentBounds, segment_bounds
from jaxpack.model.block import Block
from jaxpack.model.cache import Cache, CacheSlot
from jaxpack.model.context import PerLayer, RowContext
from jaxpack.model.linear import spread_adapters
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import reads_by_number, weights_at


def prefill(
    model: Transformer, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], *, size: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads the first `lengths` tokens of each row.

    Returns:
      The float32 logits of each row's next token, and a cache that has room for `size` tokens a row.
    """
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    segments = segment_bounds((positions < lengths[:, None]).astype(jnp.int32))

    def bounds_within(window: int | None) -> SegmentBounds:
        return segments if window is None else segments.within(window)

    bounds = PerLayer.of(model.config.windows, bounds_within)
    own_lengths = jnp.broadcast_to(lengths[:, None], (B, T))
    cache = Cache.empty(model.config, model.dtype, B, size)
    hidden, cache = _forward(model, tokens, positions, own_lengths, cache, bounds=bounds)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return model.unembed(last)[:, 0], cache


def decode_step(
    model: Transformer, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one more token of each row, at `positions`; the tokens before it are in the cache.

    Returns:
      The float32 logits of each row's next token, and the cache with the tokens that were read.
    """
    tokens, positions = tokens[:, None], positions[:, None]
    key = jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None, :]

    def seen_within(window: int | None) -> Bool[Array, "B S"]:
        seen = key <= positions
        return seen if window is None else seen & (key > positions - window)

    seen = PerLayer.of(model.config.windows, seen_within)
    hidden, cache = _forward(model, tokens, positions, positions + 1, cache, seen=seen)
    return model.unembed(hidden)[:, 0], cache


def _forward(
    model: Transformer,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"],
    cache: Cache,
    *,
    bounds: PerLayer | None = None,
    seen: PerLayer | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Returns the hidden states after the last norm, and the cache with the tokens' keys and values written.

    Tokens attend to each other within `bounds`, or to the cached tokens that `seen` marks. `lengths` are the lengths of
    the tokens' documents, see `model.rope`.
    """
    angles = model.angles(positions, lengths, longest=cache.k.shape[2])
    patterns = seen if bounds is None else bounds
    assert patterns is not None
    max_segments = None if any(model.config.windows) else 1  # see `SegmentBounds.within`
    blocks = spread_adapters(model.blocks, model.config.num_layers)
    graph, stacks, layers = nnx.split(blocks, reads_by_number, ...)

    def layer(carried: tuple[jax.Array, Cache], scanned: Any) -> tuple[tuple[jax.Array, Cache], None]:
        x, cache = carried
        parameters, number, pattern, angle = scanned
        block: Block = nnx.merge(graph, weights_at(stacks, number), parameters)
        here = patterns.at(pattern)
        within, visible = (None, here) if bounds is None else (here, None)
        context = RowContext(within, angles.at(angle), max_segments, "xla", apart=True)
        x, _, slot = block(x, context, None, CacheSlot(cache, number, positions, visible))
        assert slot is not None
        return (x, slot.cache), None

    numbers = jnp.arange(model.config.num_layers, dtype=jnp.int32)
    scanned = layers, numbers, patterns.index, angles.index
    (x, cache), _ = jax.lax.scan(layer, (model.embed(tokens), cache), scanned)
    return model.norm(x), cache
