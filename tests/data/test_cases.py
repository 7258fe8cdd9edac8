"""Tests of faults that real datasets and public reports found: what a row says is written once, refused, or counted.

Each test has the reported case and more of its kind. `pytest -k cases` runs them all.
"""

import datetime
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from chat_templates import QWEN3, STYLES, with_tags, without_tags
from conversations import TOOLS, call, chat, load, refusal, trained, turn, whole
from marked_conversations import is_written
from tokenizers import processors
from tokenizers_for_tests import small_tokenizer

from jaxpack.errors import InputError

_TOKENS = ("<u>", "<a>", "<e>", "<s:user>", "<s:assistant>", "<s:system>", "<s:tool>", "<c>", "</c>")
_ASKS = "{% if add_generation_prompt %}<s:assistant>{% endif %}"
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<c>' + c.function.name + ' ' + (c.function.arguments if"
    " c.function.arguments is string else c.function.arguments | tojson) + '</c>' }}{% endfor %}"
)
# Knows three roles and passes over any other, as Qwen's templates do.
LENIENT = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'tool') %}{{ '<s:' + m.role + '>' + m.content + '<e>' }}"
    "{% elif m.role == 'assistant' %}{{ '<s:assistant>' }}{G}{{ m.content or '' }}"
    + _CALLS
    + "{{ '<e>' }}{E}{% endif %}"
    "{% endfor %}" + _ASKS
)
# Has no calls, as Llama 3's and Phi-3's templates.
NO_CALLS = "{% for m in messages %}{{ '<s:' + m.role + '>' + m.content + '<e>' }}{% endfor %}" + _ASKS
# Writes a call in the place of a content, and takes an empty list for calls, as Llama 3.1's template does.
CALL_OR_CONTENT = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}"
    '{{ \'<s:assistant>{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<e>' }}"
    "{% else %}{{ '<s:' + m.role + '>' + m.content + '<e>' }}{% endif %}{% endfor %}" + _ASKS
)
# Cuts the thought off every answer, as the templates of the R1 distillations do.
CUTS_THOUGHTS = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<s:' + m.role + '>' + c + '<e>' }}{% endfor %}" + _ASKS
)
WRITES_THINKING = LENIENT.replace("{{ m.content or '' }}", "{{ m.thinking or '' }}{{ m.content or '' }}")
WRITES_REASONING = LENIENT.replace("{{ m.content or '' }}", "{{ m.reasoning_content or '' }}{{ m.content or '' }}")
TWICE = LENIENT.replace("m.role + '>' + m.content", "m.role + '>' + m.content + '<u>' + m.content")
NO_SYSTEM = LENIENT.replace("('system', 'user', 'tool')", "('user', 'tool')")
NO_RESULTS = LENIENT.replace("('system', 'user', 'tool')", "('system', 'user')")
NO_ARGUMENTS = re.sub(r" \+ ' ' \+ \(.*?\)\) \+", " +", LENIENT.replace("| tojson)", "| tojson))"))
LAST_TWO = LENIENT.replace("in messages", "in messages[-2:]")
WITH_BOS = "{{ bos_token }}" + NO_CALLS


def of_template(template: str, *, bos: bool = False, tags: bool = False):
    tokenizer = small_tokenizer(bos=bos, specials=(*_TOKENS, "<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = with_tags(template) if tags else without_tags(template)
    return tokenizer


# Text that a template has already written.


@pytest.mark.parametrize("after", ["", "\n", " \n"])
def test_written_text_gets_no_second_beginning_or_end(after, capsys):
    tokenizer = of_template(WITH_BOS, bos=True)
    text = tokenizer.apply_chat_template(chat("a", "b"), tokenize=False)
    prompt = tokenizer.apply_chat_template(chat("a"), tokenize=False, add_generation_prompt=True)
    assert whole(load([{"text": text + after}], tokenizer), tokenizer) == text + after
    assert capsys.readouterr().err.count("in 1 rows, a chat template has already written the text") == 1
    documents = load([{"prompt": prompt, "completion": text[len(prompt) :] + after}], tokenizer)
    assert whole(documents, tokenizer) == text + after
    assert trained(documents, tokenizer) == ["b<e>" + after]


def ending(single: str, *, bos: str | None = "<bos>"):
    """Returns a tokenizer that itself puts special tokens around a text, as `single` says."""
    tokenizer = of_template(WITH_BOS, bos=True)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer.bos_token = bos
    return tokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n <bos><s:user>a<e>", "<bos><s:user>a<e>"),
        ("<bos><bos><s:user>a<e>", "<bos><s:user>a<e>"),
        ("<bos>ab<eos>", "<bos>ab<eos>"),
        ("<bos>ab<eos>\n", "<bos>ab<eos>\n"),
        ("ab", "<bos>ab<eos>"),
        ("ab<eos>", "<bos>ab<eos>"),
        ("", "<bos><eos>"),
    ],
)
@pytest.mark.parametrize("single", ["<bos> $A", "<bos> $A <eos>"])
def test_a_text_has_one_beginning_and_one_end_whatever_the_tokenizer_adds(single, text, expected):
    tokenizer = ending(single)
    assert whole(load([{"text": text}], tokenizer), tokenizer) == expected
    if text.startswith("<bos>") and text.count("<bos>") == 1:
        documents = load([{"prompt": "<bos>q", "completion": text}], tokenizer)
        assert whole(documents, tokenizer) == "<bos>q" + expected.removeprefix("<bos>")
        assert trained(documents, tokenizer) == [expected.removeprefix("<bos>")]


def test_a_text_has_one_beginning_if_the_tokenizer_adds_one_that_it_does_not_name():
    tokenizer = ending("<bos> $A", bos=None)
    assert whole(load([{"text": "<bos>ab"}], tokenizer), tokenizer) == "<bos>ab<eos>"


def test_the_question_that_shows_the_end_of_a_turn_is_not_counted_as_a_row(capsys):
    tokenizer = of_template("{{ strftime_now('%Y') }}" + LENIENT.replace("<e>", ""))
    assert whole(load([{"text": "ab"}], tokenizer), tokenizer) == "ab<eos>"
    assert capsys.readouterr().err == "the dataset: 1 row of plain text\n"


def test_other_text_begins_with_one_bos_and_ends_with_eos(capsys):
    tokenizer = of_template(WITH_BOS, bos=True)
    assert whole(load([{"text": "ab"}], tokenizer), tokenizer) == tokenizer.bos_token + "ab" + tokenizer.eos_token
    assert "already" not in capsys.readouterr().err


# Turns that are not to be trained on.


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_mask": 0}, {"training": 0.0}, {"trainable": False}],
)
@pytest.mark.parametrize("tags", [False, True])
def test_a_turn_without_weight_is_read_and_not_trained_on(flag, tags):
    tokenizer = of_template(LENIENT, tags=tags)
    messages = [turn("user", "a"), turn("assistant", "WRONG", **flag), *chat("no", "right")]
    documents = load([{"messages": messages}], tokenizer)
    assert "WRONG" in whole(documents, tokenizer)
    assert trained(documents, tokenizer) == ["right<e>"]
    row = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "WRONG", **flag}]
    row += [{"from": "human", "value": "no"}, {"from": "gpt", "value": "right"}]
    assert trained(load([{"conversations": row}], tokenizer), tokenizer) == ["right<e>"]


def test_a_weight_between_is_refused():
    tokenizer = of_template(LENIENT)
    assert "`weight` of a message must be 0 or 1" in refusal(
        [{"messages": [turn("user", "a"), turn("assistant", "b", weight=0.5)]}], tokenizer
    )
    assert "`weight` must be 1 for a whole row" in refusal([{"messages": chat("a", "b"), "weight": 0.1}], tokenizer)
    with pytest.raises(InputError, match="`assistant_only_loss` must be on"):
        load([{"messages": [*chat("a", "b"), turn("assistant", "c", weight=0)]}], tokenizer, assistant_only_loss=False)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.5}, {"training": 0}])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat("a", "b")},
        {"text": "ab"},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
        {"input_ids": [1, 2]},
    ],
)
def test_a_row_that_is_not_to_be_trained_on_is_refused(row, flag):
    tokenizer, ((key, value),) = of_template(LENIENT), flag.items()
    message = refusal([row, row | flag], tokenizer)
    assert f"`{key}` must be 1 for a whole row, got {value!r} in row 1" in message
    load([row | {key: None}, row | {key: 1}, row | {"loss": 0.0}], tokenizer)


# Calls, thoughts, roles and contents.


CALLS = {
    "a JSON text": {"type": "function", "function": {"name": "cabs", "arguments": '{"x": 1}'}},
    "without a type": {"function": {"name": "cabs", "arguments": {"x": 1}}},
    "flat": {"name": "cabs", "arguments": {"x": 1}, "id": "abcdefghi"},
    "flat, with parameters": {"name": "cabs", "parameters": {"x": 1}},
    "with args": {"function": {"name": "cabs", "args": '{"x": 1}'}},
}
# These refuse a message without a content, or write calls only where there is none.
NEEDS_CONTENT = LENIENT.replace("{{ m.content or '' }}", "{{ m['content'] + '' }}")
NEEDS_NO_CONTENT = CALL_OR_CONTENT.replace("'tool_calls' in m ", "'tool_calls' in m and 'content' not in m ")
TYPED = LENIENT.replace("in m.tool_calls or [] %}", "in m.tool_calls or [] %}{{ c['type'] | replace('function', '') }}")


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("form", CALLS)
def test_a_call_in_any_form_is_written_by_any_template(form, content):
    message = {"role": "assistant", "tool_calls": [CALLS[form]], **content}
    for template in (LENIENT, NEEDS_CONTENT, TYPED):
        tokenizer = of_template(template)
        documents = load([{"messages": [turn("user", "a"), message]}], tokenizer)
        assert trained(documents, tokenizer) == ['<c>cabs {"x": 1}</c><e>']
    tokenizer = of_template(NEEDS_NO_CONTENT)
    documents = load([{"messages": [turn("user", "a"), message]}], tokenizer)
    assert trained(documents, tokenizer) == ['{"name": "cabs", "parameters": {"x": 1}}<e>']


@pytest.mark.parametrize("arguments", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}])
def test_a_call_may_have_no_arguments(arguments):
    tokenizer = of_template(LENIENT)
    message = turn("assistant", None, tool_calls=[{"function": {"name": "cabs", **arguments}}])
    documents = load([{"messages": [turn("user", "a"), message]}], tokenizer)
    assert trained(documents, tokenizer) == ["<c>cabs {}</c><e>"]


NO_CALLS_AT_ALL = [
    {"id": "x"},
    {"function": "cabs"},
    {"name": 5},
    {"function": {"name": None}},
    {"name": "cabs", "arguments": {}, "parameters": {}},
    "cabs",
]


@pytest.mark.parametrize("wrong", NO_CALLS_AT_ALL, ids=str)
def test_a_call_without_a_name_or_with_two_arguments_is_refused(wrong):
    messages = [turn("user", "a"), turn("assistant", "", tool_calls=[wrong])]
    message = refusal([{"messages": messages}], of_template(LENIENT))
    assert "A call of a tool must have a function with a `name`" in message


@pytest.mark.parametrize("tool", [TOOLS[0], TOOLS[0]["function"], {"type": "function", **TOOLS[0]["function"]}])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_have_one_form(tool, key):
    tokenizer = of_template("{% for t in tools %}{{ '<u>' + t.type + t.function.name + '<e>' }}{% endfor %}" + LENIENT)
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        documents = load([{"messages": chat("a", "b"), key: tools}], tokenizer)
        assert whole(documents, tokenizer) == "<u>functioncabs<e><s:user>a<e><s:assistant>b<e>"


@pytest.mark.parametrize("role", ["tool", "function", "observation", "tool_response"])
def test_the_result_of_a_call_is_a_message_of_a_tool(role):
    tokenizer = of_template(LENIENT)
    messages = [turn("user", "a"), turn("assistant", None, function_call={"name": "cabs", "arguments": "{}"})]
    documents = load([{"messages": [*messages, turn(role, "1", name="cabs"), turn("assistant", "b")]}], tokenizer)
    assert "<s:tool>1<e>" in whole(documents, tokenizer)
    assert trained(documents, tokenizer) == ["<c>cabs {}</c><e>", "b<e>"]


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_a_message_that_is_a_call_is_a_turn_of_the_assistant(role):
    tokenizer = of_template(LENIENT)
    for content in ('{"name": "cabs", "arguments": {"x": 1}}', '[{"name": "cabs", "arguments": "{\\"x\\": 1}"}]'):
        row = [{"from": "human", "value": "a"}, {"from": role, "value": content}, {"from": "observation", "value": "2"}]
        documents = load([{"conversations": [*row, {"from": "gpt", "value": "b"}]}], tokenizer)
        assert trained(documents, tokenizer) == ['<c>cabs {"x": 1}</c><e>', "b<e>"]
    assert "A call of a tool must have" in refusal([{"messages": [turn("user", "a"), turn(role, "cabs()")]}], tokenizer)


@pytest.mark.parametrize(
    ("template", "what"),
    [(NO_CALLS, "tool calls"), (CALL_OR_CONTENT, "content"), (NO_ARGUMENTS, "tool calls"), (NO_RESULTS, "content")],
)
def test_a_call_beside_a_content_is_written_whole_or_refused(template, what):
    messages = [turn("user", "a"), turn("assistant", "let me look", tool_calls=[call("cabs", x="one")])]
    messages += [turn("tool", "1"), turn("assistant", "done")]
    assert f"leaves out the {what} of message" in refusal([{"messages": messages}], of_template(template))
    documents = load([{"messages": messages}], of_template(LENIENT))
    assert trained(documents, of_template(LENIENT))[0] == 'let me look<c>cabs {"x": "one"}</c><e>'


@pytest.mark.parametrize("value", [1, True, "x"])
def test_a_second_call_that_the_template_passes_over_is_refused_in_any_row(value):
    tokenizer = of_template(LENIENT.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"))
    calls = [call("cabs", x=value), call("cabs", x=value)]
    rows = [{"messages": [turn("user", "a"), turn("assistant", "", tool_calls=calls[:n])]} for n in (1, 2)]
    message = refusal(rows, tokenizer)
    assert "leaves out the tool calls of message 1" in message
    assert "row 1" in message
    load([rows[0]], tokenizer)


def test_a_second_thought_that_the_template_passes_over_is_refused_in_any_row():
    tokenizer = of_template(
        WRITES_THINKING.replace("{{ m.content or '' }}", "{{ (m.content or '').split('</think>')[-1] }}")
    )
    rows = [
        {"messages": [turn("user", "a"), turn("assistant", content, thinking="so")]}
        for content in ("b", "<think>s</think>b")
    ]
    message = refusal(rows, tokenizer)
    assert "leaves out the thoughts of message 1" in message
    assert "row 1" in message


def test_an_older_function_call_is_a_call():
    old = {"role": "assistant", "content": None, "function_call": {"name": "cabs", "arguments": '{"x": 1}'}}
    tokenizer = of_template(LENIENT)
    assert trained(load([{"messages": [turn("user", "a"), old]}], tokenizer), tokenizer) == ['<c>cabs {"x": 1}</c><e>']
    assert old.keys() == {"role", "content", "function_call"}  # the row is as it was
    assert "A call of a tool must have" in refusal(
        [{"messages": [turn("user", "a"), old | {"function_call": "cabs()"}]}], tokenizer
    )


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (LENIENT, turn("assistant", "b", reasoning_content="because")),
        (LENIENT, turn("assistant", "b", thinking="because")),
        (NO_CALLS, turn("assistant", "b", reasoning="because")),
        (CUTS_THOUGHTS, turn("assistant", "<think>because</think>b")),
    ],
)
def test_a_last_thought_that_is_left_out_is_refused_unless_allowed(template, answer, capsys):
    tokenizer = of_template(template)
    rows = [{"messages": [turn("user", "a"), answer]}]
    message = refusal(rows, tokenizer)
    assert "leaves out the thoughts of message 1" in message
    assert "`allow_lost_thoughts`" in message
    documents = load(rows, tokenizer, allow_lost_thoughts=True)
    assert trained(documents, tokenizer) == ["b<e>"]
    said = " ".join(capsys.readouterr().err.split())
    assert "in 1 rows, the chat template leaves out thoughts that the row has; the first is row 0" in said
    assert "'because'" in said


@pytest.mark.parametrize("answer", [[], [turn("assistant", "b")]])
def test_a_thought_of_nobody_who_answers_is_counted(answer, capsys):
    """A thought may stand in a question, even in a conversation without any answer."""
    rows = [{"messages": [turn("user", "a", thinking="why"), *answer]}, {"messages": chat("c", "d")}]
    load(rows, of_template(LENIENT))
    assert "in 1 rows, the chat template leaves out thoughts" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["<think>why</think>b", "why</think>b", " why\n</think>\n\nb"])
def test_a_thought_in_a_content_may_lack_the_tag_that_opens_it(content, capsys):
    tokenizer = of_template(CUTS_THOUGHTS)
    assert "leaves out the thoughts of message 1" in refusal([{"messages": chat("a", content)}], tokenizer)
    load([{"messages": chat("a", content)}], tokenizer, allow_lost_thoughts=True)
    assert "leaves out thoughts that the row has" in " ".join(capsys.readouterr().err.split())
    assert "leaves out the content" in refusal([{"messages": chat("a", f"well <think>{content}")}], tokenizer)


def test_a_thought_in_two_fields_is_written_once():
    tokenizer = of_template(WRITES_THINKING)
    answer = turn("assistant", "b", reasoning_content="why", thinking=" why ", reasoning=None)
    assert trained(load([{"messages": [turn("user", "a"), answer]}], tokenizer), tokenizer) == ["whyb<e>"]
    assert "thoughts" in refusal([{"messages": [turn("user", "a"), answer | {"reasoning": "or"}]}], tokenizer)


@pytest.mark.parametrize("thought", [["why"], {"text": "why"}, 7])
def test_a_thought_that_is_no_text_is_refused(thought):
    for key in ("reasoning_content", "reasoning", "thinking"):
        rows = [{"messages": [turn("user", "a"), turn("assistant", "b", **{key: thought})]}]
        assert f"`{key}` of a message must be text" in refusal(rows, of_template(QWEN3))


def test_earlier_thoughts_that_are_left_out_are_counted(capsys):
    rows = [{"messages": [*chat("a"), turn("assistant", "b", reasoning_content="why"), *chat("c", "d")]}] * 3
    load(rows, of_template(QWEN3))
    assert "in 3 rows, the chat template leaves out thoughts" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("role", ["human", "User", " user", "Human"])
def test_a_role_is_read_as_from_is(role):
    tokenizer = of_template(LENIENT)
    for answering in ("gpt", "Assistant", "model", "chatgpt", "bot", "AI"):
        documents = load([{"messages": [turn(role, "q"), turn(answering, "b")]}], tokenizer)
        assert whole(documents, tokenizer) == "<s:user>q<e><s:assistant>b<e>"
        assert trained(documents, tokenizer) == ["b<e>"]


@pytest.mark.parametrize("role", ["developer", "environment", "critic", "ipython"])
def test_a_role_that_the_template_passes_over_is_refused(role):
    message = refusal([{"messages": [turn(role, "q"), *chat("a", "b")]}], of_template(LENIENT))
    assert f"leaves out the content of message 0 (role '{role}'), 'q', in row 0" in message
    documents = load([{"messages": [turn(role, "q"), *chat("a", "b")]}], of_template(NO_CALLS))
    assert "q" in whole(documents, of_template(NO_CALLS))


@pytest.mark.parametrize("content", [42, 1.5, True, {"answer": 1}, None, [1], ["b"]])
@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_a_content_that_is_no_text_is_refused(content, role):
    rows = [{"messages": [*chat("a", "b"), turn(role, content), *chat("c", "d")]}]
    message = refusal(rows, of_template(LENIENT))
    assert "message 2, row 0 of the dataset" in message
    assert "must be text" in message


@pytest.mark.parametrize(
    "part",
    [{"type": "image", "text": "a"}, {"text": "a", "image_url": {"url": "x"}}, {"type": "text", "content": "a"}, "a"],
)
def test_a_part_that_is_no_text_is_refused(part):
    parts = [{"type": "text", "text": "a"}, part]
    assert "The parts of a message must be text" in refusal(
        [{"messages": [turn("user", parts), turn("assistant", "b")]}], of_template(LENIENT)
    )


@pytest.mark.parametrize("text", ["content", "value"])
@pytest.mark.parametrize("role", ["role", "from"])
def test_a_message_has_one_text(role, text):
    tokenizer = of_template(LENIENT)
    row = [{role: "user", text: "a"}, {role: "assistant", "content": "b", "value": "b"}]
    assert trained(load([{"messages": row}], tokenizer), tokenizer) == ["b<e>"]
    row[1]["value"] = "c"
    assert "A message must have one text, got a `content` of 'b' and a `value` of 'c'" in refusal(
        [{"messages": row}], tokenizer
    )


def test_a_message_without_a_content_is_refused():
    rows = [{"messages": [turn("user", "a"), {"role": "assistant", "text": "b"}]}]
    assert "a message with the fields ['role', 'text']" in refusal(rows, of_template(LENIENT))


@pytest.mark.parametrize("none", [[], None])
def test_an_empty_list_of_calls_is_no_call(none):
    tokenizer = of_template(CALL_OR_CONTENT)
    documents = load([{"messages": [turn("user", "a"), turn("assistant", "b", tool_calls=none)]}], tokenizer)
    assert trained(documents, tokenizer) == ["b<e>"]


# Formats.


def test_history_and_system_of_alpaca_are_turns_before():
    row = {"instruction": "and then?", "input": "", "output": "c", "system": "BE SHORT"}
    row |= {"history": [["first?", "a"], ["second?", "b"]]}
    tokenizer = of_template(LENIENT)
    documents = load([row], tokenizer)
    assert whole(documents, tokenizer) == (
        "<s:system>BE SHORT<e><s:user>first?<e><s:assistant>a<e><s:user>second?<e><s:assistant>b<e>"
        "<s:user>and then?<e><s:assistant>c<e>"
    )
    assert trained(documents, tokenizer) == ["a<e>", "b<e>", "c<e>"]
    for field in ("system", "history"):
        message = refusal([{name: row[name] for name in ("instruction", "output", field)}], small_tokenizer())
        assert f"`{field}` must be empty where the tokenizer has no chat template" in message
    assert "`history` must be a list of pairs" in refusal([row | {"history": ["first?"]}], tokenizer)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_rows_system_text_is_written_once_or_refused(key):
    tokenizer = of_template(LENIENT)
    for messages in (chat("a", "b"), chat("a", "b", system="be brief")):
        documents = load([{"messages": messages, key: "be brief"}], tokenizer)
        assert whole(documents, tokenizer) == "<s:system>be brief<e><s:user>a<e><s:assistant>b<e>"
    rows = [{"messages": chat("a", "b", system="be brief"), key: "be long"}]
    assert f"A row must have one system text, got 'be brief' and a `{key}` of 'be long'" in refusal(rows, tokenizer)
    rows = [{"instruction": "a", "output": "b", "system": "be brief", "system_prompt": "be long"}]
    assert "A row must have one system text" in refusal(rows, tokenizer)


def test_fields_that_are_not_used_are_said(capsys):
    tokenizer = of_template(LENIENT)
    for row in (
        {"messages": chat("a", "b")},
        {"text": "a"},
        {"input_ids": [1, 2]},
        {"instruction": "a", "output": "b"},
    ):
        load([row | {"source": "web", "context": "c", "weight": 1, "none": None}], tokenizer)
        assert "these fields of the rows are not used: `source`, `context`\n" in capsys.readouterr().err
    load([{"prompt": "a", "completion": "b", "system": "be brief"}], tokenizer)
    assert "not used: `system`" in capsys.readouterr().err
    load([{"messages": chat("a", "b"), "system": "be brief", "tools": [], "chat_template_kwargs": {}}], tokenizer)
    assert "not used" not in capsys.readouterr().err


def test_the_format_is_one_whose_fields_are_not_null():
    tokenizer = of_template(LENIENT)
    row = {"messages": None, "conversations": chat("a", "b"), "text": None, "input_ids": None}
    assert trained(load([row], tokenizer), tokenizer) == ["b<e>"]


def test_texts_without_roles_are_a_users_and_an_assistants_in_turn():
    tokenizer = of_template(LENIENT)
    documents = load([{"conversations": ["a", "b", "c", "d"]}], tokenizer)
    assert whole(documents, tokenizer) == "<s:user>a<e><s:assistant>b<e><s:user>c<e><s:assistant>d<e>"
    assert trained(documents, tokenizer) == ["b<e>", "d<e>"]


@pytest.mark.parametrize("tags", [False, True])
def test_a_conversation_without_messages_has_nothing_to_learn(tags, capsys):
    tokenizer = of_template(LENIENT, tags=tags)
    for options in ({}, {"assistant_only_loss": False}):
        documents = load([{"messages": [], "system": "x"}, {"messages": chat("a", "b")}], tokenizer, **options)
        assert whole(documents, tokenizer) == "<s:user>a<e><s:assistant>b<e>"
        assert "1 of 2 rows have nothing to learn" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("listed", [tuple, lambda items: np.array(items, object)])
def test_messages_in_arrays_and_tuples_are_read(listed):
    tokenizer = of_template(LENIENT)
    answer = turn(
        "assistant", listed([{"type": "text", "text": "b"}]), tool_calls=listed([call("cabs", x=listed([1, 2]))])
    )
    documents = load([{"messages": listed([turn("user", "a"), answer])}], tokenizer)
    assert trained(documents, tokenizer) == ['b<c>cabs {"x": [1, 2]}</c><e>']
    documents = load([{"prompt": listed(chat("a")), "completion": listed([answer])}], tokenizer)
    assert trained(documents, tokenizer) == ['b<c>cabs {"x": [1, 2]}</c><e>']


def test_an_empty_instruction_is_not_written():
    tokenizer = of_template(LENIENT)
    documents = load([{"instruction": "", "input": "a", "output": "b"}], tokenizer)
    assert whole(documents, tokenizer) == "<s:user>a<e><s:assistant>b<e>"


@pytest.mark.parametrize(
    ("row", "used"),
    [
        ({"instruction": "a", "output": "b", "text": "t"}, "`instruction` and `output`"),
        ({"messages": chat("a", "b"), "text": "t"}, "`messages`"),
        ({"messages": chat("a", "b"), "instruction": "c", "output": "d"}, "`messages`"),
        ({"prompt": "a", "completion": "b", "text": "t"}, "`prompt` and `completion`"),
    ],
)
def test_of_several_formats_the_structured_one_is_read_and_it_is_said(row, used, capsys):
    tokenizer = of_template(LENIENT)
    assert "t" not in whole(load([row], tokenizer), tokenizer).replace("assistant", "")
    said = " ".join(capsys.readouterr().err.split())
    assert f"{used} is read, and " in said
    assert whole(load([row | {"text": "t"}], tokenizer, text_field="text"), tokenizer) != "t<eos>"


ROW = json.dumps({"messages": chat("a", "b")}, indent=1)
LINE = json.dumps(json.loads(ROW))
FILES = {
    "an array": f"[{ROW}, {ROW}]",
    "an array over lines": f"\n\n[\n{LINE},\r\n{LINE}\r\n]\r\n",
    "an array after a byte order mark": f"\ufeff[{LINE},{LINE}]",
    "lines after byte order marks": f"\ufeff\r\n{LINE}\r\n\n\ufeff{LINE}\r\n \n",
    "a field with the rows": f'{{"data": [{LINE}, {LINE}]}}',
    "a field with the rows, over lines": f'{{\n "version": "1",\n "rows": [{ROW}, {ROW}]\n}}',
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".JSON"])
@pytest.mark.parametrize("name", FILES)
def test_json_is_read_whatever_holds_the_rows(name, suffix, tmp_path, capsys):
    path = tmp_path / f"data{suffix}"
    path.write_text(FILES[name], newline="")
    tokenizer = of_template(LENIENT)
    documents = load(str(path), tokenizer)
    assert [trained(documents, tokenizer, which) for which in range(len(documents))] == [["b<e>"], ["b<e>"]]
    said = " ".join(capsys.readouterr().err.split())
    assert ("are those of its field" in said) == ("field" in name)
    assert ("not used: `version`" in said) == ("version" in FILES[name])


def test_a_file_of_one_row_over_several_lines_is_read(tmp_path):
    path = tmp_path / "row.json"
    path.write_text(ROW)
    tokenizer = of_template(LENIENT)
    assert trained(load(str(path), tokenizer), tokenizer) == ["b<e>"]


def test_a_row_that_has_a_list_of_other_things_is_a_row(tmp_path):
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps({"body": "ab", "authors": [{"name": "c"}]}))
    tokenizer = of_template(LENIENT)
    assert whole(load(str(path), tokenizer, text_field="body"), tokenizer) == "ab<eos>"


@pytest.mark.timeout(30)
def test_rows_are_read_from_a_pipe(tmp_path):
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path)
    with ThreadPoolExecutor() as pool:
        pool.submit(path.write_text, FILES["a field with the rows, over lines"])
        assert len(load(str(path), of_template(LENIENT))) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            f'{{"train": [{LINE}], "test": [{LINE}]}}',
            "must have the rows of one dataset, got lists of rows in the fields",
        ),
        (f'{LINE}\n{{"text": "a", "text": "b"}}', "Line 2 of"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content' occurs twice"),
        (f'[{LINE},\n {{"text": "a", "text": "b"}}]', "'text' occurs twice"),
        (f'{{"data": [{LINE}],\n "data": []}}', "'data' occurs twice"),
        ('{"data": [1]}', "A row must have"),
        ('{\n"messages": oops\n}', "Line 1 of"),
    ],
)
def test_json_of_which_a_part_would_be_lost_is_refused(text, why, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert why in refusal(str(path), of_template(LENIENT))


# Templates that write the date.


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_a_date_in_a_template_is_the_runs_and_is_said(tags, assistant_only_loss, capsys):
    tokenizer = of_template("{{ strftime_now('%d %b %Y') }}" + LENIENT, tags=tags)
    rows, options = [{"messages": chat("a", "b")}], {"assistant_only_loss": assistant_only_loss}
    documents = load(rows, tokenizer, date=datetime.date(2031, 2, 3), **options)
    assert "03 Feb 2031" in whole(documents, tokenizer)
    assert "the chat template writes the date 2031-02-03" in " ".join(capsys.readouterr().err.split())
    today = datetime.date.today()
    assert today.strftime("%d %b %Y") in whole(load(rows, tokenizer, **options), tokenizer)
    load(rows, of_template(LENIENT), **options)
    assert "writes the date" not in " ".join(capsys.readouterr().err.split()).replace(f"writes the date {today}", "")


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("{% set form = '%Y-%m-%d' %}{{ strftime_now(form) }}", "2031-02-03"),
        ("{{ strftime_now(format='%B %-d, %Y') }}", "February 3, 2031"),
        ('{{ strftime_now("%A")  }}\n', "Monday\n"),
        ("\n  {% if true %}{{ strftime_now('%F %%') }}{% endif %}\n", "\n2031-02-03 %"),
        ("{% macro today() %}{{ strftime_now('%d %b') }}{% endmacro %}{{ today() }}", "03 Feb"),
        ("{{ strftime_now('%Y') | int - 1 }}", "2030"),
    ],
)
def test_a_date_is_the_runs_however_the_template_asks_for_it(before, expected, tags):
    tokenizer = of_template(before + LENIENT, tags=tags)
    documents = load([{"messages": chat("a", "b")}], tokenizer, date=datetime.date(2031, 2, 3))
    assert whole(documents, tokenizer) == expected + "<s:user>a<e><s:assistant>b<e>"
    assert trained(documents, tokenizer) == ["b<e>"]


# Rows of tokens.


def test_masks_of_rows_of_tokens_are_labels():
    def labels(row: dict[str, Any]) -> list[int]:
        return load([row], small_tokenizer()).labels.tolist()

    ids = {"input_ids": [1, 2, 3, 4]}
    for name in ("assistant_masks", "completion_mask", "assistant_mask", "assistant_tokens_mask", "loss_mask"):
        assert labels(ids | {name: [0, 0, 1, 1]}) == [-100, -100, 3, 4]
        assert labels(ids | {name: np.array([0, 0, 1, 1])}) == [-100, -100, 3, 4]
        assert labels(ids | {name: [False, False, True, True]}) == [-100, -100, 3, 4]
    assert labels(ids | {"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 1, 0, 1]}) == [-100, 2, -100, 4]
    assert labels(ids | {"attention_mask": [1, 1, 1, 0]}) == [1, 2, 3]
    assert labels(ids | {"attention_mask": [0, 1, 1, 0], "completion_mask": [0, 0, 1, 1]}) == [-100, 3]


@pytest.mark.parametrize("name", ["assistant_masks", "completion_mask", "labels"])
def test_every_row_of_tokens_says_what_is_trained_on_if_the_first_does(name):
    row = {"input_ids": [1, 2], name: [0, 1]}
    for other in ({"input_ids": [1, 2]}, row | {name: None}):
        message = refusal([row, other], small_tokenizer())
        assert f"`{name}`" in message
        assert "row 1" in message


@pytest.mark.parametrize("field", [{"position_ids": [0, 1, 0, 1]}, {"seq_lengths": [2, 2]}])
def test_a_row_of_several_documents_is_refused(field):
    tokenizer = small_tokenizer()
    assert "must be one document, got several" in refusal([{"input_ids": [1, 2, 3, 4], **field}], tokenizer)
    load([{"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 2, 3], "seq_lengths": [4]}], tokenizer)
    for wrong in ([[0], [1, 2]], ["a"], [0.5, 1]):
        assert "must be a flat list of integers" in refusal([{"input_ids": [1, 2], "position_ids": wrong}], tokenizer)
    load([{"input_ids": [1, 2, 3], "position_ids": [1, 0, 1], "attention_mask": [0, 1, 1]}], tokenizer)


def test_rows_of_tensors_are_read():
    jnp = pytest.importorskip("jax.numpy")
    row = {"input_ids": jnp.array([1, 2, 3]), "labels": jnp.array([-100, 2, 3])}
    assert load([row], small_tokenizer()).labels.tolist() == [-100, 2, 3]


# The rule as a property: every piece of a row has a marker of its own.

TEMPLATES = {
    **{f"{name}, {tags}": style.tokenizer(tags=tags) for name, style in STYLES.items() for tags in (False, True)},
    "qwen3": of_template(QWEN3),
    "lenient": of_template(LENIENT),
    "lenient, tags": of_template(LENIENT, tags=True),
    "no calls": of_template(NO_CALLS),
    "call or content": of_template(CALL_OR_CONTENT),
    "cuts thoughts": of_template(CUTS_THOUGHTS),
    "writes thinking": of_template(WRITES_THINKING),
    "writes reasoning": of_template(WRITES_REASONING),
    "twice": of_template(TWICE),
    "no system": of_template(NO_SYSTEM),
    "no results": of_template(NO_RESULTS),
    "no arguments": of_template(NO_ARGUMENTS),
    "the last two": of_template(LAST_TWO),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_marker_is_written_once_or_its_row_is_refused_or_counted(name, capsys):
    outcomes = [is_written(seed, TEMPLATES[name], capsys) for seed in range(150)]
    assert any(outcomes) == (name != "twice")
