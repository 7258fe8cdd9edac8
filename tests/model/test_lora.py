"""Tests which projections get a LoRA adapter, and what an adapter adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import small_model

from jaxpack.errors import InputError
from jaxpack.model.linear import Linear, LoraAdapter
from jaxpack.model.lora import adapters, add_lora, untie
from jaxpack.settings import LoraConfig
from jaxpack.train.step import split_trainable

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def linear_with(names: list[str], scaling: float = 2.0, dropout: float = 0.0) -> Linear:
    """Makes three projections of one input; those in `names` get an adapter, each of another rank."""
    linear = Linear(6, {"a": 4, "b": 3, "c": 5}, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for rank, (name, size) in enumerate(linear.projections, 1):
        if name in names:
            key = jax.random.key(rank)
            lora_a, lora_b = jax.random.normal(key, (rank, 6)), jax.random.normal(key, (size, rank))
            linear.lora[name] = LoraAdapter(lora_a, lora_b, scaling, dropout)
    return linear


@pytest.mark.parametrize("names", [["a"], ["b"], ["c"], ["a", "c"], ["c", "b"], ["a", "b", "c"]], ids="".join)
def test_an_adapter_adds_its_product_to_its_own_rows(names):
    linear = linear_with(names)
    x = jax.random.normal(jax.random.key(9), (2, 3, 6))
    weight = np.asarray(linear.weight[...], np.float64)
    first = 0
    for name, size in linear.projections:
        if name in names:
            adapter = linear.lora[name]
            weight[first : first + size] += 2.0 * np.asarray(adapter.lora_b[...]) @ np.asarray(adapter.lora_a[...])
        first += size
    np.testing.assert_allclose(linear(x), np.asarray(x) @ weight.T, atol=1e-5)


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    linear, plain = linear_with(["a"], dropout=0.5), linear_with(["a"])
    x = jnp.ones((1, 1, 6))
    np.testing.assert_array_equal(linear(x), plain(x))
    keys = jax.random.split(jax.random.key(0), 4000)  # one for each row
    drawn = linear(jnp.ones((4000, 1, 6)), keys)[:, None]
    assert jnp.std(drawn[..., :4]) > 0.1
    assert jnp.all(drawn[..., 4:] == drawn[:1, ..., 4:])  # dropout acts only where there is an adapter
    error = 5 * jnp.std(drawn, axis=0) / np.sqrt(len(keys))
    assert jnp.all(jnp.abs(drawn.mean(axis=0) - plain(x)) <= error + 1e-6)


def test_a_new_adapter_changes_nothing(family):
    model = small_model(family)
    tokens = jnp.arange(20)[None]
    before = model.logits(tokens)
    add_lora(model, LoraConfig(r=4))
    np.testing.assert_allclose(model.logits(tokens), before, atol=1e-6)  # matmuls of other shapes add up otherwise


def test_targets(family):
    assert set(adapters(add_lora(small_model(family), LoraConfig()))) == ALL
    some = LoraConfig(target_modules=("q_proj", "down_proj"))
    assert set(adapters(add_lora(small_model(family), some))) == {"q_proj", "down_proj"}
    assert set(adapters(add_lora(small_model(family), LoraConfig(target_modules="k_proj")))) == {"k_proj"}


def test_scaling():
    assert LoraConfig(r=4, lora_alpha=8).scaling == 2
    assert LoraConfig(r=4, lora_alpha=8, use_rslora=True).scaling == 4


def test_ranks_and_alphas_by_projection(family):
    lora = LoraConfig(r=4, lora_alpha=8, rank_pattern="q_proj=2, up_proj=6", alpha_pattern={"up_proj": 3})
    assert lora == LoraConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 2, "up_proj": 6}, alpha_pattern="up_proj=3")
    found = adapters(add_lora(small_model(family), lora))
    for name, (rank, scaling) in {"q_proj": (2, 4), "up_proj": (6, 0.5), "k_proj": (4, 2)}.items():
        assert found[name].lora_a.shape[-2] == found[name].lora_b.shape[-1] == rank
        assert found[name].scaling == scaling
    with pytest.raises(InputError, match=r"must be of projections with an adapter, got \['k_proj'\]"):
        add_lora(small_model(family), LoraConfig(target_modules="q_proj", rank_pattern="k_proj=2"))
    for wrong in ("q_proj", "q_proj=", "q_proj=2.5", "q_proj=0", {"q_proj": True}, {"q_proj": "2"}, [7]):
        with pytest.raises(InputError, match="`rank_pattern` must map projections to whole numbers of at least 1"):
            LoraConfig(rank_pattern=wrong)


def test_matrices_are_trained_whole_beside_adapters(family):
    tied = small_model(family).config.tie_word_embeddings
    model = add_lora(small_model(family), LoraConfig(target_modules="q_proj", modules_to_save="lm_head,embed_tokens"))
    _, trainable, _ = split_trainable(model)
    assert len(jax.tree.leaves(trainable)) == (3 if tied else 4)
    if tied:
        with pytest.raises(InputError, match=r"must be both of .* where they are tied"):
            add_lora(small_model(family), LoraConfig(modules_to_save="lm_head"))
    with pytest.raises(InputError, match="`modules_to_save` must be among"):
        LoraConfig(modules_to_save="norm")


def test_the_start_follows_from_the_seed(family):
    def start(seed: int) -> np.ndarray:
        return np.asarray(adapters(add_lora(small_model(family), LoraConfig(seed=seed)))["q_proj"].lora_a[...])

    np.testing.assert_array_equal(start(1), start(1))
    assert (start(1) != start(2)).any()


def test_what_cannot_be_is_refused(family):
    with pytest.raises(InputError, match=r"`target_modules` must be .*got \['query'\]"):
        add_lora(small_model(family), LoraConfig(target_modules=("q_proj", "query", "lm_head")))
    with pytest.raises(InputError, match="`model` must be without LoRA adapters"):
        add_lora(add_lora(small_model(family), LoraConfig()), LoraConfig())
    with pytest.raises(InputError, match="`r` must be at least 1, got 0"):
        LoraConfig(r=0)


def test_an_untied_model_computes_the_same_with_two_matrices():
    model, tokens = small_model("qwen3"), jnp.arange(12)[None]
    before = model.logits(tokens)
    untie(model)
    np.testing.assert_array_equal(model.logits(tokens), before)
    model.lm_head.set_value(model.lm_head[...] + 1)
    assert (model.logits(tokens) != before).any()
    np.testing.assert_array_equal(model.embed(tokens), small_model("qwen3").embed(tokens))
    add_lora(model, LoraConfig(r=2, modules_to_save="lm_head"))  # a tied model has no head to train alone
