"""Packed, padding-free fine-tuning of language models in JAX.

The names in `__all__` are public, and only they are promised to stay.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time `__getattr__` imports a name when it is used: `jaxpack --help` must not import jax
    from jaxpack.data.batching import Batches
    from jaxpack.data.documents import Documents
    from jaxpack.data.named_templates import set_chat_template
    from jaxpack.data.packer import Packer
    from jaxpack.data.packing import PackedBatch, pack_rows
    from jaxpack.data.preview import ShownRow, show_row
    from jaxpack.data.reading import load_documents
    from jaxpack.errors import InputError, TrainingError
    from jaxpack.generation.text import generate, generate_text
    from jaxpack.model.config import Llama3RopeScaling, ModelConfig, RopeConfig
    from jaxpack.model.lora import add_lora
    from jaxpack.model.transformer import Transformer
    from jaxpack.model.vocab import resize_vocab
    from jaxpack.objectives.objective import HiddenObjective, LogProbObjective, Objective, Sums
    from jaxpack.objectives.sft import SFT
    from jaxpack.parallel.processes import initialize_distributed
    from jaxpack.planning.inspect import Inspection, LayoutEstimate, inspect
    from jaxpack.settings import GenerateConfig, LoraConfig, TrainConfig
    from jaxpack.train.callbacks import Callback, EarlyStopping
    from jaxpack.train.evaluation import evaluate
    from jaxpack.train.report import write_report
    from jaxpack.train.step import TrainState, make_train_step, split_trainable
    from jaxpack.train.trainer import Trainer, TrainResult

__version__ = "0.1.0"

__all__ = [
    "SFT",
    "Batches",
    "Callback",
    "Documents",
    "EarlyStopping",
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
    "Packer",
    "RopeConfig",
    "ShownRow",
    "Sums",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "Trainer",
    "TrainingError",
    "Transformer",
    "add_lora",
    "evaluate",
    "generate",
    "generate_text",
    "initialize_distributed",
    "inspect",
    "load_documents",
    "make_train_step",
    "pack_rows",
    "resize_vocab",
    "set_chat_template",
    "show_row",
    "split_trainable",
    "write_report",
]

_MODULES = {
    "jaxpack.data.batching": ("Batches",),
    "jaxpack.data.documents": ("Documents",),
    "jaxpack.data.named_templates": ("set_chat_template",),
    "jaxpack.data.packer": ("Packer",),
    "jaxpack.data.packing": ("PackedBatch", "pack_rows"),
    "jaxpack.data.preview": ("ShownRow", "show_row"),
    "jaxpack.data.reading": ("load_documents",),
    "jaxpack.errors": ("InputError", "TrainingError"),
    "jaxpack.generation.text": ("generate", "generate_text"),
    "jaxpack.model.config": ("Llama3RopeScaling", "ModelConfig", "RopeConfig"),
    "jaxpack.model.lora": ("add_lora",),
    "jaxpack.model.transformer": ("Transformer",),
    "jaxpack.model.vocab": ("resize_vocab",),
    "jaxpack.objectives.objective": ("HiddenObjective", "LogProbObjective", "Objective", "Sums"),
    "jaxpack.objectives.sft": ("SFT",),
    "jaxpack.parallel.processes": ("initialize_distributed",),
    "jaxpack.planning.inspect": ("Inspection", "LayoutEstimate", "inspect"),
    "jaxpack.settings": ("GenerateConfig", "LoraConfig", "TrainConfig"),
    "jaxpack.train.callbacks": ("Callback", "EarlyStopping"),
    "jaxpack.train.evaluation": ("evaluate",),
    "jaxpack.train.report": ("write_report",),
    "jaxpack.train.step": ("TrainState", "make_train_step", "split_trainable"),
    "jaxpack.train.trainer": ("Trainer", "TrainResult"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_RENAMED = {"Promise": "LayoutEstimate"}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value
    if name in _RENAMED:
        warnings.warn(f"jaxpack.{name} is now jaxpack.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
