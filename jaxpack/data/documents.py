"""Defines `Documents`: tokenised texts, with labels that say which tokens are trained on."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxpack.constants import IGNORE

_BLOCK = 1 << 22  # labels that are counted at a time


@dataclasses.dataclass(frozen=True)
class Documents:
    """Holds tokenised documents, end to end in two flat arrays.

    `tokens` and `labels` are int32 `[total]`. As in Hugging Face, labels are not shifted: the label of a position is
    the token at that position, or -100 if this token is not trained on. Document `d` holds the `lengths[d]` tokens from
    index `starts[d]` on; `starts` and `lengths` are int64 `[documents]`.

    Example:
      >>> import numpy as np
      >>> from jaxpack import Documents
      >>> tokens = np.array([4, 5, 6, 7, 8], np.int32)  # a document of three tokens, then one of two
      >>> labels = np.array([-100, 5, 6, -100, 8], np.int32)
      >>> documents = Documents(tokens, labels, starts=np.array([0, 3]), lengths=np.array([3, 2]))
      >>> documents.num_tokens
      5
    """

    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def joined(cls, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Documents":
        """Returns documents that are given one by one, each as its tokens and its labels. Copies them."""
        none = [np.empty(0, np.int32)]
        tokens, labels = (np.concatenate(none + [pair[i] for pair in pairs]) for i in range(2))
        lengths = np.array([len(tokens) for tokens, _ in pairs], np.int64)
        return cls(tokens, labels, np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens in all documents."""
        return int(self.lengths.sum())

    @functools.cached_property
    def num_targets(self) -> np.ndarray:
        """Counts the tokens to train on in each document, int64 `[documents]`.

        The first token of a document never counts, since nothing predicts it.
        """
        return self.targets_within(self.starts, self.lengths)

    def targets_within(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Counts the tokens to train on in pieces of documents, int64: those with a label, but not a piece's first."""
        ends = starts + lengths
        return self._targets_before(ends) - self._targets_before(np.minimum(starts + 1, ends))

    def _targets_before(self, places: np.ndarray) -> np.ndarray:
        """Counts the labels to train on before places of the flat arrays, a block of labels at a time.

        The counts of all places would take twice as much memory as tokens and labels together.
        """
        order = np.argsort(places, kind="stable")
        ascending, counts, before = places[order], np.zeros(len(places), np.int64), 0
        for begin in range(0, len(self.labels), _BLOCK):
            trained = np.cumsum(self.labels[begin : begin + _BLOCK] != IGNORE, dtype=np.int32)
            # The places after 1, 2, ... labels of this block.
            first, last = np.searchsorted(ascending, (begin, begin + len(trained)), side="right")
            counts[order[first:last]] = before + trained[ascending[first:last] - begin - 1]
            before += int(trained[-1])
        return counts

    def truncate(self, max_length: int) -> "Documents":
        """Returns the same documents, cut to at most `max_length` tokens each. Copies no token."""
        return dataclasses.replace(self, lengths=np.minimum(self.lengths, max_length))

    def __getitem__(self, which: np.ndarray) -> "Documents":
        """Returns the documents that an index or mask array selects. Copies no token."""
        return dataclasses.replace(self, starts=self.starts[which], lengths=self.lengths[which])
