"""Finds the README's code blocks for the tests that run them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def command(start: str) -> str:
    """Returns the one shell block that begins with `start`, with continued lines joined."""
    (found,) = (block for block in blocks("console") if block.startswith(start))
    return found.replace("\\\n", " ")
