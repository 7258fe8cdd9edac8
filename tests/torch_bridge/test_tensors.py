"""Tests that the tables name a checkpoint's tensors, and that each goes to its place and back. Needs no torch."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import small_config

from jaxpack.errors import InputError
from jaxpack.model.targets import projections_of
from jaxpack.model.transformer import Transformer
from torch_bridge.tensors import build_model, model_tensors, tensor_table

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe", "gpt_oss"])
def test_targets_of_adapters_have_the_names_of_the_table(family):
    model = nnx.eval_shape(lambda: Transformer(small_config(family), rngs=nnx.Rngs(0)))
    table = {
        name.removesuffix(".weight"): (entry.projection, layer)
        for name, (entry, layer) in tensor_table(model.config).items()
        if entry.projection is not None and entry.expert is None and name.endswith(".weight")
    }
    assert {target.path: (target.name, target.layer) for target in projections_of(model)} == table


class FakeTensors:
    """Holds tensors in memory, in place of a checkpoint."""

    description = "the test"

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = tensors
        self.read_names: list[str] = []
        self.unreadable: dict[str, str] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str, first: int, last: int, buffer: np.ndarray) -> np.ndarray:
        self.read_names.append(name)
        return self.tensors[name][first:last]


def shapes_by_hand(family: str, tied: bool) -> dict[str, tuple[int, ...]]:
    """Lists every tensor of a `small_config` checkpoint, as transformers names and shapes the tensors."""
    c = small_config(family)
    D, F, Q, KV = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, D), "model.norm.weight": (D,)}
    for i in range(c.num_layers):
        layer = {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "self_attn.q_proj": (Q, D),
            "self_attn.k_proj": (KV, D),
            "self_attn.v_proj": (KV, D),
            "self_attn.o_proj": (D, Q),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        if family == "qwen3":
            layer |= {"self_attn.q_norm": (c.head_dim,), "self_attn.k_norm": (c.head_dim,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not tied:
        shapes["lm_head.weight"] = (c.vocab_size, D)
    return shapes


@TIED
def test_the_table_names_the_tensors_of_a_checkpoint(family: str, tied: bool):
    table = tensor_table(small_config(family, tie_word_embeddings=tied))
    assert table.keys() == shapes_by_hand(family, tied).keys()
    places = [(entry.path, entry.projection, layer) for entry, layer in table.values()]
    assert len(set(places)) == len(places), "two tensors go to one place"


def test_a_name_says_its_layer_when_there_are_many(family: str):
    """Layers are sorted as numbers: 2 comes before 10."""
    table = tensor_table(small_config(family, num_layers=12))
    for name, (_, layer) in table.items():
        assert (f".layers.{layer}." in name) == (layer is not None)
    counts = np.bincount([layer for _, layer in table.values() if layer is not None])
    assert counts.tolist() == [11 if family == "qwen3" else 9] * 12


@TIED
def test_every_element_is_filled_once(family: str, tied: bool):
    """Tensors of ones leave no parameter at zero, and hold as many numbers as the model."""
    config = small_config(family, tie_word_embeddings=tied)
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes_by_hand(family, tied).items()}
    source = FakeTensors(tensors)
    model = build_model(config, source, "float32")
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all((parameter == 1).all() for parameter in parameters)
    assert sum(parameter.size for parameter in parameters) == sum(tensor.size for tensor in tensors.values())
    assert sorted(source.read_names) == sorted(tensors), "each is read once"


@TIED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_read_comes_out_again(family: str, tied: bool, dtype: str):
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in shapes_by_hand(family, tied).items()
    }
    model = build_model(small_config(family, tie_word_embeddings=tied), FakeTensors(tensors), dtype)
    again = dict(model_tensors(model))
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


def test_tensors_go_where_the_layers_read_them(family: str):
    """Query, key and value are rows of one matrix, in this order, as are gate and up; layers are stacked."""
    config = small_config(family, tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes_by_hand(family, False).items()}
    model = build_model(config, FakeTensors(tensors), "float32")
    blocks = model.blocks
    places = {
        "input_layernorm": blocks.attention_norm.scale,
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj": blocks.attention.qkv.weight,
        "self_attn.o_proj": blocks.attention.out.weight,
        "post_attention_layernorm": blocks.feed_forward_norm.scale,
        "mlp.gate_proj mlp.up_proj": blocks.feed_forward.gate_up.weight,
        "mlp.down_proj": blocks.feed_forward.down.weight,
    }
    if family == "qwen3":
        places |= {"self_attn.q_norm": blocks.attention.q_norm.scale, "self_attn.k_norm": blocks.attention.k_norm.scale}
    for names, parameter in places.items():
        for layer in range(config.num_layers):
            side_by_side = [tensors[f"model.layers.{layer}.{name}.weight"] for name in names.split()]
            np.testing.assert_array_equal(parameter[layer], np.concatenate(side_by_side), err_msg=names)
    np.testing.assert_array_equal(model.embedding[...], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.norm.scale[...], tensors["model.norm.weight"])
    np.testing.assert_array_equal(model.lm_head[...], tensors["lm_head.weight"])


def test_missing_and_misshapen_tensors_are_reported_together_before_any_is_read(family: str):
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes_by_hand(family, False).items()}
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].T
    source = FakeTensors(tensors)
    with pytest.raises(InputError) as refused:
        build_model(small_config(family, tie_word_embeddings=False), source, "float32")
    assert "1 missing tensor (model.layers.1.self_attn.k_proj.weight)" in str(refused.value)
    assert "model.layers.0.mlp.down_proj.weight is [80, 48] and must be [48, 80]" in str(refused.value)
    assert source.read_names == []


def test_tensors_beyond_the_model_are_ignored_aloud(family: str, capsys: pytest.CaptureFixture[str]):
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes_by_hand(family, True).items()}
    # in old files; no weight
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(10, np.float32)
    config = small_config(family, tie_word_embeddings=True)
    build_model(config, FakeTensors(tensors), "float32")
    assert "ignored" not in capsys.readouterr().err
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(80, np.float32)
    build_model(config, FakeTensors(tensors), "float32")
    assert "ignored" in capsys.readouterr().err


def test_reading_and_writing_needs_no_torch():
    """The test runs a separate process in which torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; import torch_bridge, torch_bridge.adapter, torch_bridge.tensors"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
