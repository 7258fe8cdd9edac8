"""Reads a row into a conversation, from any of the usual formats."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxpack.errors import InputError

Message = dict[str, Any]

_ROLES = {  # names that datasets give the roles, in `role` or in ShareGPT's `from`, in lower case
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_TRAINING = ("weight", "train", "training", "loss", "loss_mask")  # a turn's own word on whether it is trained on
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the fields that hold what an answer was thought out by
_HISTORY = "history"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Holds all parts of a row that a chat template gets.

    Attributes:
      messages: the turns, with `role` and `content`, and perhaps `tool_calls` and thoughts.
      tools: the tools that the template may describe.
      options: further arguments of the template.
      prompt: the number of messages at the beginning that are not trained on.
      untrained: the numbers of further turns of the assistant that the row says not to train on.
    """

    messages: list[Message]
    tools: list | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: int = 0
    untrained: frozenset[int] = frozenset()

    def is_trained(self, i: int) -> bool:
        """Returns whether message `i` is a turn of the assistant that is trained on."""
        return self.messages[i].get("role") == "assistant" and i >= self.prompt and i not in self.untrained


def read_conversation(row: Mapping[str, Any], messages: list, where: str, *, prompt: int = 0) -> Conversation:
    """Reads `messages`, with `role` and `content` or with ShareGPT's `from` and `value`, into a conversation.

    The conversation also has the row's `system`, `tools` and `chat_template_kwargs`. `where` names the row in errors.
    """
    turns, trained = [], []
    for number, message in enumerate(messages):
        turn, is_trained = _message(message, f"message {number}, {where}")
        turns.append(turn)
        trained.append(is_trained)
    if row.get("weight") not in (None, 1):
        raise InputError(
            f"`weight` must be 1 for a whole row, got {row['weight']!r:.80} in {where}. Remove the field or leave"
            " the row out, or give its messages a `weight` of 0 or 1."
        )
    system = row.get("system")
    if system and (not turns or turns[0].get("role") != "system"):
        if not isinstance(system, str):
            raise InputError(f"`system` must be a str, got {system!r:.80} in {where}.")
        turns.insert(0, {"role": "system", "content": system})
        trained.insert(0, True)
        prompt += prompt > 0
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"`chat_template_kwargs` must be a mapping, got {options!r:.80} in {where}.")
    untrained = frozenset(i for i, is_trained in enumerate(trained) if not is_trained)
    return Conversation(turns, _tools(row.get("tools"), where), options, prompt, untrained)


def read_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str, str]:
    """Returns Alpaca's instruction, input (empty if the row has none) and output."""
    texts: tuple[Any, Any, Any] = row.get("instruction"), row.get("input") or "", row.get("output")
    for key, text in zip(("instruction", "input", "output"), texts, strict=True):
        if not isinstance(text, str):
            raise InputError(f"`{key}` must be a str, got {text!r:.80} in {where}.")
    return texts


def read_history(row: Mapping[str, Any], where: str) -> list[Message]:
    """Returns the turns before an instruction: LLaMA-Factory's `history`, pairs of a question and its answer."""
    history = row.get(_HISTORY) or []
    is_pairs = isinstance(history, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    )
    if not is_pairs:
        raise InputError(f"`history` must be a list of pairs of texts, got {history!r:.80} in {where}.")
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": next(roles), "content": text} for pair in history for text in pair]


def instruction_message(instruction: str, given: str) -> Message:
    """Returns the user's message with an instruction and, after an empty line, its input if there is one."""
    return {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction}


def alpaca_prompt(instruction: str, given: str) -> str:
    """Returns Alpaca's prompt, for tokenizers without a chat template (Stanford Alpaca, Taori et al. 2023)."""
    paired = ", paired with an input that provides further context" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the"
        f" request.\n\n### Instruction:\n{instruction}\n\n"
        + (f"### Input:\n{given}\n\n" if given else "")
        + "### Response:\n"
    )


def _message(message: Any, where: str) -> tuple[Message, bool]:
    """Returns a message as templates read it, and whether the row allows it to be trained on."""
    if isinstance(message, Mapping) and isinstance(message.get("role"), str):
        message = {key: value for key, value in message.items() if value is not None}
        # A role that no dataset is known to use may be one of the template's own. If it is not, the template leaves the
        # message out, and the row is refused.
        message["role"] = _ROLES.get(message["role"].strip().lower(), message["role"])
    elif isinstance(message, Mapping) and isinstance(message.get("from"), str) and "value" in message:
        role = _ROLES.get(message["from"].strip().lower())
        if role is None:
            raise InputError(f"`from` must be one of {sorted(_ROLES)}, got {message['from']!r:.80} in {where}.")
        rest = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
        message = {"role": role, "content": message["value"], **rest}
    else:
        raise InputError(
            f"A message must have `role` and `content`, or `from` and `value`, got {message!r:.80} in {where}."
        )
    is_trained = all([_training_flag(key, message.pop(key), where) for key in _TRAINING if key in message])
    calls = message.pop("tool_calls", [])
    if not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise InputError(f"`tool_calls` must be a list of mappings, got {calls!r:.80} in {where}.")
    if "function_call" in message:  # OpenAI's older form of a single call
        called = message.pop("function_call")
        if not isinstance(called, Mapping):
            raise InputError(f"`function_call` must be a mapping, got {called!r:.80} in {where}.")
        calls = [*calls, {"type": "function", "function": called}]
    if calls:  # templates take an empty list for calls
        message["tool_calls"] = [with_arguments(call, _from_json) for call in calls]
    if calls and message.get("content") is None:
        message.pop("content", None)  # not "": some templates write calls only where there is no content
    else:
        message["content"] = _content(message, where)
    return message, is_trained


def _training_flag(key: str, value: Any, where: str) -> bool:
    if value not in (0, 1):  # and so neither False nor True
        raise InputError(f"`{key}` of a message must be 0 or 1, or a boolean, got {value!r:.80} in {where}.")
    return bool(value)


def _content(message: Message, where: str) -> str:
    """Returns the content of a message as text."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise InputError(f"The parts of a message must be text, got {content!r:.80} in {where}.")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        got = f"{content!r:.80}" if "content" in message else f"a message with the fields {sorted(message)}"
        raise InputError(f"The content of a message must be text, or a list of parts with text, got {got} in {where}.")
    return content


def with_arguments(call: Mapping[str, Any], change: Callable[[Any], Any]) -> Mapping[str, Any]:
    """Applies `change` to the arguments of a tool call, which are in its `function` or in the call itself."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": with_arguments(call["function"], change)}
    return {**call, "arguments": change(call.get("arguments", {}))}


def _from_json(arguments: Any) -> Any:
    """Parses arguments that are JSON of a mapping, as OpenAI's are; most templates would quote the JSON once more."""
    with contextlib.suppress(TypeError, ValueError):
        found = json.loads(arguments)
        return found if isinstance(found, Mapping) else arguments
    return arguments


def without_none(value: Any) -> Any:
    """Removes keys with the value None, since Arrow gives every mapping in a row the keys of all mappings."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _tools(tools: Any, where: str) -> list | None:
    """Reads a row's tools from a list, or from JSON of a list; each tool may be JSON, too."""
    try:
        found = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
        if isinstance(found, list):
            found = [json.loads(tool) if isinstance(tool, str) else tool for tool in found]
    except ValueError:
        found = tools
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, Mapping) for tool in found)):
        raise InputError(f"`tools` must be a list of mappings, or JSON of one, got {tools!r:.80} in {where}.")
    return found or None
