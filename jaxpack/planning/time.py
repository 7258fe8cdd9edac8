"""Predicts the seconds that a step takes with each choice of `remat`, at the rates of a device."""

import math

from jaxpack.constants import Remat
from jaxpack.model.remat import OFFLOADED, unrolls
from jaxpack.planning.cards import DeviceRates
from jaxpack.planning.cost import StepShape, backward_cost, forward_cost, loss_cost, recomputed_cost, update_cost
from jaxpack.planning.memory import residual_bytes


def num_kernels(step: StepShape, remat: Remat) -> int:
    """Returns the approximate number of kernels of the layers in a step, from profiles of Qwen3 models.

    Adapters have many small kernels, and loops copy arrays. For frozen weights in 4 bits, it counts what takes the same
    time: the kernel that makes a dense matrix takes as long as several small ones even where the matrix is small.
    """
    looped, unrolled = (75, 46) if step.trains_all else (110, 62)  # kernels per layer
    if step.dequantizes:
        looped, unrolled = looped + 30, unrolled + 20
    return step.shape[0] * step.num_layers * (unrolled if unrolls(remat) else looped)


def num_loss_kernels(step: StepShape) -> int:
    """Returns the approximate number of kernels of the loss: twenty for each chunk of tokens and piece of the head."""
    chunks = math.ceil(step.max_targets / step.loss_chunk)
    pieces = math.ceil(step.config.vocab_size / step.piece_rows) if step.streams_head else 1
    return step.shape[0] * 20 * chunks * pieces


def step_seconds(step: StepShape, remat: Remat, rates: DeviceRates) -> float:
    """Returns the seconds of a step, with kernels running one after another.

    Copies to the host and back run beside kernels, so they only add time if the link is slower than the computation.
    With the choices that offload activations or the embedding, the host starts kernels one by one: a small step takes
    as long as starting them.
    """
    forward = step.num_layers * rates.seconds(forward_cost(step))
    backward = step.num_layers * rates.seconds(backward_cost(step) + recomputed_cost(step, remat))
    residuals = residual_bytes(step, remat) / rates.link
    weights = step.layer_weight_bytes / rates.link if step.offload_weights else 0.0
    head = step.head * step.itemsize / rates.link if step.streams_head else 0.0
    # The link carries copies in both directions at a time: in the forward pass, residuals leave and weights arrive.
    micro = max(forward, residuals, weights) + max(backward, residuals + weights)
    micro += max(rates.seconds(loss_cost(step)), head)
    of_layers, of_loss = num_kernels(step, remat), num_loss_kernels(step)
    # A piece of the head and a chunk of tokens make kernels so small that starting them takes longer.
    seconds = step.shape[0] * micro + rates.seconds(update_cost(step)) + of_layers * rates.kernel
    seconds += of_loss * (rates.start if step.streams_head else rates.kernel)
    starts_each = remat in OFFLOADED or step.offload_embedding
    return max(seconds, (of_layers + of_loss) * rates.start) if starts_each else seconds
