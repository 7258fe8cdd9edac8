"""Exactly the assistant's turns and their end tokens are trained on, with every chat template."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from chat_templates import CHATML, QWEN3, STYLES, Style, with_tags, without_tags
from conversations import TOOLS, call, chat, load, refusal, trained, turn, whole
from models import small_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers_for_tests import small_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig
from jaxpack.train.trainer import Trainer

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def of_template(template: str, *specials: str, tags: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizer(specials=specials)
    tokenizer.chat_template = with_tags(template) if tags else without_tags(template)
    return tokenizer


CHATS = {
    "one_turn": chat("the cab?", "ab, the cab."),
    "turns": chat("a", "b", "the", "cab", "c", "d"),
    "same_words": chat("ab", "ab", "ab", "ab"),
    "unicode": chat("é 😀 ß?", "日本語 - e\u0301 👩‍👩‍👧", "ü", "😀"),
    "empty_answer": chat("hi", "", "hi?", "yes"),
    "empty_question": chat("", "yes"),
    "outer_whitespace": chat("  hi \n", "\n\n  yes\n", "\n", " a  b "),
    "code": chat("code", "    def f():\n        return 1\n\n\n    # the end"),
    "template_words": chat("user\n", "assistant\n[INST] model\n", "ASSISTANT:", "\n\n"),
    "ends_in_a_question": chat("a", "b", "c"),
    "long": chat(*(f"turn {i} of the cab" for i in range(40))),
}


@pytest.mark.parametrize("tags", [False, True], ids=["compared", "tags"])
@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_assistants_turns_and_their_end_tokens_are_trained_on(style: Style, name: str, tags: bool) -> None:
    tokenizer = style.tokenizer(tags=tags)
    systems = [None, "be\n the cab"] if style.system else [None]
    for system in systems:
        messages = chat(*(message["content"] for message in CHATS[name]), system=system)
        documents = load([{"messages": messages}], tokenizer)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert trained(documents, tokenizer) == [style.trained(answer) for answer in answers]
        assert whole(documents, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)


CALLING = [
    turn("user", "a cab?"),
    {"role": "assistant", "tool_calls": [call("cabs", city="Köln", n=2)]},
    turn("tool", '{"cabs": [1, "2"]}', name="cabs", tool_call_id="abcdefghi"),
    turn("assistant", "two"),
    turn("user", "more?"),
    turn("assistant", "no"),
]
CALLED = {
    "chatml": '<tool_call>\n{"name": "cabs", "arguments": {"city": "Köln", "n": 2}}\n</tool_call><|im_end|>',
    "llama3": '{"name": "cabs", "parameters": {"city": "Köln", "n": 2}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "cabs", "arguments": {"city": "Köln", "n": 2}, "id": "abcdefghi"}]</s>',
}


@pytest.mark.parametrize("tags", [False, True], ids=["compared", "tags"])
@pytest.mark.parametrize("name", CALLED)
def test_tool_calls_are_trained_on_and_their_results_are_not(name: str, tags: bool) -> None:
    style = STYLES[name]
    tokenizer = style.tokenizer(tags=tags)
    answers = [CALLED[name], style.trained("two"), style.trained("no")]
    for end, count in ((6, 3), (4, 2), (2, 1)):
        messages = [turn("system", "be"), *CALLING[:end]]
        documents = load([{"messages": messages, "tools": TOOLS}], tokenizer)
        assert trained(documents, tokenizer) == answers[:count]
        assert whole(documents, tokenizer) == tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)


@pytest.mark.parametrize("tags", [False, True], ids=["compared", "tags"])
def test_arguments_may_be_json_and_are_written_as_the_template_takes_them(tags: bool) -> None:
    style = STYLES["chatml"]
    joined = style.template.replace("call.function.arguments | tojson", "call.function.arguments + ' '")
    as_json = json.loads(json.dumps(CALLING[:2]))
    function = as_json[1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    for template, end in ((style.template, "}\n"), (joined, " }\n")):
        tokenizer = of_template(template, *style.specials, tags=tags)
        for messages in (CALLING[:2], as_json):
            documents = load([{"messages": messages}], tokenizer)
            assert trained(documents, tokenizer) == [CALLED["chatml"].replace("}\n", end)]


def test_several_calls_beside_a_content_are_one_turn() -> None:
    style = STYLES["chatml"]
    tokenizer = style.tokenizer()
    answer = turn("assistant", "let me see", tool_calls=[call("cabs", n=1), call("cabs", n=2)])
    documents = load([{"messages": [turn("user", "a"), answer, turn("tool", "1"), turn("tool", "2")]}], tokenizer)
    calls = [f'<tool_call>\n{{"name": "cabs", "arguments": {{"n": {n}}}}}\n</tool_call>' for n in (1, 2)]
    assert trained(documents, tokenizer) == ["\n".join(["let me see", *calls]) + "<|im_end|>"]


THINKING = {
    "an_empty_thought": (chat("a", "b"), ["<think>\n\n</think>\n\nb<|im_end|>"]),
    "earlier_ones_have_none": (chat("a", "b", "c", "d"), ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]),
    "a_thought_in_the_content": (
        chat("a", "<think>\nhm\n</think>\n\nb"),
        ["<think>\nhm\n</think>\n\nb<|im_end|>"],
    ),
    "earlier_thoughts_are_dropped": (
        chat("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\noh\n</think>\n\nd"),
        ["b<|im_end|>", "<think>\noh\n</think>\n\nd<|im_end|>"],
    ),
    "a_thought_of_its_own": (
        [turn("user", "a"), turn("assistant", "b", reasoning_content="hm")],
        ["<think>\nhm\n</think>\n\nb<|im_end|>"],
    ),
    "thoughts_between_tools": (
        [
            turn("user", "a"),
            turn("assistant", "b", reasoning_content="hm"),
            turn("tool", "1"),
            turn("assistant", "c"),
            turn("tool", "2"),
            turn("assistant", "d", reasoning_content="oh"),
        ],
        ["<think>\nhm\n</think>\n\nb<|im_end|>", "c<|im_end|>", "<think>\noh\n</think>\n\nd<|im_end|>"],
    ),
}


@pytest.mark.parametrize("tags", [False, True], ids=["compared", "tags"])
@pytest.mark.parametrize("name", THINKING)
def test_thoughts_that_a_template_writes_are_trained_on(name: str, tags: bool) -> None:
    messages, expected = THINKING[name]
    tokenizer = of_template(QWEN3, *CHATML_TOKENS, tags=tags)
    documents = load([{"messages": messages}], tokenizer)
    assert trained(documents, tokenizer) == expected


@pytest.mark.parametrize("tag", ["<think>", "<think>\n"])
@pytest.mark.parametrize("default", [True, False])
def test_a_thought_in_a_content_is_trained_on_from_the_end_of_the_generation_prompt(tag: str, default: bool) -> None:
    # The prompt opens a thought, or writes an empty one if thoughts are off by default (Qwen3.5's smaller models).
    template = (
        "{% for m in messages %}{% set parts = m.content.split('</think>') %}{% if m.role == 'user' %}"
        "{{ '<u>' + m.content + '<e>' }}{% else %}{{ '<a><think>\n' }}"
        "{{ parts[0].split('<think>')[-1].strip() if parts[1:] else '' }}"
        "{{ '\n</think>\n\n' + parts[-1].strip() + '<e>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<a><think>\n' }}"
        f"{{% if not (enable_thinking | default({default})) %}}{{{{ '\n</think>\n\n' }}}}{{% endif %}}{{% endif %}}"
    )
    tokenizer = of_template(template, "<u>", "<a>", "<e>")
    documents = load([{"messages": chat("a", f"{tag}hm\n</think>\n\nb", "c", "d")}], tokenizer)
    empty = "" if not default else "\n</think>\n\n"
    assert trained(documents, tokenizer) == ["hm\n</think>\n\nb<e>", f"{empty}d<e>"]


def test_rows_have_thoughts_of_their_own() -> None:
    tokenizer = of_template(QWEN3, *CHATML_TOKENS)
    thoughts = ["hm", "oh", "the cab"]
    rows = [{"messages": [turn("user", "a"), turn("assistant", "b", reasoning_content=one)]} for one in thoughts]
    documents = load(rows, tokenizer)
    for which, one in enumerate(thoughts):
        assert trained(documents, tokenizer, which) == [f"<think>\n{one}\n</think>\n\nb<|im_end|>"]


def test_an_empty_thought_is_not_trained_on_where_the_generation_prompt_writes_it() -> None:
    tokenizer = of_template(QWEN3, *CHATML_TOKENS)
    rows = [
        {"messages": chat("a", "b"), "chat_template_kwargs": {"enable_thinking": thinking}}
        for thinking in (False, True)
    ]
    documents = load(rows, tokenizer)
    assert trained(documents, tokenizer, 0) == ["b<|im_end|>"]
    assert trained(documents, tokenizer, 1) == ["<think>\n\n</think>\n\nb<|im_end|>"]


# These tokenizers report the characters of a token in other ways: without the spaces around it (Llama 3, GPT-2), in
# pieces of a character, or with an added space before the first word (SentencePiece).
def offsets_trimmed(specials: tuple[str, ...]) -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizer(specials=specials)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def sentencepiece(specials: tuple[str, ...]) -> PreTrainedTokenizerFast:
    words = ["<eos>", "<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehtu", "▁a", "▁ab"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("▁", "a"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]  # keeps the first space
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<eos>", *specials)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def end_tokens_take_space(specials: tuple[str, ...]) -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(token, special=True, rstrip=True) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("make", [offsets_trimmed, sentencepiece, end_tokens_take_space], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [name for name in STYLES if STYLES[name].eos == "<eos>"])
def test_the_same_characters_are_trained_on_with_any_tokenizer(name: str, make: Callable) -> None:
    style = STYLES[name]
    for tags in (False, True):
        tokenizer = make(style.specials)
        tokenizer.chat_template = with_tags(style.template) if tags else without_tags(style.template)
        for messages in CHATS.values():
            documents = load([{"messages": messages}], tokenizer)
            answers = [style.trained(message["content"]) for message in messages if message["role"] == "assistant"]
            texts = trained(documents, tokenizer)
            if make is end_tokens_take_space:
                assert [text.strip() for text in texts] == [answer.strip() for answer in answers]
            else:
                assert texts == answers


def test_a_token_of_template_and_answer_is_trained_on() -> None:
    # "a" belongs to the end of the template's text and not to the answer, but "ab" is one token.
    template = (
        "{% for m in messages %}{{ ('<u>' if m.role == 'user' else '<a>a') + m.content }}"
        "{% if m.role == 'user' %}<e>{% else %}b{% endif %}{% endfor %}{% if add_generation_prompt %}<a>a{% endif %}"
    )
    tokenizer = of_template(template, "<u>", "<a>", "<e>")
    assert trained(load([{"messages": chat("c", "bcd", "c", "bca")}], tokenizer), tokenizer) == ["abcdb", "abcab"]
    assert trained(load([{"messages": chat("c", "c", "c", "dc")}], tokenizer), tokenizer) == ["cb", "dcb"]


def test_random_conversations_have_the_same_mask_by_tags_and_by_comparing() -> None:
    random = np.random.default_rng(0)
    words = ["a", "b", "ab", "the", " the", "\n", " ", "\t", "é", "😀"]
    words += ["<|im_end|>", "[INST]", "user", "model\n", "</s>", "<end_of_turn>"]
    rows = []
    for _ in range(40):
        contents = ["".join(random.choice(words, random.integers(0, 6))) for _ in range(random.integers(1, 7))]
        rows.append({"messages": chat(*contents)})
    for style in STYLES.values():
        tokenizers = [style.tokenizer(tags=tags) for tags in (False, True)]
        compared, tagged = (load(rows, tokenizer) for tokenizer in tokenizers)
        np.testing.assert_array_equal(compared.tokens, tagged.tokens)
        np.testing.assert_array_equal(compared.labels, tagged.labels)
        assert len(compared) == sum(len(row["messages"]) > 1 for row in rows)


# Other ways to begin and end a turn, and the text of `chat("a", "b", "c", "d")` that is trained on.
FORMS = {
    "generation_prompt_that_asks_for_thoughts": (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a><think></think>' }}{{ m.content + '<e>' }}"
        "{% endfor %}{% if add_generation_prompt %}<a>"
        "{{ '<think>\n' if enable_thinking is not defined or enable_thinking else '<think></think>' }}{% endif %}",
        ["b<e>", "d<e>"],
    ),
    "generation_prompt_that_forbids_thoughts": (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a><think>\n' }}{{ m.content + '<e>' }}"
        "{% endfor %}{% if add_generation_prompt %}<a>"
        "{{ '<think>\n' if enable_thinking is defined and enable_thinking else '<think></think>' }}{% endif %}",
        ["b<e>", "d<e>"],
    ),
    "generation_prompt_that_says_more": (
        "{% for m in messages %}{{ '<u>' + m.content if m.role == 'user' else '<a>' + m.content + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}<a><think>\n{% endif %}",
        ["b<e>", "d<e>"],
    ),
    "another_end_of_the_last_turn": (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}"
        "{% if m.role == 'assistant' and loop.last %}<r>{% else %}<e>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}",
        ["b<e>", "d<r>"],
    ),
    "the_answer_begins_with_a_channel": (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a><r>final' }}{{ m.content + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}",
        ["<r>finalb<e>", "<r>finald<e>"],
    ),
    "two_tokens_for_an_end": (
        "{% for m in messages %}{{ '<u>' + m.content + '<e>' if m.role == 'user' else '<a>' + m.content + '<r><e>' }}"
        "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
        ["b<r><e>", "d<r><e>"],
    ),
    "words_for_an_end": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ' END\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        ["b END", "d END"],
    ),
    "no_end": (
        "{% for m in messages %}{{ ('<u>' if m.role == 'user' else '<a>') + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}",
        ["b", "d"],
    ),
    "an_end_of_the_text_alone": (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% else %}{{ eos_token }}{% endif %}",
        ["b", "d\n<eos>"],
    ),
}


def test_a_header_that_the_generation_prompt_leaves_out_after_a_tool_is_not_trained_on() -> None:
    template = (
        "{% for m in messages %}{{ '<u>' + m.role + '\n' + m.content + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role == 'user' %}{{ '<u>assistant\n' }}{% endif %}"
    )
    tokenizer = of_template(template, "<u>", "<e>")
    messages = [turn("user", "a"), turn("assistant", "b"), turn("tool", "c"), turn("assistant", "d")]
    assert trained(load([{"messages": messages}], tokenizer), tokenizer) == ["b<e>", "d<e>"]


def test_a_conversation_may_begin_with_the_assistant() -> None:
    for name in ("chatml", "llama3", "phi3"):
        tokenizer = STYLES[name].tokenizer()
        documents = load([{"messages": [turn("assistant", "hi"), *chat("a", "b")]}], tokenizer)
        assert trained(documents, tokenizer) == [STYLES[name].trained(answer) for answer in ("hi", "b")]


@pytest.mark.parametrize("asks", ["<think>\\n", "<think></think>"])
def test_a_call_without_a_thought_where_the_generation_prompt_has_one(asks: str) -> None:
    # DeepSeek and Qwen3.5 do this: an earlier answer has no thought either, so its header is the header of the call.
    template = (
        "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<u>' + m.content + '<e>' }}{% else %}"
        "{{ '<a>' }}{% if loop.last and not m.tool_calls %}{{ ASKS }}{% endif %}"
        "{% if m.tool_calls %}{{ '<r>' + m.tool_calls[0].function.name }}"
        "{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}"
        "{{ m.content + '<e>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<a>' + ASKS }}{% endif %}"
    )
    tokenizer = of_template(template.replace("ASKS", f"'{asks}'"), "<u>", "<a>", "<e>", "<r>", "<think>", "</think>")
    messages = [turn("user", "a"), turn("assistant", "", tool_calls=[call("cabs", n=1)]), turn("tool", "1")]
    documents = load([{"messages": [*messages, turn("assistant", "b")]}], tokenizer)
    assert trained(documents, tokenizer) == ['<r>cabs{"n": 1}<e>', "b<e>"]


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_turns(name: str, capsys: pytest.CaptureFixture) -> None:
    template, expected = FORMS[name]
    tokenizer = of_template(template, "<u>", "<a>", "<e>", "<r>")
    documents = load([{"messages": chat("a", "b", "c", "d")}], tokenizer)
    assert trained(documents, tokenizer) == expected
    assert ("learn to stop" in capsys.readouterr().err) == (name in ("no_end", "words_for_an_end"))


# --- Whole rows -------------------------------------------------------------------------------------------------------


def test_prompt_and_completion_train_on_the_completions_turns_alone() -> None:
    messages = chat("a", "b", "c", "d", "e", "f")
    for style in STYLES.values():
        for tags in (False, True):
            tokenizer = style.tokenizer(tags=tags)
            for prompt in (1, 3, 5):
                documents = load([{"prompt": messages[:prompt], "completion": messages[prompt:]}], tokenizer)
                answers = [style.trained(message["content"]) for message in messages[prompt::2]]
                assert trained(documents, tokenizer) == answers
                assert whole(documents, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("style", STYLES)
def test_every_token_of_a_completion_is_trained_on_where_that_is_asked(style: str) -> None:
    tokenizer = STYLES[style].tokenizer()
    messages = chat("a", "b", "c", "d", "e", "f")
    row = {"prompt": messages[:3], "completion": messages[3:]}
    documents = load([row], tokenizer, assistant_only_loss=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    asked = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert whole(documents, tokenizer) == text
    assert trained(documents, tokenizer) == [text.removeprefix(asked)] != [text]


def test_every_token_of_messages_is_trained_on_where_that_is_asked() -> None:
    tokenizer = STYLES["chatml"].tokenizer()
    rows = [{"messages": chat("a", "b")}]
    documents = load(rows, tokenizer, assistant_only_loss=False)
    np.testing.assert_array_equal(documents.labels, documents.tokens)
    np.testing.assert_array_equal(documents.tokens, load(rows, tokenizer).tokens)


@pytest.mark.parametrize("assistant_only", [True, False])
def test_the_trainer_trains_on_what_its_configuration_says(assistant_only: bool) -> None:
    tokenizer = STYLES["chatml"].tokenizer()
    model = small_model("qwen3", vocab_size=len(tokenizer))
    trainer = Trainer(model, tokenizer, [{"messages": chat("a", "b")}], TrainConfig(assistant_only_loss=assistant_only))
    labels = trainer.documents.labels
    assert (labels == -100).any() == assistant_only


# --- Nothing to learn -------------------------------------------------------------------------------------------------


def test_rows_without_an_answer_are_left_out_and_counted_aloud(capsys: pytest.CaptureFixture) -> None:
    tokenizer = STYLES["chatml"].tokenizer()
    rows = [{"messages": messages} for messages in (chat("a", "b"), chat("who?"), chat("c", "d"), chat("why?"))]
    documents = load(rows, tokenizer)
    assert [trained(documents, tokenizer, which) for which in range(len(documents))] == [
        ["b<|im_end|>"],
        ["d<|im_end|>"],
    ]
    said = capsys.readouterr().err
    assert "2 of 4 rows have nothing to learn" in said
    assert "row 1 of the dataset" in said
    assert "who?" in said


def test_rows_that_all_have_no_answer_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"At least one row must .* got 2 rows with none .* row 0 of the dataset: .*who"
    ):
        load([{"messages": chat("who?")}] * 2, STYLES["chatml"].tokenizer())


# --- What is refused --------------------------------------------------------------------------------------------------


# Each case: (a template, the messages of the second row, parts of the error message).
UNDECIDED = {
    "a_message_at_the_end": (
        "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% else %}<u>be brief<e>{% endif %}",
        chat("a", "b"),
        ["a turn ends in '<e><u>', but the last one in '<e><u>be brief<e>'"],
    ),
    "no_generation_prompt": (
        "{% for m in messages %}{{ '<u>' + m.role + '\n' + m.content + '<e>\n' }}{% endfor %}",
        chat("a", "b"),
        ["no generation prompt", "<u>assistant"],
    ),
    "another_generation_prompt": (
        "{% for m in messages %}{{ '<u>' + m.role + ' says\n' + m.content + '<e>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<u>assistant:\n' }}{% endif %}",
        chat("a", "b"),
        ["'<e>\\n<u>assistant says\\n'", "'<e>\\n<u>assistant:\\n'"],
    ),
    "the_header_depends_on_the_question": (
        "{% for m in messages %}{{ '<u>' + m.content if m.role == 'user' else '<e><a>' }}"
        "{% if m.role == 'assistant' %}{{ messages[loop.index0 - 1].content | length | string + m.content + '<e>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<e><a>{% endif %}",
        chat("twelve words", "b"),
        ["the text around message 1 depends on its content"],
    ),
    "the_answer_is_changed_elsewhere": (
        "{{ messages | length }}{% for m in messages %}{% if m.content == 'b' %}!{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}",
        chat("a", "b"),
        ["the text around message 1 depends on its content"],
    ),
    "tags_in_a_macro": (
        "{% macro say(m) %}<a> the assistant says: {% generation %}{{ m.content }}<e>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<u>' + m.content }}{% else %}{{ say(m) }}{% endif %}"
        "{% endfor %}",
        chat("a", "b"),
        ["its tags are not where they seem to be: tags within a macro"],
    ),
    "a_mark_in_the_text": (without_tags(CHATML), chat("a", "\ufdd0"), ["U+FDD0"]),
}


@pytest.mark.parametrize("name", UNDECIDED)
def test_a_mask_that_cannot_be_told_is_refused_with_the_reason_and_a_way_out(name: str) -> None:
    template, messages, fragments = UNDECIDED[name]
    tokenizer = of_template(template, "<u>", "<a>", "<e>", *CHATML_TOKENS)
    message = refusal([{"messages": chat("who?")}, {"messages": messages}], tokenizer)
    for fragment in ("row 1 of the dataset. Put ", "generation %}", "turn `assistant_only_loss` off", *fragments):
        assert fragment in message
    load([{"messages": messages}], tokenizer, assistant_only_loss=False)


def test_what_the_template_leaves_out_is_refused() -> None:
    questions = "{% for m in messages %}<u>{% if m.role == 'user' %}{{ m.content }}{% endif %}<e>{% endfor %}"
    message = refusal([{"messages": chat("a", "b")}], of_template(questions, "<u>", "<e>"))
    assert "but it leaves out the content of message 1 (role 'assistant'), 'b', in row 0 of the dataset" in message
    calling = [turn("user", "a"), {"role": "assistant", "content": "", "tool_calls": [call("cabs")]}]
    for tags in (False, True):
        message = refusal([{"messages": calling}], STYLES["gemma"].tokenizer(tags=tags))
        assert "but it leaves out the tool calls of message 1 (role 'assistant'), 'cabs', in row 0" in message
