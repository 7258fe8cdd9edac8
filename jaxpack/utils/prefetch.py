"""Makes the next items of a loop in a separate thread while the loop works on the current one."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetched(make: Callable[[int], Item], count: int, ahead: int = 2) -> Generator[Item, None, None]:
    """Yields `make(0)`, `make(1)`, ..., `make(count - 1)`, with at most `ahead` items begun before they are needed.

    One thread makes the items in order, from the first request on. An exception of `make` is raised in place of its
    item. Close the iterator (`contextlib.closing`) to end the thread: closing waits for the item that is being made and
    starts no other.
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
