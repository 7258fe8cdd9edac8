"""Reads a row into a conversation, from any of the usual formats."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxpack.errors import InputError

Message = dict[str, Any]

_ROLES = {  # names that datasets give the roles, in `role` or in ShareGPT's `from`, in lower case
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLING = ("function_call", "tool_call")  # roles of LLaMA-Factory and ms-swift, whose content is the JSON of calls
# A turn says with these fields whether it is trained on.
TRAINING = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_mask", "loss_weight")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the fields that hold what an answer was thought out by
_ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs")  # names of a call's arguments, ours first
SYSTEMS = ("system", "system_prompt")  # a row's fields for the text of a first message of the role "system"
TOOLS = ("tools", "functions")  # a row's fields for its tools; the second is OpenAI's older name
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = ("image", "image_url", "audio", "video")


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

    Two or more texts without roles are those of a user and an assistant in turn (LIMA). The conversation also has the
    row's `system` (or `system_prompt`), `tools` and `chat_template_kwargs`. `where` names the row in errors.
    """
    if len(messages) > 1 and all(isinstance(message, str) for message in messages):
        messages = _in_turn(messages)
    turns, trained = [], []
    for number, message in enumerate(messages):
        turn, is_trained = _message(message, f"message {number}, {where}")
        turns.append(turn)
        trained.append(is_trained)
    for key in SYSTEMS if messages else ():  # a row without messages says nothing
        text = row.get(key) or ""
        if not isinstance(text, str):
            raise InputError(f"`{key}` must be a str, got {text!r:.80} in {where}.")
        if not text.strip():
            continue
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": text})
            trained.insert(0, True)
            prompt += prompt > 0
        elif (first := turns[0].get("content", "")).strip() != text.strip():
            raise InputError(
                f"A row must have one system text, got {first!r:.80} and a `{key}` of {text!r:.80} in {where}. Remove"
                " one of them."
            )
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"`chat_template_kwargs` must be a mapping, got {options!r:.80} in {where}.")
    untrained = frozenset(i for i, is_trained in enumerate(trained) if not is_trained)
    tools = next((row[key] for key in TOOLS if row.get(key) is not None), None)
    return Conversation(turns, _tools(tools, where), options, prompt, untrained)


def check_row_is_trained(row: Mapping[str, Any], where: str) -> None:
    """Refuses a row that says of itself as a whole that it is not trained on, or with another weight than 1."""
    for key in TRAINING:
        value = row.get(key)
        is_off = isinstance(value, int) and value == 0  # a `loss` of 0.0 may be a measurement
        if is_off or (key == "weight" and value not in (None, 1)):
            raise InputError(
                f"`{key}` must be 1 for a whole row, got {value!r:.80} in {where}. Remove the field or leave the row"
                f" out, or give its messages a `{key}` of 0 or 1."
            )


def _in_turn(texts: Iterable[str]) -> list[Message]:
    """Returns the messages of a user and an assistant who take turns."""
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]


def read_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str, str]:
    """Returns Alpaca's instruction, input (empty if the row has none) and output."""
    texts: tuple[Any, Any, Any] = row.get("instruction"), row.get("input") or "", row.get("output")
    for key, text in zip(("instruction", "input", "output"), texts, strict=True):
        if not isinstance(text, str):
            raise InputError(f"`{key}` must be a str, got {text!r:.80} in {where}.")
    return texts


def read_history(row: Mapping[str, Any], where: str) -> list[Message]:
    """Returns the turns before an instruction: LLaMA-Factory's `history`, pairs of a question and its answer."""
    history = row.get("history") or []
    is_pairs = isinstance(history, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    )
    if not is_pairs:
        raise InputError(f"`history` must be a list of pairs of texts, got {history!r:.80} in {where}.")
    return _in_turn(itertools.chain.from_iterable(history))


def instruction_message(instruction: str, given: str) -> Message:
    """Returns the user's message with an instruction and, after an empty line, its input if there is one."""
    return {"role": "user", "content": "\n\n".join(text for text in (instruction, given) if text)}


def alpaca_prompt(instruction: str, given: str) -> str:
    """Returns Alpaca's prompt, for tokenizers without a chat template (Stanford Alpaca, Taori et al. 2023)."""
    paired = ", paired with an input that provides further context" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the"
        f" request.\n\n### Instruction:\n{instruction}\n\n"
        + (f"### Input:\n{given}\n\n" if given else "")
        + "### Response:\n"
    )


def _message(given: Any, where: str) -> tuple[Message, bool]:
    """Returns a message as templates read it, and whether the row allows it to be trained on."""
    key = next(
        (key for key in ("role", "from") if isinstance(given, Mapping) and isinstance(given.get(key), str)), None
    )
    if key is None:
        raise InputError(
            f"A message must have `role` and `content`, or `from` and `value`, got {given!r:.80} in {where}."
        )
    name = given[key].strip().lower()
    # A role that no dataset is known to use may be one of the template's own. If it is not, the template leaves the
    # message out, and the row is refused.
    role = _ROLES.get(name, given[key] if key == "role" else None)
    if role is None:
        raise InputError(f"`from` must be one of {sorted(_ROLES)}, got {given[key]!r:.80} in {where}.")
    rest = {field: value for field, value in given.items() if field not in ("role", "from") and value is not None}
    message = {"role": role, **rest}
    value = message.pop("value", None)
    if value is not None and message.setdefault("content", value) != value:
        raise InputError(
            f"A message must have one text, got a `content` of {message['content']!r:.80} and a `value` of"
            f" {value!r:.80} in {where}."
        )
    is_trained = all([_training_flag(flag, message.pop(flag), where) for flag in TRAINING if flag in message])
    _keep_thoughts_once(message, where)
    calls = _calls(message, name, where)
    if calls:  # templates take an empty list for calls
        message["tool_calls"] = calls
    if not calls or "content" in message:
        message["content"] = _content(message, given, where)
    return message, is_trained


def _keep_thoughts_once(message: Message, where: str) -> None:
    """Refuses thoughts that are not text, and removes those that another field of the message has, too."""
    texts = set()
    for key in THOUGHTS:
        thought = message.get(key)
        if thought and not isinstance(thought, str | bool):
            raise InputError(f"`{key}` of a message must be text, got {thought!r:.80} in {where}.")
        if isinstance(thought, str) and thought.strip() not in texts:
            texts.add(thought.strip())
        elif not isinstance(thought, bool):
            message.pop(key, None)


def _calls(message: Message, name: str, where: str) -> list[Message]:
    """Takes the calls of tools out of a message, in the one form that all templates know: OpenAI's."""
    calls = message.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise InputError(f"`tool_calls` must be a list of mappings, got {calls!r:.80} in {where}.")
    if "function_call" in message:  # OpenAI's older form of a single call
        calls = [*calls, message.pop("function_call")]
    if name in _CALLING:
        content = message.pop("content", None)
        called = _from_json(content) if isinstance(content, str) else content
        calls = [*calls, *(called if isinstance(called, list) else [called])]
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> Message:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    function = function if isinstance(function, Mapping) else {}
    given = [function[key] for key in _ARGUMENTS if function.get(key) is not None]
    if not isinstance(function.get("name"), str) or len(given) > 1:
        raise InputError(
            f"A call of a tool must have a function with a `name` (a str) and `arguments`, got {call!r:.80} in {where}."
        )
    arguments = given[0] if given else {}
    if isinstance(arguments, str) and not arguments.strip():
        arguments = {}
    if isinstance(parsed := _from_json(arguments), Mapping):  # most templates would quote JSON once more
        arguments = parsed
    rest = {key: value for key, value in call.items() if key not in ("function", "name", *_ARGUMENTS)}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}


def _training_flag(key: str, value: Any, where: str) -> bool:
    if value not in (0, 1):  # and so neither False nor True
        raise InputError(f"`{key}` of a message must be 0 or 1, or a boolean, got {value!r:.80} in {where}.")
    return bool(value)


def _content(message: Message, given: Mapping[str, Any], where: str) -> str:
    """Returns the content of a message as text."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(map(_is_text, content)):
            raise InputError(f"The parts of a message must be text, got {content!r:.80} in {where}.")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        fields = sorted(field for field, value in given.items() if value is not None)
        got = f"{content!r:.80}" if "content" in message else f"a message with the fields {fields}"
        raise InputError(f"The content of a message must be text, or a list of parts with text, got {got} in {where}.")
    return content


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and isinstance(part.get("text"), str)
        and (part.get("type") or "text") in _TEXT_PARTS
        and all(part.get(key) is None for key in _MEDIA)
    )


def with_arguments(call: Mapping[str, Any], change: Callable[[Any], Any]) -> Message:
    """Applies `change` to the arguments of a call of a tool."""
    return {**call, "function": {**call["function"], "arguments": change(call["function"]["arguments"])}}


def _from_json(text: Any) -> Any:
    """Parses JSON; returns anything else as it is."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        return json.loads(text)
    return text


def plain(value: Any, *, drop_none: bool) -> Any:
    """Returns a row's value with lists in the place of tuples and NumPy arrays, which pandas and `datasets` may give.

    Args:
      drop_none: True removes keys with the value None, since Arrow gives every mapping in a row the keys of all.
    """
    if isinstance(value, Mapping):
        pairs = ((key, item) for key, item in value.items() if item is not None or not drop_none)
        return {key: plain(item, drop_none=drop_none) for key, item in pairs}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return [plain(item, drop_none=drop_none) for item in value] if isinstance(value, list | tuple) else value


def _tools(tools: Any, where: str) -> list | None:
    """Reads a row's tools from a list, or from JSON of a list; each tool may be JSON, too, and a function alone."""
    try:
        found = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
        if isinstance(found, list):
            found = [json.loads(tool) if isinstance(tool, str) else tool for tool in found]
    except ValueError:
        found = tools
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, Mapping) for tool in found)):
        raise InputError(f"`tools` must be a list of mappings, or JSON of one, got {tools!r:.80} in {where}.")
    return [_tool(tool) for tool in found] if found else None


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a tool in the one form that all templates know: OpenAI's."""
    is_function = (
        isinstance(tool.get("name"), str) and "function" not in tool and tool.get("type") in (None, "function")
    )
    if not is_function:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
