"""Adds LoRA adapters to projections and initialises them; `model/linear.py` computes with them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpack.constants import WHOLE_MODULES
from jaxpack.errors import InputError, check_type
from jaxpack.model.linear import Linear, LoraAdapter
from jaxpack.model.moe import Experts
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import TRAINED, freeze, is_trained, non_finite, weight_of
from jaxpack.settings import LoraConfig


def add_lora(model: Transformer, config: LoraConfig) -> Transformer:
    """Adds adapters to a model, in place, and returns it; only adapters and `modules_to_save` stay trained.

    The factors are initialised as PEFT does: `lora_a` uniform in +-1/sqrt(in), `lora_b` zero, both float32. Experts get
    adapters only if `target_parameters` names their matrices.

    Raises:
      InputError: a name in `target_modules` or `target_parameters` is no projection, or no experts' matrix, of this
        model, a name in a pattern has no adapter, only one of two tied matrices is in `modules_to_save`, or the model
        has adapters already.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> model = jaxpack.add_lora(model, jaxpack.LoraConfig(r=8, target_modules="q_proj,v_proj"))
    """
    check_type("config", config, LoraConfig)
    if adapters(model):
        raise InputError("`model` must be without LoRA adapters, got one that has them.")
    linears = [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    known = [name for linear in linears for name, _ in linear.projections]
    wanted = tuple(known) if config.target_modules == "all-linear" else config.target_modules
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        hint = " `target_parameters` names the experts' matrices, such as 'mlp.experts.down_proj'."
        hint = hint if experts_of(model) else ""
        raise InputError(f"`target_modules` must be 'all-linear' or among {sorted(known)}, got {unknown}.{hint}")
    experts = _chosen_experts(model, config)
    config = _with_full_names(config, experts)
    with_adapter = {*wanted, *(module.name for module in experts)}
    without = sorted({name for name, _ in (*config.rank_pattern, *config.alpha_pattern)} - with_adapter)
    if without:
        raise InputError(f"`rank_pattern` and `alpha_pattern` must be of projections with an adapter, got {without}.")
    whole = set(config.modules_to_save)
    if model.config.tie_word_embeddings and len(whole) == 1:
        raise InputError(f"`modules_to_save` must be both of {WHOLE_MODULES} where they are tied, got {sorted(whole)}.")
    if whole:  # They are trained from copies of the weights.
        model.read_weights()
    attributes = {"embed_tokens": "embedding", "lm_head": model.head_name}
    trained = {attributes[name] for name in whole}
    freeze(model, leave_out=trained)
    for name in trained:
        variable = getattr(model, name)
        if not is_trained(variable):  # it was frozen before, perhaps in a form that cannot be trained
            setattr(model, name, TRAINED(weight_of(variable).dense(model.dtype)))
    rngs = nnx.Rngs(config.seed)

    def adapter(name: str, stack: tuple[int, ...], out_features: int, in_features: int) -> LoraAdapter:
        rank, bound = config.rank_of(name), 1 / math.sqrt(in_features)  # kaiming_uniform(a=sqrt(5))
        lora_a = jax.random.uniform(rngs.params(), (*stack, rank, in_features), jnp.float32, -bound, bound)
        lora_b = jnp.zeros((*stack, out_features, rank), jnp.float32)
        return LoraAdapter(lora_a, lora_b, config.scaling_of(name), config.lora_dropout)

    for linear in linears:
        *layers, _, in_features = linear.weight.shape
        for name, size in linear.projections:
            if name in wanted:
                linear.lora[name] = adapter(name, tuple(layers), size, in_features)
    for module in experts:
        *layers, rows, in_features = module.weight.shape
        stack = (*layers, module.num_experts)
        module.lora[module.name] = adapter(module.name, stack, rows // module.num_experts, in_features)
    model.lora_config = config
    return model


def ends_with(name: str, end: str) -> bool:
    """Returns whether the last parts of a name with dots are `end`, as PEFT matches names."""
    return f".{name}".endswith(f".{end}")


def _chosen_experts(model: Transformer, config: LoraConfig) -> list[Experts]:
    """Returns the modules whose names end with a name in `target_parameters`, as PEFT matches them."""
    modules = experts_of(model)
    found = {end: [module for module in modules if ends_with(module.name, end)] for end in config.target_parameters}
    if unknown := [end for end, those in found.items() if not those]:
        if not modules:
            raise InputError(
                f"`target_parameters` must be empty for a model without experts, got {unknown}. Name its projections in"
                " `target_modules` instead."
            )
        raise InputError(f"`target_parameters` must be among {sorted(one.name for one in modules)}, got {unknown}.")
    return [module for module in modules if any(module in those for those in found.values())]


def _with_full_names(config: LoraConfig, experts: list[Experts]) -> LoraConfig:
    """Returns the settings with the full names of these experts' matrices, also in patterns."""

    def full(name: str) -> str:
        return next((one.name for one in experts if ends_with(one.name, name)), name)

    patterns = {
        field: tuple((full(name), value) for name, value in getattr(config, field))
        for field in ("rank_pattern", "alpha_pattern")
    }
    return dataclasses.replace(config, target_parameters=tuple(one.name for one in experts), **patterns)


def untie(model: Transformer) -> None:
    """Gives a model that ties its head to its embedding a head of its own, with the same values, in place."""
    assert model.config.tie_word_embeddings, "the head is already a matrix of its own"
    head = weight_of(model.embedding).dense(model.dtype)
    model.lm_head = TRAINED(jnp.array(head, copy=True))  # a step may donate both matrices, each once
    model.config = dataclasses.replace(model.config, tie_word_embeddings=False)


def adapters(model: Transformer) -> dict[str, LoraAdapter]:
    """Returns the model's adapters by the name of their projection, empty without LoRA.

    Their factors are stacked over layers. Those of experts are stacked over layers and experts, and have the name of
    the matrices of all experts together, such as "mlp.experts.down_proj".
    """
    check_type("model", model, Transformer)  # checked here for all callers
    return {
        name: adapter
        for _, module in nnx.iter_modules(model)
        if isinstance(module, Linear | Experts)
        for name, adapter in module.lora.items()
    }


def matrix_sizes(model: Transformer) -> dict[str, tuple[int, int]]:
    """Returns the output and input channels of everything that may have an adapter, by the names of `adapters`."""
    sizes: dict[str, tuple[int, int]] = {}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            sizes |= {name: (size, module.weight.shape[-1]) for name, size in module.projections}
        elif isinstance(module, Experts):
            *_, rows, in_features = module.weight.shape
            sizes[module.name] = rows // module.num_experts, in_features
    return sizes


def experts_of(model: Transformer) -> list[Experts]:
    """Returns the modules that hold experts' matrices, in the order of the computation; empty for a dense model."""
    found = [module for _, module in nnx.iter_modules(model) if isinstance(module, Experts)]
    return sorted(found, key=lambda module: module.name, reverse=True)  # "gate_up_proj", then "down_proj"


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
        if isinstance(module, Linear | Experts):
            module.lora = nnx.Dict()
    view.lora_config = None
    return view
