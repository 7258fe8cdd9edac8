"""Writes small tokenizers in the form in which they lie on the hub, as transformers 4 wrote them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEXTS = [
    "the cat",
    "<s>[INST] the cat [/INST] two </s>",
    "<|im_start|>user\nhello<|im_end|>\n",
    " leading",
    "a  b",
    "é <new> <pad>",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
_TURNS = ("<|im_start|>", "<|im_end|>")
_PIECES = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "▁th", "▁the", "▁c", "▁ca", "▁cat"]
_JOINS = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁c", "a"), ("▁ca", "t")]


def write_hub_tokenizer(folder: Path, kind: str) -> Path:
    """Writes one of `KINDS` to a new folder, and returns the folder."""
    folder.mkdir(parents=True)
    KINDS[kind](folder)
    return folder


def _qwen2(folder: Path, *, template: bool = True) -> None:
    """Writes a byte-level BPE with its vocabulary in `vocab.json` and `merges.txt`, too."""
    joins = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, joins)]
    model = models.BPE({word: number for number, word in enumerate(words)}, joins)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model.save(str(folder))
    settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None}
    settings |= {"pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace", "split_special_tokens": False}
    _write(folder, tokenizer, ("<|endoftext|>", *_TURNS), settings | ({"chat_template": TEMPLATE} if template else {}))


def _qwen2_slow(folder: Path) -> None:
    """Leaves out `tokenizer.json`: the vocabulary is only in `vocab.json`, `merges.txt` and `added_tokens.json`."""
    _qwen2(folder)
    (folder / "tokenizer.json").unlink()


def _qwen2_templates(folder: Path) -> None:
    """Has two chat templates, each in a file of its own."""
    _qwen2(folder, template=False)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}" + TEMPLATE)


def _llama2(folder: Path, legacy: bool | None = None) -> None:
    """Writes a SentencePiece BPE, with the flag that says how the text after a special token is split."""
    specials = ("<unk>", "<s>", "</s>")
    words = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES]
    model = models.BPE(
        {word: number for number, word in enumerate(words)},
        _JOINS,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (folder / "tokenizer.model").write_bytes(_sentencepiece(words))
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATE, "pad_token": None}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    settings |= {"add_eos_token": False, "sp_model_kwargs": {}} | ({} if legacy is None else {"legacy": legacy})
    _write(folder, tokenizer, (*specials, *_TURNS), settings)


def _mistral(folder: Path) -> None:
    """Has the code of a tokenizer class in `auto_map`, and no list of added tokens in its settings."""
    _llama2(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["added_tokens_decoder"]
    path.write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["tokenization_missing.Missing", None]}}))


KINDS = {
    "qwen2": _qwen2,
    "qwen2_slow": _qwen2_slow,
    "qwen2_templates": _qwen2_templates,
    "llama2": _llama2,
    "llama2_legacy": lambda folder: _llama2(folder, legacy=True),
    "llama2_not_legacy": lambda folder: _llama2(folder, legacy=False),
    "mistral_auto_map": _mistral,
}


# Changes that users make to a tokenizer before they train: each returns the changed tokenizer.


def _set(name: str, value: Any) -> Callable[[Any], Any]:
    def change(tokenizer: Any) -> Any:
        setattr(tokenizer, name, value)
        return tokenizer

    return change


def _add(**specials: Any) -> Callable[[Any], Any]:
    def change(tokenizer: Any) -> Any:
        tokenizer.add_special_tokens(specials)
        return tokenizer

    return change


def _pad_on_the_other_side(tokenizer: Any) -> Any:
    tokenizer.padding_side = "left" if tokenizer.padding_side == "right" else "right"
    return tokenizer


def _add_plain(tokenizer: Any) -> Any:
    tokenizer.add_tokens(["[INST]"])
    return tokenizer


CHANGES: dict[str, Callable[[Any], Any]] = {
    "template": _set("chat_template", "{{ messages[0].content }}é"),
    "no template": _set("chat_template", None),
    "templates": _set("chat_template", {"default": "a", "rag": "b"}),
    "eos": _set("eos_token", "<|im_start|>"),
    "new pad": _add(pad_token="<pad>"),
    "no eos": _set("eos_token", None),
    "padding side": _pad_on_the_other_side,
    "length": _set("model_max_length", 77),
    "plain token": _add_plain,
    "special tokens": _add(extra_special_tokens=["<new>", "<|im_end|>"]),
    "retrained": lambda tokenizer: tokenizer.train_new_from_iterator(["abab abc abab"] * 9, 300),
}


def same(one: Any, other: Any) -> bool:
    """Returns whether two tokenizers have equal ids for `TEXTS`, and equal settings."""
    names = ("eos_token", "pad_token", "bos_token", "padding_side", "model_max_length", "chat_template")
    return all(getattr(one, name) == getattr(other, name) for name in names) and ids(one) == ids(other)


def ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in TEXTS]


def _write(folder: Path, tokenizer: Tokenizer, specials: tuple[str, ...], settings: dict[str, Any]) -> None:
    form = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    before = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(token, special=True, **form) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    numbers = {token: tokenizer.token_to_id(token) for token in specials}
    added = {token: number for token, number in numbers.items() if number >= before}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    settings |= {"additional_special_tokens": list(_TURNS), "model_max_length": 4096, "extra_special_tokens": {}}
    decoder = {str(number): {"content": token} | form | {"special": True} for token, number in numbers.items()}
    # The order and the spaces are not those that any version of transformers writes today.
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": decoder}, indent=3))
    named = {name: {"content": token} | form for name, token in settings.items() if name.endswith("_token") and token}
    named = {name: token for name, token in named.items() if not name.startswith("add_")}
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(_TURNS)} | named))


def _sentencepiece(words: list[str]) -> bytes:
    """Returns a `tokenizer.model`: SentencePiece's protocol buffer of a BPE with bytes for unknown characters."""

    def number(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number(value >> 7)

    def field(key: int, value: bytes) -> bytes:
        return number(key << 3 | 2) + number(len(value)) + value

    def whole(key: int, value: int) -> bytes:
        return number(key << 3) + number(value)

    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}  # unknown, control; else byte (6) or normal (1)
    pieces = b""
    for index, word in enumerate(words):
        kind = kinds.get(word, 6 if word.startswith("<0x") else 1)
        score = number(2 << 3 | 5) + struct.pack("<f", -float(index))
        pieces += field(1, field(1, word.encode()) + score + whole(3, kind))
    bpe, byte_fallback = whole(3, 2), whole(35, 1)
    return pieces + field(2, bpe + whole(4, len(words)) + byte_fallback)
