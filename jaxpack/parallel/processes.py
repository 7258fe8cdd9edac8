"""Lets the processes of a run find each other, agree, and end together.

A run on several hosts has a process on each of them. All run the same program on the same data, and only the first one
writes files and prints. What a process measures by itself (its free memory, a signal, the date) may differ from what
the others find, and then they would run different programs and wait for each other forever. So they agree on it first.

JAX has no public way to send a few bytes between processes. Like orbax, this module uses the client of JAX's
coordination service, which has one.
"""

import atexit
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.sharding import NamedSharding, PartitionSpec

from jaxpack.errors import InputError, one_line, reason
from jaxpack.parallel.mesh import DeviceMesh
from jaxpack.utils.console import console

_ADDRESS, _COUNT, _NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_ENDED = "jaxpack/ended"  # the key under which a process that cannot go on says so
_FOREVER = 10**9  # milliseconds: others may write a large model in the meantime
_DEAD_AFTER = 30  # seconds without a sign of life from a process
_LOOK_EVERY = 0.5  # seconds between two looks at what the others say
_HEARD_AFTER = 2  # seconds until all others have read why a process ends
_CARRIERS = ("gloo", "nccl")  # the libraries that carry arrays between processes, and name themselves in their errors
_AGAIN = "Start all processes again: with `resume_from_checkpoint` 'latest' the run goes on from its last checkpoint."
_rounds = itertools.count()


def initialize_distributed() -> None:
    """Connects the processes of a run, if the environment says that there are several. Call it before anything of JAX.

    There are several if `srun` started more than one task (SLURM), or if JAX_NUM_PROCESSES is above 1. In the second
    case JAX_PROCESS_ID counts the processes from 0, and JAX_COORDINATOR_ADDRESS is "host:port" of process 0, with a
    port that is free there. A process takes all GPUs that it sees; of several on one host under SLURM, each takes one.

    If one of the processes fails or dies, the others end, too, and say so. `jaxpack train` calls this function.

    Raises:
      InputError: a variable is missing or is no number, or the other processes did not come within five minutes.

    Example:
      >>> import jaxpack
      >>> jaxpack.initialize_distributed()  # does nothing in a single process
    """
    if distributed.global_state.client is None:
        arguments = _of_environment()
        if arguments is None:
            return
        # It would take SIGTERM away from the run, which ends in order by itself.
        jax.config.update("jax_enable_preemption_service", False)
        # On CPUs, two programs that run at the same time could take each other's messages.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=_DEAD_AFTER, **arguments)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"`{_ADDRESS}` must lead to process 0 of the run, and all processes must be started within five"
                f" minutes: {reason(error):.300}"
            ) from error
    watch()


def _of_environment() -> dict[str, Any] | None:
    """Returns arguments of `jax.distributed.initialize`, or None if there is only one process."""
    if _ADDRESS in os.environ or _COUNT in os.environ:
        numbers = {}
        for name in (_COUNT, _NUMBER):
            if not os.environ.get(name, "").isdecimal():
                raise InputError(
                    f"`{name}` must be a number in a run of several processes, got {os.environ.get(name)!r}. Each"
                    f" process needs {_ADDRESS}, {_COUNT} and {_NUMBER}."
                )
            numbers[name] = int(os.environ[name])
        if numbers[_COUNT] == 1:
            return None
        if numbers[_NUMBER] >= numbers[_COUNT]:
            raise InputError(f"`{_NUMBER}` must be below {_COUNT} ({numbers[_COUNT]}), got {numbers[_NUMBER]}.")
        if not os.environ.get(_ADDRESS):
            raise InputError(f"`{_ADDRESS}` must be host:port of process 0 in a run of several processes, got none.")
        return {
            "coordinator_address": os.environ[_ADDRESS],
            "num_processes": numbers[_COUNT],
            "process_id": numbers[_NUMBER],
            "cluster_detection_method": "deactivate",
        }
    # Within `salloc` and in a batch script there is no step yet: that is one process, whatever SLURM_NTASKS says.
    if "SLURM_STEP_NODELIST" not in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return None
    return {} if (devices := _devices_of_task()) is None else {"local_device_ids": devices}


def _devices_of_task() -> list[int] | None:
    """Returns the GPUs of a SLURM task by their places in what it sees; None lets JAX take the one of its number."""
    on_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0].split(",")[0]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(visible) == 1:  # SLURM has given each task its own.
        return [0]
    if on_node == "1":
        count = len(visible) or int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
        return list(range(count)) or None
    return None


def is_first_process() -> bool:
    """Returns whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def _client() -> Any:
    """Returns the client of JAX's coordination service, which a run of several processes has."""
    return distributed.global_state.client


def exchange(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order; all must call it. In a single process, `[value]`.

    Args:
      value: what JSON can hold.
    """
    count = jax.process_count()
    if count == 1:
        return [value]
    client, number = _client(), next(_rounds)
    place = f"jaxpack/exchange/{number}"
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(value))
    client.wait_at_barrier(place, _FOREVER)
    found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(f"{place}/")}
    if number:  # All have read what came before: otherwise they would not be at this barrier.
        client.key_value_delete(f"jaxpack/exchange/{number - 1}/{jax.process_index()}")
    return [found[index] for index in range(count)]


def least(value: int | None) -> int | None:
    """Returns the least of the processes' values, so that all decide by the same; None counts as no limit."""
    known = [one for one in exchange(value) if one is not None]
    return min(known) if known else None


class Consensus:
    """Tells all processes a number at the same step, such as that of a signal which only one of them has received.

    The greatest of their numbers counts. Several processes learn it one step later: the devices compare the numbers
    behind the step that is running, so that nothing waits for them.

    Args:
      own: returns the number of this process.

    Attributes:
      delay: the steps after which an answer is known.
    """

    def __init__(self, own: Callable[[], int], mesh: DeviceMesh):
        self._own, self._shape, self._answer = own, (mesh.size,), 0
        self._is_shared = jax.process_count() > 1
        self.delay = int(self._is_shared)
        self._asked: jax.Array | None = None
        if self._is_shared:
            self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._greatest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self) -> None:
        """Asks all processes for their numbers. Each process calls it once in each step."""
        if self._is_shared:
            self._answer = 0 if self._asked is None else int(self._asked)
            own = np.full(self._shape, self._own(), np.int32)
            self._asked = self._greatest(jax.make_array_from_callback(self._shape, self._sharding, own.__getitem__))

    @property
    def answer(self) -> int:
        """Returns the greatest number at the call of `ask` before the last; of a single process, that of now."""
        return self._answer if self._is_shared else self._own()


# --- The end of a process -------------------------------------------------------------------------------------------


class _LastWords:
    """Holds a shell that prints a sentence if this process dies without having ended in order.

    JAX aborts a process whose run has lost another one, and the system may kill it: then no code of its own runs.
    """

    def __init__(self, sentence: str):
        script = 'read -r end; [ "$end" = in-order ] || echo "$0" >&2'
        # In a session of its own, so that what is sent to this process' group does not reach it.
        self._shell = subprocess.Popen(["sh", "-c", script, sentence], stdin=subprocess.PIPE, start_new_session=True)

    def cancel(self) -> None:
        """Says that the process ends in order."""
        with contextlib.suppress(OSError, ValueError):
            assert self._shell.stdin is not None
            self._shell.stdin.write(b"in-order\n")
            self._shell.stdin.close()


_last_words: _LastWords | None = None  # of a process that watches the others


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def watch() -> None:
    """Ends this process when another one says that it cannot go on, and sees to it that this one says so, too.

    From now on only the first process prints. In a single process, and at a second call, nothing happens.
    """
    global _last_words
    if _last_words is not None or jax.process_count() == 1:
        return
    _last_words = _LastWords(
        f"error: {_name()} of the run was ended, because it was killed or another process died (JAX says so above)."
        f" {_AGAIN}"
    )
    console.quiet = not is_first_process()
    client, before = _client(), sys.excepthook
    is_over = threading.Event()

    def look_at_the_others() -> None:
        while not is_over.wait(_LOOK_EVERY):
            try:
                told = client.key_value_try_get(_ENDED)
            except jax.errors.JaxRuntimeError:  # Nobody has said anything.
                continue
            if _last_words is not None and not told.startswith(f"{_name()} "):
                if is_first_process():  # The others ask this process: it goes last.
                    time.sleep(2 * _HEARD_AFTER)
                _end(f"error: {_name()} ends, because {told}", 1)

    def end_in_order() -> None:
        is_over.set()
        looks.join()  # A thread within JAX would abort Python's end.
        if _last_words is not None:
            _last_words.cancel()

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        said = reason(error)
        if any(name in said.lower() for name in _CARRIERS):
            # No traceback: after another process has died, whatever exchanges arrays next fails.
            why = f"{_name()} of the run was ended, because another process was killed or died ({said:.300}). {_AGAIN}"
            leave(why, 1, prints=True)
        before(kind, error, trace)
        leave(f"{kind.__name__}: {said:.300}", 1)

    sys.excepthook = tell
    looks = threading.Thread(target=look_at_the_others, daemon=True, name="jaxpack-watch")
    looks.start()
    atexit.register(end_in_order)


def end_together() -> None:
    """Waits until all processes are done with the run. After that, one that fails does not end the others."""
    global _last_words
    exchange(None)
    if _last_words is not None:
        _last_words.cancel()
        _last_words = None


def leave(why: str, status: int, *, prints: bool | None = None) -> None:
    """Ends this process at once, and with it all others of the run, which print why. Does nothing in a single process.

    Python's usual end would wait minutes for the other processes, which wait for this one.

    Args:
      prints: whether this process prints why, too; by default only if nothing else that it prints is seen.
    """
    if _last_words is None:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another one was earlier.
        _client().key_value_set(_ENDED, f"{_name()} failed: {one_line(why)}")
    time.sleep(_HEARD_AFTER)
    _end(f"error: {why}" if (console.quiet if prints is None else prints) else None, status)


def _end(sentence: str | None, status: int) -> None:
    assert _last_words is not None
    console.quiet = False
    if sentence is not None:
        console.print(sentence, style="red")
    _last_words.cancel()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
