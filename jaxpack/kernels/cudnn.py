"""Attention by cuDNN, for rows of a few long documents. See `attention.attention`, which chooses it.

cuDNN takes packed rows by the offset and length of each segment. It keeps a log-sum-exp for every one of the
`max_segments` that a row may have, `[B * max_segments, N, T]` in float32, and its backward pass is slow with many: so
there are at most 8.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, Int

from jaxpack.kernels._launch import launch, pl, plt, power_of_two_divisor, powers_of_two

MAX_SEGMENTS = 8
_FIRST_JAX = (0, 11)  # before, jax multiplied the offsets of grouped keys by the number of query heads


def refusal(
    head_dim: int,
    dtype: DTypeLike,
    *,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
    max_segments: int | None,
) -> str | None:
    """Why cuDNN cannot compute that here, as what it needs; None where it can."""
    if window is not None or softcap is not None or sinks is not None:
        return "no `window`, `softcap` or `sinks`"
    if jnp.dtype(dtype).itemsize != 2 or not jnp.issubdtype(dtype, jnp.floating):
        return f"bfloat16 or float16, got {jnp.dtype(dtype)}"
    if head_dim > 256 or head_dim % 8:
        return f"a head_dim of at most 256 and a multiple of 8, got {head_dim}"
    if max_segments is None or max_segments > MAX_SEGMENTS:
        return f"`max_segments` of at most {MAX_SEGMENTS}, got {max_segments}"
    if jax.__version_info__ < _FIRST_JAX:
        return f"jax {'.'.join(map(str, _FIRST_JAX))} or newer, got {jax.__version__}"
    return _device_refusal()


def _device_refusal() -> str | None:
    # The one choice that is made where a program is traced: jax asks for the device there, too.
    if jax.default_backend() != "gpu" or "cuda" not in jax.devices()[0].client.platform_version:
        return f"an NVIDIA GPU, got {jax.default_backend()}"
    capability = jax.devices()[0].compute_capability
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
    """`attention.attention` of what has no `refusal`. A row of more than `max_segments` segments yields NaN."""
    return _attention(q, k, v, first, last, scale, max(2, max_segments))  # of one segment jax takes no offset


def segment_table(
    first: Int[Array, "B T"], last: Int[Array, "B T"], count: int
) -> tuple[Int[Array, "B {count+1}"], Int[Array, "B {count}"], Int[Array, " B"]]:
    """Where the first `count` segments begin, -1 behind the last; how long they are, -1 where there are fewer; where
    the next begins.

    The first token after a segment knows where the next one begins, so this is a walk of `count` steps: in one kernel,
    since as many small ones would take 4 % of the time of the attention.
    """
    B, T = first.shape

    def kernel(first_ref: Any, last_ref: Any, starts_ref: Any, lengths_ref: Any, covered_ref: Any) -> None:
        row = pl.program_id(0)
        start = first_ref[row, 0]
        for segment in range(count):
            real = start < T
            end = last_ref[row, jnp.minimum(start, T - 1)]
            starts_ref[row, segment] = jnp.where(real, start, -1)
            lengths_ref[row, segment] = jnp.where(real, end - start, -1)
            following = first_ref[row, jnp.minimum(end, T - 1)]
            start = jnp.where(real & (end < T), following, T)
        starts_ref[row, count] = jnp.int32(-1)
        covered_ref[row] = start

    return launch(
        kernel,
        first,
        last,
        name="segment_table",
        grid=(B,),
        out_shape=tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B, count + 1), (B, count), (B,))),
        num_warps=1,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, first, last, scale, max_segments):
    attend, covered = _attend(first, last, scale, max_segments)
    return _blank([attend(q, k, v)], first, covered)[0]  # not `_forward`, which has the log-sum-exp written, too


def _attend(first, last, scale, max_segments) -> tuple[Callable, jax.Array]:
    """cuDNN's function of q, k and v, which writes the segments' tokens alone; where in a row the last of them ends."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    offsets, lengths, covered = segment_table(first, last, max_segments)

    def attend(q, k, v):
        return dot_product_attention(
            q, k, v,
            q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets,
            scale=scale, mask_type=MaskType.PADDING_CAUSAL,
        )  # fmt: skip

    return attend, covered


def _forward(q, k, v, first, last, scale, max_segments):
    attend, covered = _attend(first, last, scale, max_segments)
    out, pull = jax.vjp(attend, q, k, v)
    (blanked,) = _blank([out], first, covered)
    # `pull` holds the output, too: with the blanked one in its place nothing has to be copied.
    residuals, structure = jax.tree.flatten(pull)
    pull = jax.tree.unflatten(structure, [blanked if x is out else x for x in residuals])
    pull = jax.tree.map(lambda x: x if any(x is y for y in (q, k, v)) else checkpoint_name(x, "attention"), pull)
    return blanked, (pull, first, covered)


def _backward(scale, max_segments, residuals, d_out):
    del scale, max_segments
    pull, first, covered = residuals
    return *_blank(pull(d_out), first, covered), None, None


_attention.defvjp(_forward, _backward)


_TOKENS, _CHANNELS = 16, 1024  # of a program, and of one of its stores


def _blank(arrays: Sequence[jax.Array], first: Int[Array, "B T"], covered: Int[Array, " B"]) -> tuple[jax.Array, ...]:
    """Fills in, in place, what cuDNN does not write of `[B, T, A, H]`: zeros at padding, else NaN from `covered` on."""
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
