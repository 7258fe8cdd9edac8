"""Draws conversations in which every piece has a marker, and checks what becomes of each marker.

This is the rule of the data: every piece of a row is written exactly once, and trained on where it is the assistant's;
or the row is refused; or the piece is counted aloud.
"""

import json
import random
from typing import Any

import pytest
from conversations import call, load, trained, turn, whole
from transformers import PreTrainedTokenizerFast

from jaxpack.errors import InputError

_NAME = "names of calls"  # templates may repeat one in an id, or beside the result


class Marked:
    """Draws a random conversation in which each piece has a marker: `learned` or `context`, by kind."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        self.learned: dict[str, str] = {}
        self.context: dict[str, str] = {}
        self.messages: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {"messages": self.messages}
        first = self.draw.random()
        if first < 0.3:
            self.messages.append(
                turn(self.draw.choice(["system", "developer"]), self.mark(self.context, "system text"))
            )
        elif first < 0.4:
            self.row[self.draw.choice(["system", "system_prompt"])] = self.mark(self.context, "system text")
        for _ in range(self.draw.randint(1, 3)):
            role = self.draw.choice(["user"] * 6 + ["human", "critic"])
            self.messages.append(turn(role, self.mark(self.context, "content")))
            if self.draw.random() < 0.3:
                self.messages.append(self.answer(with_call=True))
                for _ in self.messages[-1]["tool_calls"]:
                    self.messages.append(turn("tool", self.mark(self.context, "content"), tool_call_id="abcdefghi"))
            self.messages.append(self.answer(with_call=False))

    def mark(self, pieces: dict[str, str], kind: str) -> str:
        marker = f"q{len(self.learned) + len(self.context)}w"
        pieces[marker] = kind
        return self.draw.choice(["{}", " {}", "{}\n", "so {} it"]).format(marker)

    def answer(self, *, with_call: bool) -> dict[str, Any]:
        weight = self.draw.choice([{}, {}, {"weight": 1}, {"weight": 0}, {"train": False}])
        pieces = self.context if 0 in weight.values() else self.learned
        content = self.mark(pieces, "content") if not with_call or self.draw.random() < 0.5 else ""
        if self.draw.random() < 0.2:
            opening = self.draw.choice(["<think>", "<think>", "<think>\n", ""])
            content = f"{opening}{self.mark(pieces, 'thoughts')}</think>{content}"
        message = turn(self.draw.choice(["assistant", "assistant", "gpt"]), content, **weight)
        if self.draw.random() < 0.2:
            message[self.draw.choice(["reasoning_content", "thinking"])] = self.mark(pieces, "thoughts")
        if with_call:
            message["tool_calls"] = [self.call(pieces) for _ in range(self.draw.choice([1, 1, 2]))]
        if self.draw.random() < 0.05:
            message["content"] = self.draw.choice([7, True, {"a": 1}])
        elif self.draw.random() < 0.1:
            message["content"] = [{"type": "text", "text": content}]
        return message

    def call(self, pieces: dict[str, str]) -> dict[str, Any]:
        deep = [{"x": self.mark(pieces, "calls")}]
        arguments = {self.mark(pieces, "calls"): self.mark(pieces, "calls"), "deep": deep}
        made = call(self.mark(pieces, _NAME).strip(), **arguments)
        forms = made, made["function"], {"function": {**made["function"], "arguments": json.dumps(arguments)}}
        return self.draw.choice(forms)


def is_written(seed: int, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture) -> bool:
    """Checks the rule on a random conversation; returns False if it is refused."""
    row = Marked(seed)
    try:
        documents = load([row.row], tokenizer)
    except InputError:
        return False
    said = " ".join(capsys.readouterr().err.split())
    text, learned = whole(documents, tokenizer), " ".join(trained(documents, tokenizer))
    for markers, are_learned in ((row.learned, True), (row.context, False)):
        for marker, kind in markers.items():
            count = text.count(marker)
            is_counted = count == 0 and f"leaves out {kind} that" in said
            assert count == 1 or is_counted or (kind == _NAME and count), (seed, marker, kind, text, said)
            assert (marker in learned) == (are_learned and count > 0), (seed, marker, text, learned)
    return True
