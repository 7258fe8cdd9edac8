"""Predicts the seconds that a step takes with each choice of `remat`, at the rates of a device."""

from jaxpack.constants import Remat
from jaxpack.model.remat import OFFLOADED, unrolls
from jaxpack.planning.cards import DeviceRates
from jaxpack.planning.cost import StepShape, backward_cost, forward_cost, loss_cost, recomputed_cost, update_cost
from jaxpack.planning.memory import residual_bytes


def num_kernels(step: StepShape, remat: Remat) -> int:
    """Returns the approximate number of kernels in a step, from profiles of Qwen3 models.

    Adapters have many small kernels, and loops copy arrays.
    """
    looped, unrolled = (75, 46) if step.trains_all else (110, 62)  # kernels per layer
    return step.shape[0] * step.num_layers * (unrolled if unrolls(remat) else looped)


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
    count = num_kernels(step, remat)
    seconds = step.shape[0] * micro + rates.seconds(update_cost(step)) + count * rates.kernel
    starts_each = remat in OFFLOADED or step.offload_embedding
    return max(seconds, count * rates.start) if starts_each else seconds
