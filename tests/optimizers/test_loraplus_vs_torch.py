"""Tests that LoRA+ has PEFT's updates, changes nothing where it is off, and is refused where there is no adapter."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import small_model

from jaxpack import InputError, LoraConfig, TrainConfig
from jaxpack.model.lora import adapters
from jaxpack.model.weights import split_trained
from jaxpack.optimizers.optimizer import make_optimizer, resolve_optimizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
peft_optimizers = pytest.importorskip("peft.optimizers")

SETTINGS = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.0}
NAMES = ("q_proj", "down_proj")
LORA = LoraConfig(r=4, target_modules=NAMES)


def torch_model(model) -> torch.nn.Module:
    """Returns PEFT's adapters with the values of the model's, in layers of the same shapes."""
    ours = adapters(model)
    layers = torch.nn.ModuleList()
    for _ in range(2):
        sizes = {name: (ours[name].lora_a.shape[-1], ours[name].lora_b.shape[-2]) for name in NAMES}
        layers.append(torch.nn.ModuleDict({name: torch.nn.Linear(*size) for name, size in sizes.items()}))
    config = peft.LoraConfig(r=4, target_modules=list(NAMES), use_dora=model.lora_config.use_dora)
    found = peft.get_peft_model(torch.nn.Sequential(layers), config)
    for name, parameter in found.named_parameters():
        if parameter.requires_grad:
            layer, side, projection = place_of(name)
            parameter.data = torch.tensor(np.asarray(getattr(ours[projection], side)[layer]))
    return found


def place_of(name: str) -> tuple[int, str, str]:
    """Returns the layer, the array and the projection of one of PEFT's parameters."""
    layer, projection, array = re.search(r"\.(\d)\.(\w+_proj)\.(lora_(?:[AB]|magnitude))", name).groups()
    return int(layer), "magnitude" if array == "lora_magnitude" else array.lower(), projection


@pytest.mark.parametrize("use_dora", [False, True])
def test_updates_are_those_of_peft(use_dora):
    model = small_model("llama", lora=dataclasses.replace(LORA, use_dora=use_dora))
    theirs = torch_model(model)
    their_optimizer = peft_optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    config = TrainConfig(**SETTINGS, loraplus_lr_ratio=16)
    optimizer = make_optimizer(config, optax.constant_schedule(1e-3), model)
    _, ours, _ = split_trained(model)
    state, rng = optimizer.init(ours), np.random.default_rng(0)
    for _ in range(4):
        gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), ours)
        updates, state = optimizer.update(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)
        by_name = {path[-3:]: leaf for path, leaf in arrays_of(gradients)}
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                layer, side, projection = place_of(name)
                parameter.grad = torch.tensor(np.asarray(by_name["lora", projection, side][layer]))
        their_optimizer.step()
    by_name = {path[-3:]: leaf for path, leaf in arrays_of(ours)}
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            layer, side, projection = place_of(name)
            # Adam's updates are about the learning rate, rounded to float32 a few times.
            np.testing.assert_allclose(by_name["lora", projection, side][layer], parameter.detach(), atol=1e-6)
            compared += 1
    assert compared == 2 * 2 * (2 + use_dora)  # layers, projections, factors with magnitudes


def arrays_of(tree) -> list[tuple[tuple[str, ...], jax.Array]]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), leaf) for path, leaf in paths]


@pytest.mark.parametrize("ratio", [1, 1.0, None])
def test_a_ratio_of_one_is_the_same_program(ratio):
    model = small_model("llama", lora=LORA)
    _, ours, _ = split_trained(model)

    def program(config: TrainConfig) -> str:
        optimizer, _ = resolve_optimizer(None, config, 10, model)
        return jax.jit(optimizer.update).lower(ours, jax.eval_shape(optimizer.init, ours), ours).as_text()

    plain = program(TrainConfig())
    assert program(TrainConfig(loraplus_lr_ratio=ratio)) == plain
    assert program(TrainConfig(loraplus_lr_ratio=2)) != plain


def test_it_is_refused_where_nothing_would_read_it():
    config = TrainConfig(loraplus_lr_ratio=16.0)
    with pytest.raises(
        InputError, match=r"`loraplus_lr_ratio` must be None for a model without adapters, got 16\.0: it"
    ):
        resolve_optimizer(None, config, 10, small_model("llama"))
    with pytest.raises(InputError, match="`loraplus_lr_ratio` must be None if `optimizer` is an optax transformation"):
        resolve_optimizer(optax.sgd(1.0), config, 10, small_model("llama", lora=LORA))
    for wrong in (0, -1, float("inf"), "16", True):
        with pytest.raises(InputError, match="`loraplus_lr_ratio` must be a positive number or None, got"):
            TrainConfig(loraplus_lr_ratio=wrong)
