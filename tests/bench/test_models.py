"""A random model has the right shapes and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import small_config

from jaxpack.bench.models import _normal, random_model
from jaxpack.model.lora import add_lora
from jaxpack.model.transformer import Transformer
from jaxpack.settings import LoraConfig


def test_a_random_model_has_the_shapes_of_one_that_is_initialised():
    config = small_config("qwen3")
    random = nnx.state(random_model(config, LoraConfig(r=4)))
    usual = nnx.state(add_lora(Transformer(config, rngs=nnx.Rngs(0)), LoraConfig(r=4)))
    sizes = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (random, usual)]
    assert sizes[0] == sizes[1]
    embedding = np.asarray(random["embedding"][...], np.float32)
    assert embedding.std() == pytest.approx(0.02, rel=0.05)
    assert abs(embedding.mean()) < 1e-3


def test_noise_is_normal_and_finite_at_the_ends_of_its_range():
    ends = _normal(jnp.array([0, 2**32 - 1], jnp.uint32))
    np.testing.assert_allclose(ends, [-5.29, 5.29], atol=0.01)  # half of a step from the ends, of 2^23 steps
    drawn = np.asarray(_normal(jnp.asarray(np.random.default_rng(0).integers(2**32, size=100_000, dtype=np.uint32))))
    assert drawn.std() == pytest.approx(1, rel=0.01)
    assert np.mean(np.abs(drawn) < 1) == pytest.approx(0.6827, abs=0.01)
