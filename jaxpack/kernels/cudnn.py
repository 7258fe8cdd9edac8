"""Attention by cuDNN, for rows of a few long documents. `attention.attention` chooses it.

cuDNN takes packed rows as the offset and length of each segment. It keeps a log-sum-exp for each of the `max_segments`
that a row may have, `[B * max_segments, N, T]` in float32, and its backward pass is slow with many segments. So at most
8 are allowed. This module calls XLA's custom calls directly. The function that jax has for them computes the offsets
anew for every layer and pass, in ten small kernels that take 1 % of the time.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, Int

from jaxpack.kernels._launch import launch, pl, plt, power_of_two_divisor, powers_of_two
from jaxpack.parallel.device import current_device

MAX_SEGMENTS = 8
_FIRST_JAX = (0, 11)  # the first jax version whose XLA was measured and compared


def unsupported_reason(
    shape: Sequence[int],
    dtype: DTypeLike,
    *,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
    max_segments: int | None,
) -> str | None:
    """Returns what cuDNN needs that attention on heads `[B, T, A, H]` does not meet here; None if cuDNN can run."""
    head_dim = shape[3]
    if window is not None or softcap is not None or sinks is not None:
        return "no `window`, `softcap` or `sinks`"
    if jnp.dtype(dtype).itemsize != 2 or not jnp.issubdtype(dtype, jnp.floating):
        return f"bfloat16 or float16, got {jnp.dtype(dtype)}"
    if head_dim > 256 or head_dim % 8:
        return f"a head_dim of at most 256 and a multiple of 8, got {head_dim}"
    if max_segments is None or max_segments > MAX_SEGMENTS:
        return f"`max_segments` of at most {MAX_SEGMENTS}, got {max_segments}"
    if math.prod(shape) >= 2**31:  # cuDNN's offsets are int32
        return f"fewer than 2^31 elements, got {list(shape)}"
    if jax.__version_info__ < _FIRST_JAX:
        return f"jax {'.'.join(map(str, _FIRST_JAX))} or newer, got {jax.__version__}"
    return _device_refusal()


def _device_refusal() -> str | None:
    device = current_device()  # the only choice that is made at tracing, not at lowering
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return f"an NVIDIA GPU, got {device.platform}"
    capability = device.compute_capability
    if int(capability.split(".")[0]) < 9:
        return f"a GPU of compute capability 9.0 (Hopper) or newer, got {capability}"
    return None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    *,
    scale: float,
    max_segments: int,
) -> Float[Array, "B T N H"]:
    """Computes `attention.attention` with cuDNN, for arguments that have no `unsupported_reason`.

    In a row of more than `max_segments` segments, the tokens of the segments beyond yield NaN.
    """
    # At least 2: with one segment, XLA takes no offsets.
    return _attention(q, k, v, first, last, scale, max(2, max_segments))


class SegmentTable(NamedTuple):
    """Holds S segments of each row in cuDNN's form; a row with fewer segments has empty ones at its end.

    Attributes:
      lengths: `[B * S]` int32, in tokens.
      q_offsets, kv_offsets: `[B * S + 1]` int32, in elements of q, and of k or v; the last offset is the array's size.
      covered: `[B]` int32, the token of a row at which the segment after the S-th begins, or T.
    """

    lengths: jax.Array
    q_offsets: jax.Array
    kv_offsets: jax.Array
    covered: jax.Array


def segment_table(
    first: Int[Array, "B T"], last: Int[Array, "B T"], count: int, q_stride: int, kv_stride: int
) -> SegmentTable:
    """Returns the first `count` segments of each row. A stride is the number of elements of one token.

    The bounds of the token after a segment say where the next segment begins, so `count` steps find all segments. They
    run in one kernel, because that many small kernels would take 4 % of the time of the attention.
    """
    B, T = first.shape

    def kernel(
        first_ref: Any, last_ref: Any, lengths_ref: Any, q_offsets_ref: Any, kv_offsets_ref: Any, covered_ref: Any
    ) -> None:
        row = pl.program_id(0)

        def put(index: Any, token: Any) -> None:
            q_offsets_ref[index] = token * q_stride
            kv_offsets_ref[index] = token * kv_stride

        start = first_ref[row, 0]
        for segment in range(count):
            real = start < T
            end = last_ref[row, jnp.minimum(start, T - 1)]
            lengths_ref[row * count + segment] = jnp.where(real, end - start, 0)
            put(row * count + segment, row * T + start)
            following = first_ref[row, jnp.minimum(end, T - 1)]
            start = jnp.where(real & (end < T), following, T)
        put(B * count, jnp.int32(B * T))  # every row writes the same value
        covered_ref[row] = start

    sizes = B * count, B * count + 1, B * count + 1, B  # as the fields of SegmentTable
    return SegmentTable(
        *launch(
            kernel,
            first,
            last,
            name="segment_table",
            grid=(B,),
            out_shape=tuple(jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes),
            num_warps=1,
        )
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, first, last, scale, max_segments):
    return _attend(q, k, v, first, last, scale, max_segments, keep_lse=False)[0]


def _forward(q, k, v, first, last, scale, max_segments):
    out, lse, table = _attend(q, k, v, first, last, scale, max_segments, keep_lse=True)
    q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (q, k, v, out, lse, first, table)


def _attend(q, k, v, first, last, scale, max_segments, *, keep_lse):
    B, T, N, H = q.shape
    table = segment_table(first, last, max_segments, N * H, k.shape[2] * H)
    results = [q]
    if keep_lse:
        results.append(jax.ShapeDtypeStruct((B * max_segments, N, T), jnp.float32))
    out, *lse = _custom_call("__cudnn$fmhaSoftmax", _FORWARD, q, k, v, table=table, results=results, scale=scale)
    (out,) = _blank([out], first, table.covered)
    return out, lse[0] if keep_lse else None, table


def _backward(scale, max_segments, residuals, d_out):
    del max_segments
    q, k, v, out, lse, first, table = residuals
    operands = (q, k, v, lse, d_out, out)
    target = "__cudnn$fmhaSoftmaxBackward"
    d_qkv = _custom_call(target, _BACKWARD, *operands, table=table, results=[q, k, v], scale=scale)
    return *_blank(d_qkv, first, table.covered), None, None


_attention.defvjp(_forward, _backward)

# XLA needs a description of each matmul of the attention, on arrays [B, T, N, H] and [B, N, T, S]: for both operands,
# the axis that is summed over, and then the axis that holds the heads.
_FORWARD = {"bmm1": ((3, 3), (2, 2)), "bmm2": ((3, 1), (1, 2))}
_BACKWARD = {
    "bmm1_grad_gemm1": ((2, 1), (1, 2)),
    "bmm1_grad_gemm2": ((3, 1), (1, 2)),
    "bmm2_grad_gemm1": ((2, 1), (1, 2)),
    "bmm2_grad_gemm2": ((3, 3), (2, 2)),
}


def _custom_call(target, matmuls, q, k, v, *operands, table: SegmentTable, results, scale) -> list[jax.Array]:
    """Calls cuDNN through XLA and returns arrays of the shapes and dtypes of `results`.

    Results with four axes are heads, `[B, T, A, H]`.
    """
    B, T, N, _ = q.shape
    config = {
        "algorithm": {"algo_id": "0", "math_type": "TENSOR_OP_MATH", "is_cudnn_frontend": True, "workspace_size": "0"},
        "fmha_scale": scale,
        "intermediate_tensor_shape": {
            "element_type": {"bfloat16": "BF16", "float16": "F16"}[q.dtype.name],
            "dimensions": [str(size) for size in (B, N, T, T)],
            "is_dynamic_dimension": [False] * 4,
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
        },
        "is_flash_attention": True,
        "mask_type": "PADDING_CAUSAL",
        "dropout_rate": 0.0,
        "seed": 0,
        "sliding_window_length": 0,
        "max_seg_per_batch": len(table.lengths) // B,
        "is_paged_attention": False,
    }
    for name, ((left, right), (left_heads, right_heads)) in matmuls.items():
        config[f"{name}_dot_dimension_numbers"] = {
            "lhs_contracting_dimensions": [str(left)],
            "rhs_contracting_dimensions": [str(right)],
            "lhs_batch_dimensions": ["0", str(left_heads)],
            "rhs_batch_dimensions": ["0", str(right_heads)],
        }

    def is_heads(x: Any) -> bool:
        return x.ndim == 4

    # XLA returns heads as [B, A, T, H], in the memory layout of [B, T, A, H].
    shapes = [tuple(x.shape[i] for i in (0, 2, 1, 3)) if is_heads(x) else x.shape for x in results]
    found = jax.ffi.ffi_call(
        target,
        [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, results, strict=True)]
        + [jax.ShapeDtypeStruct((0,), jnp.uint8)],  # the workspace; XLA fills in its size
        output_layouts=[(0, 2, 1, 3) if is_heads(x) else None for x in results] + [None],
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": config}),
    )(q, k, v, *operands, table.lengths, table.lengths, table.q_offsets, table.kv_offsets)
    return [jnp.swapaxes(x, 1, 2) if is_heads(x) else x for x in found[:-1]]


_TOKENS, _CHANNELS = 16, 1024  # tokens of one program, and channels of one of its stores


def _blank(arrays: Sequence[jax.Array], first: Int[Array, "B T"], covered: Int[Array, " B"]) -> tuple[jax.Array, ...]:
    """Fills in, in place, the tokens of `[B, T, A, H]` that cuDNN does not write.

    Padding becomes 0; real tokens from `covered` on become NaN.
    """
    B, T = first.shape
    flat = [x.reshape(B, T, -1) for x in arrays]
    count = power_of_two_divisor(T, limit=_TOKENS)

    def kernel(first_ref: Any, covered_ref: Any, *refs: Any) -> None:
        block, row = pl.program_id(0), pl.program_id(1)
        here = pl.ds(block * count, count)
        token = block * count + jnp.arange(count, dtype=jnp.int32)
        real = first_ref[row, here] <= token
        blank = ~real | (token >= covered_ref[row])
        value = jnp.where(real, jnp.nan, 0.0)

        @pl.when(jnp.sum(blank.astype(jnp.int32)) > 0)
        def _() -> None:
            for ref in refs[len(arrays) :]:
                for piece in powers_of_two(ref.shape[2], limit=_CHANNELS):
                    shape = (count, piece[1])
                    plt.store(
                        ref.at[row, here, pl.ds(*piece)],
                        jnp.broadcast_to(value[:, None], shape).astype(ref.dtype),
                        mask=jnp.broadcast_to(blank[:, None], shape),
                    )

    blanked = launch(
        kernel,
        first,
        covered,
        *flat,
        name="blank",
        grid=(T // count, B),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat],
        num_warps=4,
        input_output_aliases={2 + i: i for i in range(len(flat))},
    )
    return tuple(x.reshape(array.shape) for x, array in zip(blanked, arrays, strict=True))
