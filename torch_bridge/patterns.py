"""Matches the regular expressions of an adapter against names of modules."""

import re
from collections.abc import Sequence

from jaxpack.errors import InputError


def match_all(patterns: Sequence[str], names: Sequence[str], where: str) -> list[set[str]]:
    """Returns, for each pattern, the names that it matches from their beginnings to their ends.

    Args:
      patterns: regular expressions of Python.
      names: the names to match.
      where: what an error calls the patterns, such as "`target_modules` of adapter_config.json".

    Raises:
      InputError: a pattern is no regular expression.
    """
    try:
        return [{name for name in names if re.fullmatch(pattern, name)} for pattern in patterns]
    except (re.error, RecursionError) as error:
        raise InputError(
            f"{where} must be regular expressions, got one that Python cannot read: {error}. Correct the file."
        ) from error


def match_ends(patterns: Sequence[str], names: Sequence[str], where: str) -> list[set[str]]:
    """Returns, for each pattern, the names that it matches as a whole, or from after one of their dots to their ends.

    The arguments and errors are those of `match_all`.
    """
    return match_all([rf"(.*\.)?({pattern})" for pattern in patterns], names, where)
