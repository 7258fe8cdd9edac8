"""Chooses what a step keeps, and where: predicts its memory and time with each choice, and takes the fastest that fits.

Predictions are within 10 % of measurements on an H200 and an H100 (`benchmarks/results/`, and the tests): adapters of
Qwen3-0.6B to 8B, and all weights of 0.6B. Steps of under 30 ms can be off by 30 %, because the host sets their pace:
one such step took 19, 22 and 31 ms.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_args

from jaxpack.constants import PINNED_LIMIT, Remat
from jaxpack.data.batching import Batches, BatchSource
from jaxpack.errors import InputError
from jaxpack.kernels.logits import CHUNK
from jaxpack.model.remat import OFFLOADED
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import (
    current_device,
    free_device_bytes,
    pinned_limit_bytes,
)
from jaxpack.parallel.processes import least
from jaxpack.planning.cards import Card, DeviceRates, rates_of
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import argument_bytes, autotuning_bytes, host_bytes, host_frozen_bytes, peak_bytes
from jaxpack.planning.time import step_seconds
from jaxpack.settings import TrainConfig
from jaxpack.utils.host import available_host_bytes

_GIB = 2**30
_ACCURACY = 0.1  # Measured memory may exceed the prediction by this share.
_SMALLER_CHUNKS = (512, 256, 128)  # of the loss; with fewer tokens, a GPU's matmuls are slow
_OFFLOADS = ("offload_weights", "offload_embedding")
_ANY_RATES = DeviceRates(1, 1, 1, 1, 0, 0)  # for memory, which does not depend on rates
_WORTH = 0.98  # A choice that a run may fall back on needs at most this share of the memory of the one before it.


class Choice(NamedTuple):
    """Holds what a run chooses to save memory or time.

    Attributes:
      remat: what the backward pass computes again.
      loss_chunk: the number of tokens whose logits exist at a time.
      reason: a line for the user; None if the user named the choice.
      offload_weights: whether the frozen matrices of the layers lie in the host's memory.
      offload_embedding: whether the frozen embedding and head do.
    """

    remat: Remat
    loss_chunk: int = CHUNK
    reason: str | None = None
    offload_weights: bool = False
    offload_embedding: bool = False

    def __str__(self) -> str:
        return f'remat "{self.remat}"{self._chunks}{self._hosted}'

    @property
    def note(self) -> str:
        """Returns what the rounding of a run depends on, for its checkpoints.

        A head in host memory is read in pieces. Weights of layers give the same bits wherever they lie.
        """
        return self.remat + self._chunks + (", with the head in pieces" if self.offload_embedding else "")

    @property
    def of_step(self) -> dict[str, Any]:
        """Returns the fields of a `StepShape` that the choice sets."""
        names = ("loss_chunk", "offload_weights", "offload_embedding")
        return {name: getattr(self, name) for name in names}

    @property
    def offloads(self) -> tuple[bool, bool]:
        """Returns whether the layers' matrices lie in the host's memory, and whether embedding and head do."""
        return self.offload_weights, self.offload_embedding

    @property
    def fetches(self) -> dict[str, Any]:
        """Returns the options of `make_train_step` and `make_eval_step` that say what programs fetch from there."""
        return {"fetches_layers": self.offload_weights, "fetches_head": self.offload_embedding}

    @property
    def _chunks(self) -> str:
        return "" if self.loss_chunk == CHUNK else f" with the logits of {self.loss_chunk} tokens at a time"

    @property
    def _hosted(self) -> str:
        names = ("the layers' weights", "embedding and head")
        there = [name for name, is_there in zip(names, self.offloads, strict=True) if is_there]
        return f", with {' and '.join(there)} in host memory" if there else ""


class Prediction(NamedTuple):
    """Holds the predicted memory and time of a step with one choice."""

    choice: Choice
    peak_bytes: int
    seconds: float
    host_bytes: int


def predict(step: StepShape, rates: DeviceRates) -> dict[Remat, Prediction]:
    """Returns a prediction for every `remat`, from the one that keeps least on the device to the one that keeps most.

    If the layers' weights lie in the host's memory, only "offload" and "offload_heads" are predicted.
    """
    first = autotuning_bytes(step)
    return {
        remat: Prediction(
            Choice(
                remat,
                step.loss_chunk,
                offload_weights=step.offload_weights,
                offload_embedding=step.offload_embedding,
            ),
            max(first, peak_bytes(step, remat)),
            step_seconds(step, remat, rates),
            host_bytes(step, remat),
        )
        for remat in get_args(Remat)
        if remat in OFFLOADED or not step.offload_weights
    }


def predict_all(step: StepShape, rates: DeviceRates, config: TrainConfig = TrainConfig()) -> list[Prediction]:  # noqa: B008
    """Returns the predictions of every choice that the settings allow."""
    sizes = [CHUNK, *(size for size in _SMALLER_CHUNKS if size < step.max_targets)]
    return [
        prediction
        for weights in _allowed(config.offload_weights, step.layer_weight_bytes, step.offload_weights)
        for embedding in _allowed(config.offload_embedding, step.embedding_bytes, step.offload_embedding)
        for size in sizes
        for prediction in predict(
            dataclasses.replace(step, loss_chunk=size, offload_weights=weights, offload_embedding=embedding), rates
        ).values()
    ]


def _allowed(setting: str, movable_bytes: int, is_offloaded: bool) -> list[bool]:
    """Returns the places where matrices may lie: False for the device, True for the host's memory."""
    if is_offloaded:  # They are not moved back.
        return [True]
    return [False] * (setting != "on") + [True] * (setting != "off" and movable_bytes > 0)


def fits(predictions: Iterable[Prediction], memory: float, host: float) -> list[Prediction]:
    """Returns the predictions that fit in `memory` bytes on the device and `host` bytes on the host, fastest first."""
    room = [p for p in predictions if p.peak_bytes <= memory and p.host_bytes <= host]
    return sorted(room, key=lambda p: (p.seconds, sum(p.choice.offloads), p.peak_bytes))


def usable_bytes(config: TrainConfig, held_bytes: int = 0, card: Card | None = None) -> float | None:
    """Returns the bytes of device memory that a run may use, or None if the device does not report its free memory.

    These are the user's `memory_limit` or else the free bytes, and those that the run holds already, less a margin for
    errors of predictions. If a card is named, the memory that a run can have on it counts as free.
    """
    if config.memory_limit is not None:
        return config.memory_limit * _GIB
    free = least(free_device_bytes(current_device())) if card is None else card.memory_bytes
    return None if free is None else (free + held_bytes) / (1 + _ACCURACY)


def choices(
    config: TrainConfig,
    model: Transformer,
    batches: BatchSource,
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
      compiles_first: whether the frozen weights are read after the first programs are compiled.

    Raises:
      InputError: with every choice, a step needs more memory than there is, or the host has too little memory for the
        choice that the user named, or the model's weights cannot lie where the user asked for.
    """
    step = StepShape.of_run(model, batches, optimizer_bytes=optimizer_bytes)
    step = dataclasses.replace(step, compiles_first=compiles_first)
    named = None if config.remat == "auto" else config.remat
    _check_offloads(config, step)
    asked = {name: getattr(config, name) == "on" or getattr(step, name) for name in _OFFLOADS}
    usual: Remat = "offload" if asked["offload_weights"] else "full"
    if card is None:
        _check_host(dataclasses.replace(step, **asked), named or usual, there=host_frozen_bytes(step))
    memory = usable_bytes(config, held_bytes, card)
    if memory is None:
        choice = Choice(named or usual, **asked)
        why = f"{choice}: this device does not report its free memory; a `memory_limit` may allow a faster choice"
        return [choice._replace(reason=why if named is None else None)]
    device = current_device()
    host = _host_room() + host_frozen_bytes(step) if card is None else pinned_limit_bytes()

    def predicted(step: StepShape) -> list[Prediction]:
        predictions = predict_all(step, rates_of(device.device_kind) if card is None else card.rates, config)
        on_host = card is None and device.platform == "cpu"  # Its only memory is the host's.
        return [p for p in predictions if named is not None or any(asked.values()) or not (on_host and p.host_bytes)]

    def does_fit(step: StepShape) -> bool:
        return bool(fits(predicted(step), memory, host))

    predictions = predicted(step)
    allowed = [p for p in predictions if named in (None, p.choice.remat)]
    fitting = fits(allowed, memory, host)
    if named is not None and card is None:  # The user's choice is tried, whatever is predicted.
        fitting = fitting or [min(fits(allowed, math.inf, host) or allowed, key=lambda p: p.peak_bytes)]
    if not fitting:
        frugal = min(fits(allowed, math.inf, host) or allowed, key=lambda p: p.peak_bytes)
        refusal = _refusal(config, step, frugal, memory, card)
        remedy = _remedy(config, model, batches, step, memory, does_fit) + _hint_at_offloading(
            config, step, memory, host
        )
        raise InputError(f"{refusal} {remedy}")
    frugal = fitting[:1]
    for prediction in fitting[1:]:
        # A later choice cannot bring weights back from the host.
        both = zip(frugal[-1].choice.offloads, prediction.choice.offloads, strict=True)
        can_follow = all(after or not before for before, after in both)
        if can_follow and prediction.peak_bytes <= _WORTH * frugal[-1].peak_bytes:
            frugal.append(prediction)

    def with_reason(prediction: Prediction) -> Choice:
        if named is not None and prediction.choice.offloads == tuple(asked.values()):
            return prediction.choice  # The user named all of it.
        return prediction.choice._replace(reason=_explanation(prediction, predictions, memory))

    return list(map(with_reason, frugal))


def _check_offloads(config: TrainConfig, step: StepShape) -> None:
    """Refuses settings that this model cannot follow: weights that cannot move, or that have moved already."""
    if step.offload_weights and config.remat not in ("auto", *OFFLOADED):
        raise InputError(
            f'`remat` must be "auto", "offload" or "offload_heads", got "{config.remat}": an earlier run moved the'
            " layers' weights of this model to the host's memory. Load the model anew for another choice."
        )
    for name, size in zip(_OFFLOADS, (step.layer_weight_bytes, step.embedding_bytes), strict=True):
        if getattr(config, name) == "off" and getattr(step, name):
            raise InputError(
                f'`{name}` must be "auto" or "on", got "off": an earlier run moved these weights of this model to the'
                " host's memory. Load the model anew."
            )
        if getattr(config, name) == "on" and not size:
            raise InputError(
                f'`{name}` must be "auto" or "off" for this model, got "on": it has no frozen weights that can lie in'
                " the host's memory. Trained weights, and layers of which some are in 4 bits, stay on the device."
            )


def _check_host(step: StepShape, remat: Remat, there: int) -> None:
    """Refuses what does not fit in the host's memory; `there` are bytes of weights that lie there already."""
    needed, room = host_bytes(step, remat) - there, _host_room()
    if needed > room:
        got = f"{PINNED_LIMIT} of {gib(room)}" if room == pinned_limit_bytes() else f"{gib(room)} available"
        if weights := host_frozen_bytes(step) - there:
            more = f", or set {PINNED_LIMIT} to more GiB" if room == pinned_limit_bytes() else ""
            raise InputError(
                f"`offload_weights` and `offload_embedding` must ask for what fits in host memory: the weights need"
                f" {gib(weights)}, and activations {gib(needed - weights)}, got {got}. Leave the weights on the device"
                f' ("off"), or take fewer tokens for each step{more}.'
            )
        raise InputError(
            f'`remat` "{remat}" must fit in host memory: the activations of all layers need {gib(needed)}, got {got}.'
            ' Choose "full", which keeps layer inputs on the device.'
        )


def _host_room() -> int:
    """Returns how many bytes can be offloaded to the host's memory; the least of several processes."""
    available, limit = least(available_host_bytes()), pinned_limit_bytes()
    return limit if available is None else min(available, limit)


def _explanation(chosen: Prediction, predictions: list[Prediction], memory: float) -> str:
    of_room = f"{gib(chosen.peak_bytes)} of the {gib(memory)} that the run may use"
    line = f"{chosen.choice}: a step is predicted to take {chosen.seconds:.3g} s and {of_room}"
    faster = [p for p in predictions if p.seconds < chosen.seconds and p.choice.loss_chunk == CHUNK]
    faster = [p for p in faster if not any(p.choice.offloads)] or faster
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
    batches: BatchSource,
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
    steps = (dataclasses.replace(step, **p.choice.of_step) for p in predict_all(step, _ANY_RATES, config))
    if (held := min(map(argument_bytes, steps))) > memory:
        return f"The weights and the optimizer's state take {gib(held)}: choose a smaller model or more memory."
    return "Not even a batch size of 1 is predicted to fit: a smaller `max_length` needs less."


def _hint_at_offloading(config: TrainConfig, step: StepShape, memory: float, host: float) -> str:
    """Returns a sentence that names the settings that keep weights on the device, if the run would fit without them."""
    off = [name for name in _OFFLOADS if getattr(config, name) == "off"]
    if not off or config.remat not in ("auto", *OFFLOADED):
        return ""
    free = dataclasses.replace(config, **dict.fromkeys(off, "auto"))
    if not fits(predict_all(step, _ANY_RATES, free), memory, host):
        return ""
    return f' With {" and ".join(f"`{name}`" for name in off)} "auto", it is predicted to fit as it is.'
