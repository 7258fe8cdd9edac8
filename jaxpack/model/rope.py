"""Computes the rotary angles of a batch from the frequencies of a checkpoint's rope.

Most scalings have the same frequencies for all documents. Two do not: LongRoPE has other frequencies for documents
longer than the original context, and dynamic NTK stretches the base with each token beyond `max_position_embeddings`.
Here the length of a token's own document decides, so that a packed document gets the angles that it gets alone.
transformers uses the longest row of a batch, padding and neighbours included; on one document at a time the two agree.
Rows within both limits have one set of frequencies, known when the program is compiled.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpack.kernels.rope import Angles, rotary_angles
from jaxpack.model.config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeConfig,
    YarnRopeScaling,
)


def document_angles(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"], lengths: Int[Array, "B T"], *, longest: int
) -> Angles:
    """Returns the rotary angles of a batch, for all layers with this rope.

    `positions` are the tokens' positions in their documents, and `lengths` the lengths of those documents, of which
    none has more than `longest` tokens.
    """
    scaling = rope.scaling
    frequencies, factor = jnp.asarray(rope_frequencies(rope, head_dim)), attention_factor(rope)
    if isinstance(scaling, LongRopeScaling) and longest > scaling.original_max_position_embeddings:
        is_long = (lengths > scaling.original_max_position_embeddings)[:, :, None]
        long = jnp.asarray(rope_frequencies(rope, head_dim, is_long=True))
        frequencies = jnp.where(is_long, long[None, None, :], frequencies[None, None, :])
    elif isinstance(scaling, DynamicRopeScaling) and longest > (usual := scaling.max_position_embeddings):
        # The base is multiplied by s^(R / (R - 2)), which stretches the longest wavelength by
        # s = 1 + factor * excess / usual.
        stretch = 1 + scaling.factor * (jnp.maximum(lengths, usual) / usual - 1)
        R = rope.rotary_dim(head_dim)
        powers = jnp.asarray(np.arange(0, R, 2, dtype=np.float32) / np.float32(R - 2))
        frequencies = frequencies[None, None, :] * stretch[:, :, None] ** -powers[None, None, :]
    return rotary_angles(positions, frequencies, factor)


def last_length_alike(rope: RopeConfig, length: Int[Array, " B"]) -> Int[Array, " B"]:
    """Returns the length up to which a document of `length` tokens can grow without a change of its angles."""
    match rope.scaling:
        case LongRopeScaling(original_max_position_embeddings=original):
            return jnp.where(length > original, _ALWAYS, original)
        case DynamicRopeScaling(max_position_embeddings=usual):
            return jnp.maximum(length, usual)
    return jnp.full_like(length, _ALWAYS)


_ALWAYS = np.iinfo(np.int32).max


def rope_frequencies(rope: RopeConfig, head_dim: int, *, is_long: bool = False) -> Float[np.ndarray, " half"]:
    """Returns the rescaled frequencies `theta^(-2i / R)` of the channel pairs, in radians per position, float32.

    R is the number of channels that are rotated. `is_long` selects LongRoPE's factors for long documents.
    """
    R = rope.rotary_dim(head_dim)
    channels = np.arange(0, R, 2, dtype=np.float32) / np.float32(R)
    frequencies = 1.0 / np.power(np.float32(rope.theta), channels)
    match rope.scaling:
        case LinearRopeScaling() as scaling:
            frequencies = frequencies / scaling.factor
        case Llama3RopeScaling() as scaling:
            frequencies = _llama3(frequencies, scaling)
        case YarnRopeScaling() as scaling:
            frequencies = _yarn(frequencies, scaling, rope.theta)
        case LongRopeScaling() as scaling:
            frequencies = frequencies / np.array(scaling.long_factor if is_long else scaling.short_factor)
    return frequencies.astype(np.float32)


def attention_factor(rope: RopeConfig) -> float:
    """Returns the factor of cosine and sine: the checkpoint's or, without one, that of the scaling's paper."""
    scaling = rope.scaling
    if not isinstance(scaling, YarnRopeScaling | LongRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = math.log(max(scaling.factor, 1))
    if isinstance(scaling, LongRopeScaling):
        return math.sqrt(1 + growth / math.log(scaling.original_max_position_embeddings))
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * growth + 1) / (0.1 * scaling.mscale_all_dim * growth + 1)
    return 0.1 * growth + 1


def _llama3(frequencies: Float[np.ndarray, " half"], scaling: Llama3RopeScaling) -> Float[np.ndarray, " half"]:
    """Rescales frequencies as Llama 3.1 does.

    Wavelengths up to L / high_freq_factor keep their frequency, and those beyond L / low_freq_factor have it divided by
    `factor`. Between them the result is interpolated linearly in L / wavelength. L is the original context length.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)  # rotations over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn(
    frequencies: Float[np.ndarray, " half"], scaling: YarnRopeScaling, theta: float
) -> Float[np.ndarray, " half"]:
    """Rescales frequencies as YaRN does (https://arxiv.org/abs/2309.00071).

    Channels that rotate more than `beta_fast` times over the original context keep their frequency, and channels that
    rotate less than `beta_slow` times have it divided by `factor`. Between them the result is interpolated linearly in
    the channel.
    """
    half = len(frequencies)

    def channel(turns: float) -> float:
        """Returns the (fractional) index of the channel pair that rotates `turns` times over the original context."""
        return half * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    if first == last:
        last += 0.001  # avoids a division by zero
    stretch = np.clip((np.arange(half, dtype=np.float32) - first) / (last - first), 0, 1)
    return (1 - stretch) * frequencies + stretch * frequencies / scaling.factor
