"""Makes the learning rate by step. The schedules are those of transformers, with the same names and parameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpack.arguments import by_name
from jaxpack.constants import POLYNOMIAL_END
from jaxpack.settings import TrainConfig


def make_schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate by step, as in transformers: a warm-up from 0, then `lr_scheduler_type`.

    Example:
      >>> from jaxpack import TrainConfig
      >>> schedule = make_schedule(TrainConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=2), 4)
      >>> [float(schedule(step)) for step in range(5)]
      [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * num_steps
    warmup = math.ceil(warmup)
    peak, given = config.learning_rate, by_name(config.lr_scheduler_kwargs)
    steps = max(1, num_steps - warmup)  # of the decay
    rise = optax.linear_schedule(0.0, peak, max(1, warmup))
    kind = config.lr_scheduler_type
    if kind == "linear":
        after = optax.linear_schedule(peak, 0.0, steps)
    elif kind == "cosine" and not given:
        after = optax.cosine_decay_schedule(peak, steps)
    elif kind == "cosine":
        after = _cosine(peak, 0.0, steps, **given)
    elif kind == "cosine_with_min_lr":
        least = given.pop("min_lr") if "min_lr" in given else peak * given.pop("min_lr_rate")
        after = _cosine(peak, least, steps, **given)
    elif kind == "cosine_with_restarts":
        after = _restarts(peak, steps, **given)
    elif kind == "polynomial":
        after = optax.polynomial_schedule(peak, given.get("lr_end", POLYNOMIAL_END), given.get("power", 1.0), steps)
    elif kind == "inverse_sqrt":
        after = _inverse_sqrt(peak, given.get("timescale", warmup or 10_000))
    elif kind == "warmup_stable_decay":
        rise, after = _warmup_stable_decay(peak, num_steps, warmup, **given)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([rise, after], [warmup])


def _cosine(peak: float, least: float, steps: int, num_cycles: float = 0.5) -> optax.Schedule:
    def schedule(step: Any) -> Any:
        return least + (peak - least) * _half_wave(2 * num_cycles / steps * step)

    return schedule


def _restarts(peak: float, steps: int, num_cycles: int = 1) -> optax.Schedule:
    """Returns cosine decays to 0, one after another.

    A decay begins at the first step whose `num_cycles * (step / steps)` is a whole number or past one. transformers
    rounds this product to float64: `49 * (1 / 49)` is below 1, so that decay begins a step later. So do these.
    """
    begins = [-(-cycle * steps // num_cycles) for cycle in range(num_cycles)]
    begins = [begin + (num_cycles * (begin / steps) < cycle) for cycle, begin in enumerate(begins)]
    phases = np.array([num_cycles * (begin / steps) - cycle for cycle, begin in enumerate(begins)], np.float32)
    begins = np.array(begins, np.int32)

    def schedule(step: Any) -> Any:
        cycle = jnp.searchsorted(begins, jnp.maximum(step, 0), side="right") - 1
        phase = jnp.asarray(phases)[cycle] + (step - jnp.asarray(begins)[cycle]) * (num_cycles / steps)
        return peak * _half_wave(phase)

    return schedule


def _inverse_sqrt(peak: float, timescale: float) -> optax.Schedule:
    def schedule(step: Any) -> Any:
        return peak * jax.lax.rsqrt(1 + jnp.maximum(step, 0) / timescale)

    return schedule


def _warmup_stable_decay(
    peak: float,
    num_steps: int,
    warmup: int,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> tuple[optax.Schedule, optax.Schedule]:
    """Returns the warm-up, and the schedule after it: the peak, then a decay to `min_lr_ratio * peak`.

    The stable part takes the steps that are left, unless their number is given. If the decay is longer than these, it
    begins in its middle, as in transformers.
    """
    stable = num_steps - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    rises: dict[str, Callable] = {  # by the share of the warm-up that is left
        "linear": lambda x: 1 - x,
        "cosine": lambda x: _half_wave(x),
        "1-sqrt": lambda x: 1 - jnp.sqrt(x),
    }
    falls: dict[str, Callable] = {  # by the share of the decay that is done
        "linear": lambda x: 1 - x,
        "cosine": lambda x: _half_wave(2 * num_cycles * x),
        "1-sqrt": lambda x: 1 - jnp.sqrt(x),
    }

    def above_least(share: Any) -> Any:
        return peak * (share * (1 - min_lr_ratio) + min_lr_ratio)

    def rise(step: Any) -> Any:
        return above_least(rises[warmup_type](jnp.clip((warmup - step) / max(1, warmup), 0, 1)))

    def after(step: Any) -> Any:
        step = step - stable
        falling = above_least(falls[decay_type](jnp.clip(step / max(1, num_decay_steps), 0, 1)))
        return jnp.where(step < 0, peak, jnp.where(step < num_decay_steps, falling, peak * min_lr_ratio))

    return rise, after


def _half_wave(phase: Any) -> Any:
    """Returns the share of the peak that is left at a phase of a cosine: 1 at 0, 0 at 1, and 1 again at 2."""
    return 0.5 * (1 + jnp.cos(jnp.pi * phase))
