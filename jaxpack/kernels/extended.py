"""Appends an adapter's product to its tokens: `[x, x A^T]`, with R channels after the D channels of `x`.

In that form the adapter is part of its projection's matmul, as a few more channels to sum over or to return:

    [x, x A^T] [W, B]^T = x W^T + (x A^T) B^T        x [W; A]^T = [x W^T, x A^T]

The same holds for the gradients. E is D + R channels; R is 0 or a power of two of at least 16. The kernels here compute
the rest: the norm that makes `x`, the narrow products with A and B, and the residual connection. Each kernel is one
pass over the residual stream, where separate operations would take five. Where `unsupported_reason` returns a reason,
`implementation=None` takes XLA.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpack.constants import Implementation
from jaxpack.errors import InputError
from jaxpack.kernels._launch import dispatch, launch, pl, plt, power_of_two_divisor
from jaxpack.kernels.adapter import padded_rank
from jaxpack.kernels.rms_norm import rms_norm_backward, rms_norm_reference


def unsupported_reason(tokens: int, channels: int, rank: int) -> str | None:
    """Returns the requirement that `[tokens, channels]` and `rank` do not meet, or None if the kernels can run.

    Their matmuls take blocks of at least 16 by 16, and hold a token's R channels in registers.
    """
    if tokens % 16 or channels % 16:
        return f"multiples of 16 tokens and channels, got {tokens} and {channels}"
    if rank > _MAX_RANK or rank not in (0, padded_rank(rank)):
        return f"a rank of at most {_MAX_RANK}, padded to a power of two of at least 16, got {rank}"
    return None


def append_lora_input(
    x: Float[Array, "*B D"], a: Float[Array, "R D"], implementation: Implementation | None = None
) -> Float[Array, "*B E"]:
    """Returns `[x, x A^T]`."""
    return _by_token(_append_reference, _append_kernel, implementation, a.shape, x)(a)


def norm_append_lora_input(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    a: Float[Array, "R D"],
    *,
    eps: float,
    implementation: Implementation | None = None,
) -> Float[Array, "*B E"]:
    """Returns `[n, n A^T]`, where `n = rms_norm(x, scale)`."""
    xla, pallas = (functools.partial(f, eps=eps) for f in (_norm_append_reference, _norm_append_kernel))
    return _by_token(xla, pallas, implementation, a.shape, x)(scale, a)


def norm_append_lora_input_backward(
    d_extended: Float[Array, "*B E"],
    extended: Float[Array, "*B E"],
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    a: Float[Array, "R D"],
    d_residual: Float[Array, "*B D"],
    *,
    eps: float,
    with_scale: bool,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, " D"] | None]:
    """Returns the gradients of `x` and `scale` from the gradient of the output of `norm_append_lora_input`.

    `d_residual` is added to the gradient of `x`. The gradient of `scale` is None unless `with_scale`.
    """
    settings = {"eps": eps, "with_scale": with_scale}
    xla, pallas = (functools.partial(f, **settings) for f in (_backward_reference, _backward_kernel))
    return _by_token(xla, pallas, implementation, a.shape, x, d_residual, d_extended, extended)(scale, a)


def add_extended(
    extended: Float[Array, "*B E"],
    b: Float[Array, "D R"],
    residual: Float[Array, "*B D"] | None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*B D"]:
    """Returns `residual + y + z B^T` for `extended = [y, z]`, rounded once; without a residual, `y + z B^T`."""
    if not b.shape[1]:
        return extended if residual is None else residual + extended
    arrays = [extended] if residual is None else [residual, extended]
    return _by_token(_add_reference, _add_kernel, implementation, b.shape[::-1], *arrays)(b)


def _by_token(
    xla: Callable,
    pallas: Callable,
    implementation: Implementation | None,
    factor: tuple[int, ...],
    *arrays: jax.Array,
) -> Callable:
    """Chooses the implementation and returns a function that calls it with `arrays` and then its own arguments.

    `arrays` are passed as `[tokens, channels]`; two-axis results get their batch axes back. The returned function takes
    the arguments without a token axis. `factor` is the shape of A, or the transposed shape of B.

    Raises:
      InputError: "pallas" is named, but the kernels cannot take these sizes.
    """
    batch, (rank, channels) = arrays[0].shape[:-1], factor
    tokens = math.prod(batch)
    if (needs := unsupported_reason(tokens, channels, rank)) is not None:
        if implementation == "pallas":
            raise InputError(f'`implementation` "pallas" needs {needs}.')
        implementation = implementation or "xla"
    chosen = dispatch(implementation, xla=xla, pallas=pallas)

    def run(*rest: jax.Array) -> Any:
        out = chosen(*(array.reshape(tokens, -1) for array in arrays), *rest)
        return jax.tree.map(lambda y: y.reshape(*batch, -1) if y.ndim == 2 else y, out)

    return run


# The references.


def _append_reference(x, a):
    return jnp.concatenate([x, x @ a.T], axis=-1)


def _norm_append_reference(x, scale, a, *, eps):
    return _append_reference(rms_norm_reference(x, scale, eps=eps), a)


def _backward_reference(x, d_residual, d_extended, extended, scale, a, *, eps, with_scale):
    del extended
    d, d_narrow = jnp.split(d_extended, [x.shape[1]], axis=1)
    d = d.astype(jnp.float32) + jnp.matmul(d_narrow, a, preferred_element_type=jnp.float32)
    d_x, d_scale = rms_norm_backward(x, scale, d, eps=eps)
    return (d_residual + d_x).astype(x.dtype), d_scale if with_scale else None


def _add_reference(*arrays):
    *residual, extended, b = arrays
    y, z = jnp.split(extended, [len(b)], axis=1)
    terms = [*(x.astype(jnp.float32) for x in residual), y, jnp.matmul(z, b.T, preferred_element_type=jnp.float32)]
    return sum(terms[1:], start=terms[0]).astype(extended.dtype)


# The kernels, on `[tokens, channels]`. A program takes a block of tokens and reads its channels piece by piece. Where a
# sum over all channels must come first, it reads them twice: the second time they are in the cache.


class _Tile(NamedTuple):
    """Sets the most that one program takes, as measured on an H200 (`benchmarks/tune_kernels.py`)."""

    tokens: int
    channels: int  # of one piece
    num_warps: int
    num_stages: int  # how many pieces ahead a matmul's operands are loaded, for ranks up to _LOW_RANK


_APPEND = _Tile(64, 128, 8, 3)
_NORM_APPEND = _Tile(32, 128, 8, 3)
_BACKWARD = _Tile(16, 256, 4, 3)
_ADD = _Tile(32, 256, 8, 1)
_LOW_RANK = 64  # for higher ranks, three pieces of a factor do not fit into the shared memory
_MAX_RANK = 256


class _Blocks:
    """Cuts tokens and channels into blocks without a remainder."""

    def __init__(self, x: jax.Array | jax.ShapeDtypeStruct, rank: int, tile: _Tile):
        self.shape = x.shape
        self.tokens = power_of_two_divisor(self.shape[0], limit=tile.tokens)
        self.channels = power_of_two_divisor(self.shape[1], limit=tile.channels)
        self.count = self.shape[0] // self.tokens
        self.rank = rank
        self.num_warps = tile.num_warps
        self.num_stages = tile.num_stages if rank <= _LOW_RANK else 1

    def here(self) -> Any:
        """Returns the index of the program's tokens. To be called in a kernel."""
        return pl.ds(pl.program_id(0) * self.tokens, self.tokens)

    def for_each_piece(self, body: Callable, init: Any, *, again: bool = False) -> Any:
        """Runs `value = body(index, value)` for each piece of the channels in turn and returns the last value.

        With `again`, the order is reversed: the pieces that were read last are still in the cache, while the whole
        block of tokens would not fit into it.
        """
        count = self.shape[1] // self.channels

        def step(i: Any, value: Any) -> Any:
            return body(pl.ds((count - 1 - i if again else i) * self.channels, self.channels), value)

        return jax.lax.fori_loop(0, count, step, init)

    def zeros(self) -> jax.Array:
        """Returns a float32 accumulator of one piece, which is summed over its channels only once, at the end."""
        return jnp.zeros((self.tokens, self.channels), jnp.float32)

    @property
    def ranks(self) -> Any:
        """Returns the index of all rows of A, or all columns of B."""
        return pl.ds(0, self.rank)

    @property
    def behind(self) -> Any:
        """Returns the index of the R channels after the D channels."""
        return pl.ds(self.shape[1], self.rank)


def _load(ref: Any, *at: Any) -> jax.Array:
    return ref[at].astype(jnp.float32)


def _inverse_norm(squares: jax.Array, D: int, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.sum(squares, axis=1)[:, None] / D + eps)


def _append_kernel(x, a):
    return _extend_launch(x, None, a, 0.0)


def _norm_append_kernel(x, scale, a, *, eps):
    return _extend_launch(x, scale, a, eps)


def _extend_launch(x: jax.Array, scale: jax.Array | None, a: jax.Array, eps: float) -> jax.Array:
    blocks = _Blocks(x, len(a), _APPEND if scale is None else _NORM_APPEND)
    T, D = blocks.shape
    scales, factors = [] if scale is None else [scale], [a] if len(a) else []

    def kernel(x_ref: Any, *refs: Any) -> None:
        scale_refs, a_refs, out_ref = refs[: len(scales)], refs[len(scales) : -1], refs[-1]
        here = blocks.here()
        if scale_refs:
            squares = blocks.for_each_piece(
                lambda at, total: total + jnp.square(_load(x_ref, here, at)), blocks.zeros()
            )
            inverse = _inverse_norm(squares, D, eps)

        def step(at: Any, xa: Any) -> Any:
            n = x_ref[here, at]
            for scale_ref in scale_refs:
                n = (n.astype(jnp.float32) * inverse * _load(scale_ref, at)[None, :]).astype(out_ref.dtype)
            out_ref[here, at] = n
            for a_ref in a_refs:
                xa += plt.dot(n, a_ref[blocks.ranks, at].T)
            return xa

        xa = jnp.zeros((blocks.tokens, blocks.rank), jnp.float32) if a_refs else None
        xa = blocks.for_each_piece(step, xa, again=bool(scale_refs))
        if a_refs:
            out_ref[here, blocks.behind] = xa.astype(out_ref.dtype)

    return launch(
        kernel,
        x,
        *scales,
        *factors,
        name="norm_append_lora_input" if scales else "append_lora_input",
        grid=(blocks.count,),
        out_shape=jax.ShapeDtypeStruct((T, D + len(a)), x.dtype),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def _backward_kernel(x, d_residual, d_extended, extended, scale, a, *, eps, with_scale):
    blocks = _Blocks(x, len(a), _BACKWARD)
    T, D = blocks.shape
    factors = [a] if len(a) else []

    def kernel(x_ref: Any, residual_ref: Any, d_ref: Any, z_ref: Any, scale_ref: Any, *refs: Any) -> None:
        a_refs, (out_ref, *sum_refs) = refs[: len(factors)], refs[len(factors) :]
        here, program = blocks.here(), pl.program_id(0)

        def sums(at: Any, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x = _load(x_ref, here, at)
            return totals[0] + x * x, totals[1] + _load(d_ref, here, at) * x * _load(scale_ref, at)[None, :]

        squares, products = blocks.for_each_piece(sums, (blocks.zeros(), blocks.zeros()))
        inverse = _inverse_norm(squares, D, eps)
        # This is the mean of g n, with g = scale * (d + d_z A). The adapter's part of the sum is d_z z, because
        # z = (n * scale) A^T.
        mean = jnp.sum(products, axis=1)[:, None] * inverse
        if a_refs:
            mean += jnp.sum(_load(d_ref, here, blocks.behind) * _load(z_ref, here, blocks.behind), axis=1)[:, None]
        mean /= D

        def write(at: Any, _: None) -> None:
            d = _load(d_ref, here, at)
            for a_ref in a_refs:
                d += plt.dot(d_ref[here, blocks.behind], a_ref[blocks.ranks, at])
            n = _load(x_ref, here, at) * inverse
            g = d * _load(scale_ref, at)[None, :]
            out = _load(residual_ref, here, at) + inverse * (g - n * mean)
            out_ref[here, at] = out.astype(out_ref.dtype)
            if sum_refs:
                sum_refs[0][program, at] = jnp.sum(d * n, axis=0)

        blocks.for_each_piece(write, None, again=True)

    outputs = launch(
        kernel,
        x,
        d_residual,
        d_extended,
        extended,
        scale,
        *factors,
        name="norm_append_lora_input_backward",
        grid=(blocks.count,),
        out_shape=[
            jax.ShapeDtypeStruct((T, D), x.dtype),
            *([jax.ShapeDtypeStruct((blocks.count, D), jnp.float32)] if with_scale else []),
        ],
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return outputs[0], jnp.sum(outputs[1], axis=0) if with_scale else None


def _add_kernel(*arrays):
    *_, extended, b = arrays
    out = jax.ShapeDtypeStruct((len(extended), len(b)), extended.dtype)
    blocks = _Blocks(out, b.shape[1], _ADD)

    def kernel(*refs: Any) -> None:
        *residual_refs, extended_ref, b_ref, out_ref = refs
        here, piece = blocks.here(), pl.ds(pl.program_id(1) * blocks.channels, blocks.channels)
        total = _load(extended_ref, here, piece)
        for residual_ref in residual_refs:
            total = _load(residual_ref, here, piece) + total
        total += plt.dot(extended_ref[here, blocks.behind], b_ref[piece, blocks.ranks].T)
        out_ref[here, piece] = total.astype(out_ref.dtype)

    return launch(
        kernel,
        *arrays,
        name="add_extended",
        grid=(blocks.count, len(b) // blocks.channels),
        out_shape=out,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
