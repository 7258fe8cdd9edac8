"""Tests that the folder that the benchmark of GPT-OSS trains is whole, and in MXFP4."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from models import small_config

import torch_bridge
from benchmarks.write_gpt_oss import write
from jaxpack.model.moe import experts_of
from jaxpack.model.mxfp4 import MXFP4Weight
from jaxpack.model.weights import weight_of


def test_the_folder_is_read_in_mxfp4_with_weights_of_a_usual_size(tmp_path):
    config = dataclasses.replace(small_config("gpt_oss"), hidden_size=64, moe_intermediate_size=32)
    write(tmp_path, config)
    model, tokenizer = torch_bridge.from_pretrained(tmp_path)
    assert tokenizer is None
    assert model.config.num_layers == config.num_layers
    for experts in experts_of(model):
        weight = weight_of(experts.weight)
        assert isinstance(weight, MXFP4Weight)
        assert 0.015 < float(np.std(weight.dense(np.float32))) < 0.03
    logits = model.logits(jnp.arange(1, 9)[None])
    assert np.isfinite(logits).all()
