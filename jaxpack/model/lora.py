"""Adds LoRA adapters to projections and initialises them; `model/linear.py` computes with them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpack.constants import WHOLE_MODULES
from jaxpack.errors import InputError, check_type
from jaxpack.kernels.weight import Weight
from jaxpack.model.linear import Linear, LoraAdapter
from jaxpack.model.moe import Experts, experts_of
from jaxpack.model.targets import TABLES, Layers, chosen_layers, ends_with, names_for
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import TRAINED, freeze, is_trained, non_finite, weight_of
from jaxpack.settings import LoraConfig


def add_lora(model: Transformer, config: LoraConfig) -> Transformer:
    """Adds adapters to a model, in place, and returns it; only adapters and `modules_to_save` stay trained.

    The factors are initialised as PEFT does: `lora_a` uniform in +-1/sqrt(in), `lora_b` zero, both float32. They are
    stacked over the layers that have the adapter, which may be other layers for each projection. Experts get adapters
    only if `target_parameters` names their matrices, and the embedding and the head only if `target_modules` names them
    ("embed_tokens", "lm_head"). The adapter of an embedding starts as PEFT's, too: standard normal values in `lora_a`
    `[R, D]` (PEFT's `lora_embedding_B`, transposed), and zeros in `lora_b` `[V, R]`. If the model ties the two, each
    adapter changes only its own use of the matrix, as in PEFT, and a merged model is untied.

    With DoRA, the magnitudes start as the norms of the rows of the weights, which are read for this if they are still
    in their files.

    Raises:
      InputError: a name in `target_modules` or `target_parameters` is no projection, or no experts' matrix, of this
        model, a pattern matches none, a layer does not exist, a name in `rank_pattern` or `alpha_pattern` has no
        adapter, only one of two tied matrices is in `modules_to_save`, one of them is in `target_modules`, too, DoRA is
        asked for the embedding or the head, or the model has adapters already.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> model = jaxpack.add_lora(model, jaxpack.LoraConfig(r=8, target_modules="q_proj,v_proj"))
    """
    check_type("config", config, LoraConfig)
    if adapters(model):
        raise InputError("`model` must be without LoRA adapters, got one that has them.")
    chosen = chosen_layers(model, config)
    experts = [module for module in experts_of(model) if module.name in chosen]
    parameters = names_for(model, {module.name: chosen[module.name] for module in experts})
    config = _with_full_names(config, experts, parameters)
    without = sorted({name for name, _ in (*config.rank_pattern, *config.alpha_pattern)} - chosen.keys())
    if without:
        raise InputError(f"`rank_pattern` and `alpha_pattern` must be of projections with an adapter, got {without}.")
    whole = set(config.modules_to_save)
    tables = [name for name in TABLES if name in chosen]
    if tables and config.use_dora:
        raise InputError(f"`use_dora` must be off with {' and '.join(tables)} in `target_modules`, got True.")
    if both := [name for name in tables if name in whole or (whole and model.config.tie_word_embeddings)]:
        raise InputError(
            f"`target_modules` must be without {' and '.join(both)}, because `modules_to_save` trains the same matrix"
            " whole, got it in both. Leave it out of one of them."
        )
    if model.config.tie_word_embeddings and len(whole) == 1:
        raise InputError(f"`modules_to_save` must be both of {WHOLE_MODULES} where they are tied, got {sorted(whole)}.")
    if whole or config.use_dora:  # They are trained from copies of the weights, and magnitudes from their norms.
        model.read_weights()
    attributes = {"embed_tokens": "embedding", "lm_head": model.head_name}
    trained = {attributes[name] for name in whole}
    freeze(model, leave_out=trained)
    for name in trained:
        variable = getattr(model, name)
        if not is_trained(variable):  # it was frozen before, perhaps in a form that cannot be trained
            setattr(model, name, TRAINED(weight_of(variable).dense(model.dtype)))
    rngs = nnx.Rngs(config.seed)

    def adapter(
        name: str, experts: tuple[int, ...], out_features: int, in_features: int, magnitude: Any = None
    ) -> LoraAdapter:
        rank, bound = config.rank_of(name), 1 / math.sqrt(in_features)  # kaiming_uniform(a=sqrt(5))
        layers = chosen[name]
        stack = (len(layers), *experts)
        lora_a = jax.random.uniform(rngs.params(), (*stack, rank, in_features), jnp.float32, -bound, bound)
        lora_b = jnp.zeros((*stack, out_features, rank), jnp.float32)
        some = layers if len(layers) < model.config.num_layers else None
        return LoraAdapter(lora_a, lora_b, config.scaling_of(name), config.lora_dropout, some, magnitude)

    linears = [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    for linear in linears:
        first = 0
        for name, size in linear.projections:
            if name in chosen:
                norms = None
                if config.use_dora:
                    norms = _norms(weight_of(linear.weight), chosen[name], first, size, model.dtype)
                linear.lora[name] = adapter(name, (), size, linear.weight.shape[-1], norms)
            first += size
    for module in experts:
        *_, rows, in_features = module.weight.shape
        E = module.num_experts
        module.lora[module.name] = adapter(module.name, (E,), rows // E, in_features)
    V, D = model.config.vocab_size, model.config.hidden_size
    for name in tables:
        one = adapter(name, (), V, D)
        one.layers = None  # it is in no layer
        if name == "embed_tokens":
            one.lora_a.set_value(jax.random.normal(rngs.params(), one.lora_a.shape, jnp.float32))
        model.lora[name] = one
    model.lora_config = config
    return model


def _with_full_names(config: LoraConfig, experts: list[Experts], parameters: tuple[str, ...]) -> LoraConfig:
    """Returns the settings with `parameters` as targets, and full names of these experts' matrices in patterns."""

    def full(name: str) -> str:
        return next((one.name for one in experts if ends_with(one.name, name)), name)

    patterns = {
        field: tuple((full(name), value) for name, value in getattr(config, field))
        for field in ("rank_pattern", "alpha_pattern")
    }
    return dataclasses.replace(config, target_parameters=parameters, **patterns)


def _norms(weight: Weight, layers: tuple[int, ...], first: int, size: int, dtype: DTypeLike) -> Float[Array, "L O"]:
    """Returns the norms of a projection's rows in some layers, float32."""
    rows = (weight.at(layer).dense_rows(first, size, dtype).astype(jnp.float32) for layer in layers)
    return jnp.stack([jnp.linalg.norm(one, axis=1) for one in rows])


def untie(model: Transformer) -> None:
    """Gives a model that ties its head to its embedding a head of its own, with the same values, in place."""
    assert model.config.tie_word_embeddings, "the head is already a matrix of its own"
    head = weight_of(model.embedding).dense(model.dtype)
    model.lm_head = TRAINED(jnp.array(head, copy=True))  # a step may donate both matrices, each once
    model.config = dataclasses.replace(model.config, tie_word_embeddings=False)


def adapters(model: Transformer) -> dict[str, LoraAdapter]:
    """Returns the model's adapters by the name of their projection, empty without LoRA.

    Their factors are stacked over the layers that have the adapter. Those of experts are stacked over layers and
    experts, and have the name of the matrices of all experts together, such as "mlp.experts.down_proj". Those of
    "embed_tokens" and "lm_head" are stacks of one.
    """
    check_type("model", model, Transformer)  # checked here for all callers
    return {
        name: adapter
        for _, module in nnx.iter_modules(model)
        if isinstance(module, Linear | Experts | Transformer)
        for name, adapter in module.lora.items()
    }


def layers_of_adapters(model: Transformer) -> Layers:
    """Returns the layers that have an adapter, by the names of `adapters`."""
    every = tuple(range(model.config.num_layers))
    return {name: (0,) if name in TABLES else adapter.layers or every for name, adapter in adapters(model).items()}


def matrix_sizes(model: Transformer) -> dict[str, tuple[int, int]]:
    """Returns the output and input channels of everything that may have an adapter, by the names of `adapters`."""
    sizes = dict.fromkeys(TABLES, (model.config.vocab_size, model.config.hidden_size))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            sizes |= {name: (size, module.weight.shape[-1]) for name, size in module.projections}
        elif isinstance(module, Experts):
            *_, rows, in_features = module.weight.shape
            sizes[module.name] = rows // module.num_experts, in_features
    return sizes


def require_finite(model: Transformer) -> None:
    """Refuses a model whose trained parameters hold NaN or infinity; the device reads them once.

    Raises:
      InputError: such a value was found.
    """
    if wrong := non_finite(nnx.state(model, TRAINED)):
        others = f" and {len(wrong) - 1} other arrays" if len(wrong) > 1 else ""
        raise InputError(
            f"`model` must have trained weights that are finite, got NaN or infinity in {wrong[0]}{others}. Use a"
            " checkpoint or an adapter from before the training failed, and train with a lower `learning_rate`."
        )


def without_adapters(model: Transformer) -> Transformer:
    """Returns a view of the model, around the same arrays, that has no adapters."""
    view = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(view):
        if isinstance(module, Linear | Experts | Transformer):
            module.lora = nnx.Dict()
    view.lora_config = None
    return view
