"""Reads a row into a conversation, from any of the usual formats."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxpack.errors import InputError

Message = dict[str, Any]

_ROLES = {  # the values of ShareGPT's `from`
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


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Holds all parts of a row that a chat template gets. The first `prompt` messages are not trained on."""

    messages: list[Message]
    tools: list | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: int = 0


def read_conversation(row: Mapping[str, Any], messages: list, where: str, *, prompt: int = 0) -> Conversation:
    """Reads `messages`, with `role` and `content` or with ShareGPT's `from` and `value`, into a conversation.

    The conversation also has the row's `system`, `tools` and `chat_template_kwargs`. `where` names the row in errors.
    """
    turns = [_message(message, where) for message in messages]
    system = row.get("system")
    if system and (not turns or turns[0].get("role") != "system"):
        if not isinstance(system, str):
            raise InputError(f"`system` must be a str, got {system!r:.80} in {where}.")
        turns.insert(0, {"role": "system", "content": system})
        prompt += prompt > 0
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"`chat_template_kwargs` must be a mapping, got {options!r:.80} in {where}.")
    return Conversation(turns, _tools(row.get("tools"), where), options, prompt)


def read_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str, str]:
    """Returns Alpaca's instruction, input (empty if the row has none) and output."""
    texts: tuple[Any, Any, Any] = row.get("instruction"), row.get("input") or "", row.get("output")
    for key, text in zip(("instruction", "input", "output"), texts, strict=True):
        if not isinstance(text, str):
            raise InputError(f"`{key}` must be a str, got {text!r:.80} in {where}.")
    return texts


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


def _message(message: Any, where: str) -> Message:
    if isinstance(message, Mapping) and isinstance(message.get("role"), str):
        message = {key: value for key, value in message.items() if value is not None}
    elif isinstance(message, Mapping) and isinstance(message.get("from"), str) and "value" in message:
        if message["from"] not in _ROLES:
            raise InputError(f"`from` must be one of {sorted(_ROLES)}, got {message['from']!r:.80} in {where}.")
        message = {"role": _ROLES[message["from"]], "content": message["value"]}
    else:
        raise InputError(
            f"A message must have `role` and `content`, or `from` and `value`, got {message!r:.80} in {where}."
        )
    calls = message.get("tool_calls", [])
    if not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise InputError(f"`tool_calls` must be a list of mappings, got {calls!r:.80} in {where}.")
    if calls:
        message["tool_calls"] = [with_arguments(call, _from_json) for call in calls]
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise InputError(f"The parts of a message must be text, got {content!r:.80} in {where}.")
        message["content"] = "".join(part["text"] for part in content)
    return message


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
