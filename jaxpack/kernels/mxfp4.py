"""Makes 16-bit matrices from MXFP4 codes, the format of GPT-OSS' experts.

The format is the OCP's (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf). Each
row of a matrix is cut into blocks of 32 elements. An element is a code of 4 bits: a sign, two bits of exponent and one
of mantissa, which give 0, 0.5, 1, 1.5, 2, 3, 4 or 6. Each block has a scale of 8 bits, the exponent of a power of two.
Every element is exact in bfloat16.

A layer is decoded by a kernel that reads it in place from the stack of all layers. XLA would copy the layer's codes out
of the stack and decode them in several passes: half of the time of a step of GPT-OSS.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8, UInt32

from jaxpack.constants import Implementation
from jaxpack.errors import InputError
from jaxpack.kernels._launch import dispatch, launch, pl, power_of_two_divisor

BLOCK = 32  # elements that share a scale
CODES_PER_WORD = 8
_MANTISSA_BITS = 7  # of bfloat16


def dequantize_mxfp4(
    codes: UInt32[Array, "L O W"],
    scales: UInt8[Array, "L O G"],
    layer: Int[Array, ""] | int,
    dtype: DTypeLike,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "O I"]:
    """Returns one dense matrix of a stack, with the same bits as `decoded`.

    Args:
      codes, scales: as in `decoded`.
      layer: the number of the matrix in the stack.
      implementation: see `jaxpack.kernels`. None takes "xla" for 2^31 scales, or elements of a matrix, or more.

    Raises:
      InputError: "pallas" is named for as many.
    """
    elements = codes.shape[1] * codes.shape[2] * CODES_PER_WORD
    if max(scales.size, elements) >= 2**31:  # Pallas would compute their offsets in 32 bits.
        if implementation == "pallas":
            raise InputError(
                "`implementation` must be None or 'xla' for 2^31 scales or elements of a matrix or more, got 'pallas'"
                f" for {scales.size} scales and {elements} elements."
            )
        implementation = "xla"
    xla, pallas = (functools.partial(f, dtype=jnp.dtype(dtype)) for f in (_reference, _kernel))
    return dispatch(implementation, xla=xla, pallas=pallas)(codes, scales, jnp.asarray(layer, jnp.int32))


def decoded(codes: UInt32[Array, "*L O W"], scales: UInt8[Array, "*L O G"], dtype: DTypeLike) -> Float[Array, "*L O I"]:
    """Returns dense matrices, exact in bfloat16 and then cast to `dtype`; I = 8 W = 32 G.

    Args:
      codes: eight codes in each word, the first in its lowest four bits.
      scales: the exponent of each block's scale plus 127.
    """
    shifts = jnp.arange(CODES_PER_WORD, dtype=jnp.uint32) * 4
    code = (codes[..., None] >> jnp.broadcast_to(shifts, (*codes.shape, CODES_PER_WORD))) & 15
    code = code.astype(jnp.int32).reshape(*scales.shape, BLOCK)
    dense = _elements(code, jnp.broadcast_to(scales[..., None].astype(jnp.int32), code.shape))
    return dense.reshape(*codes.shape[:-1], codes.shape[-1] * CODES_PER_WORD).astype(dtype)


def _elements(code: Int[Array, "*N"], scale: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """Returns the values of codes in bfloat16, for every scale.

    The bits are composed with integer arithmetic, because float arithmetic may flush the smallest numbers to zero. The
    value is (1 + fraction) 2^e; a code without exponent bits is 0 or 0.5.
    """
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    is_half = (exponent == 0) & (mantissa == 1)
    e = scale + jnp.where(exponent == 0, -1, exponent - 1)
    fraction = jnp.where(is_half, 0, mantissa << (_MANTISSA_BITS - 1))
    normal = (e << _MANTISSA_BITS) | fraction
    below = ((1 << _MANTISSA_BITS) | fraction) >> jnp.clip(1 - e, 0, _MANTISSA_BITS + 1)
    bits = jnp.where(e > 0, jnp.where(e > 254, 255 << _MANTISSA_BITS, normal), below)
    bits = jnp.where((exponent == 0) & (mantissa == 0), 0, bits) | (sign << 15)
    return _bfloat16(bits)


def _elements_of_ordinary_scales(code: Int[Array, "*N"], scale: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """Returns the values of codes whose scales are `_ORDINARY`, in half of the operations.

    From 1 on, the exponent and mantissa of a code, as one number, are those of the value: 2 for 1, 3 for 1.5, 4 for 2.
    So bfloat16's bits are a multiple of it plus the scale's. Only 0.5, whose code is 1, needs the next lower exponent.
    """
    magnitude, unit = code & 7, 1 << (_MANTISSA_BITS - 1)
    bits = (scale << _MANTISSA_BITS) + (magnitude - 2) * unit - jnp.where(magnitude == 1, unit, 0)
    return _bfloat16(jnp.where(magnitude == 0, 0, bits) | ((code & 8) << 12))


def _bfloat16(bits: Int[Array, "*N"]) -> Float[Array, "*N"]:
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


def _reference(codes, scales, layer, *, dtype):
    codes, scales = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (codes, scales))
    return decoded(codes, scales, dtype)


# The kernel. Rows follow one another without gaps, so a program makes a piece of the matrix as one long row.

_WORDS, _NUM_WARPS = 512, 4  # the most words that one program decodes, and its warps
_WORDS_PER_BLOCK = BLOCK // CODES_PER_WORD
_ORDINARY = 2, 252  # scales with which every value is a normal number


def _kernel(codes, scales, layer, *, dtype):
    L, O, W = codes.shape  # noqa: E741
    words = power_of_two_divisor(O * W, limit=_WORDS)
    blocks = words // _WORDS_PER_BLOCK

    def kernel(codes_ref: Any, scales_ref: Any, layer_ref: Any, out_ref: Any) -> None:
        piece, layer = pl.program_id(0), layer_ref[0]
        shape = blocks, _WORDS_PER_BLOCK, CODES_PER_WORD
        shifts = jnp.broadcast_to(4 * jnp.arange(CODES_PER_WORD, dtype=jnp.uint32)[None, None, :], shape)
        word = codes_ref[layer, pl.ds(piece * words, words)].reshape(shape[:2])
        code = ((jnp.broadcast_to(word[:, :, None], shape) >> shifts) & jnp.uint32(15)).astype(jnp.int32)
        scale = scales_ref[layer, pl.ds(piece * blocks, blocks)].astype(jnp.int32)
        scale = jnp.broadcast_to(scale[:, None, None], shape)
        are_ordinary = (jnp.min(scale) >= _ORDINARY[0]) & (jnp.max(scale) <= _ORDINARY[1])
        size = words * CODES_PER_WORD

        def write(elements: jax.Array) -> None:
            out_ref[pl.ds(piece * size, size)] = elements.astype(dtype).reshape(size)

        pl.when(are_ordinary)(lambda: write(_elements_of_ordinary_scales(code, scale)))
        pl.when(jnp.logical_not(are_ordinary))(lambda: write(_elements(code, scale)))

    flat = launch(
        kernel,
        *(codes.reshape(L, O * W), scales.reshape(L, -1), layer.reshape(1)),
        name="dequantize_mxfp4",
        grid=(O * W // words,),
        out_shape=jax.ShapeDtypeStruct((O * W * CODES_PER_WORD,), dtype),
        num_warps=_NUM_WARPS,
    )
    return flat.reshape(O, W * CODES_PER_WORD)
