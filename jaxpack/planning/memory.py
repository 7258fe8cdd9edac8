"""The memory that a step takes with each choice of `remat`, in bytes: of the device, and of the host."""

from jaxpack.constants import Remat
from jaxpack.kernels.logits import CHUNK as LOSS_CHUNK
from jaxpack.model.cost import BackwardPeak
from jaxpack.model.remat import KEPT, OFFLOADED, unrolls
from jaxpack.planning.cost import StepShape


def argument_bytes(step: StepShape) -> int:
    """Returns the bytes that a step is given: weights, trained ones in float32 with AdamW's two moments, and the batch,
    four int32.
    """
    A, B, T = step.shape
    return step.frozen_bytes + 3 * 4 * step.trained + 4 * 4 * A * B * T


def layer_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the bytes that the device keeps of one layer for its backward pass."""
    names, layer = KEPT[remat], step.layer
    if names is None:
        return _whole_layer_bytes(step) + step.tokens * layer.shared_bytes
    return step.tokens * (layer.bytes_of(names) + (0 if remat in OFFLOADED else step.input_bytes))


def _whole_layer_bytes(step: StepShape) -> int:
    """Returns the bytes of all that the derivatives of a layer read."""
    return step.tokens * (step.input_bytes + step.layer.read_bytes) + step.layer.cast_weight_bytes


def offloaded_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the bytes of one layer that wait in the host's memory."""
    if remat not in OFFLOADED:
        return 0
    return step.tokens * (step.input_bytes + step.layer.bytes_of(step.offloaded(remat)))


def loss_bytes(step: StepShape) -> int:
    """Returns the most bytes that loss and its gradient hold: a chunk of logits in float32 and their gradient; hidden
    states before and after the last norm, those with a target, and their gradient; a trained head's gradient, and its
    cast; a dense copy of a head that is stored in another form.
    """
    chunk = min(LOSS_CHUNK, step.max_targets) * step.config.vocab_size * (4 + step.itemsize)
    head = step.head * (4 + step.itemsize) if step.trains_head else 0
    head += step.head * step.itemsize if step.copies_head else 0
    return chunk + 4 * step.tokens * step.input_bytes + head


def backward_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the most bytes that the backward pass of one layer holds beside what is kept.

    By then all of the layer was computed again, or only the part that comes next, from its input if that was offloaded;
    a loop over layers has copied out what was kept, too. What was fetched is there, also of the next layer.
    """

    def held(peak: BackwardPeak) -> int:
        if KEPT[remat] is None:
            again = 0
        elif peak.starts_from in step.offloaded(remat):
            again = step.tokens * peak.rerun_bytes
        else:  # all but what was kept, or fetched
            there = unrolls(remat) * layer_bytes(step, remat) + offloaded_bytes(step, remat)
            again = _whole_layer_bytes(step) - there
        return again + step.tokens * peak.bytes + peak.weight_bytes

    return max(map(held, step.layer.peaks), default=0) + 2 * offloaded_bytes(step, remat)


def peak_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the most bytes that a step holds on the device: at the loss, in the first layer that goes backward, or at
    the end.

    Gradients of the trained parameters are float32. A loop over layers has a place for all of them from its start;
    without one they are stacked after the last. Micro-batches add theirs to another copy.
    """
    kept = step.num_layers * layer_bytes(step, remat)
    gradients = 4 * step.trained
    head = 4 * step.head if step.trains_head else 0
    stacked = 0 if unrolls(remat) else gradients
    at_end = gradients + (head if step.config.tie_word_embeddings else 0)
    micro = max(kept + loss_bytes(step), kept + max(stacked, head) + backward_bytes(step, remat), at_end)
    accumulated = gradients if step.shape[0] > 1 else 0
    return argument_bytes(step) + accumulated + micro


def autotuning_bytes(step: StepShape) -> int:
    """Returns the most bytes that are held before the first step, while XLA times kernels for each matmul.

    All but the batch is there already. The largest matmul makes a chunk of logits, or a trained head's gradient, in
    float32: from operands of its own, and twice, to compare.
    """
    chunk = min(LOSS_CHUNK, step.max_targets)
    hidden, logits = chunk * step.config.hidden_size, chunk * step.config.vocab_size
    matmul = (hidden + step.head) * step.itemsize + 2 * 4 * logits
    if step.trains_head:
        matmul = max(matmul, (hidden + logits) * step.itemsize + 2 * 4 * step.head)
    return argument_bytes(step) + matmul


def host_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the bytes that wait in the host's memory, of all layers but the last."""
    return (step.num_layers - 1) * offloaded_bytes(step, remat)
