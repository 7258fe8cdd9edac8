"""Prefetching changes only when items are made, and its thread ends with the loop."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxpack.utils.prefetch import prefetched


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("jaxpack-prefetch")]


class Recorder:
    """Makes squares, and records their indices and the threads that made them."""

    def __init__(self, fails_at: int | None = None, error: type[BaseException] = ValueError):
        self.made: list[int] = []
        self.threads: set[threading.Thread] = set()
        self._fails_at, self._error = fails_at, error

    def __call__(self, index: int) -> int:
        self.made.append(index)
        self.threads.add(threading.current_thread())
        if index == self._fails_at:
            raise self._error(index)
        return index**2


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_items_are_those_of_indexing_in_order_each_made_once(count: int, ahead: int):
    make = Recorder()
    assert list(prefetched(make, count, ahead)) == [index**2 for index in range(count)]
    assert make.made == list(range(count))
    assert threading.current_thread() not in make.threads
    assert prefetch_threads() == []


def test_the_next_items_are_made_while_the_loop_is_busy_and_no_more():
    made = [threading.Event() for _ in range(10)]
    with contextlib.closing(prefetched(lambda index: made[index].set(), 10, ahead=2)) as items:
        next(items)
        assert made[1].wait(60)  # made before it is asked for
        next(items)
        assert made[2].wait(60)
        (thread,) = prefetch_threads()
    assert not thread.is_alive()
    assert not made[4].is_set()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_is_raised_in_place_of_its_item_with_its_own_type(error: type[BaseException]):
    got = []
    with pytest.raises(error) as raised:
        got.extend(prefetched(Recorder(fails_at=3, error=error), 10))
    assert raised.value.args == (3,)
    assert got == [0, 1, 4]
    assert prefetch_threads() == []


def test_leaving_early_ends_the_thread_and_starts_nothing_else(monkeypatch: pytest.MonkeyPatch):
    leaving, made = threading.Event(), []
    shutdown = ThreadPoolExecutor.shutdown

    def shut_down_while_item_1_is_being_made(pool: ThreadPoolExecutor, wait: bool = True, **options: bool):
        shutdown(pool, wait=False, **options)
        leaving.set()
        shutdown(pool, wait=wait)

    def make(index: int) -> None:
        made.append(index)
        assert index == 0 or leaving.wait(60)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut_down_while_item_1_is_being_made)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(prefetched(make, 1000)) as items:
        for _ in items:
            raise KeyboardInterrupt
    assert prefetch_threads() == []
    assert 2 not in made
