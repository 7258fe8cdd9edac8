"""What a loop needs next, made in a thread of its own while the loop does something else."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetched(make: Callable[[int], Item], count: int, ahead: int = 2) -> Iterator[Item]:
    """Yields `make(0)`, `make(1)`, ..., `make(count - 1)`, each begun before it is asked for, at most `ahead` early.

    One thread makes them, in order, from the first request on. What `make` raises is raised in place of its item. Close
    the iterator (`contextlib.closing`) to end the thread: that waits for the item being made and starts no other.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jaxpack-prefetch")
    try:
        begun = deque(pool.submit(make, index) for index in range(min(ahead, count)))
        for index in range(count):
            item = begun.popleft().result()
            if index + ahead < count:
                begun.append(pool.submit(make, index + ahead))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
