"""What each choice of `remat` costs: the predicted memory and time of a step, and the fastest choice that fits.

The arithmetic is for the kernels of a GPU and bfloat16; plain XLA (`implementation="xla"`) takes more of both. It is
within 10 % of what was measured on an H200 and an H100 (`benchmarks/results/`, and the tests): adapters of Qwen3-0.6B
to 8B, all weights of 0.6B. Steps of under 30 ms can be off by 30 %: they go by the host, and one took 19, 22 and 31 ms.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple, get_args

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.errors import InputError
from jaxpack.kernels.logits import CHUNK as LOSS_CHUNK
from jaxpack.model.config import ModelConfig
from jaxpack.model.lora import adapters
from jaxpack.model.remat import (
    KEPT,
    NAMED,
    OFFLOADED,
    Layer,
    Ranks,
    cast_weight_bytes,
    input_bytes,
    offloaded,
    offloaded_bytes,
    unnamed_bytes,
    unrolls,
)
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import TRAINED, is_trained
from jaxpack.parallel.device import (
    PINNED_LIMIT,
    available_host_bytes,
    current_device,
    free_device_bytes,
    pinned_limit_bytes,
)
from jaxpack.settings import TrainConfig

_GIB = 2**30
_ACCURACY = 0.1  # what is measured may be that much more than was predicted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the memory and time of a step follow from."""

    layer: Layer
    num_layers: int
    trained: int  # parameters, float32
    frozen_bytes: int
    full: bool  # all weights are trained
    trains_head: bool  # with all weights, or whole beside adapters
    shape: tuple[int, int, int]  # A micro-batches of B rows of T tokens
    max_targets: int  # in a micro-batch
    keys_per_token: float  # that a token attends to, on average, over layers too

    @classmethod
    def of(
        cls,
        model: Transformer,
        shape: tuple[int, int, int],
        *,
        max_targets: int | None = None,
        keys_per_token: float | None = None,
    ) -> "Job":
        """A step of this model, whose arrays may be abstract. Without the last two, every row is one document."""
        if keys_per_token is None:
            keys_per_token = _keys_per_token(model.config, np.array([shape[2]]))
        full = is_trained(model.norm.scale)
        drops = any(adapter.dropout for adapter in adapters(model).values())
        _, trained, frozen = nnx.split(model, TRAINED, ...)
        block = model.blocks
        linears = (block.attention.qkv, block.attention.out, block.feed_forward.gate_up, block.feed_forward.down)
        return cls(
            layer=Layer(
                model.config,
                Ranks(*(linear.rank for linear in linears)),
                model.dtype.itemsize,
                drops,
                model.casts_weights,
            ),
            num_layers=model.config.num_layers,
            trained=sum(x.size for x in jax.tree.leaves(trained)),
            frozen_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen)),
            full=full,
            trains_head=is_trained(model.head_variable),
            shape=shape,
            max_targets=max_targets or shape[1] * shape[2],
            keys_per_token=keys_per_token,
        )

    @classmethod
    def of_run(cls, model: Transformer, batches: Batches, row_length: int | None = None) -> "Job":
        """The largest step of a run, or one with rows of that length."""
        A, B, longest = max(batches.shapes)
        shape = (A, B, row_length or longest)
        return cls.of(
            model,
            shape,
            max_targets=batches.limits[shape[2]].max_targets,
            keys_per_token=_keys_per_token(model.config, np.minimum(batches.documents.lengths, shape[2])),
        )

    @property
    def tokens(self) -> int:
        """Of a micro-batch, with its padding."""
        return self.shape[1] * self.shape[2]

    @property
    def head(self) -> int:
        """Elements of the matrix that makes logits."""
        return self.layer.config.vocab_size * self.layer.config.hidden_size


def _keys_per_token(config: ModelConfig, lengths: Int[np.ndarray, " documents"]) -> float:
    """The average over layers, and over the tokens of documents of these lengths."""
    lengths = lengths.astype(np.float64)

    def pairs(window: int | None) -> float:
        """Of tokens and those that they attend to: all before them, and from the window's length on as many as that."""
        within = lengths if window is None else np.minimum(lengths, window)
        return float(np.sum(within * (within + 1) / 2 + (lengths - within) * within))

    return float(np.mean([pairs(window) for window in config.windows]) / lengths.sum())


# Memory.


def argument_bytes(job: Job) -> int:
    """What a step is given: weights, trained ones in float32 with AdamW's two moments, and the batch, four int32."""
    A, B, T = job.shape
    return job.frozen_bytes + 3 * 4 * job.trained + 4 * 4 * A * B * T


def layer_bytes(job: Job, remat: Remat) -> int:
    """What the device keeps of one layer for its backward pass."""
    names, layer = KEPT[remat], job.layer
    if names is not None:
        named = sum(NAMED[name](layer) for name in names)
        return job.tokens * (named + (0 if remat in OFFLOADED else input_bytes(layer)))
    # With nothing computed again XLA sees that the backward pass norms and turns the heads as the forward pass did.
    turned = sum(layer.heads) * layer.itemsize if layer.config.qk_norm else 0
    return _whole_layer_bytes(job) + job.tokens * turned


def _whole_layer_bytes(job: Job) -> int:
    """All that the derivatives of a layer read."""
    layer = job.layer
    by_token = input_bytes(layer) + unnamed_bytes(layer) + sum(size(layer) for size in NAMED.values())
    return job.tokens * by_token + cast_weight_bytes(layer)


def loss_bytes(job: Job) -> int:
    """The most that loss and its gradient hold: a chunk of logits in float32 and their gradient; hidden states before
    and after the last norm, those with a target, and their gradient; a trained head's gradient, and its cast."""
    layer = job.layer
    chunk = min(LOSS_CHUNK, job.max_targets) * layer.config.vocab_size * (4 + layer.itemsize)
    return chunk + 4 * job.tokens * input_bytes(layer) + (job.head * (4 + layer.itemsize) if job.trains_head else 0)


def backward_bytes(job: Job, remat: Remat) -> int:
    """The most that the backward pass of one layer holds beside what is kept, at its gated activation.

    By then all of the layer was computed again, or, from the residual stream between its halves, the second of them; a
    loop over layers has copied out what was kept, too. Beside it there are the gradient of the product, of the layer's
    output, the same extended, and the matrix behind the product; and what was fetched, of the next layer, too.
    """
    layer, D = job.layer, job.layer.config.hidden_size
    if KEPT[remat] is None:
        again = 0
    elif "residual" in offloaded(remat, layer.config, casts=layer.casts):
        again = job.tokens * ((D + layer.ranks.gate_up) * layer.itemsize + NAMED["gate_up"](layer))
    else:  # all but what was kept, or fetched
        there = unrolls(remat) * layer_bytes(job, remat) + job.tokens * offloaded_bytes(layer, remat)
        again = _whole_layer_bytes(job) - there
    gradients = job.tokens * (layer.config.intermediate_size + 2 * D + layer.ranks.down) * layer.itemsize
    fetched = 2 * job.tokens * offloaded_bytes(layer, remat)
    return again + gradients + layer.projections.down * layer.itemsize + fetched


def peak_bytes(job: Job, remat: Remat) -> int:
    """The most that a step holds on the device: at the loss, in the first layer that goes backward, or at the end.

    Gradients of the trained parameters are float32. A loop over layers has a place for all of them from its start;
    without one they are stacked after the last. Micro-batches add theirs to another copy.
    """
    kept = job.num_layers * layer_bytes(job, remat)
    gradients = 4 * job.trained
    head = 4 * job.head if job.trains_head else 0
    stacked = 0 if unrolls(remat) else gradients
    at_end = gradients + (head if job.layer.config.tie_word_embeddings else 0)
    micro = max(kept + loss_bytes(job), kept + max(stacked, head) + backward_bytes(job, remat), at_end)
    accumulated = gradients if job.shape[0] > 1 else 0
    return argument_bytes(job) + accumulated + micro


def autotuning_bytes(job: Job) -> int:
    """The most that is held before the first step, while XLA times kernels for each matmul to choose one.

    All but the batch is there already. The largest matmul makes a chunk of logits, or a trained head's gradient, in
    float32: from operands of its own, and twice, to compare.
    """
    layer, chunk = job.layer, min(LOSS_CHUNK, job.max_targets)
    hidden, logits = chunk * layer.config.hidden_size, chunk * layer.config.vocab_size
    matmul = (hidden + job.head) * layer.itemsize + 2 * 4 * logits
    if job.trains_head:
        matmul = max(matmul, (hidden + logits) * layer.itemsize + 2 * 4 * job.head)
    return argument_bytes(job) + matmul


def host_bytes(job: Job, remat: Remat) -> int:
    """What waits in the host's memory, of all layers but the last."""
    return (job.num_layers - 1) * job.tokens * offloaded_bytes(job.layer, remat)


# Time.


class Rates(NamedTuple):
    """What a device sustains in the middle of a step, per second: less than its best in a benchmark of one kernel. And
    what a kernel takes beside its work, in seconds."""

    matmul: float  # floating-point operations, bfloat16
    attention: float  # the same, within the attention kernels
    memory: float  # bytes
    link: float  # bytes to the host, and as many back
    kernel: float  # on the device
    start: float  # on the host, where it starts each by itself


# From the kernels of their steps (2026-11-26 and 2026-11-27): of the H100 its SXM's, from the link on the H200's.
RATES = {
    "H200": Rates(720e12, 500e12, 3.0e12, 50e9, 2e-6, 7e-6),
    "H100": Rates(720e12, 500e12, 2.4e12, 50e9, 2e-6, 7e-6),
}
_UNKNOWN = Rates(100e12, 50e12, 0.6e12, 10e9, 0, 0)  # or a CPU, that starts no kernels
_SLOWER = {"PCIe", "NVL", "MIG"}  # of the same name, with less power, or parts of one
_TILE_KEYS = 64  # that the attention kernels compute and mask, for each token


def known_gpu(device_kind: str) -> str | None:
    """That of `RATES`, by the name that jax has for a device."""
    words = set(device_kind.split())
    return next((name for name in RATES if name in words and not words & _SLOWER), None)


def rates_of(device_kind: str) -> Rates:
    """By the name that jax has for a device; low ones where they are not known."""
    return RATES.get(known_gpu(device_kind), _UNKNOWN)


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of matmuls and of attention, and the bytes that all other kernels move."""

    matmul: float = 0
    attention: float = 0
    bytes: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.matmul + other.matmul, self.attention + other.attention, self.bytes + other.bytes)

    def seconds(self, rates: Rates) -> float:
        """One kernel after another."""
        return self.matmul / rates.matmul + self.attention / rates.attention + self.bytes / rates.memory


def forward_work(job: Job) -> dict[str, Work]:
    """Of one layer and micro-batch: what it takes to compute what has a name, the norms, and the output."""
    layer, ranks, projections = job.layer, job.layer.ranks, job.layer.projections
    (q, kv), D, F = layer.heads, layer.config.hidden_size, layer.config.intermediate_size
    keys = job.keys_per_token + _TILE_KEYS

    def work(*, matmul: int = 0, attention: float = 0, channels: int = 0, copied: int = 0) -> Work:
        """`channels` of each token are read or written; `copied` weights laid side by side with an adapter's."""
        moved = (job.tokens * channels + 2 * copied) * layer.itemsize
        return Work(job.tokens * 2 * matmul, job.tokens * attention, moved)

    turn = work(channels=2 * (q + kv))
    norms = work(channels=4 * D + ranks.qkv + ranks.gate_up, copied=projections.qkv + projections.gate_up)
    qkv = work(matmul=projections.qkv)
    out = work(matmul=projections.out, channels=3 * D + ranks.out, copied=projections.out)
    down = work(matmul=projections.down, channels=3 * F + 3 * D + ranks.down, copied=projections.down)
    if layer.config.post_norms:  # normed and added after the projection, in a pass of their own
        branch, out, down = out + down, work(channels=3 * D), work(channels=3 * D)
    else:
        branch = Work()
    # Turned heads are normed first and not kept; without a norm they are turned in place, and kept so.
    return {
        "norms": norms + turn if layer.config.qk_norm else norms,
        "heads": qkv,
        "qkv": Work() if layer.config.qk_norm else turn,
        "attention": work(attention=4 * q * keys, channels=2 * q + 2 * kv),
        "branch": branch,
        "residual": out,
        "gate_up": work(matmul=projections.gate_up),
        "output": down,
    }


def recomputed(layer: Layer, remat: Remat) -> set[str]:
    """What the backward pass computes again of `forward_work`; nothing of it reads a layer's output."""
    names = KEPT[remat]
    if names is None:
        return set()
    there = {*names, *offloaded(remat, layer.config, casts=layer.casts), "lora"}
    if "qkv" in there:
        there.add("heads")  # that it is made of
    return {"norms", "heads", *NAMED} - there


def backward_work(job: Job) -> Work:
    """Of one layer and micro-batch, all but what is computed again."""
    layer, projections = job.layer, job.layer.projections
    (q, kv), D, F = layer.heads, layer.config.hidden_size, layer.config.intermediate_size
    matmul = 2 * sum(projections) * (2 if job.full else 1)  # gradients of inputs; of weights
    attention = 3.5 * 4 * q * (job.keys_per_token + _TILE_KEYS)  # seven products for the forward pass's two
    channels = 6 * F  # the gated activation, its product again
    channels += 10 * D + 2 * (layer.ranks.qkv + layer.ranks.gate_up)  # both norms, with the residual connections
    channels += 6 * q + 4 * kv + 3 * (q + kv)  # attention in two kernels; norm and rotation of its heads
    if layer.config.post_norms:
        channels += 8 * D
    if any(layer.ranks):
        channels += 4 * D  # extends the gradients of both branches' outputs
        channels += 4 * D + 2 * q + 2 * kv + 3 * F  # gradients of the factors, from inputs and outputs
    copied = 2 * (sum(projections) if not layer.casts else projections.out + projections.down)
    return Work(job.tokens * matmul, job.tokens * attention, (job.tokens * channels + copied) * layer.itemsize)


def loss_work(job: Job) -> Work:
    """Logits and the gradients that come from them; what is read and written of float32 logits."""
    matmuls = 3 if job.trains_head else 2
    moved = job.max_targets * job.layer.config.vocab_size * (2 * 4 + job.layer.itemsize)
    return Work(2 * matmuls * job.max_targets * job.head, 0, moved)


def num_kernels(job: Job, remat: Remat) -> int:
    """About how many a step runs, from the profiles of Qwen3's: adapters have many small ones, loops copy arrays."""
    looped, unrolled = (75, 46) if job.full else (110, 62)  # of a layer
    return job.shape[0] * job.num_layers * (unrolled if unrolls(remat) else looped)


def step_seconds(job: Job, remat: Remat, rates: Rates) -> float:
    """One kernel after another. Copies to the host and back run beside them: they take longer where the link is slower
    than the computation. Where kernels are started one by one, few tokens take what it takes to start them."""
    work = forward_work(job)
    again = sum((work[name] for name in sorted(recomputed(job.layer, remat))), start=Work())
    forward = job.num_layers * sum(work.values(), start=Work()).seconds(rates)
    backward = job.num_layers * (backward_work(job) + again).seconds(rates)
    copy = host_bytes(job, remat) / rates.link
    micro = max(forward, copy) + max(backward, copy) + loss_work(job).seconds(rates)
    # Reads gradients twice; reads and writes parameters and both moments. Long arrays: faster than a step's others.
    update = Work(bytes=7 * 4 * job.trained)
    count = num_kernels(job, remat)
    seconds = job.shape[0] * micro + update.seconds(rates) + count * rates.kernel
    return max(seconds, count * rates.start) if remat in OFFLOADED else seconds


def run_seconds(model: Transformer, batches: Batches, remat: Remat, rates: Rates) -> float:
    """All steps of a run."""
    lengths, steps = np.unique(batches.row_lengths, return_counts=True)
    jobs = (Job.of_run(model, batches, int(length)) for length in lengths)
    return sum(count * step_seconds(job, remat, rates) for job, count in zip(jobs, steps.tolist(), strict=True))


# The choice.


class Prediction(NamedTuple):
    """What a step takes with one choice."""

    remat: Remat
    peak_bytes: int
    seconds: float
    host_bytes: int


def predict(job: Job, rates: Rates) -> dict[Remat, Prediction]:
    """For every choice, from the one that keeps least on the device to the one that keeps most."""
    first = autotuning_bytes(job)
    return {
        remat: Prediction(
            remat, max(first, peak_bytes(job, remat)), step_seconds(job, remat, rates), host_bytes(job, remat)
        )
        for remat in get_args(Remat)
    }


def fits(predictions: Iterable[Prediction], memory: float) -> list[Prediction]:
    """Those that do, fastest first, within `memory` bytes of the device and what the host has to spare."""
    host = _host_room()
    room = [p for p in predictions if p.peak_bytes <= memory and p.host_bytes <= host]
    return sorted(room, key=lambda p: (p.seconds, p.peak_bytes))


def resolve(
    config: TrainConfig, model: Transformer, batches: Batches, held_bytes: int, gpu: str | None = None
) -> tuple[Remat, str | None]:
    """A run's choice; and, where `remat` left it open, a line that says what was chosen and why.

    Args:
      held_bytes: of the device's memory, what the run's own weights and optimizer state take already.
      gpu: of `RATES`, for a run that is not on this machine's device: of its memory nothing is known.

    Raises:
      InputError: a step fits with no choice, or the host has too little memory for one that is asked for by name.
    """
    job = Job.of_run(model, batches)
    if config.remat != "auto":
        if gpu is None:
            _check_host(job, config.remat)
        return config.remat, None
    device = current_device()
    free = _free_bytes(device, held_bytes) if gpu is None else None
    memory = free if config.memory_limit is None else config.memory_limit * _GIB
    if memory is None:
        return "full", 'remat "full": this device does not say how much memory is free; a `memory_limit` may allow more'
    predictions = list(predict(job, rates_of(gpu or device.device_kind)).values())
    if gpu is None and device.platform == "cpu":  # has no memory but the host's
        predictions = [p for p in predictions if not p.host_bytes]
    if not (fitting := fits(predictions, memory)):
        raise InputError(_refusal(config, job, fits(predictions, math.inf), memory))
    return fitting[0].remat, _explanation(fitting[0], predictions, memory)


def _check_host(job: Job, remat: Remat) -> None:
    needed, room = host_bytes(job, remat), _host_room()
    if needed > room:
        got = f"{PINNED_LIMIT} of {_gib(room)}" if room == pinned_limit_bytes() else f"{_gib(room)} available"
        raise InputError(
            f'`remat` "{remat}" needs {_gib(needed)} of host memory for what the first {job.num_layers - 1} layers '
            f'read again, got {got}. "full" keeps it on the device.'
        )


def _host_room() -> int:
    """What can wait in the host's memory."""
    available, limit = available_host_bytes(), pinned_limit_bytes()
    return limit if available is None else min(available, limit)


def _free_bytes(device: jax.Device, held_bytes: int) -> float | None:
    """What a run may take in all: what is free and what it holds already, less what a prediction may be off by."""
    free = free_device_bytes(device)
    return None if free is None else (free + held_bytes) / (1 + _ACCURACY)


def _explanation(chosen: Prediction, predictions: list[Prediction], memory: float) -> str:
    step = f"{chosen.seconds:.3g} s a step"
    line = f'remat "{chosen.remat}": predicted {_gib(chosen.peak_bytes)} of {_gib(memory)} and {step}'
    faster = [p for p in predictions if p.seconds < chosen.seconds]
    if not faster:
        return line
    following = max(faster, key=lambda p: p.seconds)
    return f'{line}; "{following.remat}" would take {_gib(following.peak_bytes)} and {following.seconds:.3g} s'


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def _refusal(config: TrainConfig, job: Job, choices: list[Prediction], memory: float) -> str:
    frugal = min(choices, key=lambda p: p.peak_bytes)
    step = f"a step of {' x '.join(map(str, job.shape))} tokens"
    need, room = f'{_gib(frugal.peak_bytes)} (remat "{frugal.remat}")', _gib(memory)
    if config.memory_limit is not None:
        return f"`memory_limit` must be at least {need} for {step}, got {room}; a smaller batch needs less."
    return (
        f"`per_device_train_batch_size` or `max_length` must be smaller: {step} needs {need}, got {room} that are free"
        f" with {config.per_device_train_batch_size} and {config.max_length}."
    )
