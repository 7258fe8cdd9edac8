"""A step's shape, and the work of its passes: sums over what the parts of the model say that they cost (`model.cost`).

The arithmetic is for the kernels of a GPU and bfloat16; plain XLA (`implementation="xla"`) takes more memory and time.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Int

from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.model.config import ModelConfig
from jaxpack.model.cost import NO_COST, Cost, CostContext, PartCost
from jaxpack.model.lora import adapters
from jaxpack.model.remat import KEPT, offloaded
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import is_trained, split_trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """The figures of a model and a batch that the memory and time of a step follow from.

    Attributes:
      config: the architecture.
      layer: the cost of one layer.
      itemsize: bytes of an element of the activations.
      trained: how many parameters are trained, in float32.
      frozen_bytes: the bytes of all other parameters.
      trains_all: whether all weights are trained.
      trains_head: whether the head is: with all weights, or whole beside adapters.
      casts_weights: see `Transformer.casts_weights`.
      copies_head: whether the loss makes a dense copy of a head that is stored in another form.
      shape: A micro-batches of B rows of T tokens.
      max_targets: the most targets in a micro-batch.
      keys_per_token: how many tokens a token attends to, on average, over layers too.
    """

    config: ModelConfig
    layer: PartCost
    itemsize: int
    trained: int
    frozen_bytes: int
    trains_all: bool
    trains_head: bool
    casts_weights: bool
    copies_head: bool
    shape: tuple[int, int, int]
    max_targets: int
    keys_per_token: float

    @classmethod
    def of(
        cls,
        model: Transformer,
        shape: tuple[int, int, int],
        *,
        max_targets: int | None = None,
        keys_per_token: float | None = None,
    ) -> "StepShape":
        """Returns the shape of a step of this model, whose arrays may be abstract.

        Args:
          shape: `(A, B, T)`.
          max_targets: the most targets in a micro-batch; None if every token may be one.
          keys_per_token: how many tokens a token attends to, on average; None if every row is one document.
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
        return cls(
            config=model.config,
            layer=model.blocks.cost(context),
            itemsize=context.itemsize,
            trained=sum(x.size for x in jax.tree.leaves(trained)),
            frozen_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen)),
            trains_all=is_trained(model.norm.scale),
            trains_head=is_trained(model.head_variable),
            casts_weights=context.casts_weights,
            copies_head=not model.head.is_dense,
            shape=shape,
            max_targets=max_targets or shape[1] * shape[2],
            keys_per_token=keys_per_token,
        )

    @classmethod
    def of_run(cls, model: Transformer, batches: Batches, row_length: int | None = None) -> "StepShape":
        """Returns the shape of the largest step of a run, or of one with rows of `row_length` tokens."""
        A, B, longest = max(batches.shapes)
        shape = (A, B, row_length or longest)
        return cls.of(
            model,
            shape,
            max_targets=batches.limits[shape[2]].max_targets,
            keys_per_token=_keys_per_token(model.config, np.minimum(batches.documents.lengths, shape[2])),
        )

    @property
    def num_layers(self) -> int:
        """The layers of the model."""
        return self.config.num_layers

    @property
    def tokens(self) -> int:
        """The tokens of a micro-batch, with its padding."""
        return self.shape[1] * self.shape[2]

    @property
    def input_bytes(self) -> int:
        """A layer's input in bytes a token, which every choice keeps: offloaded, in the host's memory."""
        return self.config.hidden_size * self.itemsize

    @property
    def head(self) -> int:
        """The elements of the matrix that makes logits."""
        return self.config.vocab_size * self.config.hidden_size

    def offloaded(self, remat: Remat) -> frozenset[str]:
        """Returns the names that wait in the host's memory beside inputs."""
        return offloaded(remat, self.config, casts=self.casts_weights)


def _keys_per_token(config: ModelConfig, lengths: Int[np.ndarray, " documents"]) -> float:
    """The average over layers, and over the tokens of documents of these lengths."""
    lengths = lengths.astype(np.float64)

    def pairs(window: int | None) -> float:
        """Counts tokens and those that they attend to: all before them, or as many as the window has."""
        within = lengths if window is None else np.minimum(lengths, window)
        return float(np.sum(within * (within + 1) / 2 + (lengths - within) * within))

    return float(np.mean([pairs(window) for window in config.windows]) / lengths.sum())


# The work of one layer and micro-batch.


def forward_cost(step: StepShape) -> Cost:
    """Returns the work of a layer's forward pass."""
    return step.layer.forward.for_tokens(step.tokens)


def recomputed_cost(step: StepShape, remat: Remat) -> Cost:
    """Returns the work of a layer's forward pass that its backward pass does again."""
    names = KEPT[remat]
    return NO_COST if names is None else step.layer.recomputed(names | step.offloaded(remat)).for_tokens(step.tokens)


def backward_cost(step: StepShape) -> Cost:
    """Returns the work of a layer's backward pass, all but what is computed again."""
    return step.layer.backward.for_tokens(step.tokens)


# The work that layers have no part in.


def loss_cost(step: StepShape) -> Cost:
    """Returns the work of a micro-batch's loss: logits, the gradients that come from them, and float32 logits read and
    written.
    """
    matmuls = 3 if step.trains_head else 2
    of_target = Cost(matmul=2 * matmuls * step.head, bytes=step.config.vocab_size * (2 * 4 + step.itemsize))
    return of_target.for_tokens(step.max_targets)


def update_cost(step: StepShape) -> Cost:
    """Returns the work of a step's update, which reads gradients twice, and reads and writes parameters and both
    moments.
    """
    return Cost(weight_bytes=7 * 4 * step.trained)
