"""A template of ours writes what the published one writes, for every conversation of text that the latter takes."""

from pathlib import Path

import pytest
import trl
from conversations import chat
from tokenizers_for_tests import small_tokenizer

import jaxpack

SPECIALS = (
    "<|im_start|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
SPECIALS += ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# The published templates. Qwen2.5 adds a system text where there is none, and Gemma 2 refuses one.
THEIRS = {"chatml": "qwen2_5", "gemma": "gemma3", "llama3": "llama3", "phi3": "phi3"}
TALKS = {
    "one_turn": chat("the cab?", "ab, the cab."),
    "turns": chat("a", "b", "the", "cab", "c", "d"),
    "unicode": chat("é 😀 ß?", "日本語 - e\u0301"),
    "outer_whitespace": chat("  hi \n", "\n\n  yes\n", "\n", " a  b "),
    "ends_in_a_question": chat("a", "b", "c"),
}


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize(
    ("name", "system"), [(name, text) for name in THEIRS for text in ("be\n the cab", *[None] * (name != "chatml"))]
)
def test_the_published_template_writes_the_same(name: str, system: str | None, prompted: bool):
    theirs, ours = (small_tokenizer(bos=name in ("gemma", "llama3"), specials=SPECIALS) for _ in range(2))
    theirs.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{THEIRS[name]}.jinja").read_text("utf-8")
    jaxpack.set_chat_template(ours, name)
    for talk in TALKS.values():
        messages = [{"role": "system", "content": system}, *talk] if system else talk
        mine, other = (
            one.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted) for one in (ours, theirs)
        )
        assert mine == other
