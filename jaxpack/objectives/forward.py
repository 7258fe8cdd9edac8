"""Gives an objective the results of one forward pass of a model over a batch."""

import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxpack.constants import Implementation, Remat
from jaxpack.data.packing import AnyBatch, BatchLimits, EmbeddedBatch, PackedBatch
from jaxpack.errors import InputError
from jaxpack.kernels.logits import CHUNK
from jaxpack.kernels.token_log_probs import TokenScores, token_log_probs, token_scores
from jaxpack.kernels.weight import Weight
from jaxpack.model.lora import adapters, without_adapters
from jaxpack.model.moe import RouterSums
from jaxpack.model.transformer import Transformer, row_numbers


class Forward:
    """Holds a model, a batch `[B, T]` of rows, and the results of a forward pass, each computed when first read.

    Attributes:
      model: the model, with the weights of this step.
      batch: rows of whole documents, as arrays `[B, T]`.
      limits: upper limits for the documents in a row and the targets in the batch.
      implementation: see `jaxpack.kernels`.
      loss_chunk: the number of tokens whose logits exist at a time.
      balances: whether `router_sums` has what the load-balancing loss reads.
    """

    def __init__(
        self,
        model: Transformer,
        batch: AnyBatch,
        *,
        remat: Remat = "full",
        implementation: Implementation | None = None,
        limits: BatchLimits = BatchLimits(),  # noqa: B008
        dropout_key: Key[Array, ""] | None = None,
        neftune_noise_alpha: float | None = None,
        loss_chunk: int = CHUNK,
        balances: bool = False,
    ):
        self.model, self.limits, self.balances = model, limits, balances
        self._embedded = batch.embedded if isinstance(batch, EmbeddedBatch) else None
        self.batch = PackedBatch(*batch[:4])  # what a user's function gets
        self.implementation: Implementation | None = implementation
        self.loss_chunk = loss_chunk
        self._remat: Remat = remat
        self._dropout_key = dropout_key
        self._neftune_noise_alpha = neftune_noise_alpha

    @functools.cached_property
    def hidden(self) -> Float[Array, "B T D"]:
        """Returns the hidden states after the last norm, in the model's dtype."""
        return self._run[0]

    @functools.cached_property
    def head_operands(self) -> tuple[Float[Array, "B T E"], Weight]:
        """Returns the operands whose product is the logits: `hidden` and the head, with the head's adapter if any."""
        rows = row_numbers(self.batch.tokens, self.batch.segment_ids)
        return self.model.head_operands(self.hidden, self._dropout_key, rows)

    @property
    def router_sums(self) -> RouterSums | None:
        """Returns how a mixture's experts were used; None for a model without experts."""
        return self._run[1]

    @functools.cached_property
    def _run(self) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        return self._run_of(self.model, self._dropout_key, balances=self.balances)

    @functools.cached_property
    def log_probs(self) -> Float[Array, "B T"]:
        """Returns the log-probability of each token's target, float32; 0 where there is no target."""
        return self._log_probs_of(self.head_operands)

    @functools.cached_property
    def reference_log_probs(self) -> Float[Array, "B T"]:
        """Returns `log_probs` of the model without its adapters, as it was before training. They have no gradient.

        Raises:
          InputError: the model has no adapters, or trains the embedding or the head beside them.
        """
        config = self.model.lora_config
        if not adapters(self.model) or (config is not None and config.modules_to_save):
            raise InputError(
                "`objective` must be without a reference, because not only adapters are trained: the reference is the"
                " model without its adapters. Use `add_lora` without `modules_to_save`."
            )
        graph, state = nnx.split(without_adapters(self.model))
        reference = nnx.merge(graph, jax.lax.stop_gradient(state))
        operands = reference.head_operands(self._run_of(reference, None)[0])
        return jax.lax.stop_gradient(self._log_probs_of(operands))

    @functools.cached_property
    def scores(self) -> TokenScores:
        """Returns the loss of each token and the likeliest next token. They have no gradient."""
        softcap = self.model.config.final_logit_softcapping
        options: dict[str, Any] = {"softcap": softcap, "implementation": self.implementation, "chunk": self.loss_chunk}
        return token_scores(*self.head_operands, self.batch.targets, **options)

    def _run_of(
        self, model: Transformer, dropout_key: Key[Array, ""] | None, *, balances: bool = False
    ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        return model.with_router_sums(
            self.batch.tokens,
            self.batch.segment_ids,
            self.batch.positions,
            remat=self._remat,
            max_segments=self.limits.max_segments,
            implementation=self.implementation,
            dropout_key=dropout_key,
            neftune_noise_alpha=self._neftune_noise_alpha,
            embedded=self._embedded,
            balances=balances,
        )

    def _log_probs_of(self, operands: tuple[Float[Array, "B T E"], Weight]) -> Float[Array, "B T"]:
        return token_log_probs(
            *operands,
            self.batch.targets,
            softcap=self.model.config.final_logit_softcapping,
            max_targets=self.limits.max_targets,
            chunk=self.loss_chunk,
            implementation=self.implementation,
        )
