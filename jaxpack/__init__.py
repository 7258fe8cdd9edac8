"""Packed, padding-free fine-tuning of language models in JAX.

The names in `__all__` are public, and only they are promised to stay.
"""

import warnings
from typing import Any

from jaxpack.data.batching import Batches
from jaxpack.data.documents import Documents
from jaxpack.data.packing import PackedBatch, pack_rows
from jaxpack.data.preview import ShownRow, show_row
from jaxpack.data.reading import load_documents
from jaxpack.errors import InputError
from jaxpack.generation.text import generate, generate_text
from jaxpack.model.config import Llama3RopeScaling, ModelConfig, RopeConfig
from jaxpack.model.lora import add_lora
from jaxpack.model.transformer import Transformer
from jaxpack.objectives.objective import HiddenObjective, LogProbObjective, Objective, Sums
from jaxpack.objectives.sft import SFT
from jaxpack.planning.inspect import Inspection, LayoutEstimate, inspect
from jaxpack.settings import GenerateConfig, LoraConfig, TrainConfig
from jaxpack.train.callbacks import Callback
from jaxpack.train.report import write_report
from jaxpack.train.trainer import Trainer, TrainResult

__all__ = [
    "SFT",
    "Batches",
    "Callback",
    "Documents",
    "GenerateConfig",
    "HiddenObjective",
    "InputError",
    "Inspection",
    "LayoutEstimate",
    "Llama3RopeScaling",
    "LogProbObjective",
    "LoraConfig",
    "ModelConfig",
    "Objective",
    "PackedBatch",
    "RopeConfig",
    "ShownRow",
    "Sums",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "Transformer",
    "add_lora",
    "generate",
    "generate_text",
    "inspect",
    "load_documents",
    "pack_rows",
    "show_row",
    "write_report",
]

_RENAMED = {"Promise": "LayoutEstimate"}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"jaxpack.{name} is now jaxpack.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
