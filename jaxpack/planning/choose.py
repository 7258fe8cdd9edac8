"""Chooses `remat`: predicts the memory and time of a step with each choice, and takes the fastest one that fits.

Predictions are within 10 % of measurements on an H200 and an H100 (`benchmarks/results/`, and the tests): adapters of
Qwen3-0.6B to 8B, and all weights of 0.6B. Steps of under 30 ms can be off by 30 %, because the host sets their pace:
one such step took 19, 22 and 31 ms.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, get_args

from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.errors import InputError
from jaxpack.kernels.logits import CHUNK
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import (
    PINNED_LIMIT,
    current_device,
    free_device_bytes,
    pinned_limit_bytes,
)
from jaxpack.planning.cards import Card, DeviceRates, rates_of
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import argument_bytes, autotuning_bytes, host_bytes, peak_bytes
from jaxpack.planning.time import step_seconds
from jaxpack.settings import TrainConfig
from jaxpack.utils.host import available_host_bytes

_GIB = 2**30
_ACCURACY = 0.1  # Measured memory may exceed the prediction by this share.
_SMALLER_CHUNKS = (512, 256, 128)  # of the loss; with fewer tokens, a GPU's matmuls are slow
_WORTH = 0.98  # A choice that a run may fall back on needs at most this share of the memory of the one before it.


class Choice(NamedTuple):
    """Holds what a run chooses to save memory or time.

    Attributes:
      remat: what the backward pass computes again.
      loss_chunk: the number of tokens whose logits exist at a time.
      reason: a line for the user; None if the user named the choice.
    """

    remat: Remat
    loss_chunk: int = CHUNK
    reason: str | None = None

    def __str__(self) -> str:
        return f'remat "{self.remat}"{self._chunks}'

    @property
    def note(self) -> str:
        """Returns what the rounding of a run depends on, for its checkpoints."""
        return self.remat + self._chunks

    @property
    def _chunks(self) -> str:
        return "" if self.loss_chunk == CHUNK else f" with the logits of {self.loss_chunk} tokens at a time"


class Prediction(NamedTuple):
    """Holds the predicted memory and time of a step with one choice."""

    choice: Choice
    peak_bytes: int
    seconds: float
    host_bytes: int


def predict(step: StepShape, rates: DeviceRates) -> dict[Remat, Prediction]:
    """Returns a prediction for every choice, from the one that keeps least on the device to the one that keeps most."""
    first = autotuning_bytes(step)
    return {
        remat: Prediction(
            Choice(remat, step.loss_chunk),
            max(first, peak_bytes(step, remat)),
            step_seconds(step, remat, rates),
            host_bytes(step, remat),
        )
        for remat in get_args(Remat)
    }


def predict_all(step: StepShape, rates: DeviceRates) -> list[Prediction]:
    """Returns the predictions of every `remat` with every size of the loss's chunks, the largest chunks first."""
    sizes = [CHUNK, *(size for size in _SMALLER_CHUNKS if size < step.max_targets)]
    return [
        prediction
        for size in sizes
        for prediction in predict(dataclasses.replace(step, loss_chunk=size), rates).values()
    ]


def fits(predictions: Iterable[Prediction], memory: float, host: float) -> list[Prediction]:
    """Returns the predictions that fit in `memory` bytes on the device and `host` bytes on the host, fastest first."""
    room = [p for p in predictions if p.peak_bytes <= memory and p.host_bytes <= host]
    return sorted(room, key=lambda p: (p.seconds, p.peak_bytes))


def usable_bytes(config: TrainConfig, held_bytes: int = 0, card: Card | None = None) -> float | None:
    """Returns the bytes of device memory that a run may use, or None if the device does not report its free memory.

    These are the user's `memory_limit` or else the free bytes, and those that the run holds already, less a margin for
    errors of predictions. If a card is named, the memory that a run can have on it counts as free.
    """
    if config.memory_limit is not None:
        return config.memory_limit * _GIB
    free = free_device_bytes(current_device()) if card is None else card.memory_bytes
    return None if free is None else (free + held_bytes) / (1 + _ACCURACY)


def choices(
    config: TrainConfig,
    model: Transformer,
    batches: Batches,
    held_bytes: int,
    card: Card | None = None,
    optimizer_bytes: int | None = None,
    compiles_first: bool = False,
) -> list[Choice]:
    """Returns the choices that a run may take: the best first, then those that need less memory each.

    The later ones are for a run that finds less memory than was predicted. If the user named a `remat`, all have it.

    Args:
      held_bytes: the bytes of device memory that the run's own weights and optimizer state take already.
      card: the card of a run on another machine than this one. A choice that the user named must fit on it, because
        that machine is not here to try. Its host is expected to have as much memory as XLA pins.
      optimizer_bytes: the bytes of the optimizer's state; None for those of the optimizer that `optim` names.
      compiles_first: whether the frozen weights are read after the programs are compiled.

    Raises:
      InputError: with every choice, a step needs more memory than there is, or the host has too little memory for the
        choice that the user named.
    """
    step = StepShape.of_run(model, batches, optimizer_bytes=optimizer_bytes)
    step = dataclasses.replace(step, compiles_first=compiles_first)
    named = None if config.remat == "auto" else config.remat
    if named is not None and card is None:
        _check_host(step, named)
    memory = usable_bytes(config, held_bytes, card)
    if memory is None:
        why = 'remat "full": this device does not report its free memory; a `memory_limit` may allow a faster choice'
        return [Choice("full", reason=why) if named is None else Choice(named)]
    device = current_device()
    host = _host_room() if card is None else pinned_limit_bytes()

    def predicted(step: StepShape) -> list[Prediction]:
        predictions = predict_all(step, rates_of(device.device_kind) if card is None else card.rates)
        on_host = card is None and device.platform == "cpu"  # Its only memory is the host's.
        return [p for p in predictions if named is not None or not (on_host and p.host_bytes)]

    def does_fit(step: StepShape) -> bool:
        return bool(fits(predicted(step), memory, host))

    predictions = predicted(step)
    allowed = [p for p in predictions if named in (None, p.choice.remat)]
    fitting = fits(allowed, memory, host)
    if named is not None and card is None:  # The user's choice is tried, whatever is predicted.
        fitting = fitting or [min(allowed, key=lambda p: p.peak_bytes)]
    if not fitting:
        frugal = min(fits(allowed, math.inf, host) or allowed, key=lambda p: p.peak_bytes)
        refusal = _refusal(config, step, frugal, memory, card)
        raise InputError(f"{refusal} {_remedy(config, model, batches, step, memory, does_fit)}")
    frugal = fitting[:1]
    for prediction in fitting[1:]:
        if prediction.peak_bytes <= _WORTH * frugal[-1].peak_bytes:
            frugal.append(prediction)
    if named is not None:
        return [p.choice for p in frugal]
    return [p.choice._replace(reason=_explanation(p, predictions, memory)) for p in frugal]


def _check_host(step: StepShape, remat: Remat) -> None:
    needed, room = host_bytes(step, remat), _host_room()
    if needed > room:
        got = f"{PINNED_LIMIT} of {gib(room)}" if room == pinned_limit_bytes() else f"{gib(room)} available"
        raise InputError(
            f'`remat` "{remat}" must fit in host memory: the activations of the first {step.num_layers - 1} layers '
            f'need {gib(needed)}, got {got}. Choose "full", which keeps layer inputs on the device.'
        )


def _host_room() -> int:
    """Returns how many bytes can be offloaded to the host's memory."""
    available, limit = available_host_bytes(), pinned_limit_bytes()
    return limit if available is None else min(available, limit)


def _explanation(chosen: Prediction, predictions: list[Prediction], memory: float) -> str:
    of_room = f"{gib(chosen.peak_bytes)} of the {gib(memory)} that the run may use"
    line = f"{chosen.choice}: a step is predicted to take {chosen.seconds:.3g} s and {of_room}"
    faster = [p for p in predictions if p.seconds < chosen.seconds and p.choice.loss_chunk == CHUNK]
    if not faster:
        return line
    following = max(faster, key=lambda p: p.seconds)
    return f"{line}; {following.choice} would take {following.seconds:.3g} s, but need {gib(following.peak_bytes)}"


def gib(size: float) -> str:
    """Returns a number of bytes in GiB, as messages write it."""
    return f"{size / _GIB:.1f} GiB"


def _refusal(config: TrainConfig, step: StepShape, frugal: Prediction, memory: float, card: Card | None) -> str:
    """Returns a sentence that says which argument asks for too much; `frugal` is the choice that needs least."""
    what = f"a step of {' x '.join(map(str, step.shape))} tokens"
    need, room = f"{gib(frugal.peak_bytes)} ({frugal.choice})", gib(memory)
    if config.memory_limit is not None:
        return f"`memory_limit` must be at least {need} for {what}, got {room}."
    if card is not None:
        host = f" and {gib(frugal.host_bytes)} of host memory" if frugal.host_bytes else ""
        return f"`gpu` must have {need}{host} for {what}, got {card.name}, on which a run may use {room}."
    return (
        "`per_device_train_batch_size` or `max_length` must be smaller, got a batch size of"
        f" {config.per_device_train_batch_size} and a maximum length of {config.max_length}: {what} needs {need}, but"
        f" only {room} can be used."
    )


def _remedy(
    config: TrainConfig,
    model: Transformer,
    batches: Batches,
    step: StepShape,
    memory: float,
    does_fit: Callable[[StepShape], bool],
) -> str:
    """Returns a sentence that says what would make a run fit whose largest step does not."""
    if does_fit(step):
        return f'Another choice fits: take `remat` "auto" instead of "{config.remat}".'

    def too_large(size: int) -> bool:
        if config.layout == "padding-free":
            fewer = dataclasses.replace(config, per_device_train_batch_size=size)
            batches_of_fewer = Batches(batches.documents, fewer)
            fewer_tokens = StepShape.of_run(model, batches_of_fewer, optimizer_bytes=step.optimizer_bytes)
            return not does_fit(dataclasses.replace(fewer_tokens, compiles_first=step.compiles_first))
        A, B, T = step.shape
        rows = math.ceil(B * size / config.per_device_train_batch_size)
        targets = min(step.max_targets, rows * T)
        return not does_fit(dataclasses.replace(step, shape=(A, rows, T), max_targets=targets))

    sizes = range(1, config.per_device_train_batch_size)
    if fitting := bisect.bisect_left(sizes, True, key=too_large):
        return f"A batch size of {sizes[fitting - 1]} is predicted to fit."
    if (held := argument_bytes(step)) > memory:
        return f"The weights and the optimizer's state take {gib(held)}: choose a smaller model or more memory."
    return "Not even a batch size of 1 is predicted to fit: a smaller `max_length` needs less."
