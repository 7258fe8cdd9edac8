"""Makes 16-bit matrices from MXFP4 codes, the format of GPT-OSS' experts.

The format is the OCP's (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf). Each
row of a matrix is cut into blocks of 32 elements. An element is a code of 4 bits: a sign, two bits of exponent and one
of mantissa, which give 0, 0.5, 1, 1.5, 2, 3, 4 or 6. Each block has a scale of 8 bits, the exponent of a power of two.
Every element is exact in bfloat16.

XLA can decode in one pass without a kernel of ours, because no table is read.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8, UInt32

BLOCK = 32  # elements that share a scale
CODES_PER_WORD = 8
_MANTISSA_BITS = 7  # of bfloat16


def dequantize_mxfp4(
    codes: UInt32[Array, "*L O W"], scales: UInt8[Array, "*L O G"], dtype: DTypeLike
) -> Float[Array, "*L O I"]:
    """Returns dense matrices, exact in bfloat16 and then cast to `dtype`; I = 8 W = 32 G.

    Args:
      codes: eight codes in each word, the first in its lowest four bits.
      scales: the exponent of each block's scale plus 127.
    """
    shifts = jnp.arange(CODES_PER_WORD, dtype=jnp.uint32) * 4
    code = (codes[..., None] >> jnp.broadcast_to(shifts, (*codes.shape, CODES_PER_WORD))) & 15
    code = code.astype(jnp.int32).reshape(*scales.shape, BLOCK)
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    # The bits of bfloat16 are composed with integer arithmetic, because float arithmetic may flush the smallest numbers
    # to zero. The value is (1 + fraction) 2^e; a code without exponent bits is 0 or 0.5.
    is_half = (exponent == 0) & (mantissa == 1)
    e = scales[..., None].astype(jnp.int32) + jnp.where(exponent == 0, -1, exponent - 1)
    fraction = jnp.where(is_half, 0, mantissa << (_MANTISSA_BITS - 1))
    normal = (e << _MANTISSA_BITS) | fraction
    below = ((1 << _MANTISSA_BITS) | fraction) >> jnp.clip(1 - e, 0, _MANTISSA_BITS + 1)
    bits = jnp.where(e > 0, jnp.where(e > 254, 255 << _MANTISSA_BITS, normal), below)
    bits = jnp.where((exponent == 0) & (mantissa == 0), 0, bits) | (sign << 15)
    dense = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    return dense.reshape(*codes.shape[:-1], codes.shape[-1] * CODES_PER_WORD).astype(dtype)
