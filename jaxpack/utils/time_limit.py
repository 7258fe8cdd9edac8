"""Ends Python code of somebody else that takes too long or too much memory, without a process of its own for it.

A thread watches the code from aside and raises an exception in it. It looks every 20 ms, and cannot end a single
operation of Python; so whoever runs the code bounds its operations.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_LOOK_SECONDS = 0.02
_IDLE_SECONDS = 1.0  # after which the watching thread ends
_AGAIN_SECONDS = 0.5  # after which the exception is raised again: a callback of a library may have swallowed it


class LimitReached(BaseException):
    """Ends the code that is watched. It is no `Exception`, which the code could catch."""


class Limit:
    """Limits the time and the memory of code within `with limit.watch()`, in any number of threads.

    Args:
      seconds: the time that the code may take, as its thread's own time, so that waiting does not count.
      memory: the bytes by which the memory of the process may grow meanwhile.
    """

    def __init__(self, seconds: float, memory: int):
        self._seconds, self._memory = seconds, memory
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[int, float] = {}  # by thread: the clock when it came in
        self._why: dict[int, str] = {}  # why the code in a thread is to end
        self._raised: dict[int, float] = {}  # by thread: when the exception was last raised in it
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watches the code in the block. Blocks may not be within one another.

        Raises:
          TimeoutError: the code took too long, or too much memory; the message says which.
        """
        with self._lock:
            # The thread's own time is taken at the first look: here, it would take longer than most blocks do.
            self._watched[threading.get_ident()] = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="jaxpack-limit", daemon=True)
                self._thread.start()
        try:
            yield
        except LimitReached:
            pass
        finally:
            why = self._leave()
        if why is not None:
            raise TimeoutError(why)

    def _leave(self) -> str | None:
        """Ends the watch of this thread, and returns why the code was to be ended, if it was."""
        thread = threading.get_ident()
        while True:
            try:
                with self._lock:
                    self._watched.pop(thread, None)
                    if thread in self._why:
                        _raise_in(thread, None)  # the exception may not have arrived yet
                    return self._why.pop(thread, None)
            except LimitReached:  # it has arrived just now
                continue

    def _look(self) -> None:
        idle_since = time.monotonic()
        seen: dict[tuple[int, float], tuple[int, float]] = {}  # memory and the thread's own time at the first look
        while True:
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                if not self._watched:
                    seen.clear()
                    if time.monotonic() - idle_since > _IDLE_SECONDS:
                        self._thread = None
                        return
                    continue
                idle_since, now = time.monotonic(), _memory_of_process()
                seen = {block: seen.get(block) or (now, _own_time(block[0])) for block in self._watched.items()}
                for (thread, _), (memory, own) in seen.items():
                    if thread in self._why:
                        if time.monotonic() - self._raised[thread] > _AGAIN_SECONDS:
                            self._end(thread)
                        continue
                    if _own_time(thread) - own > self._seconds:
                        self._why[thread] = f"it takes longer than {self._seconds:g} seconds"
                    elif now - memory > self._memory:
                        self._why[thread] = f"it takes more than {self._memory >> 20:,} MiB of memory"
                    if thread in self._why:
                        self._end(thread)

    def _end(self, thread: int) -> None:
        self._raised[thread] = time.monotonic()
        _raise_in(thread, LimitReached)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raises an exception in a thread as soon as the thread is in Python's own loop; None takes one back."""
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)


def _own_time(thread: int) -> float:
    """Returns the seconds for which a thread has run, or, without such clocks, the time of the clock."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    except (AttributeError, OSError):
        return time.monotonic()


def _memory_of_process() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
