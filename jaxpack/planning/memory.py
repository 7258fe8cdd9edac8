"""Predicts the memory that a step takes with each choice of `remat`, in bytes on the device and on the host."""

from jaxpack.constants import Remat
from jaxpack.model.cost import BackwardPeak
from jaxpack.model.pieces import piece_of
from jaxpack.model.remat import KEPT, OFFLOADED, keeps, unrolls
from jaxpack.planning.cost import StepShape


def argument_bytes(step: StepShape) -> int:
    """Returns the bytes of a step's arguments.

    These are the frozen weights, the trained ones in float32, the state of the optimizer, and the batch of four int32
    arrays. If the embedding is in the host's memory, its rows for this batch and for the next one are added.
    """
    A, B, T = step.shape
    embedded = 2 * A * B * T * step.input_bytes if step.offload_embedding else 0
    return device_frozen_bytes(step) + 4 * step.trained + step.optimizer_bytes + 4 * 4 * A * B * T + embedded


def device_frozen_bytes(step: StepShape) -> int:
    """Returns the bytes of the frozen weights that lie on the device."""
    return step.frozen_bytes - host_frozen_bytes(step)


def host_frozen_bytes(step: StepShape) -> int:
    """Returns the bytes of the frozen weights that lie in the host's memory."""
    return step.layer_weight_bytes * step.offload_weights + step.embedding_bytes * step.offload_embedding


def fetched_bytes(step: StepShape) -> int:
    """Returns the bytes of the matrices that are fetched or gathered.

    They are those of two layers, this one and the next one, and a trained embedding and head with float32 gradients.
    """
    fetched = step.layer_weight_bytes // step.num_layers if step.offload_weights else 0
    return 2 * (fetched + step.gathered_bytes) + (1 + 4 // step.itemsize) * step.gathered_outside


def layer_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the bytes of one layer's residuals that stay on the device for its backward pass."""
    names, layer = KEPT[remat], step.layer
    if names is None:
        return _whole_layer_bytes(step) + step.tokens * layer.shared_bytes
    return step.tokens * (layer.bytes_of(names) + (0 if remat in OFFLOADED else step.input_bytes))


def _whole_layer_bytes(step: StepShape) -> int:
    """Returns the bytes of everything that the derivatives of a layer read."""
    return step.tokens * (step.input_bytes + step.layer.read_bytes) + step.layer.cast_weight_bytes


def offloaded_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the bytes of one layer's residuals that are offloaded to the host."""
    if remat not in OFFLOADED:
        return 0
    return step.tokens * (step.input_bytes + step.layer.bytes_of(step.offloaded(remat)))


def loss_bytes(step: StepShape) -> int:
    """Returns the maximum number of bytes that the loss and its gradient hold.

    These are a chunk of logits in float32 and their gradient; the hidden states before and after the last norm, a copy
    of the hidden states that have a target, and a gradient of hidden states; the gradient and the cast of a trained
    head; and a dense copy of a head that is stored in another form.
    """
    if step.streams_head:
        return _streamed_loss_bytes(step)
    chunk = min(step.loss_chunk, step.max_targets) * step.config.vocab_size * (4 + step.itemsize)
    head = step.head * (4 + step.itemsize) if step.trains_head else 0
    head += step.head * step.itemsize if step.copies_head else 0
    return chunk + 4 * step.tokens * step.input_bytes + head


def _streamed_loss_bytes(step: StepShape) -> int:
    """Returns the maximum number of bytes that the loss holds if the head is fetched in pieces.

    These are two pieces of the head; a chunk of a piece's logits in float32, twice, and in the dtype of matmuls; for
    each target the sums and the row of the head; and the hidden states as in `loss_bytes`.
    """
    piece = 2 * step.piece_rows * step.input_bytes
    chunk = min(step.loss_chunk, step.max_targets) * step.piece_rows * (2 * 4 + step.itemsize)
    sums = step.max_targets * (4 * step.config.hidden_size + step.input_bytes)
    return piece + chunk + sums + 4 * step.tokens * step.input_bytes


def backward_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the maximum number of bytes that one layer's backward pass holds in addition to residuals on the device.

    At the peak, the whole layer has been recomputed, or only one part of it, if the input of that part was offloaded. A
    loop over layers also holds a copy of the layer's residuals. Of a part in pieces, one piece has been
    recomputed. Residuals that are fetched from the host are on the device for two layers at a time: this one and the
    next one.
    """

    names, piece = KEPT[remat], piece_of(step.tokens)
    comes_in_pieces = piece < step.tokens and not keeps(remat, "gate_up") and not step.gathered_bytes

    def held(peak: BackwardPeak) -> int:
        if names is None:
            again = 0
        elif peak.within is not None:
            there = step.offloaded(remat) | (names if unrolls(remat) else frozenset())
            again = step.tokens * max(0, peak.rerun_bytes - step.layer.bytes_of(peak.within & there))
            again += 0 if unrolls(remat) or remat in OFFLOADED else layer_bytes(step, remat)
        elif peak.starts_from in step.offloaded(remat):
            again = step.tokens * peak.rerun_bytes
        else:  # Recomputes all but the residuals that were kept or fetched.
            there = unrolls(remat) * layer_bytes(step, remat) + offloaded_bytes(step, remat)
            again = _whole_layer_bytes(step) - there
        if peak.whole_bytes is not None and comes_in_pieces:
            again -= (step.tokens - piece) * peak.rerun_bytes
            return again + step.tokens * peak.whole_bytes + piece * peak.bytes + peak.weight_bytes
        return again + step.tokens * peak.bytes + peak.weight_bytes

    return max(map(held, step.layer.peaks), default=0) + 2 * offloaded_bytes(step, remat)


def peak_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the maximum number of bytes that a step holds on the device.

    The peak is at the loss, in the first layer of the backward pass, or at the end. Gradients of the trained parameters
    are float32. A loop over layers allocates the gradients of all layers at its start; without a loop they are stacked
    after the last layer. Several micro-batches add their gradients to another copy. Adapters of only some layers are
    also there, with their gradients, as factors of all layers.
    """
    kept = step.num_layers * layer_bytes(step, remat)
    gradients = 4 * step.trained
    head = 4 * step.head if step.trains_head else 0
    stacked = 0 if unrolls(remat) else gradients
    at_end = gradients + (head if step.config.tie_word_embeddings else 0)
    micro = max(kept + loss_bytes(step), kept + max(stacked, head) + backward_bytes(step, remat), at_end)
    accumulated = gradients if step.shape[0] > 1 else 0
    return argument_bytes(step) + fetched_bytes(step) + accumulated + 2 * 4 * step.spread + micro


def autotuning_bytes(step: StepShape) -> int:
    """Returns the maximum number of bytes before the first step, while XLA measures kernels for each matmul.

    All arguments but the batch are on the device already, unless the frozen weights are read later.
    """
    there = argument_bytes(step) - (device_frozen_bytes(step) if step.compiles_first else 0)
    return there + search_bytes(step)


def search_bytes(step: StepShape) -> int:
    """Returns the maximum number of bytes that XLA allocates while it measures kernels for each matmul.

    The largest matmul makes a chunk of logits, or a trained head's gradient, in float32. If the head is fetched in
    pieces, it makes the logits of one piece. XLA allocates the operands of this matmul once, and its output twice, to
    compare results.
    """
    chunk = min(step.loss_chunk, step.max_targets)
    vocab_size = step.piece_rows if step.streams_head else step.config.vocab_size
    hidden, logits = chunk * step.config.hidden_size, chunk * vocab_size
    matmul = (hidden + vocab_size * step.config.hidden_size) * step.itemsize + 2 * 4 * logits
    if step.trains_head:
        matmul = max(matmul, (hidden + logits) * step.itemsize + 2 * 4 * step.head)
    return matmul


def host_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the bytes in the host's memory: residuals of the layers, and frozen weights."""
    return residual_bytes(step, remat) + host_frozen_bytes(step)


def residual_bytes(step: StepShape, remat: Remat) -> int:
    """Returns the bytes of host memory for residuals: a slice for each layer, of which the first one stays unused.

    The residuals of the last layer stay on the device.
    """
    return step.num_layers * offloaded_bytes(step, remat)
