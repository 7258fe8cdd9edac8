"""Defines the shape of a step, and computes the work of its forward pass, backward pass, loss and update.

The work of layers is the sum of the costs that the model's parts declare, see `model.cost`.

The figures are for GPU kernels and bfloat16; plain XLA (`implementation="xla"`) takes more memory and time.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxpack.constants import Remat
from jaxpack.data.batching import BatchSource
from jaxpack.kernels.host_weight import HostMatrix, HostWeight, piece_rows
from jaxpack.kernels.logits import CHUNK
from jaxpack.kernels.weight import Weight
from jaxpack.model.config import ModelConfig
from jaxpack.model.cost import NO_COST, Cost, CostContext, PartCost
from jaxpack.model.linear import spread_size
from jaxpack.model.lora import adapters
from jaxpack.model.remat import KEPT, offloaded
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import is_trained, movable, split_trained
from jaxpack.optimizers.optimizer import state_bytes
from jaxpack.parallel.placement import bytes_on_device
from jaxpack.settings import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """Holds the figures of a model and a batch from which the memory and time of a step follow.

    Attributes:
      config: the architecture.
      layer: the cost of one layer.
      itemsize: bytes of an element of the activations.
      trained: how many parameters are trained, in float32.
      spread: how many elements the adapters that only some layers have take as factors of all layers.
      optimizer_bytes: the bytes of the optimizer's state.
      frozen_bytes: the bytes of all other parameters.
      trains_all: whether all weights are trained.
      trains_head: whether the head is trained: with all weights, or in full beside adapters.
      casts_weights: see `Transformer.casts_weights`.
      copies_head: whether the loss makes a dense copy of the head, because it is stored in another form.
      shape: `(A, B, T)`: micro-batches, rows in a micro-batch, and tokens in a row.
      max_targets: the maximum number of targets in a micro-batch.
      keys_per_token: how many tokens a token attends to, on average over tokens and layers.
      loss_chunk: the number of tokens whose logits exist at a time.
      compiles_first: whether the frozen weights are read after the first programs are compiled.
      layer_weight_bytes: the bytes of the frozen matrices of all layers that may lie in the host's memory.
      embedding_bytes: the bytes of the frozen embedding and head that may lie there.
      offload_weights, offload_embedding: whether these matrices lie in the host's memory.
      gathered_bytes: the bytes of one layer's matrices that are gathered from the devices that share them.
      gathered_outside: the same for a trained embedding and head, which are gathered for a whole micro-batch.
      dequantizes: whether the layers' frozen matrices are stored in fewer bits, and made dense when they are used.
    """

    config: ModelConfig
    layer: PartCost
    itemsize: int
    trained: int
    optimizer_bytes: int
    frozen_bytes: int
    trains_all: bool
    trains_head: bool
    casts_weights: bool
    copies_head: bool
    shape: tuple[int, int, int]
    max_targets: int
    keys_per_token: float
    loss_chunk: int = CHUNK
    compiles_first: bool = False
    spread: int = 0
    layer_weight_bytes: int = 0
    embedding_bytes: int = 0
    offload_weights: bool = False
    offload_embedding: bool = False
    gathered_bytes: int = 0
    gathered_outside: int = 0
    dequantizes: bool = False

    @classmethod
    def of(
        cls,
        model: Transformer,
        shape: tuple[int, int, int],
        *,
        max_targets: int | None = None,
        keys_per_token: float | None = None,
        optimizer_bytes: int | None = None,
    ) -> "StepShape":
        """Returns the shape of a step of a model, whose arrays may be abstract.

        Args:
          shape: `(A, B, T)`.
          max_targets: the maximum number of targets in a micro-batch; None if every token may have one.
          keys_per_token: how many tokens a token attends to, on average; None if every row is one document.
          optimizer_bytes: the bytes of the optimizer's state; None for those of AdamW.
        """
        if keys_per_token is None:
            keys_per_token = _keys_per_token(model.config, np.array([shape[2]]))
        of_model = adapters(model).values()
        _, trained, frozen = split_trained(model)
        context = CostContext(
            itemsize=model.dtype.itemsize,
            keys_per_token=keys_per_token,
            has_adapters=bool(of_model),
            has_dropout=any(adapter.dropout for adapter in of_model),
            casts_weights=model.casts_weights,
        )
        if optimizer_bytes is None:
            optimizer_bytes = state_bytes(TrainConfig(), model)
        in_layers, outside = movable(model)
        return cls(
            config=model.config,
            layer=model.blocks.cost(context),
            itemsize=context.itemsize,
            trained=sum(bytes_on_device(x) // x.dtype.itemsize for x in jax.tree.leaves(trained)),
            optimizer_bytes=optimizer_bytes,
            frozen_bytes=sum(map(bytes_on_device, jax.tree.leaves(frozen))),
            trains_all=is_trained(model.norm.scale),
            trains_head=is_trained(model.head_variable),
            casts_weights=context.casts_weights,
            copies_head="lm_head" in model.lora or not (model.head.is_dense or isinstance(model.head, HostMatrix)),
            shape=shape,
            max_targets=max_targets or shape[1] * shape[2],
            keys_per_token=keys_per_token,
            layer_weight_bytes=sum(place.value.nbytes for place in in_layers),
            spread=sum(spread_size(adapter, model.config.num_layers) for adapter in of_model),
            embedding_bytes=sum(place.value.nbytes for place in outside),
            offload_weights=any(isinstance(place.value, HostWeight) for place in in_layers),
            offload_embedding=any(isinstance(place.value, HostMatrix) for place in outside),
            gathered_bytes=_in_shards(model, frozen, "blocks") + _in_shards(model, trained, "blocks", context.itemsize),
            gathered_outside=_in_shards(model, trained, "embedding", context.itemsize)
            + _in_shards(model, trained, "lm_head", context.itemsize),
            dequantizes=not all(_on_device(place.value).is_dense for place in in_layers),
        )

    @classmethod
    def of_run(
        cls, model: Transformer, batches: BatchSource, row_length: int | None = None, optimizer_bytes: int | None = None
    ) -> "StepShape":
        """Returns the shape of the largest step of a run, or of one with rows of `row_length` tokens.

        Args:
          optimizer_bytes: the bytes of the optimizer's state; None for those of the optimizer that `optim` names.
        """
        if optimizer_bytes is None:
            optimizer_bytes = state_bytes(batches.config, model)
        A, B, longest = max(batches.shapes_per_device)
        shape = (A, B, row_length or longest)
        return cls.of(
            model,
            shape,
            max_targets=batches.limits[shape[2]].max_targets,
            keys_per_token=_keys_per_token(model.config, np.minimum(batches.documents.lengths, shape[2])),
            optimizer_bytes=optimizer_bytes,
        )

    @property
    def num_layers(self) -> int:
        """Returns the number of layers of the model."""
        return self.config.num_layers

    @property
    def tokens(self) -> int:
        """Returns the number of tokens in a micro-batch, padding included."""
        return self.shape[1] * self.shape[2]

    @property
    def input_bytes(self) -> int:
        """Returns the bytes per token of a layer's input, which every choice keeps, on the device or the host."""
        return self.config.hidden_size * self.itemsize

    @property
    def streams_head(self) -> bool:
        """Returns whether the loss copies the head to the device in pieces: it is frozen and in the host's memory."""
        return self.offload_embedding and not self.trains_head

    @property
    def piece_rows(self) -> int:
        """Returns the number of rows of a piece of the head in the host's memory."""
        return piece_rows(self.config.vocab_size, self.config.hidden_size, self.itemsize)

    @property
    def head(self) -> int:
        """Returns the number of elements in the matrix that makes logits."""
        return self.config.vocab_size * self.config.hidden_size

    def offloaded(self, remat: Remat) -> frozenset[str]:
        """Returns the names of the activations that a choice offloads to the host beside the layer inputs."""
        return offloaded(remat, self.config, casts_weights=self.casts_weights)


def _on_device(weight: Weight) -> Weight:
    """Returns a weight as it is when it is on the device."""
    return weight.stack if isinstance(weight, HostWeight) else weight


def _in_shards(model: Transformer, state: nnx.State, part: str, itemsize: int | None = None) -> int:
    """Returns the bytes, when they are whole, of the matrices of a part that lie in shards.

    Args:
      part: "embedding", "lm_head", or "blocks" for the matrices of one layer.
      itemsize: bytes of an element of a trained matrix, which is gathered in the model's dtype; None as stored.
    """
    leaves = [x for x in jax.tree.leaves(state.get(part, {})) if bytes_on_device(x) < x.size * x.dtype.itemsize]
    whole = sum(x.size * (itemsize or x.dtype.itemsize) for x in leaves)
    return whole // model.config.num_layers if part == "blocks" else whole


def _keys_per_token(config: ModelConfig, lengths: Int[np.ndarray, " documents"]) -> float:
    """Returns how many tokens a token attends to, averaged over layers and the tokens of documents."""
    lengths = lengths.astype(np.float64)

    def pairs(window: int | None) -> float:
        """Counts pairs of a token and one that it attends to: itself and those before it, within the window if any."""
        within = lengths if window is None else np.minimum(lengths, window)
        return float(np.sum(within * (within + 1) / 2 + (lengths - within) * within))

    return float(np.mean([pairs(window) for window in config.windows]) / lengths.sum())


# Work of one layer on one micro-batch.


def forward_cost(step: StepShape) -> Cost:
    """Returns the work of a layer's forward pass."""
    return step.layer.forward.for_tokens(step.tokens)


def recomputed_cost(step: StepShape, remat: Remat) -> Cost:
    """Returns the part of a layer's forward work that its backward pass repeats."""
    names = KEPT[remat]
    return NO_COST if names is None else step.layer.recomputed(names | step.offloaded(remat)).for_tokens(step.tokens)


def backward_cost(step: StepShape) -> Cost:
    """Returns the work of a layer's backward pass, without what it recomputes."""
    return step.layer.backward.for_tokens(step.tokens)


def needed_flops(step: StepShape) -> float:
    """Returns the floating-point operations that each token needs, forward and backward, on average.

    What a step computes again does not count, nor what it computes for padding. Gradients of frozen weights are not
    needed: training all weights takes about 6 operations for each parameter, training adapters about 4. Attention needs
    two matmuls forward and four backward; our kernels compute its scores again.
    """
    forward, backward = step.layer.forward, step.layer.backward
    of_layer = forward.matmul + backward.matmul + 3 * forward.attention
    return step.num_layers * of_layer + loss_cost(step).matmul / step.tokens


# Work outside of the layers.


def loss_cost(step: StepShape) -> Cost:
    """Returns the work of a micro-batch's loss.

    It computes the logits and the gradients from them, and writes and reads float32 logits. Each matmul reads the head
    once for each chunk. In chunks of `CHUNK` tokens, this is hidden behind the arithmetic.
    """
    matmuls = 3 if step.trains_head else 2
    of_target = Cost(matmul=2 * matmuls * step.head, bytes=step.config.vocab_size * (2 * 4 + step.itemsize))
    more_chunks = step.max_targets / step.loss_chunk - step.max_targets / CHUNK
    again = Cost(weight_bytes=max(0, more_chunks) * matmuls * step.head * step.itemsize)
    cost = of_target.for_tokens(step.max_targets) + again
    if step.streams_head:  # The sums over pieces are float32, and read and written with each piece.
        pieces = -(-step.config.vocab_size // step.piece_rows)
        cost += Cost(bytes=2 * 4 * pieces * step.config.hidden_size).for_tokens(step.max_targets)
    return cost


def update_cost(step: StepShape) -> Cost:
    """Returns the work of a step's update.

    It reads gradients and parameters, writes parameters, and reads and writes the optimizer's state.
    """
    return Cost(weight_bytes=3 * 4 * step.trained + 2 * step.optimizer_bytes)
