"""Declares the parts of a Hugging Face tokenizer that jaxpack uses, and tokenises texts."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxpack.errors import InputError, reason


class ChatTokenizer(Protocol):
    """Declares the methods of a Hugging Face tokenizer that are needed to write conversations."""

    chat_template: Any
    special_tokens_map: Mapping[str, Any]

    def apply_chat_template(self, conversation: list, *, tokenize: bool, **options: Any) -> Any:
        """Writes a conversation as text, or as token ids."""
        ...

    def get_chat_template(self, chat_template: str | None = None, tools: list | None = None) -> str:
        """Returns the template that writes conversations with these tools."""
        ...

    def get_added_vocab(self) -> dict[str, int]:
        """Returns the ids of the tokens that were added to the vocabulary, by their texts."""
        ...


class Tokenizer(ChatTokenizer, Protocol):
    """Declares the methods of a fast Hugging Face tokenizer that jaxpack uses."""

    eos_token_id: int | None
    eos_token: Any
    bos_token_id: int | None
    bos_token: Any

    def __call__(self, text: list[str], **options: bool) -> Mapping[str, list]:
        """Returns lists with one entry for each text: at least `input_ids`."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of token ids."""
        ...

    def save_pretrained(self, save_directory: str | os.PathLike) -> Any:
        """Writes the tokenizer's files into a folder."""
        ...


def tokenize(
    texts: list[str], tokenizer: Tokenizer, where: Callable[[int], str], **options: bool
) -> Mapping[str, list]:
    """Calls a tokenizer on texts. `where` returns how an error names a text, for example by its row, given its index.

    A text that begins with the tokenizer's BOS, because a chat template has written it, gets no second one.

    Raises:
      InputError: one of the texts is not valid Unicode, or the tokenizer gives up on it.
    """
    try:
        encoded = tokenizer(texts, **options)
    except TypeError:
        for index, text in enumerate(texts):
            if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can encode half of a surrogate pair
                raise InputError(f"Text must be valid Unicode, got {text!r:.80} in {where(index)}.") from None
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, and no `Exception`
            raise
        raise InputError(
            f"The tokenizer must encode every text, but it failed with {reason(error)!r:.200}. A pattern in its"
            " tokenizer.json needs too many attempts: use the tokenizer of the model's authors."
        ) from None
    twice = [
        index
        for index, ids in enumerate(encoded["input_ids"])
        if begins_with_bos(texts[index], tokenizer) and ids[:2] == 2 * [tokenizer.bos_token_id]
    ]
    if not twice:
        return encoded
    columns = {name: list(column) for name, column in encoded.items()}
    for column in columns.values():
        for index in twice:
            column[index] = column[index][1:]
    return columns


def begins_with_bos(text: str, tokenizer: Tokenizer) -> bool:
    """Returns whether a text begins with the tokenizer's BOS token, as texts do that a chat template has written."""
    bos = getattr(tokenizer, "bos_token", None)
    return bool(bos) and text.startswith(bos)
