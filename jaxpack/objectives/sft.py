"""The objective of supervised fine-tuning (SFT): the cross entropy of all targets."""

import dataclasses

import jax.numpy as jnp

from jaxpack.constants import IGNORE
from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy
from jaxpack.objectives.forward import Forward
from jaxpack.objectives.objective import Sums


@dataclasses.dataclass(frozen=True)
class SFT:
    """Minimises the mean cross entropy over a step's targets; the forward pass also computes the gradient of the loss.

    `label_smoothing_factor` and `z_loss_coef` change the training loss, see `TrainConfig`.

    Example:
      >>> from jaxpack import SFT
      >>> SFT().documents_together
      1
    """

    label_smoothing_factor: float = 0.0
    z_loss_coef: float = 0.0

    documents_together = 1

    def __call__(self, forward: Forward) -> Sums:
        """Returns the summed cross entropy, and the number of targets."""
        batch = forward.batch
        loss = linear_cross_entropy(
            *forward.head_operands,
            batch.targets,
            softcap=forward.model.config.final_logit_softcapping,
            max_targets=forward.limits.max_targets,
            chunk=forward.loss_chunk,
            implementation=forward.implementation,
            label_smoothing=self.label_smoothing_factor,
            z_loss=self.z_loss_coef,
        )
        # A float like the other sums, so that devices add all of them in one all-reduce; exact up to 2^24 targets.
        return Sums(loss, jnp.sum(batch.targets != IGNORE).astype(jnp.float32), {})
