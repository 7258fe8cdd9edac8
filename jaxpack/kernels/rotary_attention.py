"""Norm, RoPE and attention on the output of a fused query, key and value projection, with no copy in between.

The kernels of `rope.py` and `attention.py` read their heads in place, in the projection's output. They write the
gradients of q, k and v side by side, as the projection's backward matmuls read them. Nothing is split or concatenated.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpack.constants import Implementation
from jaxpack.errors import InputError
from jaxpack.kernels import cudnn, rope
from jaxpack.kernels._launch import dispatch
from jaxpack.kernels.attention import (
    Heads,
    Options,
    SegmentBounds,
    attention_backward,
    attention_forward,
    attention_reference,
    check_sinks,
    make_options,
    no_lse,
    pad_tokens,
    segments_for_cudnn,
)
from jaxpack.kernels.nonfinite import contain
from jaxpack.kernels.rope import Angles, norm_rotate_reference, rotate_reference


class HeadNorms(NamedTuple):
    """Holds the weights of the RMSNorms of query and key heads (for Gemma, `1 + weight`)."""

    q_scale: Float[Array, " H"]
    k_scale: Float[Array, " H"]


def rotary_attention(
    qkv: Float[Array, "B T A H"],
    angles: Angles,
    bounds: SegmentBounds,
    *,
    num_heads: int,
    norms: HeadNorms | None = None,
    eps: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    max_segments: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Computes `attention` over the heads of `qkv`, after an optional norm and RoPE of queries and keys.

    Without norms, q and k are rotated in place, and the backward pass keeps the rotated `qkv`. With norms, it keeps the
    unrotated `qkv` and runs norm and rotation again, which costs less than keeping their result.

    Args:
      qkv: N query heads, K key heads, K value heads: A = N + 2 K.
      angles: see `apply_rope`.
      num_heads: N.
      norms, eps: the norms of every query and key head, see `norm_rope`; None for no norms.
      bounds, scale, window, softcap, sinks, max_segments, implementation: see `attention`.
    """
    N, A = num_heads, qkv.shape[2]
    if A <= N or (A - N) % 2 or N % ((A - N) // 2):
        raise InputError(f"`qkv` must hold `num_heads` + 2 K heads, K a divisor of `num_heads`, got {A} heads for {N}.")
    options = make_options(qkv.shape[3], scale, window, softcap, max_segments, implementation)
    check_sinks(sinks, N)
    if (segments := segments_for_cudnn(qkv, sinks, options)) is not None:
        q, k, v = _parts(qkv, angles, norms, N, eps)
        return cudnn.attention(q, k, v, *bounds, scale=options.scale, max_segments=segments)
    return _rotary_attention(qkv, angles, bounds, norms, sinks, N, eps, options)


def _parts(qkv, angles, norms: HeadNorms | None, N: int, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns rotated (and normed) queries and keys, and values, in arrays of their own."""
    q, k, v = jnp.split(qkv, [N, (qkv.shape[2] + N) // 2], axis=2)
    if norms is None:
        return *rope.apply_rope(q, k, angles, implementation="xla"), v  # in one pass with the split
    return *rope.norm_rope(q, k, *norms, angles, eps=eps), v


def _reference(qkv, angles, bounds, norms, sinks, N, eps, options: Options) -> jax.Array:
    K = (qkv.shape[2] - N) // 2
    q, k, v = jnp.split(qkv, [N, N + K], axis=2)
    if norms is None:
        q, k = rotate_reference(q, angles), rotate_reference(k, angles)
    else:
        q, k = (norm_rotate_reference(x, scale, angles, eps) for x, scale in zip((q, k), norms, strict=True))
    return attention_reference(q, k, v, bounds, sinks, options)


def _normed(qkv, angles, norms: HeadNorms, N: int, eps: float) -> jax.Array:
    """Returns the normed and rotated query and key heads in an array of their own, `[B, T, N + K, H]`."""
    (qk,) = rope.norm_rotate_heads([qkv], norms, _normed_heads(qkv, N), [(qkv.shape[2] + N) // 2], angles, eps)
    return qk


def _normed_heads(qkv, N: int) -> list[rope.Heads]:
    K = (qkv.shape[2] - N) // 2
    return [rope.Heads((0, 0), (0, 0), N), rope.Heads((0, N), (0, N), K)]


def _rotated(qkv, angles, N: int, *, backward: bool = False) -> jax.Array:
    """Rotates the query and key heads of `qkv` in place and returns it."""
    heads = [rope.Heads((0, 0), (0, 0), (qkv.shape[2] + N) // 2)]
    return rope.rotate_heads([qkv], heads, angles, backward=backward)[0]


def _at(qk, qkv, N: int) -> tuple[Heads, Heads, Heads]:
    K = (qkv.shape[2] - N) // 2
    return Heads(qk, 0), Heads(qk, N), Heads(qkv, N + K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _rotary_attention(qkv, angles, bounds, norms, sinks, N, eps, options):
    return _forward(qkv, angles, bounds, norms, sinks, N, eps, options)[0]


def _forward(qkv, angles, bounds, norms, sinks, N, eps, options):
    K = (qkv.shape[2] - N) // 2

    def pallas(qkv, angles, bounds, norms, sinks):
        T = qkv.shape[1]
        bounds, qkv, *angles = pad_tokens(bounds, qkv, *angles)
        angles = Angles(*angles)
        if norms is None:
            qk = qkv = _rotated(qkv, angles, N)
        else:
            qk = _normed(qkv, angles, norms, N, eps)
        qk, qkv = contain(qk, qkv, K, first_key=N, first_value=N + K)
        out, lse = attention_forward(*_at(qk, qkv, N), N, K, bounds, sinks, options)
        return out[:, :T], lse, qkv[:, :T]

    def xla(qkv, angles, bounds, norms, sinks):
        out = _reference(qkv, angles, bounds, norms, sinks, N, eps, options)
        return out, no_lse(qkv[:, :, :N], K), qkv

    out, lse, qkv = dispatch(options.implementation, xla=xla, pallas=pallas)(qkv, angles, bounds, norms, sinks)
    qkv = checkpoint_name(qkv, "qkv")
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (qkv, angles, bounds, norms, sinks, out, lse)


def _backward(N, eps, options, residuals, d_out):
    def pallas(qkv, angles, bounds, norms, sinks, out, lse, d_out):
        T = qkv.shape[1]
        bounds, qkv, out, d_out, *angles = pad_tokens(bounds, qkv, out, d_out, *angles)
        angles = Angles(*angles)
        qk = qkv if norms is None else _normed(qkv, angles, norms, N, eps)
        d_qkv, d_sinks = attention_backward(*_at(qk, qkv, N), bounds, sinks, out, lse, d_out, options)
        if norms is None:
            return _rotated(d_qkv, angles, N, backward=True)[:, :T], None, d_sinks
        (d_qkv,), d_norms = rope.norm_rotate_heads_backward([d_qkv], [qkv], norms, _normed_heads(qkv, N), angles, eps)
        return d_qkv[:, :T], HeadNorms(*d_norms), d_sinks

    def xla(qkv, angles, bounds, norms, sinks, out, lse, d_out):
        del out, lse
        return jax.vjp(
            lambda qkv, norms, sinks: _reference(qkv, angles, bounds, norms, sinks, N, eps, options), qkv, norms, sinks
        )[1](d_out)

    d_qkv, d_norms, d_sinks = dispatch(options.implementation, xla=xla, pallas=pallas)(*residuals, d_out)
    return d_qkv, None, None, d_norms, d_sinks


_rotary_attention.defvjp(_forward, _backward)
