"""Callbacks run a user's own code during training, without making the device wait."""

import collections
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpack.errors import InputError
from jaxpack.utils.checks import check

if TYPE_CHECKING:
    from jaxpack.train.trainer import TrainResult


class Callback:
    """Is told what a run has done. Override the methods that you need; the others do nothing.

    All methods but `on_end` are called after the next step has been started, if there is one, so that the device never
    waits for them. An exception that a callback raises ends the run.

    Example:
      >>> from jaxpack import Callback
      >>> class Stopper(Callback):
      ...     def on_evaluation(self, step, metrics):
      ...         return metrics["eval_loss"] < 0.5  # good enough
    """

    def on_step(self, step: int, metrics: dict[str, float]) -> bool | None:
        """Is called after each step, counted from 1, with "loss", "grad_norm" and the objective's own metrics.

        Returns:
          True ends the run after the step that has already started. The run then saves a checkpoint if there is an
          `output_dir`, and `Trainer.train` returns its result. False or None lets the run go on.
        """

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> bool | None:
        """Is called after each evaluation, with "eval_loss" and every other metric as "eval_<name>".

        If the evaluation sets have names, these are the metrics of all sets together, and beside them are those of each
        set as "eval_<set>_<name>", such as "eval_math_loss".

        Returns:
          True ends the run after the step that has already started. The run then saves a checkpoint if there is an
          `output_dir`, and `Trainer.train` returns its result. False or None lets the run go on.
        """

    def on_save(self, step: int, path: Path) -> None:
        """Is called once a checkpoint is on the disk."""

    def on_end(self, result: "TrainResult") -> None:
        """Is called at the end of a run that was not interrupted."""


class EarlyStopping(Callback):
    """Ends a run once its evaluation loss has not fallen for some evaluations, as transformers' callback does.

    Args:
      patience: how many evaluations in a row may be without a lower loss.
      threshold: a loss counts if it is lower by more than this than the lowest before.

    Raises:
      InputError: `patience` is below 1, or `threshold` below 0.

    Example:
      >>> from jaxpack import EarlyStopping
      >>> stopping = EarlyStopping(patience=2)
      >>> [bool(stopping.on_evaluation(step, {"eval_loss": loss})) for step, loss in enumerate([2.0, 1.0, 1.5, 1.2])]
      [False, False, False, True]
    """

    def __init__(self, patience: int = 1, threshold: float = 0.0):
        check(type(patience) is int and patience >= 1, "patience", "must be a whole number of at least 1", patience)
        check(threshold >= 0, "threshold", "must be at least 0", threshold)
        self._patience, self._threshold = patience, threshold
        self._best, self._without = math.inf, 0

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> bool:
        """Returns whether the run ends."""
        loss = metrics["eval_loss"]
        self._without = 0 if self._best - loss > self._threshold else self._without + 1
        self._best = min(self._best, loss)
        return self._without >= self._patience


class Events:
    """Collects events until the next step has been started, and then tells the callbacks.

    Attributes:
      ends: whether a callback asked to end the run.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = callbacks
        # A deque, because another thread may add events: its methods are atomic.
        self._waiting: collections.deque[tuple[str, tuple[Any, ...]]] = collections.deque()
        self.ends = False

    def add(self, name: str, *arguments: Any) -> None:
        """Collects an event for the method `on_<name>`. May be called in any thread."""
        if self._callbacks:
            self._waiting.append((f"on_{name}", arguments))

    def tell(self) -> None:
        """Tells the callbacks all collected events, in the order in which they came."""
        while self._waiting:
            name, arguments = self._waiting.popleft()
            for callback in self._callbacks:
                self.ends |= getattr(callback, name)(*arguments) is True


def check_callbacks(callbacks: Any) -> list[Callback]:
    """Returns the callbacks as a list.

    Raises:
      InputError: one of them is not a `Callback`.
    """
    is_several = isinstance(callbacks, Sequence) and not isinstance(callbacks, str)
    found: list[Any] = list(callbacks) if is_several else [callbacks]
    for callback in found:
        if not isinstance(callback, Callback):
            raise InputError(f"`callbacks` must be a list of `jaxpack.Callback`s, got {callback!r:.80} in it.")
    return found


def check_function(name: str, function: Callable[..., Any] | None) -> None:
    """Raises an `InputError` if an argument is neither None nor callable."""
    if function is not None and not callable(function):
        raise InputError(f"`{name}` must be a function, got {function!r:.80}.")
