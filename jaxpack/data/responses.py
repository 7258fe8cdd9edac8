"""Finds the answers in text that a chat template has rendered before, by the texts that begin questions and answers."""

import re
from typing import NamedTuple

from jaxpack.utils.checks import check_parts

Span = tuple[int, int]  # the first character, and the one after the last


class Parts(NamedTuple):
    """Holds the text that begins each question and the text that begins each answer, such as `### Response:`."""

    instruction: str
    response: str


def parts_of(instruction_part: str | None, response_part: str | None) -> Parts | None:
    """Returns both parts, or None if neither is given.

    Raises:
      InputError: only one is given, one is empty or no text, or both are the same.
    """
    check_parts(instruction_part, response_part)
    return None if instruction_part is None or response_part is None else Parts(instruction_part, response_part)


def response_spans(text: str, parts: Parts) -> list[Span]:
    """Returns where the answers of a text are: each from the end of a response part to the next part, or to the end.

    Where one part begins with the other, the longer one counts.

    Example:
      >>> text = "Q: 2 + 2? A: 4. Q: Really? A: Yes."
      >>> [text[begin:end] for begin, end in response_spans(text, Parts("Q:", "A:"))]
      [' 4. ', ' Yes.']
    """
    longest_first = sorted(parts, key=len, reverse=True)
    spans, begin = [], None
    for match in re.finditer("|".join(map(re.escape, longest_first)), text):
        if begin is not None:
            spans.append((begin, match.start()))
        begin = match.end() if match.group() == parts.response else None
    if begin is not None:
        spans.append((begin, len(text)))
    return [(begin, end) for begin, end in spans if begin < end]
