"""Causal attention confined to segments: a token attends to the tokens of its own document at or before it.

Query t attends to the keys `first[t] .. t`, and key s is attended to by the queries `s .. last[s] - 1`. The bounds
`first` and `last` are computed once per batch (`segment_bounds`), and every kernel loops only between them, so it never
reads a block of another segment. With grouped heads, a program takes the G query heads of a key head together. Its rows
are pairs (token, head of the group), so a tile of 64 rows spans 64 / G tokens and little of it lies outside a short
document.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpack.errors import InputError
from jaxpack.kernels import cudnn
from jaxpack.kernels._launch import dispatch, launch, pl, plt, powers_of_two
from jaxpack.kernels.nonfinite import contain, contain_reference

Implementation = Literal["xla", "pallas", "cudnn"]
LANES = 128  # the kernels need T to be a multiple of this; `attention` pads T to one


class SegmentBounds(NamedTuple):
    """Holds the attention pattern of a batch, which all layers share in the forward and the backward pass.

    Both arrays are int32 `[B, T]` and never decrease within a row.

    Attributes:
      first: the first token of each token's segment. For padding: the first token of the next segment, or T.
      last: one past the last token of each token's segment. For padding: the `last` of the previous segment, or 0.
    """

    first: Int[Array, "B T"]
    last: Int[Array, "B T"]

    def within(self, window: int) -> "SegmentBounds":
        """Returns the bounds of a sliding window: a token attends to itself and the `window - 1` tokens before it.

        `attention` gives the same result with these bounds as with its option `window`. But bounds are data, so layers
        with different windows can share one program. These bounds no longer describe segments as cuDNN reads them, so
        pass no `max_segments` with them: without it, cuDNN is never chosen.
        """
        token = jnp.arange(self.first.shape[1], dtype=jnp.int32)[None, :]
        first, last = _lower(self.first, token, window), _upper(self.last, token, window)
        return SegmentBounds(first, last)


def segment_bounds(segment_ids: Int[Array, "B T"]) -> SegmentBounds:
    """Returns the first token and the end of each token's segment.

    Segment ids never decrease within a row, except for 0, which marks padding.
    """
    T = segment_ids.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None, :]
    real = segment_ids > 0
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((segment_ids.shape[0], 1), bool)
    begins = jnp.concatenate([edge, changes], axis=1) & real
    ends = jnp.concatenate([changes, edge], axis=1) & real
    own_first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    next_first = jax.lax.cummin(jnp.where(begins, index, T), axis=1, reverse=True)
    own_last = jax.lax.cummin(jnp.where(ends, index + 1, T), axis=1, reverse=True)
    previous_last = jax.lax.cummax(jnp.where(ends, index + 1, 0), axis=1)
    return SegmentBounds(jnp.where(real, own_first, next_first), jnp.where(real, own_last, previous_last))


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    bounds: SegmentBounds,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    max_segments: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Computes causal softmax attention within segments, with scores `scale * q k^T`.

    Query head `n` reads key and value head `n // (N / K)` (grouped queries). Padding yields zeros. Scores and softmax
    are float32; the result has the dtype of `q`. Tokens of another segment have weight exactly 0, so they cannot change
    a result even in its last bit, nor if they are NaN or infinite. The backward pass recomputes scores, block by block.

    Args:
      bounds: the result of `segment_bounds` for the batch.
      scale: the factor of the scores (default: 1 / sqrt(H)).
      window: a token attends to itself and the `window - 1` tokens before it.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
      sinks: one logit per query head that takes part in the softmax and has no value (GPT-OSS).
      max_segments: an upper bound on the segments of any row, if known. With few, long segments the kernels use larger
        tiles, and cuDNN may be chosen if no implementation is named.
      implementation: see `jaxpack.kernels`; also "cudnn", which None chooses for rows of a few long documents.

    Raises:
      InputError: arrays do not fit each other, an option is out of range, or "cudnn" is named for a case that cuDNN
        cannot compute.
    """
    options = make_options(q.shape[3], scale, window, softcap, max_segments, implementation)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape != v.shape or q.shape[2] % k.shape[2]:
        raise InputError(
            "`q`, `k` and `v` must agree in rows, tokens and head_dim, and the number of heads of `k` and `v` must "
            f"divide that of `q`, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if bounds.first.shape != q.shape[:2]:
        raise InputError(f"`bounds` must have shape {list(q.shape[:2])}, as `q` has, got {list(bounds.first.shape)}.")
    check_sinks(sinks, q.shape[2])
    if (segments := segments_for_cudnn(q, sinks, options)) is not None:
        return cudnn.attention(q, k, v, *bounds, scale=options.scale, max_segments=segments)
    return _attention(q, k, v, bounds, sinks, options)


def segments_for_cudnn(x: Float[Array, "B T A H"], sinks: jax.Array | None, options: "Options") -> int | None:
    """Returns `max_segments` if cuDNN computes attention for the heads of `x`, and None if our kernels do.

    cuDNN computes it if it is named, or if no implementation is named and cuDNN is faster.

    Raises:
      InputError: "cudnn" is named, but cuDNN cannot compute this case.
    """
    T, H = x.shape[1], x.shape[3]
    if options.implementation not in (None, "cudnn"):
        return None
    unsupported_reason = cudnn.unsupported_reason(
        x.shape, x.dtype, window=options.window, softcap=options.softcap, sinks=sinks, max_segments=options.max_segments
    )
    if options.implementation == "cudnn":
        if unsupported_reason is not None:
            raise InputError(f'`implementation` "cudnn" needs {unsupported_reason}.')
        return options.max_segments
    if unsupported_reason is not None or options.max_segments is None:
        return None
    few, long = _CUDNN_FASTER
    is_faster = H <= 128 and options.max_segments <= few and T // options.max_segments >= long
    return options.max_segments if is_faster else None


# cuDNN is faster for rows of at most this many segments, with at least this many tokens on average (on an H200).
_CUDNN_FASTER = 4, 2048


class Options(NamedTuple):
    """Holds the options of `attention` that are fixed when a program is traced."""

    scale: float
    window: int | None
    softcap: float | None
    max_segments: int | None
    implementation: Implementation | None


def make_options(
    head_dim: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    max_segments: int | None,
    implementation: Implementation | None,
) -> Options:
    """Returns the options of `attention`, checked, with the default scale filled in."""
    for argument, value in (("window", window), ("softcap", softcap), ("max_segments", max_segments)):
        if value is not None and not value > 0:
            raise InputError(f"`{argument}` must be positive, got {value}.")
    if implementation is not None and implementation not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise InputError(f"`implementation` must be None or one of {names}, got {implementation!r}.")
    return Options(head_dim**-0.5 if scale is None else scale, window, softcap, max_segments, implementation)


def check_sinks(sinks: jax.Array | None, num_heads: int) -> None:
    """Raises an InputError unless `sinks` is None or holds one sink per query head."""
    if sinks is not None and sinks.shape != (num_heads,):
        raise InputError(f"`sinks` must have shape {(num_heads,)}, one per query head, got {sinks.shape}.")


# The reference.

# Float32 scores exist for one chunk of a row's queries at a time: 256 queries, or a sixteenth of a longer row, because
# each chunk is unrolled into the program.
_MIN_CHUNK = 256
_MAX_CHUNKS = 16


def attention_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    bounds: SegmentBounds,
    sinks: Float[Array, " N"] | None,
    options: Options,
) -> Float[Array, "B T N H"]:
    """Computes `attention` in plain jnp, with dense scores for one chunk of queries at a time."""
    T = q.shape[1]
    k, v = contain_reference(k, v)
    chunk = max(_MIN_CHUNK, -(-T // _MAX_CHUNKS))
    # No query attends to keys after its chunk, so these keys are not read.
    outputs = [
        _attend(q[:, begin:end], k[:, :end], v[:, :end], bounds.first[:, begin:end], sinks, options)
        for begin, end in ((begin, min(begin + chunk, T)) for begin in range(0, T, chunk))
    ]
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


@functools.partial(jax.checkpoint, static_argnums=5)
def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    first: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None,
    options: Options,
) -> Float[Array, "B T N H"]:
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    query, key = jnp.arange(S - T, S)[:, None], jnp.arange(S)[None, :]  # the queries are the last T of the S tokens
    allowed = key <= query
    if options.window is not None:
        allowed &= key > query - options.window
    allowed = (allowed[None] & (key[None] >= first[:, :, None]))[:, None, None, :, :]
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, K, N // K, H), k, preferred_element_type=jnp.float32)
    scores = scores * options.scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        largest = jnp.maximum(largest, sink)
    largest = jax.lax.stop_gradient(largest)
    weights = jnp.where(allowed, jnp.exp(scores - largest), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - largest)
    weights = weights / jnp.where(total > 0, total, 1.0)  # padding has no allowed key
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(B, T, N, H)


# The kernels. Scores are in units of log2, because the kernels use exp2: `_LOG2E` is part of the scale.

_LOG2E = math.log2(math.e)
_MASKED = -1e30  # far below any score, but finite: the difference of two masked scores is not NaN
_NO_MAXIMUM = -1e29  # above _MASKED, so a masked score has weight 0 even before an allowed score was seen


class Heads(NamedTuple):
    """Selects the heads of `array`, `[B, T, A, H]`, from head `first` on. q, k and v may share one array."""

    array: jax.Array
    first: int = 0


class Tiles(NamedTuple):
    """Sets the tile size of one kernel, in rows (token, head of the group) and keys, and how the kernel is compiled.

    With `split`, the blocks of keys that no row masks have a loop of their own, without a mask.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    split: bool = False


class Plan(NamedTuple):
    """Holds the tiles of the three attention kernels."""

    forward: Tiles
    d_q: Tiles
    d_kv: Tiles


_LONG = 1024  # larger tiles are faster from this many tokens per segment on average


def plan(head_dim: int, itemsize: int, row_length: int, max_segments: int | None) -> Plan:
    """Returns the tiles for a shape, as measured on an H200 in bfloat16 (`benchmarks/tune_kernels.py`)."""
    if itemsize > 2:  # float32 is for comparison only: it uses no tensor cores and is by far slower with any tiles
        return Plan(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))
    if head_dim > 128:
        return Plan(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2))
    if max_segments is not None and row_length >= _LONG * max_segments:
        return Plan(Tiles(128, 64, 4, 2, split=True), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2))
    return Plan(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2))


class _QueryRows(NamedTuple):
    """Holds the rows of one tile: their index in the `T * G` rows of a key head, and their token and query head."""

    index: jax.Array
    token: jax.Array
    head: jax.Array

    @classmethod
    def at(cls, start: Any, count: int, kv_head: Any, group: int) -> "_QueryRows":
        index = start + jnp.arange(count, dtype=jnp.int32)
        return cls(index, index // group, kv_head * group + index % group)

    def load(self, ref: Any, row: Any, first_head: int) -> list[jax.Array]:
        return [plt.load(ref.at[self._index(row, first_head, piece)]) for piece in powers_of_two(ref.shape[3])]

    def store(self, ref: Any, row: Any, first_head: int, values: list[jax.Array]) -> None:
        for piece, value in zip(powers_of_two(ref.shape[3]), values, strict=True):
            plt.store(ref.at[self._index(row, first_head, piece)], value.astype(ref.dtype))

    def _index(self, row: Any, first_head: int, piece: tuple[int, int]) -> tuple[jax.Array, ...]:
        start, length = piece
        shape = (len(self.index), length)
        channel = start + jnp.arange(length, dtype=jnp.int32)
        # Pallas accepts array indices only if all indices are arrays.
        return (
            jnp.full(shape, row, jnp.int32),
            jnp.broadcast_to(self.token[:, None], shape),
            jnp.broadcast_to(first_head + self.head[:, None], shape),
            jnp.broadcast_to(channel[None, :], shape),
        )


def _load_keys(ref: Any, row: Any, start: Any, count: int, head: Any) -> list[jax.Array]:
    return [ref[row, pl.ds(start, count), head, pl.ds(*piece)] for piece in powers_of_two(ref.shape[3])]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    # Tensor cores multiply blocks of 16 by 16. For narrower pieces (a head_dim of 20 or 72 has some), Triton returns
    # wrong products without an error. So these pieces are multiplied in float32, at a precision that keeps tensor cores
    # from rounding to tf32.
    if min(*a.shape, *b.shape) < 16:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return plt.dot(a, b, precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _dot_transposed(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Returns `a b^T`, summed over all pieces of the head."""
    return functools.reduce(operator.add, (_dot(x, y.T) for x, y in zip(a, b, strict=True)))


class _Scores(NamedTuple):
    """Turns `q k^T` into scores in units of log2, and the gradient of scores back."""

    options: Options

    def forward(self, product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the scores, and their tanh if they are capped (None otherwise)."""
        scale, _, softcap = self.options[:3]
        if softcap is None:
            return product * (scale * _LOG2E), None
        tanh = jnp.tanh(product * (scale / softcap))
        return tanh * (softcap * _LOG2E), tanh

    def backward(self, d_scores: jax.Array, tanh: jax.Array | None) -> jax.Array:
        """Returns the gradient with respect to `scale * q k^T`."""
        return d_scores if tanh is None else d_scores * (1 - tanh * tanh)


def _lower(first: jax.Array, token: jax.Array, window: int | None) -> jax.Array:
    """Returns the first key that a token attends to."""
    return first if window is None else jnp.maximum(first, token - (window - 1))


def _upper(last: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """Returns one past the last token that attends to a key."""
    return last if window is None else jnp.minimum(last, key + window)


class _KeyLoop(NamedTuple):
    """Loops over the keys of a tile of rows: from the first row's first key to the last row's own token."""

    begin: Any
    end: Any
    tiles: Tiles
    row_length: int
    rows: _QueryRows
    lower: jax.Array

    @classmethod
    def of(cls, first_ref: Any, row: Any, rows: _QueryRows, start: Any, group: int, tiles: Tiles, options: Options):
        tokens = start // group, (start + tiles.rows - 1) // group
        lower = _lower(plt.load(first_ref.at[jnp.full_like(rows.token, row), rows.token]), rows.token, options.window)
        begin = _lower(first_ref[row, tokens[0]], tokens[0], options.window)
        return cls(begin, tokens[1] + 1, tiles, first_ref.shape[1], rows, lower)

    def run(self, body: Callable, carry: Any, unmasked_until: Any = None) -> Any:
        """Folds `body(start, allowed, carry)` over blocks of keys.

        `start` is the first key of a block. `allowed` is its mask, or None for blocks that end by `unmasked_until`.
        """
        keys = self.tiles.keys
        count = jnp.maximum(self.end - self.begin + keys - 1, 0) // keys

        def masked(j: Any, carry: Any) -> Any:
            # The last block could reach past the row. It is moved back, and the keys that it then shares with the block
            # before are masked.
            begin = self.begin + j * keys
            start = jnp.minimum(begin, self.row_length - keys)
            key = start + jnp.arange(keys, dtype=jnp.int32)
            key = jnp.where(key >= begin, key, self.row_length)
            allowed = (key[None, :] >= self.lower[:, None]) & (key[None, :] <= self.rows.token[:, None])
            return body(start, allowed, carry)

        if unmasked_until is None:
            return jax.lax.fori_loop(0, count, masked, carry)
        whole = jnp.maximum(unmasked_until - self.begin, 0) // keys
        carry = jax.lax.fori_loop(0, whole, lambda j, carry: body(self.begin + j * keys, None, carry), carry)
        return jax.lax.fori_loop(whole, count, masked, carry)


def attention_forward(
    q: Heads,
    k: Heads,
    v: Heads,
    num_heads: int,
    num_kv_heads: int,
    bounds: SegmentBounds,
    sinks: Float[Array, " N"] | None,
    options: Options,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K TG"]]:
    """Returns the output, and the log-sum-exp of each row's scores in units of log2.

    Rows of the log-sum-exp are ordered by token, then by head of the group.
    """
    B, T, _, H = q.array.shape
    group = num_heads // num_kv_heads
    tiles = plan(H, q.array.dtype.itemsize, T, options.max_segments).forward

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, *refs: Any) -> None:
        sinks_ref, out_ref, lse_ref = refs if sinks is not None else (None, *refs)
        block, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        start = block * tiles.rows
        rows = _QueryRows.at(start, tiles.rows, head, group)
        loop = _KeyLoop.of(first_ref, row, rows, start, group, tiles, options)
        queries = rows.load(q_ref, row, q.first)

        def step(start: Any, allowed: jax.Array | None, carry: Any) -> Any:
            largest, total, out = carry
            scores, _ = _Scores(options).forward(
                _dot_transposed(queries, _load_keys(k_ref, row, start, tiles.keys, k.first + head))
            )
            if allowed is not None:
                scores = jnp.where(allowed, scores, _MASKED)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - new_largest[:, None])
            shrink = jnp.exp2(largest - new_largest)
            total = total * shrink + jnp.sum(weights, axis=1)
            values = _load_keys(v_ref, row, start, tiles.keys, v.first + head)
            weights = weights.astype(v_ref.dtype)
            out = [o * shrink[:, None] + _dot(weights, value) for o, value in zip(out, values, strict=True)]
            return new_largest, total, out

        if sinks_ref is None:
            largest, total = jnp.full(tiles.rows, _NO_MAXIMUM, jnp.float32), jnp.zeros(tiles.rows, jnp.float32)
        else:
            largest = plt.load(sinks_ref.at[rows.head]).astype(jnp.float32) * _LOG2E
            total = jnp.ones(tiles.rows, jnp.float32)
        out = [jnp.zeros((tiles.rows, length), jnp.float32) for _, length in powers_of_two(H)]
        unmasked_until = None
        if tiles.split:
            # If all rows have the same first key, all of them attend to every key up to the first row's own token.
            token, last_token = start // group, (start + tiles.rows - 1) // group
            lower = _lower(first_ref[row, last_token], last_token, options.window)
            unmasked_until = jnp.where(lower == loop.begin, token + 1, loop.begin)
        largest, total, out = loop.run(step, (largest, total, out), unmasked_until)
        total = jnp.where(total > 0, total, 1.0)  # padding attends to no key
        rows.store(out_ref, row, 0, [o / total[:, None] for o in out])
        lse_ref[row, head, pl.ds(start, tiles.rows)] = largest + jnp.log2(total)

    return launch(
        kernel,
        q.array,
        k.array,
        v.array,
        bounds.first,
        *(() if sinks is None else (sinks,)),
        name="attention",
        grid=(T * group // tiles.rows, num_kv_heads, B),
        out_shape=(
            jax.ShapeDtypeStruct((B, T, num_heads, H), q.array.dtype),
            jax.ShapeDtypeStruct((B, num_kv_heads, T * group), jnp.float32),
        ),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def attention_backward(
    q: Heads,
    k: Heads,
    v: Heads,
    bounds: SegmentBounds,
    sinks: Float[Array, " N"] | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B K TG"],
    d_out: Float[Array, "B T N H"],
    options: Options,
) -> tuple[Float[Array, "B T A H"], Float[Array, " N"] | None]:
    """Returns the gradients of q, k and v in one array, and the gradient of the sinks (None without sinks).

    In the array of A = N + 2 K heads, the gradients of q, k and v begin at heads 0, N and N + K.
    """
    B, T, N, H = d_out.shape
    K = lse.shape[1]
    group = N // K
    tiles = plan(H, d_out.dtype.itemsize, T, options.max_segments)
    dtype = q.array.dtype

    def d_q_kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, out_ref: Any, lse_ref: Any, d_out_ref: Any,
        d_qkv_ref: Any, delta_ref: Any,
    ) -> None:  # fmt: skip
        block, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        start = block * tiles.d_q.rows
        rows = _QueryRows.at(start, tiles.d_q.rows, head, group)
        loop = _KeyLoop.of(first_ref, row, rows, start, group, tiles.d_q, options)
        queries, d_outs = rows.load(q_ref, row, q.first), rows.load(d_out_ref, row, 0)
        # The softmax's gradient needs the row sums of d_out * out. They are written out for the other kernel.
        products = (
            jnp.sum(o.astype(jnp.float32) * d.astype(jnp.float32), axis=1)
            for o, d in zip(rows.load(out_ref, row, 0), d_outs, strict=True)
        )
        delta = functools.reduce(operator.add, products)
        delta_ref[row, head, pl.ds(start, tiles.d_q.rows)] = delta
        lse = lse_ref[row, head, pl.ds(start, tiles.d_q.rows)]

        def step(start: Any, allowed: jax.Array, d_q: list[jax.Array]) -> list[jax.Array]:
            keys = _load_keys(k_ref, row, start, tiles.d_q.keys, k.first + head)
            values = _load_keys(v_ref, row, start, tiles.d_q.keys, v.first + head)
            scores, tanh = _Scores(options).forward(_dot_transposed(queries, keys))
            weights = jnp.where(allowed, jnp.exp2(scores - lse[:, None]), 0.0)
            d_scores = weights * (_dot_transposed(d_outs, values) - delta[:, None])
            d_scores = _Scores(options).backward(d_scores, tanh).astype(dtype)
            return [d + _dot(d_scores, key) for d, key in zip(d_q, keys, strict=True)]

        zeros = [jnp.zeros((tiles.d_q.rows, length), jnp.float32) for _, length in powers_of_two(H)]
        rows.store(d_qkv_ref, row, 0, [d * options.scale for d in loop.run(step, zeros)])

    d_qkv, delta = launch(
        d_q_kernel,
        q.array,
        k.array,
        v.array,
        bounds.first,
        out,
        lse,
        d_out,
        name="attention_backward_q",
        grid=(T * group // tiles.d_q.rows, K, B),
        out_shape=(
            jax.ShapeDtypeStruct((B, T, N + 2 * K, H), dtype),
            jax.ShapeDtypeStruct((B, K, T * group), jnp.float32),
        ),
        num_warps=tiles.d_q.num_warps,
        num_stages=tiles.d_q.num_stages,
    )

    def d_kv_kernel(
        d_qkv_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, last_ref: Any, lse_ref: Any, delta_ref: Any,
        d_out_ref: Any, out_ref: Any,
    ) -> None:  # fmt: skip
        del d_qkv_ref  # the same memory as `out_ref`, which already holds the gradient of q
        block, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        keys_per_block, rows_per_block = tiles.d_kv.keys, tiles.d_kv.rows
        start = block * keys_per_block
        key = start + jnp.arange(keys_per_block, dtype=jnp.int32)
        upper = _upper(last_ref[row, pl.ds(start, keys_per_block)], key, options.window)
        keys = _load_keys(k_ref, row, start, keys_per_block, k.first + head)
        values = _load_keys(v_ref, row, start, keys_per_block, v.first + head)

        last_key = start + keys_per_block - 1
        begin = start * group
        end = _upper(last_ref[row, last_key], last_key, options.window) * group

        def step(i: Any, carry: Any) -> Any:
            d_keys, d_values = carry
            # The last block is moved back, as in `_KeyLoop`.
            block_begin = begin + i * rows_per_block
            block_start = jnp.minimum(block_begin, T * group - rows_per_block)
            rows = _QueryRows.at(block_start, rows_per_block, head, group)
            token = jnp.where(rows.index >= block_begin, rows.token, -1)
            allowed = (key[:, None] <= token[None, :]) & (token[None, :] < upper[:, None])
            queries, d_outs = rows.load(q_ref, row, q.first), rows.load(d_out_ref, row, 0)
            here = pl.ds(block_start, rows_per_block)
            scores, tanh = _Scores(options).forward(_dot_transposed(keys, queries))
            weights = jnp.where(allowed, jnp.exp2(scores - lse_ref[row, head, here][None, :]), 0.0)
            d_values = [
                d + _dot(weights.astype(d_out_ref.dtype), d_out) for d, d_out in zip(d_values, d_outs, strict=True)
            ]
            d_scores = weights * (_dot_transposed(values, d_outs) - delta_ref[row, head, here][None, :])
            d_scores = _Scores(options).backward(d_scores, tanh).astype(dtype)
            d_keys = [d + _dot(d_scores, query) for d, query in zip(d_keys, queries, strict=True)]
            return d_keys, d_values

        zeros = [jnp.zeros((keys_per_block, length), jnp.float32) for _, length in powers_of_two(H)]
        count = jnp.maximum(end - begin + rows_per_block - 1, 0) // rows_per_block
        d_keys, d_values = jax.lax.fori_loop(0, count, step, (zeros, zeros))
        for piece, d_key, d_value in zip(powers_of_two(H), d_keys, d_values, strict=True):
            at = (row, pl.ds(start, keys_per_block))
            out_ref[*at, N + head, pl.ds(*piece)] = (d_key * options.scale).astype(dtype)
            out_ref[*at, N + K + head, pl.ds(*piece)] = d_value.astype(dtype)

    d_qkv = launch(
        d_kv_kernel,
        d_qkv,
        q.array,
        k.array,
        v.array,
        bounds.last,
        lse,
        delta,
        d_out,
        name="attention_backward_kv",
        grid=(T // tiles.d_kv.keys, K, B),
        out_shape=jax.ShapeDtypeStruct(d_qkv.shape, dtype),
        num_warps=tiles.d_kv.num_warps,
        num_stages=tiles.d_kv.num_stages,
        input_output_aliases={0: 0},
    )
    return d_qkv, None if sinks is None else _d_sinks(sinks, lse, delta)


def _d_sinks(sinks: Float[Array, " N"], lse: Float[Array, "B K TG"], delta: Float[Array, "B K TG"]):
    """Returns the gradient of the sinks: a sink has no value, so its score's gradient is `-weight * delta`."""
    B, K, _ = lse.shape
    group = len(sinks) // K
    by_head = (B, K, -1, group)
    scores = sinks.astype(jnp.float32).reshape(1, K, 1, group) * _LOG2E
    weights = jnp.exp2(scores - lse.reshape(by_head))
    return -jnp.sum(weights * delta.reshape(by_head), axis=(0, 2)).reshape(-1).astype(sinks.dtype)


# Derivatives.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, bounds, sinks, options):
    return _attention_forward(q, k, v, bounds, sinks, options)[0]


def _attention_forward(q, k, v, bounds, sinks, options):
    N, K = q.shape[2], k.shape[2]

    def pallas(q, k, v, bounds, sinks):
        T = q.shape[1]
        bounds, q, k, v = pad_tokens(bounds, q, k, v)
        k, v = contain(k, v, K)
        out, lse = attention_forward(Heads(q), Heads(k), Heads(v), N, K, bounds, sinks, options)
        return out[:, :T], lse, k[:, :T], v[:, :T]

    def xla(q, k, v, bounds, sinks):
        return attention_reference(q, k, v, bounds, sinks, options), no_lse(q, K), k, v

    out, lse, k, v = dispatch(options.implementation, xla=xla, pallas=pallas)(q, k, v, bounds, sinks)
    return out, (q, k, v, bounds, sinks, out, lse)


def no_lse(q: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K TG"]:
    """Returns zeros in place of the log-sum-exp for the reference, whose backward pass does not read them."""
    B, T, N, _ = q.shape
    return jnp.zeros((B, num_kv_heads, -(-T // LANES) * LANES * (N // num_kv_heads)), jnp.float32)


def _attention_backward(options, residuals, d_out):
    def pallas(q, k, v, bounds, sinks, out, lse, d_out):
        T, N, K = *q.shape[1:3], k.shape[2]
        bounds, q, k, v, out, d_out = pad_tokens(bounds, q, k, v, out, d_out)
        d_qkv, d_sinks = attention_backward(Heads(q), Heads(k), Heads(v), bounds, sinks, out, lse, d_out, options)
        return *jnp.split(d_qkv[:, :T], [N, N + K], axis=2), d_sinks

    def xla(q, k, v, bounds, sinks, out, lse, d_out):
        del out, lse
        return jax.vjp(lambda q, k, v, s: attention_reference(q, k, v, bounds, s, options), q, k, v, sinks)[1](d_out)

    d_q, d_k, d_v, d_sinks = dispatch(options.implementation, xla=xla, pallas=pallas)(*residuals, d_out)
    return d_q, d_k, d_v, None, d_sinks


def pad_tokens(bounds: SegmentBounds, *arrays: jax.Array) -> tuple[SegmentBounds, *tuple[jax.Array, ...]]:
    """Pads bounds and arrays to the next multiple of 128 tokens. Axis 1 of `arrays` is T; new tokens are padding."""
    T = bounds.first.shape[1]
    missing = -T % LANES
    if not missing:
        return bounds, *arrays
    first = jnp.where(bounds.first == T, T + missing, bounds.first)
    bounds = SegmentBounds(
        jnp.pad(first, ((0, 0), (0, missing)), constant_values=T + missing),
        jnp.pad(bounds.last, ((0, 0), (0, missing)), mode="edge"),
    )
    return bounds, *(jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))) for x in arrays)


_attention.defvjp(_attention_forward, _attention_backward)
