"""Compiles the programs of a run in a thread, so that the first steps need not wait for the programs of later ones."""

from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax

from jaxpack.errors import is_out_of_memory
from jaxpack.utils.compilation_cache import ProgramCache
from jaxpack.utils.console import console

_NOTICED = 1.0  # seconds from which on a wait is told


class Programs:
    """Compiles programs one after another in a thread, and hands out each of them once it is ready.

    The caller lowers them. Each thread may have other settings of JAX (`jax.default_matmul_precision`), and a user's
    functions are called while a program is traced, so both belong to the caller's thread. The rest takes XLA's time,
    and none of Python's.

    Args:
      cache: finds programs that an earlier run has compiled, and keeps the others.
    """

    def __init__(self, cache: ProgramCache):
        self._cache = cache
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jaxpack-compile")
        self._lowered: dict[str, jax.stages.Lowered] = {}
        self._futures: dict[str, Future[jax.stages.Compiled]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def __contains__(self, name: str) -> bool:
        return name in self._futures

    def add(self, name: str, lowered: jax.stages.Lowered) -> None:
        """Puts a program behind those that were added before it. Messages use its name, as in "a step of 8 tokens"."""
        self._lowered[name] = lowered
        self._futures[name] = self._thread.submit(self._compile, lowered)

    def get(self, name: str, *, beside_steps: bool = True) -> jax.stages.Compiled:
        """Returns a program, and waits until it is compiled.

        Args:
          beside_steps: whether the program was compiled while steps ran. A noticeable wait is then told. If memory ran
            out, the program is compiled again, now that the caller waits and no step takes memory.

        Raises:
          JaxRuntimeError: XLA cannot compile the program, for example because it ran out of memory.
        """
        future = self._futures[name]
        if beside_steps and wait([future], timeout=_NOTICED).not_done:
            console.print(f"waiting until the program for {name} is compiled")
        try:
            program = future.result()
        except jax.errors.JaxRuntimeError as error:
            if not (beside_steps and is_out_of_memory(error)):
                raise
            program = self._compile(self._lowered[name])
            self._futures[name] = future = Future()
            future.set_result(program)
        self._lowered.pop(name, None)
        return program

    @property
    def num_ready(self) -> int:
        """Returns the number of programs that are compiled."""
        return sum(future.done() for future in self._futures.values())

    @property
    def is_busy(self) -> bool:
        """Returns whether a program is not compiled yet."""
        return self.num_ready < len(self)

    def wait(self) -> None:
        """Waits until all programs are compiled."""
        wait(self._futures.values())

    def close(self) -> None:
        """Ends the thread. Waits for the program that is being compiled, and begins no other."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        begun = [future for future in self._futures.values() if not future.done()]
        if wait(begun, timeout=_NOTICED).not_done:
            console.print("waiting for the end of a compilation, which cannot be interrupted")
        self._thread.shutdown()

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        with self._cache.in_use():
            return self._cache.compile(lowered)
