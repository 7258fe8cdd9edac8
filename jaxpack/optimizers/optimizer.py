"""Makes the optimizer of a run, the one that its settings name or the user's own, and tells the bytes of its state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxpack.arguments import by_name
from jaxpack.errors import InputError
from jaxpack.model.lora import adapters
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import split_trained
from jaxpack.optimizers.adamw_8bit import scale_by_adam_8bit
from jaxpack.optimizers.matrices import each_alone, rows_of
from jaxpack.optimizers.muon import scale_by_muon_or_adam
from jaxpack.optimizers.placement import state_specs
from jaxpack.optimizers.schedules import make_schedule
from jaxpack.parallel.mesh import DeviceMesh
from jaxpack.parallel.placement import bytes_on_device, place
from jaxpack.settings import TrainConfig


def make_optimizer(
    config: TrainConfig, schedule: optax.Schedule, model: Transformer | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer that `optim` names, after clipping by the global gradient norm.

    Norm scales and biases have no weight decay. The decay is decoupled (multiplied by the learning rate, and added to
    the update), except SGD's, which is added to the gradient as in torch.

    Args:
      model: the model to train, whose arrays may be abstract; says which rows of an array are a projection. May be None
        for optimizers that work element by element.
    """

    def decays(parameters: nnx.State) -> nnx.State:
        def is_matrix(path: tuple, _: jax.Array) -> bool:
            return _names(path).isdisjoint(("scale", "bias"))

        return jax.tree_util.tree_map_with_path(is_matrix, parameters)

    decay = optax.add_decayed_weights(config.weight_decay, decays)
    rate = optax.scale_by_learning_rate(schedule)
    if config.loraplus_lr_ratio is not None:
        rate = optax.chain(optax.masked(optax.scale(config.loraplus_lr_ratio), _is_lora_b), rate)
    if config.optim == "sgd":
        return _clipped(config, optax.chain(decay, _momentum(**by_name(config.optim_args)), rate))
    return _clipped(config, optax.chain(_direction(config, model), decay, rate))


def _direction(config: TrainConfig, model: Transformer | None) -> optax.GradientTransformation:
    """Returns the transformation of gradients that names an optimizer, before weight decay and learning rate."""
    betas = config.adam_beta1, config.adam_beta2
    if config.optim == "adamw_8bit":
        return scale_by_adam_8bit(*betas, config.adam_epsilon, _num_matrices)
    if config.optim == "lion":
        return optax.scale_by_lion(*betas)
    adam = optax.scale_by_adam(*betas, config.adam_epsilon)
    if config.optim == "adamw":
        return adam
    assert model is not None, f"{config.optim} needs to know the projections of the model"
    rows = rows_of(model)
    if config.optim == "adafactor":
        # As transformers' `Trainer` sets it: no momentum, and the learning rate is that of the schedule.
        scale = optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=1, epsilon=1e-30)
        return each_alone(optax.chain(scale, optax.clip_by_block_rms(1.0)), rows)
    assert config.optim == "muon"
    return scale_by_muon_or_adam(adam, rows, **by_name(config.optim_args))


_LORA_B = ("lora_b", "magnitude")


def _is_lora_b(parameters: nnx.State) -> nnx.State:
    """Says which parameters have the learning rate of LoRA+: as in PEFT, lora_B and the vectors, DoRA's magnitudes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _names(path).isdisjoint(_LORA_B), parameters)


def _momentum(momentum: float = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


def _num_matrices(path: tuple, parameter: jax.Array) -> int:
    """Returns how many matrices with 8-bit moments an array holds: one, or one for each layer of a stack.

    Projections that lie in one matrix, such as q, k and v, count as one: blocks cross from one to the next only if the
    sizes of the projections are no multiples of 256.

    The embedding keeps float32 moments, as in transformers' `Trainer` with bitsandbytes: the gradients of rare tokens
    are far smaller than their block's largest.
    """
    names = _names(path)
    if "embedding" in names:
        return 0
    return parameter.shape[0] if "blocks" in names else 1


def _names(path: tuple) -> set[Any]:
    return {getattr(key, "key", None) for key in path}


def state_bytes(config: TrainConfig, model: Transformer, mesh: DeviceMesh | None = None) -> int:
    """Returns the bytes of the state that a run's own optimizer keeps for a model, whose arrays may be abstract.

    Args:
      mesh: the devices of the run, each of which holds its share of the state; None is one device.
    """
    _, trained, _ = split_trained(model)
    trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
    state = jax.eval_shape(make_optimizer(config, optax.constant_schedule(0.0), model).init, trained)
    if mesh is not None and mesh.size > 1:
        state = place(state, state_specs(state, trained, mesh), mesh)
    return sum(map(bytes_on_device, jax.tree.leaves(state)))


def resolve_optimizer(
    optimizer: optax.GradientTransformation | Callable[..., Any] | None,
    config: TrainConfig,
    num_steps: int,
    model: Transformer,
) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """Returns a run's optimizer, and its learning rate by step, or None where that is not known.

    Args:
      optimizer: None is the optimizer that `optim` names, with the schedule of `config`. A schedule replaces the
        schedule of `config`. An optax transformation replaces both, and gets gradients that are clipped to
        `max_grad_norm`.

    Raises:
      InputError: `optimizer` is none of these, or an optax transformation beside settings of another optimizer, or
        `loraplus_lr_ratio` is set for a model without adapters.
    """
    if config.loraplus_lr_ratio is not None and not adapters(model):
        raise InputError(
            "`loraplus_lr_ratio` must be None for a model without adapters, got"
            f" {config.loraplus_lr_ratio}: it is the learning rate of lora_B as a multiple of lora_A's."
        )
    if isinstance(optimizer, optax.GradientTransformation):
        if config.loraplus_lr_ratio is not None:
            raise InputError(
                f"`loraplus_lr_ratio` must be None if `optimizer` is an optax transformation, got"
                f" {config.loraplus_lr_ratio}. Leave one of the two out."
            )
        if config.optim != "adamw":
            raise InputError(
                f"`optimizer` must be None or a schedule with `optim` {config.optim!r}, got an optax transformation,"
                " which would replace it. Leave one of the two out."
            )
        return _clipped(config, optimizer), None
    if optimizer is None:
        schedule = make_schedule(config, num_steps)
    elif callable(optimizer) and not isinstance(optimizer, type):
        schedule = optimizer
    else:
        raise InputError(
            "`optimizer` must be an optax transformation such as optax.lion(1e-4), or a schedule (a function from the"
            f" step to the learning rate), got {type(optimizer).__name__}."
        )
    return make_optimizer(config, schedule, model), schedule


def _clipped(config: TrainConfig, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    return optax.chain(clip, optimizer)
