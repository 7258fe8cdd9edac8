"""Predicts the seconds that a step takes with each choice of `remat`, at the rates of a device."""

from typing import NamedTuple

import numpy as np

from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.model.cost import Cost
from jaxpack.model.remat import OFFLOADED, unrolls
from jaxpack.model.transformer import Transformer
from jaxpack.planning.cost import StepShape, backward_cost, forward_cost, loss_cost, recomputed_cost, update_cost
from jaxpack.planning.memory import host_bytes


class DeviceRates(NamedTuple):
    """Holds the work per second that a device sustains within a step, and the seconds that each kernel adds.

    Sustained rates are lower than the best rates of a benchmark of one kernel.
    """

    matmul: float  # bfloat16 floating-point operations per second
    attention: float  # floating-point operations per second within attention kernels
    memory: float  # bytes per second
    link: float  # bytes per second from the device to the host, and as many from the host to the device
    kernel: float  # seconds that each kernel takes on the device in addition to its work
    start: float  # seconds that the host takes to start each kernel, if it starts kernels one by one

    def seconds(self, cost: Cost) -> float:
        """Returns the seconds of a micro-batch's work (`Cost.for_tokens`), with kernels running one after another."""
        moved = cost.bytes + cost.weight_bytes
        return cost.matmul / self.matmul + cost.attention / self.attention + moved / self.memory


# Measured from kernels of steps (2026-11-26 and 2026-11-27). On the H100 (SXM), only the
# first three figures were measured; the last three are taken from the H200.
RATES = {
    "H200": DeviceRates(720e12, 500e12, 3.0e12, 50e9, 2e-6, 7e-6),
    "H100": DeviceRates(720e12, 500e12, 2.4e12, 50e9, 2e-6, 7e-6),
}
_UNKNOWN = DeviceRates(100e12, 50e12, 0.6e12, 10e9, 0, 0)  # also for a CPU, which starts no kernels
_SLOWER = {"PCIe", "NVL", "MIG"}  # Words that mark a slower variant of the same name, or a slice of a GPU.


def known_gpu(device_kind: str) -> str | None:
    """Returns the GPU of `RATES` that jax calls `device_kind`; None for any other."""
    words = set(device_kind.split())
    return next((name for name in RATES if name in words and not words & _SLOWER), None)


def rates_of(device_kind: str) -> DeviceRates:
    """Returns the rates of the device that jax calls `device_kind`, or low ones for an unknown device."""
    return RATES.get(known_gpu(device_kind) or "", _UNKNOWN)


def num_kernels(step: StepShape, remat: Remat) -> int:
    """Returns the approximate number of kernels in a step, from profiles of Qwen3 models.

    Adapters have many small kernels, and loops copy arrays.
    """
    looped, unrolled = (75, 46) if step.trains_all else (110, 62)  # kernels per layer
    return step.shape[0] * step.num_layers * (unrolled if unrolls(remat) else looped)


def step_seconds(step: StepShape, remat: Remat, rates: DeviceRates) -> float:
    """Returns the seconds of a step, with kernels running one after another.

    Copies to the host and back run beside kernels, so they only add time if the link is slower than the computation.
    With the choices that offload, the host starts kernels one by one: a small step takes as long as starting them.
    """
    forward = step.num_layers * rates.seconds(forward_cost(step))
    backward = step.num_layers * rates.seconds(backward_cost(step) + recomputed_cost(step, remat))
    copy = host_bytes(step, remat) / rates.link
    micro = max(forward, copy) + max(backward, copy) + rates.seconds(loss_cost(step))
    count = num_kernels(step, remat)
    seconds = step.shape[0] * micro + rates.seconds(update_cost(step)) + count * rates.kernel
    return max(seconds, count * rates.start) if remat in OFFLOADED else seconds


def run_seconds(model: Transformer, batches: Batches, remat: Remat, rates: DeviceRates) -> float:
    """Returns the predicted seconds of all steps of a run."""
    lengths, counts = np.unique(batches.row_lengths, return_counts=True)
    steps = (StepShape.of_run(model, batches, int(length)) for length in lengths)
    return sum(count * step_seconds(step, remat, rates) for step, count in zip(steps, counts.tolist(), strict=True))
