"""Draws synthetic documents: random token ids, with lengths from a histogram."""

import csv
import dataclasses
from pathlib import Path

import numpy as np

from jaxpack.data.documents import Documents
from jaxpack.errors import InputError, reason

_COLUMNS = ("token_length_from", "token_length_to", "documents")
_IDS = (10, 100_000)
_MAX_DRAWN = 100_000_000


def drawn_lengths(histogram: Path, count: int | None, rng: np.random.Generator) -> np.ndarray:
    """Draws document lengths from a histogram, int64 `[count]`; None draws as many as the histogram counts.

    The CSV file has the columns `token_length_from`, `token_length_to` and `documents`. A bin is drawn in proportion to
    its documents, then a length uniformly within the bin. Each length is at least 2.
    """
    try:
        with histogram.open(newline="") as file:
            bins = [[float(row[name]) for name in _COLUMNS] for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"`lengths` must be a CSV file with numbers in the columns {', '.join(_COLUMNS)}, got {str(histogram)!r}: "
            f"{type(error).__name__} {reason(error)}."
        ) from error
    low, high, weight = np.array(bins or [[0, 0, 0]]).T
    if not (np.isfinite([low, high, weight]).all() and weight.min() >= 0 and weight.sum() > 0 and (low <= high).all()):
        raise InputError(f"`lengths` must have bins with documents in them, got none in {str(histogram)!r}.")
    if count is None and weight.sum() > _MAX_DRAWN:
        raise InputError(
            f"`lengths` must have at most {_MAX_DRAWN:,} documents, got {weight.sum():.10g} in {str(histogram)!r}."
        )
    drawn = rng.choice(len(bins), round(weight.sum()) if count is None else count, p=weight / weight.sum())
    return np.maximum(2, rng.uniform(low[drawn], high[drawn]).astype(int))


def drawn_documents(histogram: Path, count: int | None, *, vocab_size: int = _IDS[1], seed: int = 0) -> Documents:
    """Draws documents of random token ids with lengths from a histogram; every token is trained on."""
    rng = np.random.default_rng(seed)
    lengths = drawn_lengths(histogram, count, rng)
    high = min(_IDS[1], vocab_size)
    tokens = rng.integers(min(_IDS[0], high - 1), high, lengths.sum()).astype(np.int32)
    return Documents(tokens, tokens, np.cumsum(lengths) - lengths, lengths)


def save_documents(path: Path, documents: Documents) -> None:
    """Writes documents to an `.npz` file without pickles, for other processes to read."""
    np.savez(path, **{field.name: getattr(documents, field.name) for field in dataclasses.fields(Documents)})


def read_documents(path: Path) -> Documents:
    """Reads documents that `save_documents` wrote."""
    with np.load(path) as arrays:
        return Documents(**{field.name: arrays[field.name] for field in dataclasses.fields(Documents)})
