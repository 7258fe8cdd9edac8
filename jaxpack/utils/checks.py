"""Checks the values that a user sets. Each error names the argument, the rule and the value received."""

import datetime
import math
from typing import Any

from jaxpack.errors import InputError


def check(ok: bool, name: str, rule: str, value: object) -> None:
    """Raises an `InputError` that says "`name` rule, got value" unless `ok`."""
    if not ok:
        raise InputError(f"`{name}` {rule}, got {value!r}.")


def is_positive(value: Any) -> bool:
    """Returns whether `value` is a finite number above 0."""
    return isinstance(value, int | float) and 0 < value < math.inf


def is_date(value: str) -> bool:
    """Returns whether `value` is a date in the form YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False
