"""Predicts what the links between devices carry in a step, and how long a step on many devices takes.

The links within a host (NVLink) carry as much in each direction at a time. A collective over n devices in a ring moves
`(n - 1) / n` of the whole array through each device's link: gathered matrices once for each gather, scattered gradients
once. An all-reduce is a scatter and a gather, and moves twice as much.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxpack.constants import Remat
from jaxpack.data.batching import BatchSource
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.mesh import DeviceMesh, num_shards
from jaxpack.planning.cards import DeviceRates
from jaxpack.planning.cost import StepShape, backward_cost, forward_cost, recomputed_cost
from jaxpack.planning.time import step_seconds


class Links(NamedTuple):
    """Holds the bytes per second that a device sends while it receives as many, within a host and between hosts.

    The defaults of both are 80 % of published figures: 450 GB/s of NVLink 4 for each GPU of a host of 8, and 50 GB/s of
    one 400 Gb/s adapter for each GPU. They were not measured.

    Attributes:
      beside: how many bytes sent beside computation slow it down by a second, because a collective takes some of the
        multiprocessors and of the memory's bandwidth. Measured on two H200, with matrices in shards: 231e9 to 263e9.
    """

    within: float = 0.8 * 450e9
    between: float = 0.8 * 50e9
    beside: float = 240e9
    devices_in_a_host: int = 8

    def rate(self, num_devices: int) -> float:
        """Returns the bytes per second of a collective over neighbouring devices."""
        return self.within if num_devices <= self.devices_in_a_host else self.between


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Holds the bytes that each device sends in a step.

    Attributes:
      gathered: for the matrices of all layers, in both directions together.
      gathered_outside: for a trained embedding and head, once for each micro-batch.
      scattered: for gradients of matrices in shards, in float32.
      reduced: for all other gradients, and for those of shards between copies of the model.
    """

    gathered: float
    gathered_outside: float
    scattered: float
    reduced: float


def traffic_of(step: StepShape, data: int, fsdp: int) -> Traffic:
    """Returns the bytes that each device sends in a step on a mesh `data` x `fsdp`.

    Args:
      step: the step of one device, whose model lies on this mesh.
    """
    A, share = step.shape[0], (fsdp - 1) / fsdp
    layers, outside = step.num_layers * step.gathered_bytes, step.gathered_outside
    in_shards = 4 * (layers + outside) / step.itemsize if step.trains_all else 0.0
    held = in_shards / fsdp
    others = max(0.0, 4 * step.trained - held)
    num_devices = data * fsdp
    reduced = 2 * others * (num_devices - 1) / num_devices + 2 * held * (data - 1) / data
    return Traffic(A * share * 2 * layers, A * share * outside, A * share * in_shards, reduced)


def mesh_seconds(
    step: StepShape,
    remat: Remat,
    rates: DeviceRates,
    data: int,
    fsdp: int,
    links: Links = Links(),  # noqa: B008
) -> float:
    """Returns the seconds of a step on a mesh: that of one device, and what its links add.

    A layer's matrices are gathered, and its gradients scattered, while another part computes, which they slow down. An
    embedding and a head in shards are gathered first, and the all-reduce follows the backward pass: these hide behind
    nothing.
    """
    traffic, A = traffic_of(step, data, fsdp), step.shape[0]
    alone = step_seconds(step, remat, rates)
    forward = step.num_layers * rates.seconds(forward_cost(step))
    backward = step.num_layers * rates.seconds(backward_cost(step) + recomputed_cost(step, remat))
    rate = links.rate(fsdp)
    one_way = traffic.gathered / (2 * A) / rate
    exposed = max(0.0, one_way - forward) + max(0.0, one_way + traffic.scattered / A / rate - backward)
    slowed = (traffic.gathered + traffic.scattered) / links.beside
    return alone + slowed + A * exposed + traffic.gathered_outside / rate + traffic.reduced / links.rate(data * fsdp)


def run_seconds(
    model: Transformer, batches: BatchSource, remat: Remat, rates: DeviceRates, mesh: DeviceMesh, **changes: Any
) -> float:
    """Returns the predicted seconds of all steps of a run.

    Args:
      model: the model on this mesh; its arrays may be abstract.
      changes: fields of each step's `StepShape` that a choice sets.
    """
    fsdp = num_shards(mesh)
    lengths, counts = np.unique(batches.row_lengths, return_counts=True)
    steps = (dataclasses.replace(StepShape.of_run(model, batches, int(length)), **changes) for length in lengths)
    seconds = (mesh_seconds(step, remat, rates, mesh.size // fsdp, fsdp) for step in steps)
    return sum(count * each for each, count in zip(seconds, counts.tolist(), strict=True))
