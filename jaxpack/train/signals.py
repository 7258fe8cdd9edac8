"""Notes SIGINT, SIGTERM and SIGHUP during a run, so that the run ends in order."""

import signal
import threading
from types import FrameType
from typing import Any

# SIGHUP comes when the terminal is closed; Windows does not have it.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopSignal:
    """Notes the first signal that asks to stop within a `with` block, so that a loop can end in order.

    A second signal acts as usual. Outside the main thread, and where a signal is ignored (`nohup`), nothing changes.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Returns whether a signal has come."""
        return self._received is not None

    def error(self) -> BaseException:
        """Returns the exception of the signal: KeyboardInterrupt, or SystemExit with 128 + the signal's number."""
        assert self._received is not None
        return KeyboardInterrupt() if self._received == signal.SIGINT else SystemExit(128 + self._received)

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
        self._received = number
        self.__exit__()
