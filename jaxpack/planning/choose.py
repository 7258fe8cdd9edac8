"""Chooses `remat`: predicts the memory and time of a step with each choice, and takes the fastest one that fits.

Predictions are within 10 % of measurements on an H200 and an H100 (`benchmarks/results/`, and the tests): adapters of
Qwen3-0.6B to 8B, and all weights of 0.6B. Steps of under 30 ms can be off by 30 %, because the host sets their pace:
one such step took 19, 22 and 31 ms.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple, get_args

import jax

from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.errors import InputError
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import (
    PINNED_LIMIT,
    current_device,
    free_device_bytes,
    pinned_limit_bytes,
)
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import autotuning_bytes, host_bytes, peak_bytes
from jaxpack.planning.time import DeviceRates, rates_of, step_seconds
from jaxpack.settings import TrainConfig
from jaxpack.utils.host import available_host_bytes

_GIB = 2**30
_ACCURACY = 0.1  # Measured memory may exceed the prediction by this share.


class Prediction(NamedTuple):
    """Holds the predicted memory and time of a step with one choice of `remat`."""

    remat: Remat
    peak_bytes: int
    seconds: float
    host_bytes: int


class Choice(NamedTuple):
    """Holds a choice of `remat` for a run, and the reason for it."""

    remat: Remat
    reason: str | None  # None if the user named the choice


def predict(step: StepShape, rates: DeviceRates) -> dict[Remat, Prediction]:
    """Returns a prediction for every choice, from the one that keeps least on the device to the one that keeps most."""
    first = autotuning_bytes(step)
    return {
        remat: Prediction(
            remat, max(first, peak_bytes(step, remat)), step_seconds(step, remat, rates), host_bytes(step, remat)
        )
        for remat in get_args(Remat)
    }


def fits(predictions: Iterable[Prediction], memory: float) -> list[Prediction]:
    """Returns the predictions that fit in `memory` bytes on the device and in free host memory, fastest first."""
    host = _host_room()
    room = [p for p in predictions if p.peak_bytes <= memory and p.host_bytes <= host]
    return sorted(room, key=lambda p: (p.seconds, p.peak_bytes))


def choices(
    config: TrainConfig, model: Transformer, batches: Batches, held_bytes: int, gpu: str | None = None
) -> list[Choice]:
    """Returns the choices of `remat` that a run may take: the best first, then those that need less memory each.

    The later ones are for a run that finds less memory than was predicted. If the user named a choice, it is the only
    one.

    Args:
      held_bytes: the bytes of device memory that the run's own weights and optimizer state take already.
      gpu: a name in `time.RATES`, for a run on another device than this machine's, whose free memory is not known.

    Raises:
      InputError: with every choice, a step needs more memory than there is, or the host has too little memory for the
        choice that the user named.
    """
    step = StepShape.of_run(model, batches)
    if config.remat != "auto":
        if gpu is None:
            _check_host(step, config.remat)
        return [Choice(config.remat, None)]
    device = current_device()
    free = _free_bytes(device, held_bytes) if gpu is None else None
    memory = free if config.memory_limit is None else config.memory_limit * _GIB
    if memory is None:
        why = 'remat "full": this device does not report its free memory; a `memory_limit` may allow a faster choice'
        return [Choice("full", why)]
    predictions = list(predict(step, rates_of(gpu or device.device_kind)).values())
    if gpu is None and device.platform == "cpu":  # Its only memory is the host's.
        predictions = [p for p in predictions if not p.host_bytes]
    if not (fitting := fits(predictions, memory)):
        raise InputError(_refusal(config, step, fits(predictions, math.inf), memory))
    frugal = [p for i, p in enumerate(fitting) if all(p.peak_bytes < other.peak_bytes for other in fitting[:i])]
    return [Choice(p.remat, _explanation(p, predictions, memory)) for p in frugal]


def _check_host(step: StepShape, remat: Remat) -> None:
    needed, room = host_bytes(step, remat), _host_room()
    if needed > room:
        got = f"{PINNED_LIMIT} of {_gib(room)}" if room == pinned_limit_bytes() else f"{_gib(room)} available"
        raise InputError(
            f'`remat` "{remat}" must fit in host memory: the activations of the first {step.num_layers - 1} layers '
            f'need {_gib(needed)}, got {got}. Choose "full", which keeps layer inputs on the device.'
        )


def _host_room() -> int:
    """Returns how many bytes can be offloaded to the host's memory."""
    available, limit = available_host_bytes(), pinned_limit_bytes()
    return limit if available is None else min(available, limit)


def _free_bytes(device: jax.Device, held_bytes: int) -> float | None:  # pyright: ignore[reportInvalidTypeForm]
    """Returns the device bytes that a run may take: the free ones and those it holds, less a margin for errors."""
    free = free_device_bytes(device)
    return None if free is None else (free + held_bytes) / (1 + _ACCURACY)


def _explanation(chosen: Prediction, predictions: list[Prediction], memory: float) -> str:
    of_room = f"{_gib(chosen.peak_bytes)} of the {_gib(memory)} that the run may use"
    line = f'remat "{chosen.remat}": a step is predicted to take {chosen.seconds:.3g} s and {of_room}'
    faster = [p for p in predictions if p.seconds < chosen.seconds]
    if not faster:
        return line
    following = max(faster, key=lambda p: p.seconds)
    return f'{line}; "{following.remat}" would take {following.seconds:.3g} s, but need {_gib(following.peak_bytes)}'


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def _refusal(config: TrainConfig, step: StepShape, choices: list[Prediction], memory: float) -> str:
    frugal = min(choices, key=lambda p: p.peak_bytes)
    what = f"a step of {' x '.join(map(str, step.shape))} tokens"
    need, room = f'{_gib(frugal.peak_bytes)} (remat "{frugal.remat}")', _gib(memory)
    if config.memory_limit is not None:
        return f"`memory_limit` must be at least {need} for {what}, got {room}; a smaller batch needs less."
    return (
        "`per_device_train_batch_size` or `max_length` must be smaller, got a batch size of"
        f" {config.per_device_train_batch_size} and a maximum length of {config.max_length}: {what} needs {need}, but"
        f" only {room} can be used."
    )
