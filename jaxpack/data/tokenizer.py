"""Declares the parts of a Hugging Face tokenizer that jaxpack uses, and tokenises texts."""

import itertools
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

    If a text begins with the token with which the tokenizer begins texts, because a chat template has written it, the
    text gets no second one, and white space before the token is cut off.

    Raises:
      InputError: one of the texts is not valid Unicode, or the tokenizer gives up on it.
    """
    begins = added_before(tokenizer) if options.get("add_special_tokens", True) else []
    if begins:
        texts = without_space_before_bos(texts, tokenizer)
    try:
        encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **options)
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
    doubled = [
        sum(1 for _ in itertools.takewhile(lambda token: [token] == begins, ids[1:])) if ids[:1] == begins else 0
        for ids in encoded["input_ids"]
    ]
    if not any(doubled):
        return encoded
    return {name: [row[cut:] for row, cut in zip(column, doubled, strict=True)] for name, column in encoded.items()}


def without_space_before_bos(texts: list[str], tokenizer: Tokenizer) -> list[str]:
    """Returns texts without the white space before a BOS token that they begin with, if the tokenizer adds one, too."""
    if not added_before(tokenizer):
        return texts
    return [text.lstrip() if begins_with_bos(text, tokenizer) else text for text in texts]


def added_before(tokenizer: Tokenizer) -> list[int]:
    """Returns the token that a tokenizer puts before a text by itself, in a list; an empty list if it puts none."""
    alone, whole = (tokenizer(["a"], add_special_tokens=add)["input_ids"][0] for add in (False, True))
    return list(whole[:1]) if list(whole[1 : 1 + len(alone)]) == list(alone) else []


def begins_with_bos(text: str, tokenizer: Tokenizer) -> bool:
    """Returns whether a text begins with the tokenizer's BOS token, as texts do that a chat template has written.

    White space may stand before it.
    """
    bos = getattr(tokenizer, "bos_token", None)
    return bool(bos) and text.lstrip().startswith(bos)
