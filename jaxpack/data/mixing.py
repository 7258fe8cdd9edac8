"""Draws rows from several datasets by weights, and holds rows out for evaluation."""

from collections.abc import Sequence

import numpy as np

from jaxpack.data.documents import Documents
from jaxpack.errors import InputError
from jaxpack.utils.console import console

_MIX, _HOLD_OUT = 1, 2  # keep the two draws of a seed apart


def mix(
    sources: Sequence[np.ndarray], weights: Sequence[float], names: Sequence[str], documents_together: int, seed: int
) -> list[np.ndarray]:
    """Draws as many documents from sources as their weights allow, none of them twice, and says how many.

    The source that is the smallest for its weight gives all of its documents. The others give as many as makes each
    source's share of the documents its share of the sum of the weights, rounded, but at least one.

    Args:
      sources: the numbers of each source's documents.
      weights: one positive number for each source.
      names: what a run prints, and errors name.
      documents_together: the number of documents that belong together, and are drawn together.
      seed: decides which documents are drawn.

    Returns:
      The numbers of the documents that are drawn from each source, in their order.
    """
    groups = [_groups(source, documents_together, name) for source, name in zip(sources, names, strict=True)]
    shares = np.array(weights) / sum(weights)
    sizes = np.array([len(source) for source in groups])
    total = (sizes / shares).min()
    counts = np.clip(np.round(total * shares).astype(np.int64), 1, sizes)
    rng = np.random.default_rng((seed, _MIX))
    drawn = [source[_draw(rng, len(source), count)] for source, count in zip(groups, counts, strict=True)]
    together = documents_together * counts
    parts = [
        f"{count:,} of {len(source):,} rows of {name} ({count / together.sum():.1%})"
        for count, source, name in zip(together, sources, names, strict=True)
    ]
    limit = names[int(np.argmin(sizes / shares))]
    console.print(f"mixed by weight: {', '.join(parts)}; {limit} runs out first")
    return [source.reshape(-1) for source in drawn]


def hold_out(
    documents: Documents, share: float, *, documents_together: int = 1, seed: int
) -> tuple[Documents, Documents]:
    """Returns the documents to train on, and a share of them that is held out, drawn by `seed`. Copies no token.

    Raises:
      InputError: there are too few documents for both.
    """
    groups = _groups(np.arange(len(documents)), documents_together, "the dataset")
    if len(groups) < 2:
        rows = "row" if documents_together == 1 else f"group of {documents_together} rows"
        raise InputError(
            f"`eval_split` must leave a {rows} to train on and one to evaluate, got {share:g} of {len(groups)}. Use"
            " more rows, or no `eval_split`."
        )
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    held = np.zeros(len(groups), bool)
    held[_draw(np.random.default_rng((seed, _HOLD_OUT)), len(groups), count)] = True
    return documents[groups[~held].reshape(-1)], documents[groups[held].reshape(-1)]


def _draw(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    return np.sort(rng.permutation(size)[:count])


def _groups(numbers: np.ndarray, together: int, name: str) -> np.ndarray:
    if len(numbers) % together:
        raise InputError(
            f"`dataset` must hold a multiple of {together} documents, as each group has {together} that belong"
            f" together, got {len(numbers):,} in {name}. Complete the group that lacks some, or leave it out."
        )
    return numbers.reshape(-1, together)
