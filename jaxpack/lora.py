"""LoRA: which projections get an adapter, and how it starts. The algebra is in `layers.Linear`."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpack.config import LoraConfig
from jaxpack.errors import InputError
from jaxpack.layers import Linear, LoraAdapter
from jaxpack.transformer import Transformer


def add_lora(model: Transformer, config: LoraConfig) -> Transformer:
    """Adds adapters to a model, in place, and returns it; from then on only they are trained.

    Initialised as PEFT does: `lora_a` uniform in +-1/sqrt(in), `lora_b` zero, both float32.

    Raises:
      InputError: a name in `target_modules` is no projection of this model, or the model has adapters already.
    """
    if adapters(model):
        raise InputError("`model` must be without LoRA adapters, got one that has them.")
    linears = [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    known = [name for linear in linears for name, _ in linear.projections]
    wanted = tuple(known) if config.target_modules == "all-linear" else config.target_modules
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise InputError(f"`target_modules` must be 'all-linear' or among {sorted(known)}, got {unknown}.")
    rngs = nnx.Rngs(config.seed)
    for linear in linears:
        *layers, _, in_features = linear.weight.shape
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform(a=sqrt(5))
        for name, size in linear.projections:
            if name in wanted:
                lora_a = jax.random.uniform(rngs.params(), (*layers, config.r, in_features), jnp.float32, -bound, bound)
                lora_b = jnp.zeros((*layers, size, config.r), jnp.float32)
                linear.lora[name] = LoraAdapter(lora_a, lora_b, config.scaling, config.lora_dropout)
    model.lora_config = config
    return model


def adapters(model: Transformer) -> dict[str, LoraAdapter]:
    """The model's adapters by projection name; empty without LoRA. Their factors are stacked over layers."""
    return {
        name: adapter
        for _, linear in nnx.iter_modules(model)
        if isinstance(linear, Linear)
        for name, adapter in linear.lora.items()
    }
