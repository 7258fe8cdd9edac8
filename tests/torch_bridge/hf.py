"""Makes the torch side of every comparison: small random transformers checkpoints, their logits and losses."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

torch.set_num_threads(1)  # the models are so tiny that threads would only wait for each other

VOCAB_SIZE = 97
ORIGINAL_CONTEXT = 64  # original context of the RoPE scalings; some documents are longer
WINDOW = 24  # sliding window; some documents are far longer

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# The scaling leaves two of ten wavelengths as they are (6 and 16 positions), blends one (40) and stretches the others.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
_LONG = {"original_max_position_embeddings": ORIGINAL_CONTEXT}
_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": _LONG | {"factor": 4.0, "beta_fast": 8.0},
    "longrope": _LONG
    | {"factor": 4.0, "short_factor": [1 + i / 20 for i in range(10)], "long_factor": [1 + i / 2 for i in range(10)]},
}

_PHI4_MINI_ROPE = _LONG | {
    "max_position_embeddings": 4 * ORIGINAL_CONTEXT,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": [1 + i / 20 for i in range(6)],
        "long_factor": [1 + i for i in range(6)],
    },
}

_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_GPT_OSS = {
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": _ROPE | {"rope_type": "yarn", "truncate": False} | _SCALINGS["yarn"],
}

_GEMMA = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 7,
}
_GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": _ROPE,
}


def scaled(kind: str) -> dict[str, Any]:
    """Returns the config settings of one kind of RoPE scaling."""
    settings = {"rope_parameters": _ROPE | {"rope_type": kind} | _SCALINGS[kind]}
    return settings | ({"max_position_embeddings": ORIGINAL_CONTEXT} if kind == "dynamic" else {})


# Maps each name to the prefix of its transformers classes and to the settings in which it differs from the others.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    **{f"llama_{kind}": ("Llama", scaled(kind)) for kind in _SCALINGS},
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral_v3": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"rope_parameters": _ROPE | {"rope_theta": 1e6}}),
    "qwen3_moe": ("Qwen3Moe", _EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe_shares": ("Qwen3Moe", _EXPERTS | {"norm_topk_prob": False}),
    "gpt_oss": ("GptOss", _GPT_OSS),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi4_mini": ("Phi3", {"hidden_size": 64, "head_dim": 16} | _PHI4_MINI_ROPE),
    "gemma2": ("Gemma2", _GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", _GEMMA | {"rope_parameters": _GEMMA3_ROPES}),
}

# Checkpoints whose folders differ in form: the family, and whether the head is the embedding ("tied").
CHECKPOINTS = (
    "gemma2-tied",
    "gemma3-tied",
    "qwen3-tied",
    "qwen3-untied",
    "qwen3_moe-untied",
    "gpt_oss-untied",
    "llama-tied",
    "llama-untied",
    "llama3-tied",
    "llama3-untied",
    "llama_biases-untied",
    "llama_longrope-untied",
    "mistral-untied",
    "phi3-untied",
    "phi4_mini-tied",
    "qwen2-tied",
    "qwen2_window-untied",
)


# Grouped heads, and a head_dim that is not hidden_size / num_heads.
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "rope_parameters": _ROPE,
}


def make_model(checkpoint: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Makes one of `FAMILIES`, with `SETTINGS` unless its own differ."""
    family, head = checkpoint.split("-")
    prefix, own = FAMILIES[family]
    settings = SETTINGS | {"tie_word_embeddings": head == "tied"}
    return random_model(prefix, settings | own, dtype)


def random_model(prefix: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Makes a model with random weights in which no part is near zero or the identity.

    Weights have standard deviation 0.1, biases three times that, and norm weights scatter around their neutral value,
    so that each part changes the logits. So does an RMSNorm epsilon of 1e-3, a tenth of the embedding's variance.
    """
    make = getattr(transformers, f"{prefix}ForCausalLM")
    own: dict[str, Any] = {"pad_token_id": None}  # the embedding of a padding token has no gradient
    if prefix == "GptOss" or "attn_logit_softcapping" in settings:
        own["attn_implementation"] = "eager"  # the default of some versions leaves soft-capping out
    model = make(make.config_class(**copy.deepcopy(settings | own))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and not name.endswith(".bias"):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_((0.3 if parameter.ndim == 1 else 0.1) * noise)
            parameter.data = parameter.data.to(dtype)  # `model.to` would also round RoPE's frequencies
    return model


def save_model(folder: Path, checkpoint: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, str]:
    """Writes a random model as a Hugging Face folder. Returns the model and the folder's path."""
    model = make_model(checkpoint, dtype)
    model.save_pretrained(folder)
    return model, str(folder)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, shape).astype(np.int32)


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Returns the float32 logits of a torch model for whole rows of tokens."""
    return model(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


class Document(NamedTuple):
    """Holds a document in Hugging Face's form: labels are not shifted, and are -100 where nothing is trained on."""

    tokens: list[int]
    labels: list[int]


def random_documents(lengths: Sequence[int], seed: int = 0) -> list[Document]:
    """Draws documents with a masked prompt of random length. Low tokens are likelier, so that a model can learn."""
    rng = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        tokens = (VOCAB_SIZE * rng.random(length) ** 3).astype(int).tolist()
        prompt = int(rng.integers(0, length))
        documents.append(Document(tokens, [-100] * prompt + tokens[prompt:]))
    return documents


def padded(documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """Pads documents into one batch: the arguments with which a transformers model computes the loss."""
    longest = max(len(document.tokens) for document in documents)
    padding = [longest - len(document.tokens) for document in documents]
    rows = list(zip(documents, padding, strict=True))
    return {
        "input_ids": torch.tensor([document.tokens + [0] * missing for document, missing in rows]),
        "attention_mask": torch.tensor([[1] * len(document.tokens) + [0] * missing for document, missing in rows]),
        "labels": torch.tensor([document.labels + [-100] * missing for document, missing in rows]),
    }
