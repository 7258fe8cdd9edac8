"""Writes tables that are made by a command into pages of the documentation."""

import re
from collections.abc import Iterable

_BLOCK = re.compile(r"(?<=<!-- made by `make docs-tables` -->\n).*?(?=<!-- end -->)", re.DOTALL)


def with_block(page: str, lines: Iterable[str]) -> str:
    """Returns a page with the lines between its two comments replaced."""
    assert _BLOCK.search(page), "the page has no comments that the table stands between"
    made = "\n".join(lines)
    return _BLOCK.sub(lambda _: f"\n{made}\n\n", page)
