"""A tokenizer gets a chat template by name or from a file; one that it cannot write is refused at once."""

from pathlib import Path
from typing import Any

import pytest
from conversations import call, chat, load, trained, turn, whole
from conversations import refusal as refused_rows
from tokenizers_for_tests import BOS, EOS, TURN_ENDS, small_tokenizer
from transformers import PreTrainedTokenizerFast

import jaxpack
from jaxpack.data.conversation import alpaca_prompt
from jaxpack.data.named_templates import TEMPLATES
from jaxpack.errors import InputError
from jaxpack.settings import TrainConfig

# The special tokens of each template, and those that end an answer.
SPECIALS = {
    "alpaca": (),
    "chatml": ("<|im_start|>", TURN_ENDS),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", TURN_ENDS),
    "vicuna": (),
}
ENDS = {name: specials[-1] if specials else EOS for name, specials in SPECIALS.items()}
TALK = chat("  the cab? ", "ab, the cab.", "more?", "no\n", system="be the cab")


def tokenizer_for(name: str, *, bos: bool = True) -> PreTrainedTokenizerFast:
    return small_tokenizer(bos=bos, specials=SPECIALS[name])


def given(name: str, **options: bool) -> PreTrainedTokenizerFast:
    return jaxpack.set_chat_template(tokenizer_for(name, **options), name)


def refusal(tokenizer: PreTrainedTokenizerFast | None, template: Any) -> str:
    before = None if tokenizer is None else (tokenizer.chat_template, tokenizer.eos_token)
    with pytest.raises(InputError) as refused:
        jaxpack.set_chat_template(tokenizer, template)
    if tokenizer is not None:
        assert (tokenizer.chat_template, tokenizer.eos_token) == before
    assert str(refused.value).endswith(".")
    return str(refused.value)


def test_the_list_of_names_is_tested_whole():
    assert SPECIALS.keys() == TEMPLATES.keys()


# These texts are what the formats' authors publish for a short conversation.
WRITTEN = {
    "alpaca": f"{BOS}S\n\n### Instruction:\na\n\n### Response:\nb{EOS}\n\n### Instruction:\nc\n\n### Response:\nd{EOS}",
    "chatml": f"{BOS}<|im_start|>system\nS<|im_end|>\n"
    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n",
    "gemma": f"{BOS}<start_of_turn>user\nS\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
    "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\nd<end_of_turn>\n",
    "llama3": f"{BOS}<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nd<|eot_id|>",
    "phi3": f"{BOS}<|system|>\nS<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n"
    f"<|assistant|>\nd<|end|>\n{EOS}",
    "phi4": f"{BOS}<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>a<|im_end|>"
    "<|im_start|>assistant<|im_sep|>b<|im_end|><|im_start|>user<|im_sep|>c<|im_end|>"
    "<|im_start|>assistant<|im_sep|>d<|im_end|>",
    "vicuna": f"{BOS}S USER: a ASSISTANT: b{EOS}USER: c ASSISTANT: d{EOS}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_written_in_the_published_format(name: str):
    messages = chat("a", "b", "c", "d", system="S")
    written = given(name).apply_chat_template(messages, tokenize=False)
    assert written == WRITTEN[name]
    asked = given(name).apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert written.startswith(asked)
    assert written[len(asked) :].strip().startswith("d")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_and_the_token_that_ends_them_are_trained_on(name: str):
    tokenizer = given(name)
    documents = load([{"messages": TALK}], tokenizer)
    parts = [part.removesuffix(ENDS[name]) for part in trained(documents, tokenizer)]
    assert [part.strip() for part in parts] == ["ab, the cab.", "no"]
    assert all(part.endswith(ENDS[name]) for part in trained(documents, tokenizer))
    assert whole(documents, tokenizer) == tokenizer.apply_chat_template(TALK, tokenize=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_token_that_ends_an_answer_is_eos_from_now_on(name: str, capsys: pytest.CaptureFixture):
    tokenizer = given(name)
    changes = ENDS[name] != EOS and name != "phi3"  # its template writes EOS after the last answer
    assert tokenizer.eos_token == (ENDS[name] if changes else EOS)
    said = " ".join(capsys.readouterr().err.split())
    assert f"the chat template is {name}: an answer ends with {ENDS[name]}" in said
    assert ("EOS token from now on (it was <eos>)" in said) == changes
    jaxpack.set_chat_template(tokenizer, name)
    assert capsys.readouterr().err == ""  # nothing has changed


def test_eos_stays_where_the_template_writes_it_itself(tmp_path: Path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}{{ eos_token }}")
    assert jaxpack.set_chat_template(small_tokenizer(), file).eos_token == EOS


@pytest.mark.parametrize("name", ["alpaca", "chatml", "vicuna", "phi3", "phi4"])
def test_a_text_begins_with_bos_if_the_tokenizer_begins_texts_with_it(name: str):
    with_bos, without = (given(name, bos=bos).apply_chat_template(TALK, tokenize=False) for bos in (True, False))
    assert with_bos == BOS + without


def test_alpaca_is_what_rows_of_instructions_become_without_a_template():
    rows = [{"instruction": "add", "output": "4"}]
    plain, asked = small_tokenizer(), given("alpaca", bos=False)
    assert whole(load(rows, asked), asked) == whole(load(rows, plain), plain) == alpaca_prompt("add", "") + "4" + EOS
    assert trained(load(rows, asked), asked) == trained(load(rows, plain), plain)


@pytest.mark.parametrize("name", ["Llama-3", "llama_3", "ChatML", "CHAT-ML"])
def test_a_name_may_be_written_as_elsewhere(name: str):
    ours = "llama3" if "3" in name else "chatml"
    assert jaxpack.set_chat_template(tokenizer_for(ours), name).chat_template == given(ours).chat_template


@pytest.mark.parametrize("name", [name for name in TEMPLATES if SPECIALS[name]])
def test_special_tokens_that_the_tokenizer_lacks_are_refused(name: str):
    said = refusal(small_tokenizer(bos=True), name)
    missing = next(token for token in SPECIALS[name] if token in said)
    count = len(small_tokenizer()(missing).input_ids)
    assert f"got '{name}', which writes {missing}, and the tokenizer makes {count} other tokens of that" in said
    assert "('alpaca', 'vicuna')" in said


def test_tokens_for_tools_alone_are_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    calls = "{% if m.tool_calls %}{{ '<|python_tag|>' + m.tool_calls[0].function | tojson }}{% endif %}"
    body = f"{{{{ m.role + (m.content or '') }}}}{calls}{{{{ '<|im_end|>' }}}}"
    file = tmp_path / "tools.jinja"
    file.write_text("{{ tools | tojson if tools else '' }}{% for m in messages %}" + body + "{% endfor %}")
    for specials in ((), ("<|python_tag|>",)):
        jaxpack.set_chat_template(small_tokenizer(specials=specials), file)
        said = " ".join(capsys.readouterr().err.split())
        count = len(small_tokenizer()("<|python_tag|>").input_ids)
        told = f"writes <|python_tag|> for tools, and the tokenizer makes {count} other tokens of that: use it only"
        assert (told in said) == (not specials)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_loses_nothing_silently(name: str, capsys: pytest.CaptureFixture):
    tokenizer = given(name)
    answer = turn("assistant", "b", reasoning_content="hm")
    calling = {"role": "assistant", "content": "", "tool_calls": [call("cabs", city="Bonn")]}
    assert "leaves out the thoughts of message 1" in refused_rows(
        [{"messages": [turn("user", "a"), answer]}], tokenizer
    )
    assert "leaves out the tool calls of message 1" in refused_rows(
        [{"messages": [turn("user", "a"), calling]}], tokenizer
    )
    load([{"messages": [turn("user", "a"), answer, *chat("c", "d")]}], tokenizer)
    assert "in 1 rows, the chat template leaves out thoughts" in " ".join(capsys.readouterr().err.split())


def test_words_in_brackets_that_are_plain_text_in_some_formats_are_not_refused(tmp_path: Path):
    file = tmp_path / "llama2.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = jaxpack.set_chat_template(small_tokenizer(), str(file))
    documents = load([{"messages": chat("a", "<think>b")}], tokenizer)
    assert trained(documents, tokenizer) == [f" <think>b{EOS}"]


def test_a_file_takes_the_place_of_the_tokenizers_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.jinja").write_text("\ufeff" + TEMPLATES["chatml"], "utf-8")
    tokenizer = small_tokenizer(chat=True, specials=SPECIALS["chatml"])
    jaxpack.set_chat_template(tokenizer, "~/own.jinja")
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    assert TrainConfig(chat_template="~/own.jinja").chat_template == f"{tmp_path}/own.jinja"


FILES = {
    "not_jinja": ("{% for %}", "got '{path}': The chat template must accept every row, but it refuses a trial: "),
    "refuses": ("{{ raise_exception('never') }}", "it refuses a trial: never."),
    "leaves_out": ("{{ messages[0].content }}", "it leaves out the content of message 1"),
    "endless": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    "writes_much": ("{{ 'a' * 10**10 }}", "more than a chat template needs"),
    "long": ("a" * (2 << 20), "must have at most 1,048,576 bytes, got 2,097,152 in '{path}'."),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_something_else_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from jaxpack.data import template_limits

    monkeypatch.setattr(template_limits._limit, "_seconds", 0.5)
    text, fragment = FILES[name]
    path = tmp_path / "own.jinja"
    path.write_text(text)
    said = refusal(small_tokenizer(), path)
    assert said.startswith("`chat_template` must ")
    assert fragment.format(path=path) in said


def test_what_is_no_file_is_refused(tmp_path: Path):
    said = refusal(small_tokenizer(), "llama-7")
    assert f"must be one of {tuple(TEMPLATES)}, or an existing file with a Jinja template, got 'llama-7'." in said
    assert "must be an existing file" in refusal(small_tokenizer(), tmp_path)
    (tmp_path / "latin.jinja").write_bytes(b"\xff")
    assert "must be a readable file of UTF-8" in refusal(small_tokenizer(), tmp_path / "latin.jinja")
    assert "got the text of a template" in refusal(small_tokenizer(), TEMPLATES["chatml"])
    assert "must be one of transformers for a `chat_template`, got None." in refusal(None, "chatml")
    assert f"must be one of {tuple(TEMPLATES)}, or a file, got 5." in refusal(small_tokenizer(), 5)


def test_a_setting_of_a_run_does_the_same():
    from jaxpack.data.reading import load_for_run

    rows = [{"messages": [turn("user", "a"), turn("assistant", "b")]}]
    tokenizer = tokenizer_for("chatml", bos=False)
    documents = load_for_run(TrainConfig(chat_template="chatml"), rows, tokenizer, vocab_size=len(tokenizer))
    assert trained(documents, tokenizer) == ["b<|im_end|>"]
    assert tokenizer.chat_template == TEMPLATES["chatml"]
