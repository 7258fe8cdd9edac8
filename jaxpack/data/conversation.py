"""A row is read into a conversation, in whichever of the usual ways it is written."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxpack.errors import InputError

Message = dict[str, Any]

_ROLES = {  # of ShareGPT's `from`
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
    """Holds all that a chat template is given of a row. The first `prompt` messages are not trained on."""

    messages: list[Message]
    tools: list | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: int = 0


def read_conversation(row: Mapping[str, Any], messages: list, where: str, *, prompt: int = 0) -> Conversation:
    """A conversation of `role` and `content`, or of ShareGPT's `from` and `value`, with the row's `system` and `tools`.

    `where` names the row in errors.
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
    """Alpaca's instruction, input (empty where there is none) and output."""
    texts = row.get("instruction"), row.get("input") or "", row.get("output")
    for key, text in zip(("instruction", "input", "output"), texts, strict=True):
        if not isinstance(text, str):
            raise InputError(f"`{key}` must be a str, got {text!r:.80} in {where}.")
    return texts


def instruction_message(instruction: str, given: str) -> Message:
    """The user's message that asks an instruction of its input."""
    return {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction}


def alpaca_prompt(instruction: str, given: str) -> str:
    """The words in which Alpaca asks, for tokenizers without a chat template (Stanford Alpaca, Taori et al. 2023)."""
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
    """Changes the arguments of a tool call, whether it is a `function` or has one."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": with_arguments(call["function"], change)}
    return {**call, "arguments": change(call.get("arguments", {}))}


def _from_json(arguments: Any) -> Any:
    """Arguments as most templates take them. OpenAI's are JSON, which those would quote once more."""
    with contextlib.suppress(TypeError, ValueError):
        found = json.loads(arguments)
        return found if isinstance(found, Mapping) else arguments
    return arguments


def without_none(value: Any) -> Any:
    """A row of Arrow's as it was: there, every mapping has the keys of all, some of them without a value."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _tools(tools: Any, where: str) -> list | None:
    """A row's tools: a list, or JSON of one; each of them may be JSON, too."""
    try:
        found = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
        if isinstance(found, list):
            found = [json.loads(tool) if isinstance(tool, str) else tool for tool in found]
    except ValueError:
        found = tools
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, Mapping) for tool in found)):
        raise InputError(f"`tools` must be a list of mappings, or JSON of one, got {tools!r:.80} in {where}.")
    return found or None
