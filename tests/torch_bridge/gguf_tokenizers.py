"""Trains small tokenizers of the kinds that GGUF files hold, on the bundled questions."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import jaxpack

QUESTIONS = [
    json.loads(line)["prompt"]
    for line in (Path(jaxpack.__file__).parent / "cli" / "sample" / "gsm8k.jsonl").read_text().splitlines()
]
TEXTS = [
    "hello world",
    "a  b   c    d",
    "don't we'll I'M they'RE",
    "12345 67 8 3.14",
    "ü ñ 你好 мир نص عربي កាន់",
    "🙂🚀 ✅",
    "\n\n  x\n\t\ty  \n",
    "def f(x):\n\treturn x + 1",
    "ABCdef GhiJkl HTTPServer",
    "...!!?? ''``",
    "<think>hm</think>",
    *QUESTIONS[:200],
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TURNS = ("<|im_start|>", "<|im_end|>")
# The patterns as they stand in the tokenizer.json of Qwen 2.5 and 3, Llama 3, Phi-4-mini and Mistral Nemo.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN, _LLAMA3 = rf"{_WORDS}\p{{N}}{_REST}", rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level(
    pre: pre_tokenizers.PreTokenizer, *, ignore_merges: bool = False, bos: bool = False
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE. `bos` begins texts with a BOS token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|begin|>", *_TURNS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(QUESTIONS[:200], trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|begin|>" if bos else None,
        chat_template=CHAT_TEMPLATE,
    )


def sentencepiece(*, gemma: bool, missing: int = 0) -> PreTrainedTokenizerFast:
    """Trains a BPE of pieces, as SentencePiece does: with all ways to merge two pieces into a third.

    Args:
      gemma: whether runs of spaces are tokens and a text gets no space before it, as in Gemma; else as in Llama 2.
      missing: how many merges to leave out at the end.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(QUESTIONS[:200], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    runs = ["▁▁", "▁▁▁"] if gemma else []
    pieces = [*runs, *(word for word in sorted(trained.get_vocab(), key=trained.get_vocab().get) if word not in runs)]
    known = set(pieces)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *_TURNS]
    words = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(numbers, merges[: len(merges) - missing], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "▁")
    if gemma:
        tokenizer.normalizer = replace
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in runs])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


# The names that the files must give the tokenizers.
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "qwen2": lambda: byte_level(split_by(_QWEN)),
    "llama-bpe": lambda: byte_level(split_by(_LLAMA3), ignore_merges=True, bos=True),
    "dbrx": lambda: byte_level(split_by(_LLAMA3)),
    "tekken": lambda: byte_level(split_by(_TEKKEN), ignore_merges=True, bos=True),
    "gpt-4o": lambda: byte_level(split_by(_GPT4O)),
    "llama2": lambda: sentencepiece(gemma=False),
    "gemma": lambda: sentencepiece(gemma=True),
}


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()
