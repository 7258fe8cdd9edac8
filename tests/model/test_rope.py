"""Rotary frequencies and their scalings. That they are transformers' own is tested in `torch_bridge/`."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.model.config import DynamicRopeScaling, Llama3RopeScaling, LongRopeScaling, RopeConfig, YarnRopeScaling
from jaxpack.model.rope import attention_factor, document_angles, rope_frequencies


def test_frequencies_fall_geometrically():
    frequencies = rope_frequencies(RopeConfig(theta=10_000.0), 64)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, 10_000.0 ** (-np.arange(32) / 32), rtol=1e-6)


def test_only_some_channels_may_be_rotated():
    some = rope_frequencies(RopeConfig(theta=1e4, partial_rotary_factor=0.75), 128)
    np.testing.assert_array_equal(some, rope_frequencies(RopeConfig(theta=1e4), 96))


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    scaling = Llama3RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192)
    plain = rope_frequencies(RopeConfig(theta=500_000.0), 128)
    scaled = rope_frequencies(RopeConfig(theta=500_000.0, scaling=scaling), 128)
    wavelengths = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 8192 / 4], plain[wavelengths < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 8, rtol=1e-6)
    between = (wavelengths > 8192 / 4) & (wavelengths < 8192)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_yarn_keeps_what_turns_often_and_stretches_what_does_not():
    scaling = YarnRopeScaling(factor=4, original_max_position_embeddings=4096)
    plain, scaled = (rope_frequencies(RopeConfig(theta=1e4, scaling=s), 128) for s in (None, scaling))
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 40], plain[turns > 40])  # the ends are rounded to whole channels
    np.testing.assert_allclose(scaled[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    assert (np.diff(scaled / plain) <= 1e-6).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.1 * np.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 2.0}, 0.1 * np.log(4) + 1),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1)),
    ],
    ids=str,
)
def test_attention_factor_of_yarn(settings, expected):
    scaling = YarnRopeScaling(factor=4, original_max_position_embeddings=4096, **settings)
    assert attention_factor(RopeConfig(theta=1e4, scaling=scaling)) == pytest.approx(expected)


LONG = LongRopeScaling(short_factor=(1.0, 1.5), long_factor=(2.0, 9.0), original_max_position_embeddings=4, factor=2)
DYNAMIC = DynamicRopeScaling(factor=3, max_position_embeddings=4)


@pytest.mark.parametrize("scaling", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
def test_frequencies_go_by_the_length_of_a_token_s_own_document(scaling):
    rope = RopeConfig(theta=1e4, scaling=scaling)
    lengths = jnp.array([[4, 4, 4, 4, 5, 5, 5, 5, 5, 7, 7, 7, 7, 7, 7, 7]])
    positions = jnp.array([[*range(4), *range(5), *range(7)]])
    packed = np.stack(document_angles(rope, 4, positions, lengths, longest=positions.shape[1]))
    for first, length in ((0, 4), (4, 5), (9, 7)):
        alone = document_angles(rope, 4, jnp.arange(length)[None], jnp.full((1, length), length), longest=length)
        np.testing.assert_array_equal(packed[:, :, first : first + length], np.stack(alone))
    # The documents do differ: the same position has another angle in each.
    assert len(set(packed[1, 0, [1, 5, 10], 1].tolist())) == (2 if scaling is LONG else 3)
