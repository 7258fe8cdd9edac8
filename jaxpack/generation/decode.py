"""The model over prompts, and from there token by token, with the keys and values of all tokens before in a cache.

It reads the modules of a model as they are, adapters unmerged, and computes what `Transformer` does. All but the
attention of prompts is plain jnp: with one token a row, the time goes into reading the weights.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxpack.kernels.attention import SegmentBounds, attention, segment_bounds
from jaxpack.kernels.gated_activation import gated_activation
from jaxpack.kernels.rope import Angles, apply_rope, norm_rope
from jaxpack.model.attention import Attention
from jaxpack.model.block import Block
from jaxpack.model.config import ModelConfig
from jaxpack.model.context import PerLayer
from jaxpack.model.norm import RMSNorm
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import reads_by_number, weights_at


class Cache(NamedTuple):
    """Rotated keys, and values, of all layers and of so many tokens a row, each at its position."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]

    @classmethod
    def empty(cls, model: Transformer, num_rows: int, size: int) -> "Cache":
        shape = cls._shape(model, num_rows, size)
        return cls(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))

    @classmethod
    def bytes_of(cls, model: Transformer, num_rows: int, size: int) -> int:
        """Bytes of an empty one."""
        return 2 * math.prod(cls._shape(model, num_rows, size)) * model.dtype.itemsize

    @staticmethod
    def _shape(model: Transformer, num_rows: int, size: int) -> tuple[int, ...]:
        config = model.config
        return config.num_layers, num_rows, size, config.num_kv_heads, config.head_dim

    def put(
        self,
        layer: Int[Array, ""],
        positions: Int[Array, "B T"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
    ) -> "Cache":
        """With those of tokens at `positions`: in place, where the cache is what a loop carries."""
        here = layer, jnp.arange(len(k))[:, None], positions
        return Cache(self.k.at[here].set(k), self.v.at[here].set(v))


def prefill(
    model: Transformer, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], *, size: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads the first `lengths` tokens of each row.

    Returns:
      The logits of what follows, float32, and a cache that has room for `size` tokens a row.
    """
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    segments = segment_bounds((positions < lengths[:, None]).astype(jnp.int32))
    windows = model.config.windows
    bounds = PerLayer.of(windows, lambda window: segments if window is None else segments.within(window))

    def mix(q, k, v, cache: Cache, layer: Int[Array, ""], bounds: SegmentBounds):
        return attention(
            q,
            k,
            v,
            bounds,
            scale=model.config.attention_scale,
            softcap=model.config.attn_logit_softcapping,
            max_segments=None if any(windows) else 1,  # see `SegmentBounds.within`
        )

    own_lengths = jnp.broadcast_to(lengths[:, None], (B, T))
    hidden, cache = _forward(model, tokens, positions, own_lengths, Cache.empty(model, B, size), bounds, mix)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return model.unembed(last)[:, 0], cache


def extend(
    model: Transformer, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one more token of each row, at `positions`; those before are in the cache.

    Returns:
      The logits of what follows, float32, and the cache with these tokens.
    """
    tokens, positions = tokens[:, None], positions[:, None]
    key = jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None, :]

    def seen_within(window: int | None) -> Bool[Array, "B S"]:
        seen = key <= positions
        return seen if window is None else seen & (key > positions - window)

    def mix(q, k, v, cache: Cache, layer: Int[Array, ""], seen: Bool[Array, "B S"]):
        k, v = (jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in cache)
        return _attend(q, k, v, seen, model.config)

    seen = PerLayer.of(model.config.windows, seen_within)
    hidden, cache = _forward(model, tokens, positions, positions + 1, cache, seen, mix)
    return model.unembed(hidden)[:, 0], cache


def _forward(
    model: Transformer,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"],
    cache: Cache,
    patterns: PerLayer,
    mix: Callable[..., Float[Array, "B T N H"]],
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states after the last norm, and the cache with the tokens' keys and values.

    `mix(q, k, v, cache, layer, pattern)` is attention; `lengths` are those of the tokens' documents, see `rotary`.
    """
    angles = model.angles(positions, lengths, longest=cache.k.shape[2])
    graph, stacks, layers = nnx.split(model.blocks, reads_by_number, ...)

    def layer(carried: tuple[jax.Array, Cache], scanned: Any):
        x, cache = carried
        parameters, number, pattern, angle = scanned
        block: Block = nnx.merge(graph, weights_at(stacks, number), parameters)
        q, k, v = _heads(block.attention, block.attention_norm(x), angles.at(angle))
        cache = cache.put(number, positions, k, v)
        mixed = mix(q, k, v, cache, number, patterns.at(pattern))
        out = block.attention.out(mixed.reshape(*x.shape[:2], -1))
        x = x + _normed(block.attention.post_norm, out)
        feed_forward = block.feed_forward
        gate_up = feed_forward.gate_up(block.feed_forward_norm(x))
        out = feed_forward.down(gated_activation(gate_up, activation=feed_forward.activation, implementation="xla"))
        return (x + _normed(feed_forward.post_norm, out), cache), None

    numbers = jnp.arange(model.config.num_layers, dtype=jnp.int32)
    scanned = layers, numbers, patterns.index, angles.index
    (x, cache), _ = jax.lax.scan(layer, (model.embed(tokens), cache), scanned)
    return model.norm(x), cache


def _heads(
    attention: Attention, x: Float[Array, "B T D"], angles: Angles
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Normed, where the model has it so, and rotated queries and keys; and values."""
    config = attention.config
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    heads = attention.qkv(x).reshape(*x.shape[:2], N + 2 * K, H)
    q, k, v = jnp.split(heads, [N, N + K], axis=2)
    if not config.qk_norm:
        return *apply_rope(q, k, angles, implementation="xla"), v
    scales = attention.q_norm.weight, attention.k_norm.weight
    return *norm_rope(q, k, *scales, angles, eps=config.rms_norm_eps, implementation="xla"), v


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    seen: Bool[Array, "B S"],
    config: ModelConfig,
) -> Float[Array, "B T N H"]:
    """Attention to the keys that are `seen`; scores and softmax in float32."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = config.attention_scale * jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if (cap := config.attn_logit_softcapping) is not None:
        scores = cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(scores, axis=-1, where=seen[:, None, None, None, :])
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(B, T, N, H)


def _normed(norm: RMSNorm | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)
