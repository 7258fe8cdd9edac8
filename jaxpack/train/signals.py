"""Notes SIGINT, SIGTERM and SIGHUP during a run, so that the run ends in order, and answers them at once."""

import os
import signal
import threading
from collections.abc import Callable
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

    Python calls the handler of a signal between two of its own instructions, so not while it waits for the device,
    which may take as long as a step. The answer need not wait: at the moment of a signal, C writes its number to a pipe
    (`signal.set_wakeup_fd`), and a thread reads the pipe. The thread may also take the locks that printing needs; a
    handler, which interrupts the main thread wherever it is, must not.

    Args:
      answer: is called with the number of the first signal as soon as it comes, in a thread. It is not called if
        something else in the process, such as asyncio, listens to such a pipe already.

    Attributes:
      received: the number of the signal that has come; 0 before that.
    """

    def __init__(self, answer: Callable[[int], object] = lambda _: None) -> None:
        self.received = 0
        self._answer = answer
        self._before: dict[int, Any] = {}
        self._heard = 0  # signals that the thread has read
        self._pipe: int | None = None  # its end to write to
        self._thread = threading.Thread(target=self._hear, daemon=True, name="jaxpack-signals")

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._listen()
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: Python did not set it and cannot restore it
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.write(self._pipe, b"\0")  # ends the thread; a process forked meanwhile would keep the pipe open
            self._thread.join()
            os.close(self._pipe)
            self._pipe = None

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()
        if self._heard > 1:  # A second signal came while Python waited, and the system makes one of the two.
            signal.raise_signal(number)

    def _listen(self) -> None:
        self._read_from, pipe = os.pipe()
        os.set_blocking(pipe, False)
        before = signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            os.close(self._read_from)
            os.close(pipe)
            return
        self._pipe = pipe
        self._thread.start()

    def _hear(self) -> None:
        with open(self._read_from, "rb", buffering=0) as signals:
            while number := ord(signals.read(1)):
                self._heard += number in _SIGNALS  # others are those of timers, for example
                if number in _SIGNALS and self._heard == 1:
                    self._answer(number)
