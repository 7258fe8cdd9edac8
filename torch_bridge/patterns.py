"""Matches regular expressions of a download in bounded time: even a short one can take longer than a lifetime."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from jaxpack.errors import InputError, reason

_SECONDS = 10.0
_MAX_LENGTH = 10_000
_PLAIN = re.compile(r"[\w.]*", re.ASCII)  # nothing in it can be matched in two ways
# A process of its own, because Python cannot interrupt a match. It reads patterns and names, and writes the matches.
_MATCH = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass
patterns, names = json.load(sys.stdin)
try:
    compiled = [re.compile(pattern) for pattern in patterns]
except (re.error, RecursionError, OverflowError) as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([[i for i, name in enumerate(names) if one.fullmatch(name)] for one in compiled]))
"""


def match_all(patterns: Sequence[str], names: Sequence[str], where: str) -> list[set[str]]:
    """Returns, for each pattern, the names that it matches from their beginnings to their ends.

    Args:
      patterns: regular expressions of Python.
      names: the names to match.
      where: what an error calls the patterns, such as "`target_modules` of adapter_config.json".

    Raises:
      InputError: a pattern is no regular expression, or matching takes longer than 10 seconds.
    """
    if any(len(pattern) > _MAX_LENGTH for pattern in patterns):
        raise InputError(
            f"{where} must be regular expressions of at most {_MAX_LENGTH:,} characters, got a longer one."
        )
    if not patterns:
        return []
    found: Any
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([list(patterns), list(names)]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        found = json.loads(done.stdout) if done.returncode == 0 else done.stderr.splitlines()[-1:]
    except subprocess.TimeoutExpired:
        found = f"matching takes longer than {_SECONDS:.0f} seconds"
    except (OSError, ValueError) as error:
        found = reason(error)
    if not isinstance(found, list) or len(found) != len(patterns) or not all(isinstance(one, list) for one in found):
        raise InputError(
            f"{where} must be regular expressions that can be matched quickly, got {_shown(patterns)}: {found!s:.200}."
        )
    places: list[list[int]] = found
    return [{names[i] for i in matched} for matched in places]


def match_ends(patterns: Sequence[str], names: Sequence[str], where: str) -> list[set[str]]:
    """Returns, for each pattern, the names that it matches as a whole, or from after one of their dots to their ends.

    The arguments and errors are those of `match_all`.
    """
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):  # as nearly always: then no process is needed
        return [{name for name in names if re.search(rf"(^|\.)({pattern})$", name)} for pattern in patterns]
    return match_all([rf"(.*\.)?({pattern})" for pattern in patterns], names, where)


def _shown(patterns: Sequence[str]) -> str:
    return ", ".join(f"{pattern!r:.80}" for pattern in patterns[:2]) + (", ..." if len(patterns) > 2 else "")
