"""Notes SIGINT, SIGTERM and SIGHUP during a run, so that the run ends in order."""

import signal
import threading
from types import FrameType
from typing import Any

# SIGHUP comes when the terminal is closed; Windows does not have it.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def error_of(number: int) -> BaseException:
    """Returns the exception of a signal: KeyboardInterrupt of SIGINT, otherwise SystemExit with 128 + its number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


class StopSignal:
    """Notes the first signal that asks to stop within a `with` block, so that a loop can end in order.

    A second signal acts as usual. Outside the main thread, and where a signal is ignored (`nohup`), nothing changes.

    Attributes:
      received: the number of the signal that has come; 0 before that.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: Python did not set it and cannot restore it
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self.__exit__()
