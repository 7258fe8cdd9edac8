"""Recognises quantised models, and finds the 16-bit model from which one was made, by its name."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

MXFP4 = "MXFP4"
QUANTISED_FIELDS = ("quantization_config", "quantization", "compression_config")  # of `config.json`
# The names of formats, by the ends of the names of tensors that only they have. The first that is found counts.
_TENSOR_ENDS = {
    ".quant_state.bitsandbytes__fp4": "bitsandbytes' fp4",
    ".SCB": "bitsandbytes' int8",
    ".absmax": "bitsandbytes' 4 bits",
    ".quant_map": "bitsandbytes' 4 bits",
    ".weight_packed": "compressed-tensors",
    ".g_idx": "GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    "_proj_blocks": MXFP4,
    ".weight_blocks": MXFP4,  # of an expert, after `io.experts` has split the tensor of all
    "_proj_scales": MXFP4,
    ".biases": "MLX",
}
_FORMATS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": MXFP4,
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
}

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
_OWNERS = {
    "llama": "meta-llama",
    "mistral": "mistralai",
    "qwen2": "Qwen",
    "qwen3": "Qwen",
    "qwen3_moe": "Qwen",
    "gpt_oss": "openai",
    "phi3": "microsoft",
}
_OWNERS |= {"gemma2": "google", "gemma3_text": "google"}


def format_of_tensors(names: Iterable[str]) -> str | None:
    """Returns the name of the format whose tensors a checkpoint has; None if it is not quantised."""
    names = list(names)
    return next((form for end, form in _TENSOR_ENDS.items() if any(name.endswith(end) for name in names)), None)


def quantisation_of(hf: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Returns the field of a `config.json` that says how the weights are quantised, with its value; else None."""
    return next(((field, hf[field]) for field in QUANTISED_FIELDS if hf.get(field)), None)


def unsupported_format(quantisation: Any) -> str | None:
    """Returns the name of the format that a `quantization_config` describes; None for bitsandbytes' NF4.

    bitsandbytes' 4 bits are NF4 unless the config says fp4: which of the two they are is seen by the tensors.

    Example:
      >>> unsupported_format({"quant_method": "gptq", "bits": 4})
      'GPTQ'
      >>> unsupported_format({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    """
    fields = quantisation if isinstance(quantisation, dict) else {}
    in_4bit, in_8bit = (any(fields.get(f"{start}load_in_{n}bit") is True for start in ("", "_")) for n in (4, 8))
    method = fields.get("quant_method")
    if method == "bitsandbytes" or (method is None and (in_4bit or in_8bit)):
        if in_4bit and not in_8bit:
            kind = fields.get("bnb_4bit_quant_type") or "nf4"
            return None if kind == "nf4" else f"bitsandbytes' {kind!s:.20}"
        return "bitsandbytes' int8"
    return _FORMATS.get(str(method), "another format" if method is None else f"{method!s:.40}")


def quantised_hint(name_or_path: str, hf: Mapping[str, Any]) -> str:
    """Returns a sentence that says which model to use instead of a quantised one, or how to find it.

    Args:
      name_or_path: the id or the folder of the quantised model.
      hf: its `config.json`.

    Example:
      >>> quantised_hint("unsloth/Qwen3-4B-bnb-4bit", {})
      "Use the 16-bit model that it was made from, probably 'unsloth/Qwen3-4B'. `load_in_4bit` holds it in 4 bits."
    """
    sibling = sixteen_bit_sibling(name_or_path, hf)
    if sibling is None:
        return (
            "Use the 16-bit model that it was made from: the model's card on the hub names it as its base model."
            " `load_in_4bit` holds it in 4 bits. Load a model in memory without `quantization_config`."
        )
    return f"Use the 16-bit model that it was made from, probably {sibling!r:.200}. `load_in_4bit` holds it in 4 bits."


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
