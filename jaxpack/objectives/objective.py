"""Defines the contract of an objective, and objectives that wrap a user's own function."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpack.errors import InputError
from jaxpack.objectives.forward import Forward


class Sums(NamedTuple):
    """Holds an objective's float32 sums over some rows, which add up over rows, micro-batches and devices.

    Attributes:
      loss: the sum that is minimised, not yet divided by the weight.
      weight: the sum by which the loss is divided, after both are added up over the whole step: for example the number
        of targets, or of documents.
      metrics: other sums to report, by name; they are divided by `weight`, too.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxpack import Sums
      >>> sums = Sums(loss=jnp.float32(6), weight=jnp.float32(3), metrics={"correct": jnp.float32(2)})
      >>> float(sums.loss / sums.weight)  # the loss that a step reports
      2.0
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


@runtime_checkable
class Objective(Protocol):
    """Computes the sums to minimise over a batch. It is called within the compiled step, on each device's own rows.

    Example:
      >>> import jaxpack
      >>> pairs = jaxpack.LogProbObjective(lambda log_probs, batch: (0.0, 1.0), documents_together=2)
      >>> [objective.documents_together for objective in (jaxpack.SFT(), pairs)]
      [1, 2]
    """

    @property
    def documents_together(self) -> int:
        """Returns how many successive documents of the dataset belong together.

        They are put into one row, or into successive rows of a padded batch.
        """
        ...

    def __call__(self, forward: Forward) -> Sums:
        """Returns the sums over the rows of `forward.batch`."""
        ...


@dataclasses.dataclass(frozen=True)
class HiddenObjective:
    """Minimises a function of hidden states: `function(hidden, model, batch) -> (sum, weight)`.

    Args:
      function: a jax function of hidden states `[B, T, D]`, the model and a `PackedBatch` of `[B, T]` arrays. It
        returns two sums over the batch, and may return a third value: a dict of sums to report, which are divided by
        the weight, too.
      documents_together: see `Objective`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxpack import HiddenObjective
      >>> def small(hidden, model, batch):
      ...     there = batch.segment_ids > 0
      ...     return jnp.sum(jnp.where(there, jnp.sum(hidden**2, axis=-1), 0)), jnp.sum(there)
      >>> objective = HiddenObjective(small)
    """

    function: Callable[..., tuple]
    documents_together: int = 1

    def __call__(self, forward: Forward) -> Sums:
        """Returns the sums that the function makes of the hidden states."""
        return as_sums(self.function(forward.hidden, forward.model, forward.batch))


@dataclasses.dataclass(frozen=True)
class LogProbObjective:
    """Minimises a function of the log-probabilities of targets: `function(log_probs, batch) -> (sum, weight)`.

    The logits of all tokens are never held at once. Only the gradient of a trained head recomputes them
    (`token_log_probs`).

    Args:
      function: a jax function of `log_probs` float32 `[B, T]`, 0 where a token has no target, and a `PackedBatch` of
        `[B, T]` arrays. It returns two sums, or two and a dict, as in `HiddenObjective`.
      documents_together: see `Objective`.
      with_reference: whether the function also gets the log-probabilities of the model without its adapters:
        `function(log_probs, reference_log_probs, batch)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxpack import LogProbObjective
      >>> def focal(log_probs, batch):
      ...     there = batch.targets != -100
      ...     return jnp.sum(-(1 - jnp.exp(log_probs)) ** 2 * log_probs * there), jnp.sum(there)
      >>> objective = LogProbObjective(focal)
    """

    function: Callable[..., tuple]
    documents_together: int = 1
    with_reference: bool = False

    def __call__(self, forward: Forward) -> Sums:
        """Returns the sums that the function makes of the log-probabilities."""
        reference = (forward.reference_log_probs,) if self.with_reference else ()
        return as_sums(self.function(forward.log_probs, *reference, forward.batch))


def as_sums(result: Any) -> Sums:
    """Returns the result of a user's function as `Sums`.

    Raises:
      InputError: the result is neither (sum, weight) nor (sum, weight, metrics), all scalars.
    """
    values = tuple(result) if isinstance(result, tuple | list) else (result,)
    sums, metrics = values[:2], dict(values[2]) if len(values) == 3 and isinstance(values[2], dict) else {}
    whole = len(values) == 2 or (len(values) == 3 and isinstance(values[2], dict))
    if not whole or any(jnp.shape(x) != () for x in (*sums, *metrics.values())):
        shown = jax.tree.map(jnp.shape, result)
        raise InputError(
            "`objective` must return (sum, weight), or (sum, weight, metrics) with a dict of metrics, all of them"
            f" scalars, got arrays of these shapes: {shown!r:.200}. Sum over the batch, for example with jnp.sum."
        )
    loss, weight = (jnp.asarray(x, jnp.float32) for x in sums)
    return Sums(loss, weight, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()})


def check_objective(objective: Any) -> Objective:
    """Returns the objective if it is a valid one.

    Raises:
      InputError: it is not an `Objective`, or its `documents_together` is not a whole number of at least 1.
    """
    if not isinstance(objective, Objective) or isinstance(objective, type) or not callable(objective):
        raise InputError(
            "`objective` must be an objective such as `HiddenObjective(function)` or `LogProbObjective(function)`, got"
            f" {objective!r:.100}."
        )
    together = objective.documents_together
    if type(together) is not int or together < 1:
        raise InputError(f"`documents_together` must be a whole number of at least 1, got {together!r}.")
    return objective
