"""The mask of every chat template in TRL's package agrees with TRL's tagged variant, or the difference is named.

TRL gives most templates a variant with `{% generation %}` tags, of which transformers makes a mask. Three masks of ours
are compared with that one: of the tagged variant, of the same variant without its tags, and of the original.
"""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conversations import call, chat, load, trained, turn, whole
from marked_conversations import is_written
from tokenizers_for_tests import small_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxpack.errors import InputError

TRL = importlib.util.find_spec("trl")
assert TRL is not None, "these tests read the templates of TRL, which `make test` installs"
TEMPLATES = {
    path.stem: path.read_text("utf-8")
    for folder in TRL.submodule_search_locations or []
    for path in sorted(Path(folder, "chat_templates").glob("*.jinja"))
}
_TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
TAGGED = [name for name, template in TEMPLATES.items() if _TAG.search(template)]
ORIGINALS = [name for name in TEMPLATES if not name.endswith("_training")]

# TRL's tags begin earlier than ours, with text that the generation prompt gives to the model.
_THOUGHTS = ("<think>\n", "<think>\n\n</think>\n\n")
LEADS = {
    "deepseek_r1_distill": ("<\uff5cAssistant\uff5c>", "<\uff5cAssistant\uff5c><think>\n"),
    "deepseekv3": (
        "<\uff5cAssistant\uff5c>",
        "<\uff5ctool▁outputs▁end\uff5c>",
    ),  # the latter, where results of tools come before
    "gptoss": ("<|start|>assistant",),
    "muse_glimmer": ("<|start|>assistant",),
    **dict.fromkeys([name for name in ORIGINALS if name.startswith("nemotron_3")], ("<think>\n", "<think></think>")),
    "qwen2_5": ("\n",),
    **dict.fromkeys(["qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"], _THOUGHTS),
}
# TRL's tags end after the token that ends the turn: with a line break, and for Phi-3 with EOS.
TAIL = re.compile(r"\n?(<eos>)?")
# TRL's tags leave out the token at which the model stops to wait for the results of its calls.
CALLS_END = {"diffusion_gemma": "<|tool_response>"}
# TRL's variant writes other text than the original.
REWRITTEN = {
    "deepseek_r1_distill": "the variant keeps thoughts",
    "glm4moe": "the variant ends the last answer, and the original writes no token that ends an answer",
    "qwen3": "the variant keeps earlier thoughts, and writes an empty one where there is none",
    "qwen3_5_nothink": "as for qwen3",
    "qwen3_5_think": "as for qwen3",
    "qwen3_6": "as for qwen3",
}
# These take contents as lists of parts alone, since some parts are images; jaxpack joins parts into one text.
IN_PARTS = ("idefics3", "llava_next", "smolvlm")
# These write a content that stands beside a call after the result of the call, so that the turn is in two places.
SPLIT_TURNS = ("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")


def _answer(number: int, **more: Any) -> dict[str, Any]:
    return turn("assistant", f"answer{number}", **more)


def _calling(content: str, *cities: str, **more: Any) -> list[dict[str, Any]]:
    calls = [call("cabs", city=city) for city in cities]
    results = [turn("tool", "result0", name="cabs", tool_call_id="abcdefghi") for city in cities]
    return [turn("assistant", content, tool_calls=calls, **more), *results]


# "answer", "thought" and "City" are in what an assistant writes; "question", "result" and "system" in what it does not.
_ASKED, _ASKED_AGAIN = turn("user", "question0"), turn("user", "question1")
_THOUGHT = [_ASKED, _answer(0, reasoning_content="thought0")]
_IN_CONTENT = [f"<think>\nthought{number}\n</think>\n\nanswer{number}" for number in range(2)]
CONVERSATIONS = {
    "plain": [_ASKED, _answer(0)],
    "turns": [_ASKED, _answer(0), _ASKED_AGAIN, _answer(1), turn("user", "question2"), _answer(2)],
    "system": [turn("system", "system0"), _ASKED, _answer(0), _ASKED_AGAIN, _answer(1)],
    "a question at the end": [_ASKED, _answer(0), _ASKED_AGAIN],
    "a thought": _THOUGHT,
    "two thoughts": [*_THOUGHT, _ASKED_AGAIN, _answer(1, reasoning_content="thought1")],
    "thoughts in contents": chat("question0", _IN_CONTENT[0], "question1", _IN_CONTENT[1]),
    "a call": [_ASKED, *_calling("", "CityA"), _answer(0)],
    "a call at the end": [_ASKED, _calling("", "CityA")[0]],
    "two calls": [_ASKED, *_calling("", "CityA", "CityB"), _answer(0), _ASKED_AGAIN, _answer(1)],
    "a call beside a content": [_ASKED, *_calling("answer0", "CityA"), _answer(1)],
    "a call after a thought": [
        _ASKED,
        *_calling("", "CityA", reasoning_content="thought0"),
        _answer(0, reasoning_content="thought1"),
    ],
}
_CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Where?"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "cabs", "description": "Finds cabs.", "parameters": _CITY}}]

# Finds the special tokens of all families in their templates.
_SPECIAL = re.compile(
    r"<\|[\w/]+\|?>|</?[a-z_]+\|>|<\uff5c[\w▁]+\uff5c>|</?(?:start_of_turn|end_of_turn|end_of_utterance|tool_call|think)>"
    r"|\[/?INST\]|\[gMASK\]|<sop>|</s>"
)


_WORDS = re.compile(r"(?:question|answer|thought|result|system)\d|City[AB]")


class Written(NamedTuple):
    """Holds the text of a conversation and its stretches that are trained on; None where it is refused, and why."""

    text: str | None
    stretches: list[str]
    why: str = ""


@functools.cache
def of_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizer(bos=True, specials=tuple(sorted(set(_SPECIAL.findall(template)))))
    tokenizer.chat_template = template
    return tokenizer


def without_tags(template: str) -> str:
    """Replaces the tags by others without an effect, which strip the same white space around them."""
    return _TAG.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)


def tools_for(name: str) -> list | None:
    return TOOLS if "call" in name else None


@functools.cache
def ours(template: str, name: str) -> Written:
    row = {"messages": CONVERSATIONS[name], "tools": tools_for(name)}
    try:
        documents = load([row], of_template(template), allow_lost_thoughts=True)
    except InputError as error:
        return Written(None, [], str(error))
    tokenizer = of_template(template)
    return Written(whole(documents, tokenizer), trained(documents, tokenizer))


def transformers_(template: str, name: str) -> Written:
    tokenizer = of_template(template)
    try:
        encoded: Any = tokenizer.apply_chat_template(
            CONVERSATIONS[name], tools=tools_for(name), return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:
        return Written(None, [], str(error))
    tokens, mask = (np.array(encoded[key]) for key in ("input_ids", "assistant_masks"))
    borders = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    stretches = [tokenizer.decode(tokens[begin:end].tolist()) for begin, end in borders.reshape(-1, 2)]
    return Written(tokenizer.decode(tokens.tolist()), stretches)


def check_refusal(refused: Written, theirs: Written, name: str, original: str) -> None:
    """A conversation is refused if its template refuses it, leaves a piece of it out, or is named above."""
    left_out = re.search(r"it leaves out the .*? of message .*?, '(.*?)', in row", refused.why)
    if theirs.text is None:
        assert "it refuses row 0 of the dataset" in refused.why
    elif left_out:
        assert left_out[1] not in theirs.text or original in IN_PARTS
    else:
        assert original in SPLIT_TURNS, refused.why
        assert name == "a call beside a content"
        assert "it writes message 1 more than once" in refused.why


@pytest.mark.parametrize("variant", TAGGED)
def test_masks_without_tags_are_those_of_the_tags(variant: str) -> None:
    template, original = TEMPLATES[variant], variant.removesuffix("_training")
    compared = 0
    for name in CONVERSATIONS:
        theirs, tagged, untagged = (
            transformers_(template, name),
            ours(template, name),
            ours(without_tags(template), name),
        )
        if tagged.text is not None:
            assert tagged == theirs, name
        else:
            check_refusal(tagged, theirs, name, original)
        if untagged.text is None:
            check_refusal(untagged, theirs, name, original)
            continue
        compared += 1
        assert untagged.text == theirs.text, name
        for mine, other in zip(untagged.stretches, theirs.stretches, strict=True):
            mine = mine.removesuffix(CALLS_END.get(original, "") if "City" in mine else "")
            lead, found, tail = other.partition(mine)
            assert found, (name, mine, other)
            assert lead in ("", *LEADS.get(original, ())), (name, mine, other)
            assert TAIL.fullmatch(tail), (name, mine, other)
    assert (compared == 0) == (original in IN_PARTS)


@pytest.mark.parametrize("original", [name for name in ORIGINALS if f"{name}_training" in TEMPLATES])
def test_masks_of_an_original_are_those_of_its_variant_without_tags(original: str) -> None:
    differ = []
    for name in CONVERSATIONS:
        mine, other = ours(TEMPLATES[original], name), ours(without_tags(TEMPLATES[f"{original}_training"]), name)
        if mine != other:
            differ.append(name)
            assert mine.text != other.text or original == "glm4moe", name
    assert bool(differ) == (original in REWRITTEN), differ


@pytest.mark.parametrize("name", ORIGINALS)
def test_all_that_the_assistant_writes_is_trained_on_once_and_nothing_else(name: str) -> None:
    for conversation, messages in CONVERSATIONS.items():
        written = ours(TEMPLATES[name], conversation)
        if written.text is None:
            continue
        said = _WORDS.findall(repr([message for message in messages if message["role"] == "assistant"]))
        thoughts = {
            word for word in said if word.startswith("thought") and word not in written.text
        }  # these are counted
        assert sorted(_WORDS.findall(" ".join(written.stretches))) == sorted({*said} - thoughts), conversation
    assert (ours(TEMPLATES[name], "plain").text is None) == (name in IN_PARTS)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_marker_is_written_once_or_its_row_is_refused_or_counted(name: str, capsys: pytest.CaptureFixture) -> None:
    outcomes = [is_written(seed, of_template(TEMPLATES[name]), capsys) for seed in range(40)]
    assert any(outcomes) == (name.removesuffix("_training") not in IN_PARTS)
