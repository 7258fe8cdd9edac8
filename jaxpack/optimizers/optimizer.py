"""Makes the optimizer of a run, AdamW with the run's settings or the user's own, and tells the bytes of its state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxpack.errors import InputError
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import split_trained
from jaxpack.optimizers.adamw_8bit import scale_by_adam_8bit
from jaxpack.optimizers.schedules import make_schedule
from jaxpack.settings import TrainConfig


def make_optimizer(config: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW, after clipping by the global gradient norm. Norm scales and biases have no weight decay.

    Its moments are float32 or, with `optim` "adamw_8bit", 8-bit, except those of the embedding and of small matrices.
    """

    def decays(parameters: nnx.State) -> nnx.State:
        def is_matrix(path: tuple, _: jax.Array) -> bool:
            return _names(path).isdisjoint(("scale", "bias"))

        return jax.tree_util.tree_map_with_path(is_matrix, parameters)

    settings = (config.adam_beta1, config.adam_beta2, config.adam_epsilon)
    adam = (
        scale_by_adam_8bit(*settings, _num_matrices) if config.optim == "adamw_8bit" else optax.scale_by_adam(*settings)
    )
    decay = optax.add_decayed_weights(config.weight_decay, decays)
    return _clipped(config, optax.chain(adam, decay, optax.scale_by_learning_rate(schedule)))


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


def state_bytes(config: TrainConfig, model: Transformer) -> int:
    """Returns the bytes of the state that a run's own optimizer keeps for a model, whose arrays may be abstract."""
    _, trained, _ = split_trained(model)
    trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
    state = jax.eval_shape(make_optimizer(config, optax.constant_schedule(0.0)).init, trained)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def resolve_optimizer(
    optimizer: optax.GradientTransformation | Callable[..., Any] | None, config: TrainConfig, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """Returns a run's optimizer, and its learning rate by step, or None where that is not known.

    Args:
      optimizer: None is the AdamW that `optim` names, with the schedule of `config`. A schedule replaces the schedule
        of `config`. An optax transformation replaces AdamW and the schedule, and gets gradients that are clipped to
        `max_grad_norm`.

    Raises:
      InputError: `optimizer` is none of these, or an optax transformation beside an `optim` that asks for another.
    """
    if isinstance(optimizer, optax.GradientTransformation):
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
    return make_optimizer(config, schedule), schedule


def _clipped(config: TrainConfig, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    return optax.chain(clip, optimizer)
