"""Finds the names of evaluation sets: a run may evaluate several, each with metrics of its own."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxpack.data.documents import Documents
from jaxpack.data.reading import Dataset
from jaxpack.data.sources import NAME, split_name
from jaxpack.errors import InputError

# One set without a name, or several by their names.
EvalDataset = Dataset | Documents | Mapping[str, Dataset | Documents]
Held = TypeVar("Held")

UNNAMED = ""  # the name of a set that is alone and has none, and of all sets together


def by_name(dataset: EvalDataset) -> dict[str, Dataset | Documents]:
    """Returns evaluation sets by their names; a dataset that is no mapping is one set with the name "".

    Raises:
      InputError: a mapping is empty, or a name in it is not a word.
    """
    if not isinstance(dataset, Mapping):
        return {UNNAMED: dataset}
    if not dataset:
        raise InputError(
            "`dataset` must name at least one set, got an empty mapping. Pass {'name': rows}, or leave it out."
        )
    sets: Mapping[Any, Any] = dataset
    for name in sets:
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            raise InputError(
                f"`dataset` must have names of letters, digits, `_` and `-`, got {name!r:.80}. The name becomes a part"
                " of the metrics' names, such as `eval_math_loss` for 'math'."
            )
    return dict(sets)


def as_given(sets: Mapping[str, Held]) -> Held | dict[str, Held] | None:
    """Undoes `by_name`: returns what belongs to a set without a name alone, and None if there are no sets."""
    return sets.get(UNNAMED, dict(sets) or None)


def read_names(given: Sequence[str]) -> list[str] | dict[str, list[str]]:
    """Reads the names in texts such as "math=math.jsonl", see `split_name`; texts of one name belong to one set.

    Without names the texts stay as they are.

    Raises:
      InputError: some have a name and some have none.

    Example:
      >>> read_names(["math=sums.jsonl", "chat=chat.jsonl", "math=proofs.jsonl"])
      {'math': ['sums.jsonl', 'proofs.jsonl'], 'chat': ['chat.jsonl']}
    """
    sets: dict[str, list[str]] = {}
    for text in given:
        name, path = split_name(text)
        sets.setdefault(name, []).append(os.path.expanduser(path))  # A shell leaves `~` behind a name as it is.
    if UNNAMED not in sets:
        return sets
    if len(sets) > 1:
        raise InputError(
            f"`dataset` must have a name before each path, or before none, got {sets[UNNAMED][0]!r:.200} without one"
            f" beside the set {next(filter(None, sets))!r}. Write for example 'chat={sets[UNNAMED][0]:.100}'."
        )
    return list(given)


@contextlib.contextmanager
def errors_name_set(name: str) -> Iterator[None]:
    """Puts the name of a set, if it has one, before the messages of errors raised inside."""
    try:
        yield
    except InputError as error:
        if name:
            error.args = (f"Evaluation set {name!r}: {error}",)
        raise


def public_metrics(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the metrics of sets by their public names: "eval_loss" for all sets together, and "eval_math_loss"."""
    return {f"eval_{prefix_of(name)}{metric}": value for name, by in metrics.items() for metric, value in by.items()}


def check_public_names(sets: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Refuses names of sets with which two metrics would have the same public name."""
    owners: dict[str, str] = {}
    for name in {UNNAMED: None, **sets}:
        for metric in metrics:
            public = f"eval_{prefix_of(name)}{metric}"
            if public in owners:
                raise InputError(
                    f"`eval_dataset` must have names that no metric begins with, got {name!r}: `{public}` would be its"
                    f" metric {metric!r}, and also {owners[public]}. Choose another name."
                )
            owners[public] = f"the metric {metric!r} of " + (f"the set {name!r}" if name else "all sets together")


def prefix_of(name: str) -> str:
    """Returns what stands before a metric's name if it is that of a set, such as "math_"."""
    return f"{name}_" if name else ""
