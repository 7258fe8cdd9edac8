"""Callbacks run a user's own code during training, without making the device wait."""

import collections
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpack.errors import InputError

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

        Returns:
          True ends the run after the step that has already started. The run then saves a checkpoint if there is an
          `output_dir`, and `Trainer.train` returns its result. False or None lets the run go on.
        """

    def on_save(self, step: int, path: Path) -> None:
        """Is called once a checkpoint is on the disk."""

    def on_end(self, result: "TrainResult") -> None:
        """Is called at the end of a run that was not interrupted."""


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
