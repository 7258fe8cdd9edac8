"""Writes conversations, loads them with their own tokenizer, and shows which text of each is trained on."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxpack.data.documents import Documents
from jaxpack.data.reading import load_documents
from jaxpack.errors import InputError


def load(rows: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Documents:
    return load_documents(rows, tokenizer, vocab_size=len(tokenizer), **options)


def whole(documents: Documents, tokenizer: PreTrainedTokenizerFast, which: int = 0) -> str:
    return tokenizer.decode(documents.tokens[documents.starts[which] :][: documents.lengths[which]].tolist())


def trained(documents: Documents, tokenizer: PreTrainedTokenizerFast, which: int = 0) -> list[str]:
    """Decodes each stretch of a document that is trained on."""
    here = slice(documents.starts[which], documents.starts[which] + documents.lengths[which])
    tokens, on = documents.tokens[here], documents.labels[here] != -100
    assert (documents.labels[here][on] == tokens[on]).all()
    borders = np.flatnonzero(np.diff(np.concatenate([[False], on, [False]])))
    return [tokenizer.decode(tokens[begin:end].tolist()) for begin, end in borders.reshape(-1, 2)]


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Returns a conversation in which user and assistant take turns."""
    before = [] if system is None else [turn("system", system)]
    return before + [turn("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "cabs", "parameters": {"type": "object", "properties": {}}}}]


def refusal(rows: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    with pytest.raises(InputError) as caught:
        load(rows, tokenizer)
    message = str(caught.value)
    assert "\n" not in message, message
    assert message.endswith("."), message
    assert not message.endswith(".."), message
    assert len(message) < 900, message
    return message
