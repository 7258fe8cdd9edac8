"""Finds the 16-bit model from which a quantised model was made, by its name."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

_QUANTISED_FIELDS = ("quantization_config", "quantization", "compression_config")  # of `config.json`
# The ends of tensors' names in GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8 and MXFP4.
_QUANTISED_ENDS = (".qweight", ".qzeros", ".weight_packed", ".absmax", ".quant_map", ".SCB", ".weight_format")
_QUANTISED_ENDS += (".weight_scale", ".weight_scale_inv", "_proj_blocks", "_proj_scales", ".biases")

# Words at the end of a quantised model's name, after the name of the model that it was made from.
_FORMAT = re.compile(
    r"bnb|bitsandbytes|nf4|fp4|fp8|mxfp[468]|nvfp4|int[248]|[2-8]bits?|gptq|gptqmodel|awq|hqq|aqlm|exl[23]|eetq|quanto|dwq"
    r"|torchao|marlin|autoround|quip|spqr|(?:quantized\.)?w\d+a\d+|[2-8](?:\.\d+)?bpw|quantized|quant",
    re.IGNORECASE,
)
_DETAIL = re.compile(r"unsloth|dynamic|static|block|kv\d*|g\d+|gs\d+|\d+g|sym|asym|mlx|auto|round|dq", re.IGNORECASE)
_LAST_WORD = re.compile(r"[-_]([^-_]+)$")
_LONGEST = 1000  # characters of a name or a path
_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)  # a folder in the cache of the hub
# Owners who publish quantised copies of others' models, and the owners of the families.
_COPYING = {"thebloke", "redhatai", "neuralmagic", "hugging-quants", "casperhansen", "modelcloud", "mlx-community"}
_COPYING |= {"solidrust", "techxgenus", "kaitchup", "nm-testing", "intel", "pytorch", "gaunernst"}
_OWNERS = {"llama": "meta-llama", "mistral": "mistralai", "qwen2": "Qwen", "qwen3": "Qwen", "phi3": "microsoft"}
_OWNERS |= {"gemma2": "google", "gemma3_text": "google"}


def is_quantised(tensors: Iterable[str]) -> bool:
    """Returns whether the names of a checkpoint's tensors are those of quantised weights."""
    return any(name.endswith(_QUANTISED_ENDS) for name in tensors)


def quantisation_of(hf: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Returns the field of a `config.json` that says how the weights are quantised, with its value; else None."""
    return next(((field, hf[field]) for field in _QUANTISED_FIELDS if hf.get(field)), None)


def quantised_hint(name_or_path: str, hf: Mapping[str, Any]) -> str:
    """Returns a sentence that says which model to use instead of a quantised one, or how to find it.

    Args:
      name_or_path: the id or the folder of the quantised model.
      hf: its `config.json`.

    Example:
      >>> quantised_hint("unsloth/Qwen3-4B-bnb-4bit", {})
      "Use the 16-bit model that it was made from, probably 'unsloth/Qwen3-4B'."
    """
    sibling = sixteen_bit_sibling(name_or_path, hf)
    if sibling is None:
        return (
            "Use the 16-bit model that it was made from: the model's card on the hub names it as its base model. Load a"
            " model in memory without `quantization_config`."
        )
    return f"Use the 16-bit model that it was made from, probably {sibling!r:.200}."


def sixteen_bit_sibling(name_or_path: str, hf: Mapping[str, Any]) -> str | None:
    """Returns the id of the 16-bit model, or its name where no owner is known; None if no name tells it."""
    quantisation = (quantisation_of(hf) or ("", {}))[1]
    told = quantisation if isinstance(quantisation, dict) else {}
    own = _id_of(name_or_path)
    for source in (hf.get("_name_or_path"), told.get("model_name_or_path"), told.get("base_model"), name_or_path):
        name = _id_of(source) if isinstance(source, str) and len(source) < _LONGEST else ""
        owner, _, model = name.rpartition("/")
        owner = owner.strip(".")  # a path that begins with "./" looks like an id
        base = _without_format(model)
        if owner.lower() in _COPYING and base != model:
            owner = _OWNERS.get(str(hf.get("model_type")), "")
        if base and name and (base != model or (name != own and _ID.fullmatch(name))):
            return f"{owner}/{base}" if owner else base
    return None


def _without_format(model: str) -> str:
    """Returns a model's name without the words for its quantisation at the end; the same name if it has none."""
    rest, found = model, False
    while match := _LAST_WORD.search(rest):
        if _FORMAT.fullmatch(match[1]):
            found = True
        elif not _DETAIL.fullmatch(match[1]):
            break
        rest = rest[: match.start()]
    return rest if found else model


def _id_of(name_or_path: str) -> str:
    """Returns the id of a model on the hub, also from its folder in the cache, or else the name of a folder."""
    if cached := _CACHED.search(name_or_path):
        return "/".join(cached.groups())
    return name_or_path if _ID.fullmatch(name_or_path) else PurePath(name_or_path).name
