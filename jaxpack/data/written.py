"""Checks that a chat template writes all that a conversation says: every piece once, and none is left out silently.

A piece is the content or the thoughts of a turn, the name or the arguments of one of its calls, or the name of a tool.
Two tests find a missing piece. A similar conversation, with a mark in the place of each piece, shows what the template
does with conversations of this form: its text must have each mark once. And the row's own text must contain each piece,
because some templates go by what a content says (for example, they cut off a thought in it).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxpack.data.conversation import THOUGHTS, Conversation, Message, with_arguments

CONTENT, SYSTEM, THOUGHT, CALL, TOOL = "content", "system text", "thoughts", "calls", "tools"

MARK = "\ufdd0{}\ufdd1"  # Unicode reserves these two: text never has them
MARKS = re.compile("\ufdd0(\\d+)\ufdd1")
# A thought that a content begins with, and the answer after it. Where the generation prompt has opened the thought, the
# content may lack that tag.
_INLINE = re.compile(r"(\s*(?:<think>\s*)?)((?:(?!<think>).)*?)(\s*</think>\s*)(.*)", re.DOTALL)

Piece = tuple[int, str]  # the number of a message, and one of the kinds above


class Unwritten(NamedTuple):
    """Names a piece that is not written once: its message, its kind, its text, and what happens to it."""

    message: int
    kind: str
    text: str
    is_doubled: bool = False


def unwritten(conversation: Conversation, text: str, form: Mapping[Piece, int] | None) -> Iterator[Unwritten]:
    """Yields the pieces of a conversation that its `text` does not have once.

    Args:
      form: how often the template writes each piece of a conversation of this form, from `written_pieces`; None if the
        template refuses marks.
    """
    for i, message in enumerate(conversation.messages):
        for kind, texts in _pieces(message):
            count = 1 if form is None else form.get((i, kind), 1)
            missing = [piece for piece in texts if not _is_in(piece, text)]
            if count == 0 or missing:
                yield Unwritten(i, kind, missing[0] if missing else texts[0])
            elif count > 1 and kind != CALL:  # a template may repeat a call's name in its id
                yield Unwritten(i, kind, texts[0], is_doubled=True)
    for tool in conversation.tools or []:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and not _is_in(name, text):
            yield Unwritten(0, TOOL, name)


def form_of(conversation: Conversation) -> Any:
    """Returns what decides where a template writes pieces, but for what they say."""
    kinds = tuple(
        (
            message.get("role"),
            tuple(sorted(message)),
            tuple(
                (kind, len(message["tool_calls"]) if kind == CALL else len(texts)) for kind, texts in _pieces(message)
            ),
        )
        for message in conversation.messages
    )
    return kinds, repr(conversation.tools), repr(conversation.options)


def written_pieces(conversation: Conversation, write: Callable[[list[Message]], str]) -> dict[Piece, int]:
    """Returns how often `write` writes each piece, by writing marks in their places."""
    marks: list[Piece] = []

    def mark(piece: Piece) -> str:
        marks.append(piece)
        return MARK.format(len(marks) - 1)

    text = write([_marked(message, i, mark) for i, message in enumerate(conversation.messages)])
    counts = Counter(int(number) for number in MARKS.findall(text))
    written: dict[Piece, int] = {}
    for number, piece in enumerate(marks):
        # A call has several marks; it is written if all of them are.
        written[piece] = min(counts[number], written.get(piece, counts[number]))
    return written


def _pieces(message: Message) -> Iterator[tuple[str, list[str]]]:
    """Yields the kinds of pieces in a message, with the texts of each that are not empty."""
    content = message.get("content")
    thoughts = [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
    if isinstance(content, str):
        if (inline := inline_thought(message)) is not None:
            thoughts.append(inline[2])
            content = inline[4]
        if content.strip():
            yield _kind_of_content(message), [content]
    if thoughts := [thought for thought in thoughts if thought.strip()]:
        yield THOUGHT, thoughts
    if calls := message.get("tool_calls"):
        yield CALL, [text for call in calls for text in _texts_of_call(call)]


def inline_thought(message: Message) -> re.Match | None:
    """Splits an assistant's content that begins with a thought into tag, thought, tag and answer; else returns None."""
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str):
        return None
    return _INLINE.fullmatch(content)


def _kind_of_content(message: Message) -> str:
    return SYSTEM if message.get("role") == "system" else CONTENT


def _texts_of_call(call: Mapping[str, Any]) -> Iterator[str]:
    yield call["function"]["name"]
    yield from _leaves(call["function"]["arguments"])


def _leaves(value: Any) -> Iterator[str]:
    """Yields the keys and the texts in the arguments of a call; numbers may be written in more than one way."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def _is_in(piece: str, text: str) -> bool:
    """Returns whether a text has a piece, with or without the white space around it, or as a JSON string."""
    piece = piece.strip()
    return piece in text or any(json.dumps(piece, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _marked(message: Message, i: int, mark: Callable[[Piece], str]) -> Message:
    """Returns a message with a mark in the place of each piece that is not empty."""
    marked = dict(message)
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        if (inline := inline_thought(message)) is None:
            marked["content"] = mark((i, _kind_of_content(message)))
        else:
            thought = mark((i, THOUGHT)) if inline[2].strip() else inline[2]
            answer = mark((i, CONTENT)) if inline[4].strip() else inline[4]
            marked["content"] = inline[1] + thought + inline[3] + answer
    for key in THOUGHTS:
        if isinstance(message.get(key), str) and message[key].strip():
            marked[key] = mark((i, THOUGHT))
    if message.get("tool_calls"):
        marked["tool_calls"] = [_marked_call(call, (i, CALL), mark) for call in message["tool_calls"]]
    return marked


def _marked_call(call: Mapping[str, Any], piece: Piece, mark: Callable[[Piece], str]) -> Mapping[str, Any]:
    def mark_arguments(given: Any) -> Any:
        arguments = {mark(piece): mark(piece)}
        return json.dumps(arguments, ensure_ascii=False) if isinstance(given, str) else arguments

    marked = with_arguments(call, mark_arguments)
    return {**marked, "function": {**marked["function"], "name": mark(piece)}}
