"""Tests which layers of which projections get an adapter, and that the other layers compute as without one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_documents, small_config, small_model

from jaxpack import generate
from jaxpack.data.batching import Batches
from jaxpack.errors import InputError
from jaxpack.model.lora import adapters, add_lora
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.targets import chosen_layers, names_for
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import freeze, move_to_host, num_parameters
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import argument_bytes, peak_bytes
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.step import loss_and_gradients, split_trainable

THREE = {"num_layers": 3}
CHOICES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "names": ({"target_modules": "q_proj,mlp.down_proj"}, {"q_proj": (0, 1, 2), "down_proj": (0, 1, 2)}),
    "paths": (
        {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "v_proj"]},
        {"q_proj": (1, 2), "v_proj": (0, 1, 2)},
    ),
    "a pattern": ({"target_modules": r".*\.self_attn\.[qk]_proj"}, {"q_proj": (0, 1, 2), "k_proj": (0, 1, 2)}),
    "layers of a pattern": (
        {"target_modules": r"model\.layers\.(0\.self_attn\.q_proj|[12]\.mlp\.down_proj)"},
        {"q_proj": (0,), "down_proj": (1, 2)},
    ),
    "layers": ({"target_modules": "q_proj", "layers_to_transform": [2, 0, 2]}, {"q_proj": (0, 2)}),
    "a layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {"q_proj": (1,)}),
    "a range": ({"target_modules": "q_proj", "layers_to_transform": "1-2"}, {"q_proj": (1, 2)}),
    "without some": (
        {"target_modules": "q_proj,v_proj", "exclude_modules": "layers.0.self_attn.q_proj"},
        {"q_proj": (1, 2), "v_proj": (0, 1, 2)},
    ),
    "without a pattern": (
        {"target_modules": "q_proj,v_proj", "exclude_modules": r".*\.[02]\..*v_proj", "layers_to_transform": "0,1"},
        {"q_proj": (0, 1), "v_proj": (1,)},
    ),
}


def abstract_model(family: str, lora: LoraConfig) -> Transformer:
    """Returns a model with adapters whose arrays are abstract."""
    make = lambda: add_lora(Transformer(small_config(family, **THREE), rngs=nnx.Rngs(0)), lora)  # noqa: E731
    return nnx.eval_shape(make)


@pytest.mark.parametrize("name", CHOICES)
def test_modules_are_chosen_as_peft_chooses_them(name):
    settings, expected = CHOICES[name]
    model = abstract_model("qwen3", LoraConfig(r=2, **settings))
    assert chosen_layers(model, model.lora_config) == expected
    for projection, layers in expected.items():
        adapter = adapters(model)[projection]
        assert adapter.lora_a.shape[0] == adapter.lora_b.shape[0] == len(layers)
        assert adapter.layers == (layers if len(layers) < 3 else None)
    again = LoraConfig(r=2, target_modules=names_for(model, expected))
    assert chosen_layers(model, again) == expected


def test_layers_are_read_from_numbers_lists_and_text():
    for given in (None, "", [], ()):
        assert LoraConfig(layers_to_transform=given).layers_to_transform == ()
    for given in ("0-3,7", " 7, 0 - 3", [0, 1, 2, 3, 7], ["0-3", 7], (*range(4), np.int64(7))):
        assert LoraConfig(layers_to_transform=given).layers_to_transform == (0, 1, 2, 3, 7)
    for wrong in (-1, "-1", "3-1", "1.5", 1.5, [True], ["x"], "0-", [[0]], "99999999999"):
        with pytest.raises(InputError, match="`layers_to_transform` must be numbers of layers from 0 on"):
            LoraConfig(layers_to_transform=wrong)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such layer": ({"layers_to_transform": "1-3"}, r"`layers_to_transform` .* 3 layers, 0 to 2, got \[3\]"),
    "no such path": (
        {"target_modules": "layers.3.self_attn.q_proj"},
        r"`target_modules` must be 'all-linear' or among",
    ),
    "no match": ({"target_modules": "q_proj|v_proj"}, r"must be a pattern that matches the whole path .* none"),
    "nothing to exclude": ({"exclude_modules": "c_attn"}, r"`exclude_modules` must be among .*got \['c_attn'\]"),
    "nothing is left": (
        {"target_modules": "q_proj", "exclude_modules": "q_proj"},
        "must leave at least one projection",
    ),
    "of another layer": (
        {"target_modules": "layers.0.self_attn.q_proj", "layers_to_transform": 1},
        "must leave at least one projection",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_module_fits_is_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        abstract_model("llama", LoraConfig(**settings))


def test_settings_that_peft_does_not_combine_are_refused():
    with pytest.raises(InputError, match=r"`layers_to_transform` must be left out beside the pattern"):
        LoraConfig(target_modules=".*q_proj", layers_to_transform=0)
    with pytest.raises(InputError, match=r"`layers_to_transform` must be left out beside `target_parameters`"):
        LoraConfig(target_parameters="mlp.experts.down_proj", layers_to_transform=0)
    for name in ("target_modules", "exclude_modules"):
        with pytest.raises(InputError, match=f"`{name}` must be names with commas between them, or a regular expr"):
            LoraConfig(**{name: "("})


# --- Computation ---

SOME = {"q_proj": (0, 2), "o_proj": (1,), "down_proj": (1, 2), "up_proj": (0, 1, 2)}
OF_EXPERTS = {"q_proj": (0, 2), "mlp.experts.gate_up_proj": (1,), "mlp.experts.down_proj": (0, 1)}


def store_4bit(model: Transformer) -> None:
    freeze(model.blocks, nf4_store(8))


STORES = {
    "dense": lambda model: None,
    "4-bit": store_4bit,
    "hosted": lambda model: move_to_host(model, layers=True),
}


def pair(family: str, layers: dict, store: str = "dense") -> tuple[Transformer, Transformer]:
    """Returns a model with adapters in some layers, and the same model with adapters in all that are zero elsewhere."""
    models = []
    for targets in (layers, {name: (0, 1, 2) for name in layers}):
        names = names_for(small_model(family, **THREE), targets)
        split = [tuple(name for name in names if (".experts." in name) == of_experts) for of_experts in (False, True)]
        lora = LoraConfig(r=4, target_modules=split[0], target_parameters=split[1])
        models.append(small_model(family, lora=lora, **THREE))
        STORES[store](models[-1])
    some, every = models
    for name, places in layers.items():
        few, all_of_them = adapters(some)[name], adapters(every)[name]
        for factor in ("lora_a", "lora_b"):
            value = getattr(few, factor)[...]
            spread = np.zeros_like(getattr(all_of_them, factor)[...])
            spread[list(places)] = value
            getattr(all_of_them, factor).set_value(jnp.asarray(spread))
    return some, every


@functools.cache
def batch():
    config = TrainConfig(max_length=128, per_device_train_batch_size=2, max_steps=1)
    return jax.tree.map(jnp.asarray, Batches(random_documents([17, 40, 3, 31]), config)[0])


CASES = [
    ("qwen3", SOME, "dense", "full"),
    ("qwen3", SOME, "4-bit", "none"),
    ("qwen3", SOME, "hosted", "offload"),
    ("qwen3_moe", OF_EXPERTS, "dense", "full"),
]


@pytest.mark.parametrize(("family", "layers", "store", "remat"), CASES, ids=[f"{x[0]}-{x[2]}-{x[3]}" for x in CASES])
def test_adapters_in_some_layers_are_adapters_that_are_zero_in_the_others(family, layers, store, remat):
    results = []
    for model in pair(family, layers, store):
        graph, trainable, frozen = split_trainable(model)
        loss, gradients = jax.jit(functools.partial(loss_and_gradients, graph, remat=remat))(trainable, frozen, batch())
        results.append((loss, adapters(nnx.merge(graph, gradients, frozen))))
    (loss, got), (expected_loss, expected) = results
    np.testing.assert_array_equal(loss, expected_loss)
    for name, places in layers.items():
        for factor in ("lora_a", "lora_b"):
            want = np.asarray(getattr(expected[name], factor)[...])[list(places)]
            assert np.abs(want).max() > 0
            np.testing.assert_array_equal(getattr(got[name], factor)[...], want)


@pytest.mark.slow
def test_text_is_generated_with_the_adapters_of_some_layers():
    some, every = pair("qwen3", SOME)
    for model in (some, every):  # adapters that change the text
        for adapter in adapters(model).values():
            adapter.lora_b.set_value(100 * adapter.lora_b[...])
    prompts = [[3, 4, 5], [6, 7]]
    texts = generate(some, prompts, max_new_tokens=6)
    assert texts == generate(every, prompts, max_new_tokens=6)
    assert texts != generate(small_model("qwen3", **THREE), prompts, max_new_tokens=6)


def test_all_layers_are_the_program_without_a_choice():
    def lowered(**settings: Any) -> str:
        graph, trainable, frozen = split_trainable(small_model("qwen3", lora=LoraConfig(r=4, **settings)))
        return jax.jit(functools.partial(loss_and_gradients, graph)).lower(trainable, frozen, batch()).as_text()

    assert lowered(layers_to_transform="0-1") == lowered(target_modules=r".*\.\w+_proj") == lowered()


def test_only_the_chosen_layers_count_as_parameters_and_all_take_memory():
    some, every = pair("qwen3", SOME)
    sizes = [num_parameters(split_trainable(model)[1]) for model in (some, every)]
    of = {name: sum(x[...].size for x in (one.lora_a, one.lora_b)) for name, one in adapters(every).items()}
    assert sizes == [sum(of[name] * len(layers) // 3 for name, layers in SOME.items()), sum(of.values())]
    few, all_of_them = (StepShape.of(model, (1, 2, 128)) for model in (some, every))
    assert few.trained == sizes[0]
    assert argument_bytes(all_of_them) - argument_bytes(few) == 12 * (sizes[1] - sizes[0])
    assert few.spread == sum(of[name] for name, layers in SOME.items() if len(layers) < 3)
    assert peak_bytes(few, "full") - argument_bytes(few) > peak_bytes(all_of_them, "full") - argument_bytes(all_of_them)
