"""Reads a fast Hugging Face tokenizer as llama.cpp needs it: tokens with their kinds, merges or scores, special ids.

llama.cpp splits texts with code of its own, which it chooses by a name. Here the parts of `tokenizer.json` decide that
name, and a tokenizer with parts that llama.cpp has not is refused: it would give other tokens than those trained on.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxpack.data.chat_template import ChatTemplate
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError
from jaxpack.utils.console import console
from torch_bridge.gguf_files.architecture import OTHER_WAY

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # gguf.TokenType
_SPACE = "▁"  # SentencePiece's sign for a space
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{first}{_LOWER}{second}" for first, second in (("*", "+"), ("+", "*")))
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name for a byte-level BPE that splits texts by this pattern, and whether a whole word that is a token is
# taken before any merge (`ignore_merges`).
_SPLITS = {
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}", False): "qwen2",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}", False): "dbrx",
    (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}{_CASED_REST}", True): "tekken",
    (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_CASED_REST}", False): "gpt-4o",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Holds the tokenizer of a GGUF file.

    Attributes:
      model: llama.cpp's name of the algorithm: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
      pre: llama.cpp's name of the way to split texts into words.
      tokens: the texts of all tokens by id.
      kinds: the kind of each token.
      merges: the merges of a byte-level BPE, each with a space between its parts.
      scores: for SentencePiece, the score of each token; that with the highest is merged first.
      special: ids by name, such as "eos".
      adds: whether the tokenizer puts "bos" before a text, and "eos" after it.
      adds_space: for SentencePiece, whether a text gets a space before it.
      chat_template: a template, or several with their names; None without one.
      stops: the texts of the tokens that end an answer.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    special: dict[str, int]
    adds: dict[str, bool]
    adds_space: bool | None = None
    chat_template: Any
    stops: Sequence[str]

    def write(self, writer: Any) -> None:
        """Writes the metadata of the tokenizer with a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.kinds)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        for name, adds in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(adds)
        if self.adds_space is not None:
            writer.add_add_space_prefix(self.adds_space)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Tokenizer | None, vocab_size: int, *, bos: int | None = None) -> Vocabulary:
    """Reads a tokenizer as llama.cpp needs it.

    Args:
      vocab_size: the rows of the model's embedding. Those without a token get unused ones.
      bos: the BOS token that the model's config names, for a tokenizer that names none.

    Raises:
      InputError: there is no tokenizer, or llama.cpp has not all of its parts.
    """
    if tokenizer is None:
        raise InputError(
            "`tokenizer` must be given, because a GGUF file holds the tokenizer, too, got None. Copy the tokenizer's"
            " files into the model's folder, and read the model again."
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"`tokenizer` must be a fast tokenizer, with a tokenizer.json, got {type(tokenizer).__name__}. {OTHER_WAY}"
        )
    content = json.loads(backend.to_str())
    names = _tokens(content, vocab_size)
    added = {token["id"]: token for token in content["added_tokens"]}
    _warn_of_stripping(added.values())
    special, end = _special(tokenizer, bos), _answer_end(tokenizer)
    if end is not None and end != tokenizer.eos_token:
        special["eot"] = tokenizer.get_added_vocab()[end]
    shared = {
        "special": special,
        "adds": _adds(tokenizer),
        "chat_template": _chat_template(tokenizer),
        "stops": list(dict.fromkeys(str(stop) for stop in (end, tokenizer.eos_token) if stop)),
    }
    if content["model"].get("type") != "BPE":
        raise _refused(f"a model of the type {content['model'].get('type')!r:.40}")
    if "ByteLevel" in [part.get("type") for part in _parts(content["pre_tokenizer"], "pretokenizers")]:
        return _byte_level(content, names, added, shared)
    return _sentencepiece(content, names, added, shared)


def _refused(what: str) -> InputError:
    return InputError(
        f"`tokenizer` must split texts in a way that llama.cpp knows, got one with {what}. llama.cpp would give the"
        f" model other tokens than it knows, so no file is written. {OTHER_WAY}"
    )


def _tokens(content: dict[str, Any], vocab_size: int) -> list[str | None]:
    """Returns the texts of all tokens by id; None where there is none."""
    numbers = dict(content["model"].get("vocab") or {}) if isinstance(content["model"].get("vocab"), dict) else {}
    numbers |= {token["content"]: token["id"] for token in content["added_tokens"]}
    largest = max(numbers.values(), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"`tokenizer` must have at most {vocab_size:,} tokens, the rows of the model's embedding, got one with the"
            f" token {largest:,}. The model and the tokenizer do not belong together."
        )
    names: list[str | None] = [None] * vocab_size
    for name, number in numbers.items():
        names[number] = name
    return names


def _parts(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Returns the steps of a pre-tokenizer or a normalizer."""
    if part is None:
        return []
    return part[name] if part.get("type") == "Sequence" else [part]


def _warn_of_stripping(added: Iterable[dict[str, Any]]) -> None:
    stripping = [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if stripping:
        console.print(
            f"llama.cpp keeps white space beside all special tokens, where this tokenizer drops it beside"
            f" {', '.join(map(repr, stripping[:3]))}{' and others' if len(stripping) > 3 else ''}",
            style="yellow",
        )


def _special(tokenizer: Tokenizer, bos: int | None) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    found["bos"] = bos if found["bos"] is None else found["bos"]
    return {name: number for name, number in found.items() if number is not None}


def _adds(tokenizer: Tokenizer) -> dict[str, bool]:
    """Returns whether the tokenizer puts BOS before a text, and EOS after it."""
    alone, whole = (list(tokenizer(["a"], add_special_tokens=add)["input_ids"][0]) for add in (False, True))
    for before in ([], [tokenizer.bos_token_id]):
        for after in ([], [tokenizer.eos_token_id]):
            if whole == before + alone + after:
                return {"bos": bool(before), "eos": bool(after)}
    raise _refused(f"other tokens around a text than BOS and EOS ({whole!r:.60} for the text 'a')")


def _chat_template(tokenizer: Tokenizer) -> Any:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()] or None
    return template or None


def _answer_end(tokenizer: Tokenizer) -> str | None:
    """Returns the token that ends an answer of the chat template, or None."""
    return ChatTemplate(tokenizer).answer_end() if getattr(tokenizer, "chat_template", None) else None


def _byte_level(
    content: dict[str, Any], names: list[str | None], added: dict[int, dict[str, Any]], shared: dict[str, Any]
) -> Vocabulary:
    model = content["model"]
    for step in _parts(content["normalizer"], "normalizers"):
        if step.get("type") != "NFC":  # llama.cpp leaves it out; texts are in this form nearly always
            raise _refused(f"a normalizer of the type {step.get('type')!r:.40}")
    if any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")):
        raise _refused("a prefix or a suffix of parts of words, or a fallback to bytes")

    def kind_of(name: str, number: int) -> int:
        if number not in added:
            return _NORMAL
        return _CONTROL if added[number]["special"] else _USER_DEFINED

    tokens, kinds = _with_unused(names, kind_of)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return Vocabulary(model="gpt2", pre=_pre(content), tokens=tokens, kinds=kinds, merges=merges, **shared)


def _with_unused(names: list[str | None], kind_of: Callable[[str, int], int]) -> tuple[list[str], list[int]]:
    """Returns the texts and the kinds of all tokens by id, with an unused token where there is none."""
    tokens = [f"[PAD{number}]" if name is None else name for number, name in enumerate(names)]
    kinds = [_UNUSED if name is None else kind_of(name, number) for number, name in enumerate(names)]
    return tokens, kinds


def _pre(content: dict[str, Any]) -> str:
    """Returns llama.cpp's name of the way in which a byte-level BPE splits texts into words."""
    steps = _parts(content["pre_tokenizer"], "pretokenizers")
    *before, last = steps
    ignores_merges = bool(content["model"].get("ignore_merges"))
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if last.get("use_regex", True) and not ignores_merges:
            if not before:
                return "gpt-2"
            if before == [{"type": "Digits", "individual_digits": True}]:
                return "smollm"
        elif not last.get("use_regex", True) and len(before) == 1 and before[0].get("type") == "Split":
            (split,) = before
            known = (split["pattern"].get("Regex"), ignores_merges)
            if known in _SPLITS and split["behavior"] == "Isolated" and not split["invert"]:
                return _SPLITS[known]
    raise _refused(f"the pre-tokenizer {json.dumps(steps, ensure_ascii=False)!r:.300}")


def _sentencepiece(
    content: dict[str, Any], names: list[str | None], added: dict[int, dict[str, Any]], shared: dict[str, Any]
) -> Vocabulary:
    model = content["model"]
    unknown = model.get("unk_token")
    if not model.get("byte_fallback") or unknown is None:
        raise _refused("neither all bytes as tokens nor a fallback to them")

    def kind_of(name: str, number: int) -> int:
        if name == unknown:
            return _UNKNOWN
        if _BYTE_TOKEN.fullmatch(name):
            return _BYTE
        if number in added and added[number]["special"]:
            return _CONTROL
        # llama.cpp finds such tokens whole, in the text with its spaces. A token with the sign for a space that is
        # looked for before spaces are replaced is never found: merges make it, as they make Gemma's runs of spaces.
        is_whole = number in added and (_SPACE not in name or added[number]["normalized"])
        return _USER_DEFINED if is_whole else _NORMAL

    tokens, kinds = _with_unused(names, kind_of)
    tokens = [t.replace(_SPACE, " ") if kind == _USER_DEFINED else t for t, kind in zip(tokens, kinds, strict=True)]
    pieces = {name: number for number, name in enumerate(names) if name is not None and kinds[number] == _NORMAL}
    ranks = _ranks([tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]], pieces)
    scores = [-float(ranks.get(name, 0)) if kind == _NORMAL else 0.0 for name, kind in zip(names, kinds, strict=True)]
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        kinds=kinds,
        scores=scores,
        adds_space=_adds_space(content),
        **shared,
    )


def _ranks(merges: list[tuple[str, ...]], pieces: dict[str, int]) -> dict[str | None, int]:
    """Returns for each piece when it is merged, counted in pieces.

    llama.cpp merges two neighbours if they are a piece together, that with the best score first. The merges of a
    tokenizer say the same if all merges into one piece follow one another, and no way to cut a piece in two is missing.
    """
    ranks: dict[str | None, int] = {}
    last, count = "", 0
    known = set(merges)
    for pair in merges:
        piece = "".join(pair)
        if piece not in pieces:  # a token that is found whole before anything is merged
            continue
        if piece != last:
            if piece in ranks:
                raise _refused(f"merges into {piece!r:.40} that do not follow one another")
            count += 1
            ranks[piece] = count
        last = piece
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in pieces and pair[1] in pieces and pair not in known:
                raise _refused(f"no merge of {pair[0]!r:.40} and {pair[1]!r:.40}, which are a token together")
    return ranks


def _adds_space(content: dict[str, Any]) -> bool:
    """Returns whether a text gets a space before it.

    Raises:
      InputError: spaces are treated in a way that llama.cpp does not know.
    """
    adds, replaces = False, False
    for step in _parts(content["normalizer"], "normalizers"):
        if step == {"type": "Prepend", "prepend": _SPACE}:
            adds = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
            replaces = True
        else:
            raise _refused(f"the normalizer {step!r:.200}")
    for step in _parts(content["pre_tokenizer"], "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement") == _SPACE and not step.get("split", True):
            replaces = True
            adds = adds or step.get("prepend_scheme") != "never"
            if step.get("prepend_scheme") == "first" and adds:
                console.print(
                    "llama.cpp puts a space also before a text that follows a special token, where this tokenizer puts"
                    " one only at the beginning",
                    style="yellow",
                )
        elif not (step.get("type") == "Split" and step.get("pattern") == {"String": " "} and replaces):
            raise _refused(f"the pre-tokenizer {step!r:.200}")
    if not replaces:
        raise _refused("words that are not joined by SentencePiece's sign for a space")
    return adds
