"""Gives a tokenizer a chat template: one of the templates that are written here, or one from a file.

The templates are written after the published formats of the models, for conversations of text. They have no
`{% generation %}` tags, which some programs cannot read; `chat_template.py` finds the assistant's part without them.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxpack.data.chat_template import ChatTemplate
from jaxpack.data.conversation import Conversation
from jaxpack.data.tokenizer import Tokenizer, added_before
from jaxpack.errors import InputError, reason
from jaxpack.utils.console import console
from jaxpack.utils.files import require_regular_file

_MAX_BYTES = 1 << 20  # forty times the longest template in use
_PROMPTED = "{% if add_generation_prompt %}{{ 'HEAD' }}{% endif %}"
_SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."  # Taori
)
_VICUNA = (  # FastChat's words
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user\\'s questions."
)


def _turns(turn: str, head: str) -> str:
    """Returns a template that writes all messages alike, and `head` before an answer."""
    return "{% for message in messages %}{{ " + turn + " }}{% endfor %}" + _PROMPTED.replace("HEAD", head)


# Templates by name. `\n` is jinja's escape for a line break.
TEMPLATES = {
    # For models without special tokens of chats: instructions and responses have headings, and EOS ends an answer.
    "alpaca": _SYSTEM_FIRST
    + "{{ (system or '"
    + _ALPACA
    + "') + '\\n\\n' }}"
    + "{% for message in turns %}"
    + "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    + "{% elif message['role'] == 'assistant' %}"
    + "{{ '### Response:\\n' + message['content'] + eos_token + ('' if loop.last else '\\n\\n') }}{% endif %}"
    + "{% endfor %}"
    + _PROMPTED.replace("HEAD", "### Response:\\n"),
    # OpenAI's format, which Qwen, SmolLM, OLMo and others have.
    "chatml": _turns(
        "'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'", "<|im_start|>assistant\\n"
    ),
    # Gemma 1 to 3. A system text stands at the beginning of the first question, as in Gemma 3.
    "gemma": "{{ bos_token }}"
    + _SYSTEM_FIRST
    + "{% for message in turns %}"
    + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    + "{{ (system + '\\n\\n' if loop.first and system else '') + message['content'] | trim + '<end_of_turn>\\n' }}"
    + "{% endfor %}"
    + _PROMPTED.replace("HEAD", "<start_of_turn>model\\n"),
    # Llama 3. Llama 3.1 and later add a system text with dates, and read this format, too.
    "llama3": "{{ bos_token }}"
    + _turns(
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] | trim + '<|eot_id|>'",
        "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
    ),
    # Phi-3 and Phi-3.5, whose texts end in EOS, which does not end an answer.
    "phi3": "{% for message in messages %}"
    + "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    + "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}",
    "phi4": _turns(
        "'<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>'",
        "<|im_start|>assistant<|im_sep|>",
    ),
    # Vicuna 1.1, for models without special tokens of chats.
    "vicuna": _SYSTEM_FIRST
    + "{{ (system or '"
    + _VICUNA
    + "') + ' ' }}"
    + "{% for message in turns %}"
    + "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    + "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    + "{% endfor %}"
    + _PROMPTED.replace("HEAD", "ASSISTANT:"),
}
_WITH_PLAIN_TEXT = ("alpaca", "vicuna")  # they write no special tokens but BOS and EOS
# Text that means a token wherever a template writes it: <|im_end|>, <end_of_turn>, </s>. Names in square brackets are
# not among them, since they are plain text in Llama 2's format, and nor are other tags, such as <think>.
_SPECIAL = re.compile(
    r"<\|[^\s<>|]{1,40}\|?>|<[^\s<>|]{1,40}\|>|<\uff5c[^\s<>\uff5c]{1,40}\uff5c>|</?s>|<(?:bos|eos)>|<(?:start|end)_of_\w{1,40}>"
)
_TRIAL = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "trial", "arguments": {"number": 1}}}
_CALLING = [_TRIAL[0], {"role": "assistant", "tool_calls": [_CALL]}, {"role": "tool", "name": "trial", "content": "1"}]
_TOOLS = [{"type": "function", "function": {"name": "trial", "parameters": {"type": "object", "properties": {}}}}]


def set_chat_template(tokenizer: Tokenizer | None, chat_template: str | os.PathLike) -> Tokenizer:
    """Gives a tokenizer a chat template in place, and returns the tokenizer. What is saved with it has the template.

    If the token with which the template ends an answer is not the tokenizer's EOS token, it becomes that: programs that
    generate text stop at EOS. EOS stays as it is where the template itself writes it, or ends an answer in no token.

    Args:
      tokenizer: the tokenizer of `from_pretrained`, or one of transformers; None is refused.
      chat_template: "alpaca", "chatml", "gemma", "llama3", "phi3", "phi4" or "vicuna" (or "llama-3", as dashes count
        for nothing), or the path of a file with a Jinja template. "alpaca" and "vicuna" need no special tokens but EOS,
        so every base model takes them. With "alpaca", "chatml", "phi3", "phi4" and "vicuna", a text
        begins with BOS if the tokenizer itself begins texts with it.

    Raises:
      InputError: there is no such name or file, the template refuses a question and its answer, or it writes a special
        token, such as <|im_end|>, that the tokenizer would cut into pieces.

    Example:
      >>> import jaxpack, torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> tokenizer = jaxpack.set_chat_template(tokenizer, "alpaca")
      >>> text = tokenizer.apply_chat_template([{"role": "user", "content": "2 + 2?"}], tokenize=False)
      >>> text.splitlines()[2:4]
      ['### Instruction:', '2 + 2?']
    """
    if not hasattr(tokenizer, "apply_chat_template") or tokenizer is None:
        raise InputError(
            f"`tokenizer` must be one of transformers for a `chat_template`, got {tokenizer!r:.80}. Use a model that"
            " has a tokenizer."
        )
    if not isinstance(chat_template, str | os.PathLike):
        raise InputError(f"`chat_template` must be one of {tuple(TEMPLATES)}, or a file, got {chat_template!r:.80}.")
    name = _own_name(chat_template)
    template = TEMPLATES[name] if name in TEMPLATES else _read(chat_template)
    if name in TEMPLATES and "bos_token" not in template and added_before(tokenizer) == [tokenizer.bos_token_id]:
        template = "{{ bos_token }}" + template
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        _check(tokenizer, str(chat_template))
    finally:
        tokenizer.chat_template = before
    return use_chat_template(tokenizer, template, str(chat_template))


def use_chat_template(tokenizer: Tokenizer, template: str, name: str) -> Tokenizer:
    """Gives a tokenizer the text of a template that is known to be right, and EOS, as `set_chat_template` does.

    Prints what has changed; `name` is how it names the template.
    """
    before, eos = tokenizer.chat_template, tokenizer.eos_token
    tokenizer.chat_template = template
    end = ChatTemplate(tokenizer).answer_end()
    ends = f"an answer ends with {end}" if end is not None else "an answer ends with no special token"
    if end is not None and end != eos and "eos_token" not in template:
        tokenizer.eos_token = end
        ends += f", which is the tokenizer's EOS token from now on (it was {eos})"
    if template != before or tokenizer.eos_token != eos:
        console.print(f"the chat template is {name}: {ends}")
    return tokenizer


def _own_name(chat_template: str | os.PathLike) -> str:
    return re.sub(r"[-_]", "", str(chat_template).lower())


def _read(chat_template: str | os.PathLike) -> str:
    """Reads a template from a file."""
    given = os.path.expanduser(os.fspath(chat_template))
    if "{{" in given or "{%" in given:
        raise InputError(
            f"`chat_template` must be a name or a file, got the text of a template, {given!r:.80}. Write it to a file,"
            " or assign it to `tokenizer.chat_template`."
        )
    path = Path(given)
    if not os.path.lexists(path):
        raise InputError(
            f"`chat_template` must be one of {tuple(TEMPLATES)}, or an existing file with a Jinja template, got"
            f" {given!r:.200}. The file of another model's template is the chat_template.jinja beside its tokenizer."
        )
    require_regular_file(path, "chat_template")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise InputError(f"`chat_template` must have at most {_MAX_BYTES:,} bytes, got {size:,} in {given!r:.200}.")
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"`chat_template` must be a readable file of UTF-8, got {given!r:.200}: {reason(error)}."
        ) from error


def _check(tokenizer: Tokenizer, name: str) -> None:
    """Refuses a tokenizer's template if it refuses a question and its answer, or leaves one of them out.

    Refuses special tokens that the tokenizer does not have, and warns of those that the template writes for tools.
    """
    written = ChatTemplate(tokenizer)
    try:
        text = written.write(Conversation(_TRIAL), "a trial")
        text += written.write_question(Conversation(_TRIAL[:1]), "a trial")
    except InputError as error:
        raise InputError(
            f"`chat_template` must be a Jinja template that writes a question and its answer, got {name!r:.200}:"
            f" {reason(error)}."
        ) from error
    for token, count in _cut_tokens(text, tokenizer):
        raise InputError(
            f"`chat_template` must write only special tokens that the tokenizer has, got {name!r:.200}, which writes"
            f" {token}, and the tokenizer makes {count} other tokens of that. Use a template for this model, one of"
            f" {_WITH_PLAIN_TEXT}, which need no special tokens, or a model that has the token. Or add the token with"
            " `tokenizer.add_tokens`, and give the model a row for it with `jaxpack.resize_vocab`."
        )
    with contextlib.suppress(InputError):  # most templates write no calls
        calls = written.write(Conversation(_CALLING, _TOOLS), "a trial")
        for token, count in _cut_tokens(calls, tokenizer):
            console.print(
                f"the chat template {name} writes {token} for tools, and the tokenizer makes {count} other tokens of"
                " that: use it only for rows without tools",
                style="yellow",
            )


def _cut_tokens(text: str, tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """Yields the special tokens in a text that the tokenizer does not have, and how many tokens it makes of each."""
    for token in dict.fromkeys(_SPECIAL.findall(text)):
        (ids,) = tokenizer([token], add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or token not in tokenizer.decode(ids):
            yield token, len(ids)
