"""Forks runs of `jaxpack` from a process that has imported everything and begun nothing. Each takes a second.

`python forked_runs.py` reads one request per line, `{"argv", "log", "moment", "number"}`, and answers with the run's
exit status, which is negative for a signal. If `moment` is given, the run sends itself signal `number` at that moment:

- `["step", n, seconds]`: this many seconds after the n-th step starts,
- `["save", n, seconds]`: this many seconds after the n-th checkpoint begins to be written,
- `["file", n]`: before Python makes, opens, renames or deletes something in the output folder for the n-th time.

With the moment `["fill", n, path]`, the run sends no signal: before its n-th step it fills the disk of `path`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Runs:
    """Holds the process from which runs are forked, and sends it requests."""

    def __init__(self, cache: Path):
        paths = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "JAX_COMPILATION_CACHE_DIR": str(cache),  # also for the small programs between the steps
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def __call__(self, *arguments: object, log: Path, moment: list | None = None, number: int = signal.SIGKILL) -> int:
        argv = [str(argument) for argument in arguments]
        request = {"argv": argv, "log": str(log), "moment": moment, "number": number}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def _before_call(owner: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Patches a function so that `act` is called before its `number`-th call."""
    function, calls = getattr(owner, name), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            act()
        return function(*args, **options)

    setattr(owner, name, counted)


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def _prepare(moment: list, number: int, output: str) -> None:
    from jaxpack.train import checkpoint, run

    def send() -> None:
        os.kill(os.getpid(), number)

    def send_later() -> None:
        threading.Thread(target=lambda: (time.sleep(seconds[0]), send()), daemon=True).start()

    what, count, *seconds = moment
    if what == "fill":
        _before_call(run.Run, "step", count, lambda: _fill(Path(moment[2])))
    elif what == "step":
        _before_call(run.Run, "step", count, send_later)
    elif what == "save":
        _before_call(checkpoint, "_write", count, send_later)
    else:
        seen = []

        def hook(event: str, args: tuple) -> None:
            if event in _FILE_EVENTS and str(args[0]).startswith(output):
                seen.append(event)
                if len(seen) == count:
                    send()

        sys.addaudithook(hook)


def _run(argv: list[str], log: str, moment: list | None, number: int) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if moment is not None:
        _prepare(moment, number, argv[argv.index("--output") + 1])
    sys.argv = ["jaxpack", *argv]
    from jaxpack import cli

    cli.main()


def _serve() -> None:
    import orbax.checkpoint  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    from jaxpack.cli import inspect, train  # noqa: F401
    from jaxpack.utils.figures import new_figure

    new_figure(1, 1)  # imports matplotlib
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _run(**request)
                status = 0
            except SystemExit as stopped:
                status = stopped.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
