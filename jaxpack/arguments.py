"""Checks the parameters that only some schedules and some optimizers have. Imports no jax."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpack.errors import InputError
from jaxpack.utils.checks import check


class Argument(NamedTuple):
    """Says which values a parameter takes: `read` turns one into its Python type, and raises ValueError for others."""

    rule: str
    read: Callable[[Any], Any]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _not_negative(value: Any) -> float:
    if (number := _number(value)) < 0:
        raise ValueError
    return number


def _positive(value: Any) -> float:
    if (number := _number(value)) <= 0:
        raise ValueError
    return number


def _share(value: Any) -> float:
    if not 0 <= (number := _number(value)) < 1:
        raise ValueError
    return number


def _steps(value: Any) -> int:
    number = int(value) if isinstance(value, str) else value
    if type(number) is not int or not 0 <= number < 2**31:
        raise ValueError
    return number


def _count(value: Any) -> int:
    if (number := _steps(value)) == 0:
        raise ValueError
    return number


def _flag(value: Any) -> bool:
    known = {"true": True, "false": False}
    if type(value) is bool:
        return value
    if not isinstance(value, str) or value.lower() not in known:
        raise ValueError
    return known[value.lower()]


def _shape(value: Any) -> str:
    if value not in _SHAPES:
        raise ValueError
    return value


_SHAPES = ("linear", "cosine", "1-sqrt")
_POSITIVE = Argument("a positive number", _positive)
_NOT_NEGATIVE = Argument("0 or a positive number", _not_negative)
_STEPS = Argument("a whole number of at least 0", _steps)
_A_SHAPE = Argument(f"one of {_SHAPES}", _shape)
_MOMENTUM = {"momentum": Argument("a number in [0, 1)", _share), "nesterov": Argument("true or false", _flag)}

# The parameters of each schedule (`lr_scheduler_kwargs`), with transformers' names.
SCHEDULES: dict[str, dict[str, Argument]] = {
    "cosine": {"num_cycles": _POSITIVE},
    "cosine_with_restarts": {"num_cycles": Argument("a whole number of at least 1", _count)},
    "cosine_with_min_lr": {"min_lr": _NOT_NEGATIVE, "min_lr_rate": _NOT_NEGATIVE, "num_cycles": _POSITIVE},
    "polynomial": {"lr_end": _NOT_NEGATIVE, "power": _POSITIVE},
    "inverse_sqrt": {"timescale": _POSITIVE},
    "warmup_stable_decay": {
        "num_decay_steps": _STEPS,
        "num_stable_steps": _STEPS,
        "warmup_type": _A_SHAPE,
        "decay_type": _A_SHAPE,
        "min_lr_ratio": _NOT_NEGATIVE,
        "num_cycles": _POSITIVE,
    },
}
# The parameters of each optimizer (`optim_args`), with torch's names.
OPTIMIZERS: dict[str, dict[str, Argument]] = {"sgd": _MOMENTUM, "muon": _MOMENTUM}


def read_arguments(
    name: str, value: Any, owner: str, of: str, known: Mapping[str, dict[str, Argument]]
) -> tuple[tuple[str, Any], ...]:
    """Returns parameters as sorted pairs, read from a mapping, pairs, JSON, or text such as "num_cycles=2,min_lr=1e-6".

    Args:
      name: the setting that holds the parameters.
      owner: the setting that decides which parameters there are, and `of` its value.
      known: the parameters by value of that setting; a value that is missing has none.

    Raises:
      InputError: the value is nothing of this, or holds an unknown name, a name twice or a wrong value.

    Example:
      >>> read_arguments("lr_scheduler_kwargs", "num_cycles=2", "lr_scheduler_type", "cosine_with_restarts", SCHEDULES)
      (('num_cycles', 2),)
    """
    pairs, allowed, read = _pairs(name, value), known.get(of, {}), {}
    for key, one in pairs:
        if key not in allowed:
            rule = f"must be among {tuple(allowed)}" if allowed else "must be empty"
            raise InputError(f"`{name}` {rule} with `{owner}` {of!r}, got {key!r}.{_hint(key, owner, known)}")
        try:
            read[key] = allowed[key].read(one.item() if isinstance(one, np.generic) else one)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"`{name}` must have {allowed[key].rule} as `{key}`, got {one!r}.") from None
    check(len(read) == len(pairs), name, "must have each name once", value)
    return tuple(sorted(read.items()))


def by_name(pairs: Any) -> dict[str, Any]:
    """Returns a setting that holds pairs of names and values as a mapping."""
    return dict(pairs)


def _pairs(name: str, value: Any) -> list[tuple[str, Any]]:
    try:
        if value is None:
            return []
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = json.loads(value)
        if isinstance(value, str):
            split = [one.split("=", 1) for one in value.split(",") if one.strip()]
            return [(key.strip(), one.strip()) for key, one in split]
        return [(str(key), one) for key, one in (value.items() if isinstance(value, Mapping) else value)]
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"`{name}` must be a mapping, or text such as 'first=2,second=1e-6', got {value!r}.") from None


def _hint(key: Any, owner: str, known: Mapping[str, dict[str, Argument]]) -> str:
    having = [of for of, arguments in known.items() if key in arguments]
    return f" It belongs to `{owner}` {' or '.join(map(repr, having))}." if having else ""
