"""Multiplies rows that are sorted by expert with their experts' matrices, and sums outer products by expert.

The matrices are read in place from the stack of all layers. Copying a layer's matrices, as other projections do to
append their adapter's factors, would cost a third of the product's time. Rows that are copies of tokens are read from
the tokens.

The functions have no derivatives of their own: `gated_experts` has one, which consists of these same two functions.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpack.constants import Activation, Implementation
from jaxpack.errors import InputError
from jaxpack.kernels._launch import dispatch, fitting, launch, pl, plt, power_of_two_divisor
from jaxpack.kernels.gated_activation import check_activation, gated_activation_reference, gated_product
from jaxpack.kernels.routing import Routing
from jaxpack.parallel.device import shared_memory_bytes


class _Tile(NamedTuple):
    """Sizes a tile of a product: output channels, channels of one step of the sum, and how many steps are loaded."""

    columns: int
    depth: int
    num_stages: int


# Fastest first, as measured on an H200. The smaller ones are for cards with less shared memory, and for float32.
_TILES = (
    _Tile(256, 64, 4),
    _Tile(256, 64, 3),
    _Tile(128, 64, 3),
    _Tile(128, 32, 4),
    _Tile(128, 32, 2),
    _Tile(64, 16, 2),
    _Tile(32, 16, 1),
)
# With an activation, a program needs more registers: on an A100, three stages of 64 channels would spill to memory.
_GATED_TILES = (_TILES[0], _Tile(256, 32, 4), *_TILES[2:])
_NUM_WARPS = 8
# The sides of a tile of an expert's matrix, and the stages; a step of its sum is one block of rows.
_OUTER_TILES = ((128, 256, 3), (128, 256, 2), (128, 128, 2), (64, 128, 2), (64, 64, 1), (32, 32, 1))
_LEAST = 16  # the smallest side of a tile that a matmul takes


def unsupported_reason(*sizes: int) -> str | None:
    """Returns why the kernels cannot multiply matrices with sides of these sizes, or None."""
    if odd := [size for size in sizes if size % _LEAST]:
        return f"the kernels need channels in multiples of {_LEAST}, got {odd[0]}"
    return None


def grouped_matmul(
    x: Float[Array, "N I"],
    matrices: Float[Array, "L E P Q"],
    routing: Routing,
    *,
    layer: Int[Array, ""] | int = 0,
    from_tokens: bool = False,
    transposed: bool = False,
    bias: Float[Array, "E O"] | None = None,
    more: tuple[Float[Array, "M R"], Float[Array, "E A B"]] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M O"]:
    """Returns `x[m] W[e]^T + b[e]` for each row m, whose block belongs to expert e.

    The sums are float32 and are rounded once, to the dtype of `x`. Rows of blocks without an expert are zero.

    Args:
      x: the rows, N = M; or, with `from_tokens`, the tokens that the rows are copies of.
      matrices: all experts' matrices in a stack of layers, `[L, E, O, I]`, in the dtype of `x`.
      routing: the expert of each block and the token of each row, see `route`.
      layer: the layer whose matrices are read.
      from_tokens: whether rows are read from their tokens; an empty row counts as zeros.
      transposed: multiplies by `W[e]`, not by `W[e]^T`; the matrices then have the shape `[L, E, I, O]`.
      bias: all experts' biases.
      more: the rows `y` and the matrices `V` of a second product `y[m] V[e]^T` that is added: `[E, O, R]`, or, if
        `transposed`, `[E, R, O]`.
      implementation: see `jaxpack.kernels`. None takes "xla" where the kernel does not support the shapes.

    Raises:
      InputError: shapes do not fit each other, or "pallas" is named and does not support them.
    """
    settings = {"layer": layer, "from_tokens": from_tokens, "transposed": transposed, "bias": bias, "more": more}
    return _products(x, matrices, routing, **settings, implementation=implementation)[0]


def grouped_gated(
    x: Float[Array, "N I"],
    matrices: Float[Array, "L E FF I"],
    routing: Routing,
    *,
    activation: Activation = "silu",
    with_gate_up: bool = False,
    layer: Int[Array, ""] | int = 0,
    from_tokens: bool = False,
    bias: Float[Array, "E FF"] | None = None,
    more: tuple[Float[Array, "M R"], Float[Array, "E FF R"]] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M F"], Float[Array, "M FF"] | None]:
    """Returns `act(gate) * up` of the experts' gate and up, which are the two halves of a `grouped_matmul`.

    The product has the bits that `gated_activation(grouped_matmul(...))` has: gate and up are rounded to the dtype of
    `x` before the activation. But they need not be written to memory and read again.

    Args:
      x, matrices, routing, layer, from_tokens, bias, more, implementation: see `grouped_matmul`; FF is 2 F, and in each
        expert's matrix, gate is above up.
      activation: see `gated_activation`.
      with_gate_up: whether gate and up are written, too.

    Returns:
      The product, and `grouped_matmul(...)`, or None unless `with_gate_up`.

    Raises:
      InputError: shapes do not fit each other, or "pallas" is named and does not support them.
    """
    check_activation(activation)
    if matrices.shape[2] % 2:
        raise InputError(
            f"`matrices` must have gate above up, so an even number of output channels, got {matrices.shape[2]}."
        )
    settings = {"layer": layer, "from_tokens": from_tokens, "bias": bias, "more": more}
    settings |= {"activation": activation, "with_gate_up": with_gate_up}
    outputs = _products(x, matrices, routing, **settings, implementation=implementation)
    return outputs[0], outputs[1] if with_gate_up else None


def _products(
    x: jax.Array,
    matrices: jax.Array,
    routing: Routing,
    *,
    layer: jax.Array | int,
    from_tokens: bool,
    bias: jax.Array | None,
    more: tuple[jax.Array, jax.Array] | None,
    implementation: Implementation | None,
    transposed: bool = False,
    activation: Activation | None = None,
    with_gate_up: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns the products. With an `activation`, returns its result, followed by the products if `with_gate_up`."""
    O, I = matrices.shape[:1:-1] if transposed else matrices.shape[2:]  # noqa: E741
    if x.shape[1] != I:
        raise InputError(f"`matrices` must sum over {x.shape[1]} channels, as many as `x` has, got {I}.")
    if more is not None:
        R = more[0].shape[1]
        expected = (matrices.shape[1], *((R, O) if transposed else (O, R)))
        if more[1].shape != expected:
            raise InputError(f"`more` must have matrices of shape {expected}, got {more[1].shape}.")
    if bias is not None and bias.shape != (matrices.shape[1], O):
        raise InputError(f"`bias` must have shape {(matrices.shape[1], O)}, got {bias.shape}.")
    settings = {"from_tokens": from_tokens, "transposed": transposed, "has_bias": bias is not None}
    settings |= {"activation": activation, "with_gate_up": with_gate_up}
    added = (*(() if bias is None else (bias,)), *(more or ()))
    arrays = (x, matrices, routing.experts, jnp.asarray(layer, jnp.int32).reshape(1), routing.tokens, *added)
    xla, pallas = (functools.partial(f, **settings) for f in (_matmul_reference, _matmul_kernel))
    rank = 0 if more is None else more[0].shape[1]
    block = len(routing.tokens) // len(routing.experts)
    channels = O if activation is None else O // 2  # a tile lies in gate, and its like in up
    reason = unsupported_reason(channels, I, *(() if more is None else (rank,)))
    if reason is None and (needed := _shared_bytes(block, _TILES[-1], rank, x.dtype)) > shared_memory_bytes():
        reason = f"a rank of {rank} needs {needed // 1024} KiB of shared memory, and this card has less"
    return dispatch(_named(implementation, reason), xla=xla, pallas=pallas)(*arrays)


def grouped_outer(
    d: Float[Array, "N O"],
    x: Float[Array, "S I"],
    routing: Routing,
    *,
    d_from_tokens: bool = False,
    x_from_tokens: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "E O I"]:
    """Returns for each expert the sum of `d[m] x[m]^T` over its rows, in float32: the gradient of its matrix.

    An expert without rows has zeros. The sum is made in the order of the rows.

    Args:
      d, x: the rows, or with `..._from_tokens` the tokens that the rows are copies of; one dtype. Empty rows of a block
        count, too, so at least one of the two must be zero there.
      routing: the blocks of each expert and the token of each row, see `route`.
      implementation: as in `grouped_matmul`.
    """
    settings = {"d_from_tokens": d_from_tokens, "x_from_tokens": x_from_tokens}
    xla, pallas = (functools.partial(f, **settings) for f in (_outer_reference, _outer_kernel))
    run = dispatch(_named(implementation, unsupported_reason(d.shape[1], x.shape[1])), xla=xla, pallas=pallas)
    return run(d, x, routing.experts, routing.starts, routing.tokens)


def _named(implementation: Implementation | None, reason: str | None) -> Implementation | None:
    """Returns the implementation to take, if the kernels do not support something for a `reason`."""
    if reason is not None and implementation == "pallas":
        raise InputError(f"`implementation` must be None or 'xla' here, got 'pallas': {reason}.")
    return implementation if reason is None else "xla"


# The reference.


def _rows(x: jax.Array, tokens: jax.Array, from_tokens: bool) -> jax.Array:
    return jnp.where(tokens[:, None] < 0, 0, x[jnp.maximum(tokens, 0)]) if from_tokens else x


def _matmul_reference(
    x, matrices, experts, layer, tokens, *added, from_tokens, transposed, has_bias, activation, with_gate_up
):
    bias, more = added[:has_bias], added[has_bias:]
    equation = "GMI,GIO->GMO" if transposed else "GMI,GOI->GMO"

    def product(x: jax.Array, matrices: jax.Array) -> jax.Array:
        x = x.reshape(len(experts), -1, x.shape[1])
        matrices = jnp.take(matrices, experts, axis=0, mode="fill", fill_value=0)
        return jnp.einsum(equation, x, matrices, preferred_element_type=jnp.float32)

    dtype = x.dtype
    out = product(_rows(x, tokens, from_tokens), jnp.take(matrices, layer[0], axis=0))
    if bias:
        out += jnp.take(bias[0], experts, axis=0, mode="fill", fill_value=0).astype(jnp.float32)[:, None, :]
    if more:
        out += product(*more)
    out = out.reshape(len(tokens), -1).astype(dtype)
    if activation is None:
        return (out,)
    activated = gated_activation_reference(out, None, activation)
    return (activated, out) if with_gate_up else (activated,)


def _outer_reference(d, x, experts, starts, tokens, *, d_from_tokens, x_from_tokens):
    d, x = _rows(d, tokens, d_from_tokens), _rows(x, tokens, x_from_tokens)
    d, x = (rows.reshape(len(experts), -1, rows.shape[1]) for rows in (d, x))
    of_blocks = jnp.einsum("GMO,GMI->GOI", d, x, preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(of_blocks, experts, num_segments=len(starts) - 1, indices_are_sorted=True)


# The kernels.


class _Tiles:
    """Covers channels with tiles whose width is a power of two.

    If the width does not divide the channels, the last tile begins earlier and overlaps the one before. Both write the
    same numbers there. Tiles that fit exactly would be narrow: 64 of 2,880 channels instead of 256.

    Attributes:
      width: the channels of a tile, at most `limit`.
      count: the number of tiles.
    """

    def __init__(self, size: int, limit: int) -> None:
        self._unit = power_of_two_divisor(size, limit=limit)
        self._size, self.width = size, min(limit, 1 << (size.bit_length() - 1))
        self.count = -(-size // self.width)

    def channels(self, number: Any) -> Any:
        """Returns the channels of a tile by its number."""
        start, last = number * (self.width // self._unit), (self._size - self.width) // self._unit
        # As a product with the unit, so that the compiler knows which powers of two divide the place.
        return pl.ds((jnp.minimum(start, last) if self._size % self.width else start) * self._unit, self.width)


def _read(ref: Any, tokens: jax.Array | None, here: Any, channels: Any) -> jax.Array:
    """Reads channels of a block of rows, by their tokens unless `tokens` is None."""
    if tokens is None:
        return ref[here, channels]
    shape = len(tokens), channels.size
    channel = jnp.broadcast_to((channels.start + jnp.arange(channels.size, dtype=jnp.int32))[None, :], shape)
    token = jnp.broadcast_to(tokens[:, None], shape)
    return plt.load(ref.at[jnp.maximum(token, 0), channel], mask=token >= 0, other=0.0)


def _matmul_kernel(
    x, matrices, experts, layer, tokens, *added, from_tokens, transposed, has_bias, activation, with_gate_up
):
    O, I = matrices.shape[:1:-1] if transposed else matrices.shape[2:]  # noqa: E741
    E, M, G = matrices.shape[1], len(tokens), len(experts)
    rank = added[-2].shape[1] if len(added) > has_bias else 0
    candidates = _TILES if activation is None else _GATED_TILES
    tile = fitting(candidates, lambda tile: _shared_bytes(M // G, tile, rank, x.dtype))
    # With an activation, a program has two tiles of half the width: the same channels of gate and of up.
    parts = 1 if activation is None else 2
    tiles, depth = _Tiles(O // parts, tile.columns // parts), power_of_two_divisor(I, limit=tile.depth)

    def kernel(x_ref: Any, matrices_ref: Any, experts_ref: Any, layer_ref: Any, tokens_ref: Any, *refs: Any) -> None:
        added_refs, out_refs = refs[: len(added)], refs[len(added) :]
        bias_refs, more_refs = added_refs[:has_bias], added_refs[has_bias:]
        block, out_channels = pl.program_id(1), tiles.channels(pl.program_id(0))
        places = [out_channels]
        if activation is not None:
            places.append(pl.ds(O // 2 + out_channels.start, tiles.width))
        here = pl.ds(block * (M // G), M // G)
        expert = experts_ref[block]

        def write(out: jax.Array, results: list[jax.Array]) -> None:
            """Writes the main output, and gate and up if they have an output of their own."""
            out_refs[0][here, out_channels] = out
            if with_gate_up:
                for place, result in zip(places, results, strict=True):
                    out_refs[1][here, place] = result

        @pl.when(expert < E)
        def _multiply() -> None:
            at = layer_ref[0], expert
            tokens = tokens_ref[here] if from_tokens else None

            def step(i: Any, totals: list[jax.Array]) -> list[jax.Array]:
                channels = pl.ds(i * depth, depth)
                matrices = [_right(matrices_ref, at, channels, place, transposed) for place in places]
                rows = _read(x_ref, tokens, here, channels)
                return [total + plt.dot(rows, matrix) for total, matrix in zip(totals, matrices, strict=True)]

            zeros = [jnp.zeros((M // G, tiles.width), jnp.float32) for _ in places]
            totals = jax.lax.fori_loop(0, I // depth, step, zeros)
            for bias_ref in bias_refs:
                biases = [bias_ref[expert, place].astype(jnp.float32)[None, :] for place in places]
                totals = [total + bias for total, bias in zip(totals, biases, strict=True)]
            if more_refs:
                more_ref, factors_ref = more_refs
                ranks = pl.ds(0, more_ref.shape[1])
                rows = more_ref[here, ranks]
                right = functools.partial(_right, factors_ref, (expert,), ranks, transposed=transposed)
                totals = [total + plt.dot(rows, right(place)) for total, place in zip(totals, places, strict=True)]
            results = [total.astype(x.dtype) for total in totals]
            if activation is None:
                return write(results[0], results)
            # The backward pass computes the product again from gate and up as they are rounded here.
            gate, up = (result.astype(jnp.float32) for result in results)
            return write(gated_product(gate, up, activation).astype(x.dtype), results)

        @pl.when(expert >= E)
        def _leave_out() -> None:
            zeros = jnp.zeros((M // G, tiles.width), x.dtype)
            write(zeros, [zeros for _ in places])

    name = "grouped_matmul_transposed" if transposed else "grouped_matmul"
    if activation is not None:
        name = f"grouped_{activation}_with_gate_up" if with_gate_up else f"grouped_{activation}"
    widths = (O // parts, O) if with_gate_up else (O // parts,)
    outputs = launch(
        kernel,
        *(x, matrices, experts, layer, tokens, *added),
        name=name,
        grid=(tiles.count, G),  # The tiles of one block run side by side, and read its rows from the cache.
        out_shape=[jax.ShapeDtypeStruct((M, width), x.dtype) for width in widths],
        num_warps=_NUM_WARPS,
        num_stages=tile.num_stages,
    )
    return tuple(outputs)


def _shared_bytes(rows: int, tile: _Tile, rank: int, dtype: DTypeLike) -> int:
    """Returns the shared memory that a tile takes: its operands in each stage, and those of the second product."""
    return (rows + tile.columns) * (tile.num_stages * tile.depth + rank) * jnp.dtype(dtype).itemsize


def _right(ref: Any, at: tuple[Any, ...], channels: Any, out_channels: Any, transposed: bool) -> jax.Array:
    """Returns a tile of a matrix with the channels that are summed over as its rows."""
    return ref[*at, channels, out_channels] if transposed else ref[*at, out_channels, channels].T


def _outer_kernel(d, x, experts, starts, tokens, *, d_from_tokens, x_from_tokens):
    O, I = d.shape[1], x.shape[1]  # noqa: E741
    size = len(tokens) // len(experts)

    def shared_bytes(tile: tuple[int, int, int]) -> int:
        rows, columns, num_stages = tile
        return (min(rows, O) + min(columns, I)) * size * num_stages * x.dtype.itemsize

    tile = fitting(_OUTER_TILES, shared_bytes)
    rows, columns = _Tiles(O, tile[0]), _Tiles(I, tile[1])

    def kernel(d_ref: Any, x_ref: Any, starts_ref: Any, tokens_ref: Any, out_ref: Any) -> None:
        expert = pl.program_id(2)
        out_rows, out_columns = rows.channels(pl.program_id(1)), columns.channels(pl.program_id(0))

        def step(block: Any, total: jax.Array) -> jax.Array:
            here = pl.ds(block * size, size)
            tokens = tokens_ref[here] if d_from_tokens or x_from_tokens else None
            d = _read(d_ref, tokens if d_from_tokens else None, here, out_rows)
            x = _read(x_ref, tokens if x_from_tokens else None, here, out_columns)
            return total + plt.dot(d.T, x)

        zeros = jnp.zeros((rows.width, columns.width), jnp.float32)
        out_ref[expert, out_rows, out_columns] = jax.lax.fori_loop(
            starts_ref[expert], starts_ref[expert + 1], step, zeros
        )

    return launch(
        kernel,
        *(d, x, starts, tokens),
        name="grouped_outer",
        grid=(columns.count, rows.count, len(starts) - 1),
        out_shape=jax.ShapeDtypeStruct((len(starts) - 1, O, I), jnp.float32),
        num_warps=_NUM_WARPS,
        num_stages=tile[2],
    )
