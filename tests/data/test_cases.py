"""Tests of faults that real datasets and public reports found: what a row says is written once, refused, or counted.

Each test has the reported case and more of its kind. `pytest -k cases` runs them all.
"""

import datetime
import json
import random
import re
from typing import Any

import numpy as np
import pytest
from chat_templates import QWEN3, STYLES, with_tags, without_tags
from conversations import call, chat, load, refusal, trained, turn, whole
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
    assert capsys.readouterr().err == ""


def test_other_text_begins_with_one_bos_and_ends_with_eos(capsys):
    tokenizer = of_template(WITH_BOS, bos=True)
    assert whole(load([{"text": "ab"}], tokenizer), tokenizer) == tokenizer.bos_token + "ab" + tokenizer.eos_token
    assert "already" not in capsys.readouterr().err


# Turns that are not to be trained on.


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_mask": 0}, {"training": 0.0}]
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


# Calls, thoughts, roles and contents.


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


def test_an_older_function_call_is_a_call():
    old = {"role": "assistant", "content": None, "function_call": {"name": "cabs", "arguments": '{"x": 1}'}}
    tokenizer = of_template(LENIENT)
    assert trained(load([{"messages": [turn("user", "a"), old]}], tokenizer), tokenizer) == ['<c>cabs {"x": 1}</c><e>']
    assert old.keys() == {"role", "content", "function_call"}  # the row is as it was
    assert "`function_call` must be a mapping" in refusal(
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


def test_earlier_thoughts_that_are_left_out_are_counted(capsys):
    rows = [{"messages": [*chat("a"), turn("assistant", "b", reasoning_content="why"), *chat("c", "d")]}] * 3
    load(rows, of_template(QWEN3))
    assert "in 3 rows, the chat template leaves out thoughts" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("role", ["human", "User", " user", "Human"])
def test_a_role_is_read_as_from_is(role):
    tokenizer = of_template(LENIENT)
    for answering in ("gpt", "Assistant", "model", "chatgpt"):
        documents = load([{"messages": [turn(role, "q"), turn(answering, "b")]}], tokenizer)
        assert whole(documents, tokenizer) == "<s:user>q<e><s:assistant>b<e>"
        assert trained(documents, tokenizer) == ["b<e>"]


@pytest.mark.parametrize("role", ["developer", "function", "critic", "ipython"])
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


def test_a_json_array_is_read(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 2, indent=1))
    assert len(load(str(path), of_template(LENIENT))) == 2


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
    for name in ("assistant_masks", "completion_mask"):
        assert labels(ids | {name: [0, 0, 1, 1]}) == [-100, -100, 3, 4]
        assert labels(ids | {name: np.array([0, 0, 1, 1])}) == [-100, -100, 3, 4]
        assert labels(ids | {name: [False, False, True, True]}) == [-100, -100, 3, 4]
    assert labels(ids | {"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 1, 0, 1]}) == [-100, 2, -100, 4]
    assert labels(ids | {"attention_mask": [1, 1, 1, 0]}) == [1, 2, 3]
    assert labels(ids | {"attention_mask": [0, 1, 1, 0], "completion_mask": [0, 0, 1, 1]}) == [-100, 3]


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


class Marked:
    """Draws a random conversation in which each piece has a marker: `learned` or `context`, by kind."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        self.learned: dict[str, str] = {}
        self.context: dict[str, str] = {}
        self.messages: list[dict[str, Any]] = []
        if self.draw.random() < 0.3:
            self.messages.append(
                turn(self.draw.choice(["system", "developer"]), self.mark(self.context, "system text"))
            )
        for _ in range(self.draw.randint(1, 3)):
            role = self.draw.choice(["user"] * 6 + ["human", "critic"])
            self.messages.append(turn(role, self.mark(self.context, "content")))
            if self.draw.random() < 0.3:
                self.messages += [self.answer(with_call=True), turn("tool", self.mark(self.context, "content"))]
                self.messages[-1]["tool_call_id"] = "abcdefghi"
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
            content = f"<think>{self.mark(pieces, 'thoughts')}</think>{content}"
        message = turn(self.draw.choice(["assistant", "assistant", "gpt"]), content, **weight)
        if self.draw.random() < 0.2:
            message[self.draw.choice(["reasoning_content", "thinking"])] = self.mark(pieces, "thoughts")
        if with_call:
            arguments = {
                self.mark(pieces, "calls"): self.mark(pieces, "calls"),
                "deep": [{"x": self.mark(pieces, "calls")}],
            }
            message["tool_calls"] = [call(self.mark(pieces, "calls").strip(), **arguments)]
        if self.draw.random() < 0.05:
            message["content"] = self.draw.choice([7, True, {"a": 1}])
        return message


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_marker_is_written_once_or_its_row_is_refused_or_counted(name, capsys):
    tokenizer, outcomes = TEMPLATES[name], []
    for seed in range(150):
        row = Marked(seed)
        try:
            documents = load([{"messages": row.messages}], tokenizer)
        except InputError:
            outcomes.append("refused")
            continue
        said = " ".join(capsys.readouterr().err.split())
        text, learned = whole(documents, tokenizer), " ".join(trained(documents, tokenizer))
        for markers, are_learned in ((row.learned, True), (row.context, False)):
            for marker, kind in markers.items():
                count = text.count(marker)
                assert count == 1 or (count == 0 and f"leaves out {kind} that" in said), (
                    seed,
                    marker,
                    kind,
                    text,
                    said,
                )
                assert (marker in learned) == (are_learned and count == 1), (seed, marker, text, learned)
        outcomes.append("written")
    assert ("written" in outcomes) == (name != "twice"), outcomes.count("refused")
