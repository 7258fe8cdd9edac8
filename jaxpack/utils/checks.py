"""Checks the values that a user sets. Each error names the argument, the rule and the value received."""

import datetime
import math
from typing import Any

from jaxpack.errors import InputError


def check(ok: bool, name: str, rule: str, value: object) -> None:
    """Raises an `InputError` that says "`name` rule, got value" unless `ok`."""
    if not ok:
        raise InputError(f"`{name}` {rule}, got {value!r}.")


def check_parts(instruction_part: Any, response_part: Any) -> None:
    """Refuses the texts that begin questions and answers unless both are given, or neither, and they differ."""
    parts = {"instruction_part": instruction_part, "response_part": response_part}
    if all(part is None for part in parts.values()):
        return
    for name, other in (("instruction_part", "response_part"), ("response_part", "instruction_part")):
        is_text = isinstance(parts[name], str) and parts[name] != ""
        check(is_text, name, f"must be text with `{other}`, and not empty", parts[name])
    check(instruction_part != response_part, "response_part", "must differ from `instruction_part`", response_part)


def is_positive(value: Any) -> bool:
    """Returns whether `value` is a finite number above 0."""
    return isinstance(value, int | float) and 0 < value < math.inf


def is_date(value: str) -> bool:
    """Returns whether `value` is a date in the form YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False
