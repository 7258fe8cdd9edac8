"""Tests DoRA in the model: its start, and its steps with every choice of `remat` and each form of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_documents, small_model
from programs import equations

from jaxpack.data.batching import Batches
from jaxpack.errors import InputError
from jaxpack.generation.decode import prefill
from jaxpack.model.linear import Linear, LoraAdapter, spread_size
from jaxpack.model.lora import adapters, add_lora
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.remat import KEPT
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import freeze, num_parameters, weight_of
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.step import loss_and_gradients, split_trainable

DORA = LoraConfig(r=4, use_dora=True)


def changed(model: Transformer) -> Transformer:
    """Returns the model with factors and magnitudes that all matter."""
    for i, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
        noise = 0.1 * jax.random.normal(jax.random.key(100 + i), adapter.magnitude.shape)
        adapter.magnitude.set_value(adapter.magnitude[...] * (1 + noise))
    return model


def dense_twin(model: Transformer) -> Transformer:
    """Returns the model without adapters, in whose weights they are merged, in float64."""
    twin = small_model("qwen3")
    linears = {path: one for path, one in nnx.iter_modules(model) if isinstance(one, Linear)}
    for path, plain in nnx.iter_modules(twin):
        if not isinstance(plain, Linear):
            continue
        weight, first = np.asarray(weight_of(linears[path].weight).dense(jnp.float32), np.float64), 0
        for name, size in plain.projections:
            one = linears[path].lora.get(name)
            for layer in range(model.config.num_layers) if one is not None else ():
                if (arrays := one.at(layer)) is None:
                    continue
                a, b, magnitude = (np.asarray(array, np.float64) for array in arrays)
                rows = weight[layer, first : first + size] + one.scaling * b @ a
                rows *= (magnitude / np.linalg.norm(rows, axis=1))[:, None]
                weight[layer, first : first + size] = rows
            first += size
        plain.weight.set_value(jnp.asarray(weight, jnp.float32))
    return twin


def test_a_new_adapter_changes_nothing_and_counts_its_magnitudes():
    model, tokens = small_model("qwen3"), jnp.arange(20)[None]
    before, config = model.logits(tokens), model.config
    add_lora(model, DORA)
    np.testing.assert_allclose(model.logits(tokens), before, atol=1e-6)
    plain = num_parameters(split_trainable(small_model("qwen3", lora=LoraConfig(r=4)))[1])
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    rows = heads + 2 * config.hidden_size + 2 * config.intermediate_size
    assert num_parameters(split_trainable(model)[1]) == plain + config.num_layers * rows


def test_training_and_generation_compute_with_rows_of_these_norms():
    lora = LoraConfig(r=4, use_dora=True, target_modules="q_proj,v_proj,o_proj,up_proj,layers.1.mlp.down_proj")
    model = changed(small_model("qwen3", lora=lora))
    tokens = jnp.arange(20)[None]
    expected = dense_twin(model).logits(tokens)
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-5)
    logits, _ = prefill(model, tokens, jnp.array([20]), size=24)
    np.testing.assert_allclose(logits[0], expected[0, -1], atol=1e-5)
    assert np.abs(small_model("qwen3").logits(tokens) - expected).max() > 0.01


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    def linear(dropout: float) -> Linear:
        made = Linear(6, {"a": 4, "b": 3}, dtype=jnp.float32, rngs=nnx.Rngs(0))
        factors = jax.random.normal(jax.random.key(0), (2, 6)), jax.random.normal(jax.random.key(1), (4, 2))
        made.lora["a"] = LoraAdapter(*factors, 2.0, dropout, magnitude=jnp.arange(1.0, 5.0))
        return made

    x = jnp.ones((1, 1, 6))
    plain = linear(0.0)(x)
    np.testing.assert_array_equal(linear(0.5)(x), plain)
    drawn = linear(0.5)(jnp.ones((4000, 1, 6)), jax.random.split(jax.random.key(0), 4000))[:, None]
    assert jnp.std(drawn[..., :4]) > 0.1
    np.testing.assert_allclose(drawn[..., 4:], jnp.broadcast_to(plain[None, ..., 4:], drawn[..., 4:].shape), atol=1e-6)
    error = 5 * jnp.std(drawn, axis=0) / np.sqrt(4000)
    assert jnp.all(jnp.abs(drawn.mean(axis=0) - plain) <= error + 1e-5)


@functools.cache
def batch():
    config = TrainConfig(max_length=128, per_device_train_batch_size=2, max_steps=1)
    return jax.tree.map(jnp.asarray, Batches(random_documents([17, 40, 3, 31]), config)[0])


@functools.cache
def results(store: str, remat: str):
    model = small_model("gemma3" if store == "dense" else "qwen3")
    if store == "4-bit":
        freeze(model, nf4_store(8))
    lora = LoraConfig(r=4, use_dora=True, target_modules="q_proj,o_proj,up_proj,layers.1.mlp.down_proj")
    graph, trainable, frozen = split_trainable(changed(add_lora(model, lora)))
    return jax.jit(functools.partial(loss_and_gradients, graph, remat=remat))(trainable, frozen, batch())


@pytest.mark.one_in(4)
@pytest.mark.parametrize("remat", [remat for remat in KEPT if remat != "full"])
@pytest.mark.parametrize("store", ["dense", "4-bit"])
def test_loss_and_gradients_are_the_same_for_every_choice(store, remat):
    (loss, gradients), (want, want_gradients) = results(store, remat), results(store, "full")
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_norms_are_computed_once_for_both_passes():
    """Each choice of `remat` keeps them: the backward pass makes no square root but those of norms of tokens."""

    def square_roots(lora: LoraConfig) -> int:
        graph, trainable, frozen = split_trainable(small_model("llama", lora=lora))
        program = jax.make_jaxpr(functools.partial(loss_and_gradients, graph))(trainable, frozen, batch())
        return sum(equation.primitive.name == "sqrt" for equation in equations(program.jaxpr))

    assert square_roots(DORA) - square_roots(LoraConfig(r=4)) == 4  # one for each matrix of a layer


def test_adapters_of_some_layers_take_magnitudes_of_all():
    model = small_model("qwen3", lora=LoraConfig(r=4, use_dora=True, target_modules="q_proj", layers_to_transform=1))
    (adapter,) = adapters(model).values()
    assert adapter.magnitude.shape == (1, 80)
    assert spread_size(adapter, 2) == 2 * (4 * 48 + 80 * 4 + 80)


def test_experts_have_no_magnitudes():
    with pytest.raises(InputError, match=r"`use_dora` must be off with `target_parameters`.*as in PEFT"):
        LoraConfig(use_dora=True, target_parameters="mlp.experts.down_proj")
    model = add_lora(small_model("qwen3_moe"), DORA)  # those of the attention have
    assert all(adapter.magnitude is not None for adapter in adapters(model).values())
