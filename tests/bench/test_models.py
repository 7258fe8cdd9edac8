"""A random model has the right shapes and sizes."""

import jax
import numpy as np
import pytest
from flax import nnx
from models import small_config

from jaxpack.bench.models import random_model
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
