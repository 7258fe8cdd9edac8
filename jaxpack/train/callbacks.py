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

    def on_earlier_evaluation(self, step: int, metrics: dict[str, float]) -> bool | None:
        """Is called for each evaluation before the step from which a run resumes, in order, with "eval_loss" alone.

        A callback that counts evaluations overrides it to count these, too.

        Returns:
          What `on_evaluation` returned in the earlier run: True if it ended the run. The run then ends at the step at
          which it would have ended without the interruption, or at once if that step is done.
        """

    def on_save(self, step: int, path: Path) -> None:
        """Is called once a checkpoint is on the disk."""

    def on_end(self, result: "TrainResult") -> None:
        """Is called at the end of a run that was not interrupted."""


class EarlyStopping(Callback):
    """Ends a run once its evaluation loss has not fallen for some evaluations, as transformers' callback does.

    The settings `early_stopping_patience` and `early_stopping_threshold` of `TrainConfig` add it to a run. A run that
    resumes counts the evaluations before its checkpoint, too, so that it ends where it would have without a stop.

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
        self._losses: dict[int, float] = {}  # by step, ascending

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> bool:
        """Returns whether the run ends."""
        # A run that repeats steps, because it went back to an earlier state, evaluates again after them.
        self._losses = {other: loss for other, loss in self._losses.items() if other < step}
        self._losses[step] = metrics["eval_loss"]
        best, without = math.inf, 0
        for loss in self._losses.values():
            without = 0 if best - loss > self._threshold else without + 1
            best = min(best, loss)
        return without >= self._patience

    on_earlier_evaluation = on_evaluation


class Events:
    """Collects events until the next step has been started, and then tells the callbacks.

    Attributes:
      ends: whether a callback asked to end the run.
      asker: the class of the callback that asked, in words.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = callbacks
        # A deque, because another thread may add events: its methods are atomic.
        self._waiting: collections.deque[tuple[str, tuple[Any, ...]]] = collections.deque()
        self.ends, self.asker = False, "a callback"

    def add(self, name: str, *arguments: Any) -> None:
        """Collects an event for the method `on_<name>`. May be called in any thread."""
        if self._callbacks:
            self._waiting.append((f"on_{name}", arguments))

    def tell_earlier(self, step: int, loss: float) -> bool:
        """Tells the callbacks of an evaluation before a resume, and returns whether one of them ended the run there."""
        ended = [one for one in self._callbacks if one.on_earlier_evaluation(step, {"eval_loss": loss}) is True]
        self._note(ended)
        return bool(ended)

    def tell(self) -> None:
        """Tells the callbacks all collected events, in the order in which they came."""
        while self._waiting:
            name, arguments = self._waiting.popleft()
            ended = [callback for callback in self._callbacks if getattr(callback, name)(*arguments) is True]
            self._note(ended)
            self.ends |= bool(ended)

    def _note(self, ended: Sequence[Callback]) -> None:
        for callback in ended[:1]:
            self.asker = f"the callback {type(callback).__name__}"


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
