"""Applies rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), alone or after a norm of every head.

Channel `i` of a head is paired with channel `i + rotary_dim / 2` (the Hugging Face layout):

    out[i]        = x[i] cos - x[i + half] sin
    out[i + half] = x[i + half] cos + x[i] sin        half = rotary_dim / 2

Channels from `rotary_dim` on stay as they are. Everything is computed in float32 and rounded once.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpack.constants import Implementation
from jaxpack.errors import InputError
from jaxpack.kernels._launch import dispatch, launch, pl, plt, power_of_two_divisor, powers_of_two


class Angles(NamedTuple):
    """Holds the cosine and sine of every token's angles, float32 `[B, T, rotary_dim / 2]`.

    They are computed once per batch and used by every layer.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotary_angles(
    positions: Int[Array, "B T"],
    inverse_frequencies: Float[Array, " half"] | Float[Array, "B T half"],
    scale: float = 1.0,
) -> Angles:
    """Returns the cosine and sine of `position * inverse_frequency` for each token, times `scale`.

    The inverse frequencies are the same for all tokens or given for each token; they already include any scaling.
    Angles are float32, because bfloat16 rounds position 257 to 256, and sin(257) is far from sin(256). `scale` is
    YaRN's attention factor.
    """
    if inverse_frequencies.ndim == 1:
        inverse_frequencies = inverse_frequencies[None, None, :]
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies.astype(jnp.float32)
    return Angles(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def apply_rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    angles: Angles,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Rotates queries and keys by their positions, in one launch and, if they are not needed again, in place.

    Args:
      angles: the result of `rotary_angles`; `rotary_dim` is twice its width, at most H.
      implementation: see `jaxpack.kernels`. The kernel writes over `q` and `k` and is as fast as a copy of them. If
        they are needed afterwards, XLA copies them first, and "xla" is faster.
    """
    _check(q, k, angles)
    return _rope(q, k, angles, implementation)


def norm_rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    q_scale: Float[Array, " H"],
    k_scale: Float[Array, " H"],
    angles: Angles,
    *,
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Applies RMSNorm to every head, then RoPE, as in Qwen3 and Gemma 3: one launch forward, one backward.

    `y = x / sqrt(mean(x^2) + eps) * scale` over the H channels of a head is rotated before it is rounded. The backward
    pass keeps `q` and `k`, and no other array of their size.

    Args:
      q_scale, k_scale: the weights of the norms (for Gemma, `1 + weight`).
      angles, implementation: as in `apply_rope`.
    """
    _check(q, k, angles)
    for argument, scale in (("q_scale", q_scale), ("k_scale", k_scale)):
        if scale.shape != q.shape[-1:]:
            raise InputError(f"`{argument}` must have shape {q.shape[-1:]}, got {scale.shape}.")
    return _norm_rope(q, k, q_scale, k_scale, angles, eps, implementation)


def _check(q: jax.Array, k: jax.Array, angles: Angles) -> None:
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        raise InputError(
            "`q` and `k` must agree in rows, tokens, head_dim and dtype, got "
            f"{q.dtype}{list(q.shape)} and {k.dtype}{list(k.shape)}."
        )
    if angles.cos.shape != angles.sin.shape or angles.cos.shape[:2] != q.shape[:2]:
        raise InputError(
            f"`angles` must hold two arrays of {list(q.shape[:2])} tokens, got "
            f"{list(angles.cos.shape)} and {list(angles.sin.shape)}."
        )
    if 2 * angles.cos.shape[2] > q.shape[3]:
        raise InputError(f"`angles` must be at most head_dim / 2 = {q.shape[3] // 2} wide, got {angles.cos.shape[2]}.")


# The reference, for one array of heads.


def rotate_reference(x: Float[Array, "B T A H"], angles: Angles) -> Float[Array, "B T A H"]:
    """Applies RoPE in plain jnp."""
    return _rotated(x.astype(jnp.float32), angles).astype(x.dtype)


def norm_rotate_reference(
    x: Float[Array, "B T A H"], scale: Float[Array, " H"], angles: Angles, eps: float
) -> Float[Array, "B T A H"]:
    """Applies RMSNorm and RoPE in plain jnp."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return _rotated(normed * scale.astype(jnp.float32)[None, None, None, :], angles).astype(x.dtype)


def _rotated(x: Float[Array, "B T A H"], angles: Angles) -> Float[Array, "B T A H"]:
    half = angles.cos.shape[-1]
    cos, sin = (table[:, :, None, :] for table in angles)
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


# The kernels. Each program takes a block of tokens and of heads; the heads share the angles of the tokens.


class Heads(NamedTuple):
    """Says where a launch reads and writes some heads.

    `source` and `target` are pairs (index of the array, first head in it); each array is `[B, T, A, H]`.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    count: int


def rotate_heads(
    arrays: Sequence[jax.Array], heads: Sequence[Heads], angles: Angles, *, backward: bool = False
) -> tuple[jax.Array, ...]:
    """Applies RoPE to some heads of `arrays`, in place; other heads stay as they are.

    With `backward`, it rotates the other way, as the gradient needs.
    """
    half = angles.cos.shape[-1]
    blocks = _Blocks.of(arrays[0], heads, _ROTATE)

    def kernel(*refs: Any) -> None:
        inputs, tables, outputs = _cut(refs, len(arrays), 2, len(arrays))

        def rotate(one: Heads, where: _Where) -> None:
            turn = _Turn.load(tables, where, half, backward)
            x = _load(inputs[one.source[0]], where.heads(one.source[1]), 2 * half, half)
            _store(outputs[one.target[0]], where.heads(one.target[1]), turn(_wide(x)))

        blocks.for_each(rotate)

    outputs = launch(
        kernel,
        *arrays,
        *angles,
        name="rope_backward" if backward else "rope",
        grid=blocks.grid,
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays],
        num_warps=_ROTATE.num_warps,
        input_output_aliases={i: i for i in range(len(arrays))},
    )
    return tuple(outputs)


def norm_rotate_heads(
    arrays: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    heads: Sequence[Heads],
    num_heads: Sequence[int],
    angles: Angles,
    eps: float,
) -> tuple[jax.Array, ...]:
    """Applies RMSNorm and RoPE to some heads of `arrays` and returns new arrays, of `num_heads[i]` heads each.

    `scales` holds one scale `[H]` for every entry of `heads`.
    """
    B, T, _, H = arrays[0].shape
    half = angles.cos.shape[-1]
    blocks = _Blocks.of(arrays[0], heads, _NORM_ROTATE)

    def kernel(*refs: Any) -> None:
        inputs, tables, scale_refs, outputs = _cut(refs, len(arrays), 2, len(scales), len(num_heads))

        def rotate(one: Heads, where: _Where) -> None:
            turn = _Turn.load(tables, where, half)
            scale = _load_scale(scale_refs[heads.index(one)], half)
            x = _wide(_load(inputs[one.source[0]], where.heads(one.source[1]), H, half))
            inverse = _inverse_norm(x, H, eps)
            normed = [(piece, part * inverse * w) for (piece, part), w in zip(x, scale, strict=True)]
            _store(outputs[one.target[0]], where.heads(one.target[1]), turn(normed))

        blocks.for_each(rotate)

    outputs = launch(
        kernel,
        *arrays,
        *angles,
        *scales,
        name="norm_rope",
        grid=blocks.grid,
        out_shape=[jax.ShapeDtypeStruct((B, T, count, H), arrays[0].dtype) for count in num_heads],
        num_warps=_NORM_ROTATE.num_warps,
    )
    return tuple(outputs)


def norm_rotate_heads_backward(
    gradients: Sequence[jax.Array],
    arrays: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    heads: Sequence[Heads],
    angles: Angles,
    eps: float,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the gradients of `norm_rotate_heads`: those of the heads, written over `gradients`, and of the scales.

    In each entry of `heads`, `target` is the place of the heads in `gradients`, which are read and overwritten, and
    `source` is their place in `arrays`.
    """
    H = arrays[0].shape[3]
    half = angles.cos.shape[-1]
    blocks = _Blocks.of(arrays[0], heads, _NORM_ROTATE_BACKWARD)

    def kernel(*refs: Any) -> None:
        inputs, x_refs, tables, scale_refs, outputs, (d_scale_ref,) = _cut(
            refs, len(gradients), len(arrays), 2, len(scales), len(gradients), 1
        )

        def rotate(one: Heads, where: _Where) -> None:
            scale = _load_scale(scale_refs[heads.index(one)], half)

            def step(i: Any, d_scale: list[jax.Array]) -> list[jax.Array]:
                here = where.step(i)
                turn = _Turn.load(tables, here, half, backward=True)
                target = here.heads(one.target[1])
                x = _wide(_load(x_refs[one.source[0]], here.heads(one.source[1]), H, half))
                dy = _wide(_load(inputs[one.target[0]], target, H, half))
                # With |x| the root mean square, n = x / |x|, dy rotated back and g = scale * dy:
                # dx = (g - n mean(g n)) / |x| and dscale = sum(dy n).
                inverse = _inverse_norm(x, H, eps)
                n = [part * inverse for _, part in x]
                dy = [part for _, part in turn(dy)]
                g = [part * w for part, w in zip(dy, scale, strict=True)]
                sums = (jnp.sum(a * b, axis=2) for a, b in zip(g, n, strict=True))
                mean = functools.reduce(operator.add, sums)[:, :, None] / H
                dx = [(piece, (a - b * mean) * inverse) for (piece, _), a, b in zip(x, g, n, strict=True)]
                _store(outputs[one.target[0]], target, dx)
                return [total + a * b for total, a, b in zip(d_scale, dy, n, strict=True)]

            cuts = _cuts(H, half)
            zeros = [jnp.zeros((blocks.tokens, blocks.heads, length), jnp.float32) for _, length in cuts]
            for piece, total in zip(cuts, jax.lax.fori_loop(0, blocks.steps, step, zeros), strict=True):
                d_scale_ref[*where.program, pl.ds(*piece)] = jnp.sum(jnp.sum(total, axis=0), axis=0)

        blocks.for_each(rotate)

    *gradients, d_scale = launch(
        kernel,
        *gradients,
        *arrays,
        *angles,
        *scales,
        name="norm_rope_backward",
        grid=blocks.grid,
        out_shape=[
            *(jax.ShapeDtypeStruct(gradient.shape, gradient.dtype) for gradient in gradients),
            jax.ShapeDtypeStruct((*blocks.counts, H), jnp.float32),
        ],
        num_warps=_NORM_ROTATE_BACKWARD.num_warps,
        input_output_aliases={i: i for i in range(len(gradients))},
    )
    # Each program wrote one sum. They are added up here in a fixed order, first over all tokens: most of the work.
    ends = np.cumsum([one.count // blocks.heads for one in heads])
    parts = jnp.split(jnp.sum(d_scale, axis=(0, 1)), ends[:-1])
    return gradients, [jnp.sum(part, axis=0).astype(scale.dtype) for part, scale in zip(parts, scales, strict=True)]


class _Tile(NamedTuple):
    """Sets the size of a program's largest block: the fastest on an H200 (`benchmarks/tune_kernels.py`)."""

    tokens: int  # in a block of `heads` heads; a block of fewer heads may have more tokens
    heads: int
    num_warps: int
    steps: int = 1  # how many blocks of tokens a program takes, one after another


_ROTATE = _Tile(1, 8, 4)
_NORM_ROTATE = _Tile(1, 8, 4)
_NORM_ROTATE_BACKWARD = _Tile(1, 2, 1, steps=16)


class _Where(NamedTuple):
    """Holds a program's index, `(row, block of tokens, block of heads)`, and what it takes at one of its steps."""

    program: tuple[Any, Any, Any]
    first_token: Any
    num_tokens: int
    first_head: Any
    num_heads: int

    @property
    def tokens(self) -> tuple[Any, Any]:
        """Returns the index of the block's tokens."""
        return self.program[0], pl.ds(self.first_token, self.num_tokens)

    def heads(self, first: int) -> tuple[Any, Any, Any]:
        """Returns the index of the block's heads, in an array whose heads begin at `first`."""
        return *self.tokens, pl.ds(first + self.first_head, self.num_heads)

    def step(self, i: Any) -> "_Where":
        """Returns the block moved on by `i` blocks of tokens."""
        return self._replace(first_token=self.first_token + i * self.num_tokens)


class _Blocks(NamedTuple):
    """Cuts all tokens and heads into blocks without a remainder."""

    entries: Sequence[Heads]
    tokens: int
    steps: int
    heads: int
    counts: tuple[int, int, int]  # of rows, blocks of tokens and blocks of heads

    @classmethod
    def of(cls, array: jax.Array, entries: Sequence[Heads], tile: _Tile) -> "_Blocks":
        B, T = array.shape[:2]
        heads = power_of_two_divisor(*(one.count for one in entries), limit=tile.heads)
        tokens = power_of_two_divisor(T, limit=tile.tokens * tile.heads // heads)
        steps = power_of_two_divisor(T // tokens, limit=tile.steps)
        return cls(
            entries, tokens, steps, heads, (B, T // (tokens * steps), sum(one.count for one in entries) // heads)
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Returns a grid in which programs for the same tokens run side by side and share angles in the L2 cache."""
        rows, tokens, heads = self.counts
        return tokens * heads, rows

    def for_each(self, body: Callable[[Heads, _Where], None]) -> None:
        """Runs `body` for the one entry that holds the program's block of heads. To be called in a kernel."""
        tokens, block = jnp.divmod(pl.program_id(0), self.counts[2])
        row = pl.program_id(1)
        begin = 0
        for one in self.entries:
            end = begin + one.count // self.heads
            first_token, first_head = tokens * self.tokens * self.steps, (block - begin) * self.heads
            where = _Where((row, tokens, block), first_token, self.tokens, first_head, self.heads)
            if len(self.entries) == 1:
                body(one, where)
            else:
                pl.when((begin <= block) & (block < end))(functools.partial(body, one, where))
            begin = end


# A block in a kernel, as pieces `((start, length), [tokens, heads, length])` of the channels: first the pieces of the
# first half, then their partners in the second half, then the channels that are not rotated.
_Pieces = list[tuple[tuple[int, int], jax.Array]]


def _cuts(channels: int, half: int) -> list[tuple[int, int]]:
    first = powers_of_two(half)
    second = [(half + start, length) for start, length in first]
    return first + second + [(2 * half + start, length) for start, length in powers_of_two(channels - 2 * half)]


def _load(ref: Any, at: tuple, channels: int, half: int) -> _Pieces:
    return [(piece, ref[*at, pl.ds(*piece)]) for piece in _cuts(channels, half)]


def _wide(pieces: _Pieces) -> _Pieces:
    return [(piece, x.astype(jnp.float32)) for piece, x in pieces]


def _store(ref: Any, at: tuple, pieces: _Pieces) -> None:
    for piece, value in pieces:
        # The result is not read here again, so it should make room in the L2 cache for data that is.
        plt.store(ref.at[*at, pl.ds(*piece)], value.astype(ref.dtype), eviction_policy="evict_first")


def _load_scale(ref: Any, half: int) -> list[jax.Array]:
    return [ref[pl.ds(*piece)].astype(jnp.float32)[None, None, :] for piece in _cuts(ref.shape[0], half)]


def _inverse_norm(pieces: _Pieces, head_dim: int, eps: float) -> jax.Array:
    total = sum(jnp.sum(x * x, axis=2) for _, x in pieces)
    return jax.lax.rsqrt(total / head_dim + eps)[:, :, None]


class _Turn(NamedTuple):
    """Rotates a head's pieces by the angles of a block of tokens."""

    angles: list[tuple[jax.Array, jax.Array]]

    @classmethod
    def load(cls, tables: Sequence[Any], where: _Where, half: int, backward: bool = False) -> "_Turn":
        cos, sin = ([ref[*where.tokens, pl.ds(*piece)][:, None, :] for piece in powers_of_two(half)] for ref in tables)
        return cls([(c, -s if backward else s) for c, s in zip(cos, sin, strict=True)])

    def __call__(self, pieces: _Pieces) -> _Pieces:
        turned, count = list(pieces), len(self.angles)
        for i, (cos, sin) in enumerate(self.angles):
            (at, first), (partner, second) = pieces[i], pieces[count + i]
            turned[i] = at, first * cos - second * sin
            turned[count + i] = partner, second * cos + first * sin
        return turned


def _cut(refs: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    ends = list(itertools.accumulate(sizes))
    return [refs[end - size : end] for size, end in zip(sizes, ends, strict=True)]


# Derivatives.


def _apart(q: jax.Array, k: jax.Array) -> list[Heads]:
    return [Heads((0, 0), (0, 0), q.shape[2]), Heads((1, 0), (1, 0), k.shape[2])]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rope(q, k, angles, implementation):
    return _rope_both_ways(q, k, angles, implementation, backward=False)


def _rope_both_ways(q, k, angles, implementation, *, backward):
    def xla(q, k, cos, sin):
        angles = Angles(cos, -sin if backward else sin)
        return rotate_reference(q, angles), rotate_reference(k, angles)

    def pallas(q, k, cos, sin):
        return rotate_heads([q, k], _apart(q, k), Angles(cos, sin), backward=backward)

    return dispatch(implementation, xla=xla, pallas=pallas)(q, k, *angles)


_rope.defvjp(
    lambda q, k, angles, implementation: (_rope(q, k, angles, implementation), angles),
    lambda implementation, angles, d: (*_rope_both_ways(d[0], d[1], angles, implementation, backward=True), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _norm_rope(q, k, q_scale, k_scale, angles, eps, implementation):
    def pallas(q, k, q_scale, k_scale, cos, sin):
        num_heads = [q.shape[2], k.shape[2]]
        return norm_rotate_heads([q, k], [q_scale, k_scale], _apart(q, k), num_heads, Angles(cos, sin), eps)

    xla = functools.partial(_norm_rope_reference, eps=eps)
    return dispatch(implementation, xla=xla, pallas=pallas)(q, k, q_scale, k_scale, *angles)


def _norm_rope_reference(q, k, q_scale, k_scale, cos, sin, *, eps):
    angles = Angles(cos, sin)
    return norm_rotate_reference(q, q_scale, angles, eps), norm_rotate_reference(k, k_scale, angles, eps)


def _norm_rope_backward(eps, implementation, residuals, d):
    *inputs, angles = residuals

    def xla(dq, dk, *args):
        inputs, (cos, sin) = args[:4], args[4:]
        forward = functools.partial(_norm_rope_reference, cos=cos, sin=sin, eps=eps)
        return jax.vjp(forward, *inputs)[1]((dq, dk))

    def pallas(dq, dk, q, k, q_scale, k_scale, cos, sin):
        (dq, dk), scales = norm_rotate_heads_backward(
            [dq, dk], [q, k], [q_scale, k_scale], _apart(q, k), Angles(cos, sin), eps
        )
        return dq, dk, *scales

    return (*dispatch(implementation, xla=xla, pallas=pallas)(*d, *inputs, *angles), None)


_norm_rope.defvjp(
    lambda q, k, q_scale, k_scale, angles, eps, implementation: (
        _norm_rope(q, k, q_scale, k_scale, angles, eps, implementation),
        (q, k, q_scale, k_scale, angles),
    ),
    _norm_rope_backward,
)
