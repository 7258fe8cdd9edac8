"""Shows how far the reading of a dataset is: with a bar in a terminal, and with a line now and then in a log."""

import time

from jaxpack.data.sources import Source
from jaxpack.utils.console import console, progress_bar

_EVERY = 10.0  # seconds from one line to the next


class ReadingProgress:
    """Counts the rows of a source while it is read.

    Where there is no bar, it prints a line every ten seconds; a source that is read within that time prints none.
    """

    def __init__(self, source: Source):
        self._name, self._sizes = source.name, [path.stat().st_size for path in source.files] or [1]
        self._rows, self._read, self._file = 0, 0, 0  # rows, bytes of whole files, and the number of files so far
        self._progress = progress_bar("tokenising")
        self._begin = self._last = time.monotonic()

    def __enter__(self) -> "ReadingProgress":
        self._progress.start()
        self._bar = self._progress.add_task("", total=None, note="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, rows: int, share: float | None, words: str) -> None:
        """Counts further rows. `share` is the share of the current file that is read, and `words` is its format."""
        self._rows += rows
        done = None
        if share is not None and sum(self._sizes):
            done = (self._read + share * self._sizes[self._file]) / sum(self._sizes)
        total = None if not done else max(self._rows, round(self._rows / min(done, 1)))
        self._progress.update(self._bar, completed=self._rows, total=total)
        now = time.monotonic()
        if self._progress.disable and now - self._last >= _EVERY:
            self._last = now
            so_far = "" if done is None else f", {min(done, 1):.0%} done"
            rate = self._rows / (now - self._begin)
            digits = 0 if rate >= 10 else 1
            console.print(
                f"reading {self._name}: {self._rows:,} rows of {words} so far{so_far}, {rate:,.{digits}f} rows/s"
            )

    def finish_file(self) -> None:
        """Turns to the next file of the source."""
        self._read += self._sizes[self._file]
        self._file += 1
