"""Documents are tokenised text, and which of its tokens are trained on."""

import dataclasses
import functools

import numpy as np

from jaxpack.constants import IGNORE


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenised documents, end to end in two flat arrays.

    `tokens` and `labels` are int32 `[total]`; a label is the token where it is trained on and -100 where it is not, as
    in Hugging Face (unshifted). Document `d` is the `lengths[d]` tokens from `starts[d]` on, both int64 `[documents]`.
    """

    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @functools.cached_property
    def num_targets(self) -> np.ndarray:
        """Tokens that each document trains on, int64 `[documents]`. Its first token is none: nothing predicts it."""
        return self.targets_within(self.starts, self.lengths)

    def targets_within(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens that pieces of documents train on, int64: all but the first of each that have a label."""
        trained = np.concatenate([[0], np.cumsum(self.labels != IGNORE)])
        ends = starts + lengths
        return trained[ends] - trained[np.minimum(starts + 1, ends)]

    def truncate(self, max_length: int) -> "Documents":
        """The same documents, without what they have beyond `max_length` tokens. Copies no token."""
        return dataclasses.replace(self, lengths=np.minimum(self.lengths, max_length))

    def __getitem__(self, which: np.ndarray) -> "Documents":
        """The documents that an index or mask array selects. Copies no token."""
        return dataclasses.replace(self, starts=self.starts[which], lengths=self.lengths[which])
