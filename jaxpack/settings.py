"""Holds the settings of adapters, runs and generation: frozen dataclasses that check their values when created."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np

from jaxpack.constants import (
    LANES,
    WHOLE_MODULES,
    Destination,
    Implementation,
    Layout,
    PackingStrategy,
    RematSetting,
    Schedule,
)
from jaxpack.utils.checks import check, is_positive

_SAVE_STEPS = 500


def _option(default: Any, meaning: str) -> Any:
    """Declares a setting: `default` is its default value, `meaning` its text in `--help`."""
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Holds the settings of low-rank adapters (https://arxiv.org/abs/2106.09685).

    The settings have PEFT's names and meaning, with one exception: a string of `target_modules` is a list of names with
    commas between them, not a pattern.
    """

    r: int = _option(16, "Rank of the adapters.")
    lora_alpha: float = _option(32, "Adapters are scaled by alpha / r.")
    lora_dropout: float = _option(0.0, "Dropout on the input of the adapters, one mask for those that share it.")
    use_rslora: bool = _option(False, "Scale by alpha / sqrt(r) instead (https://arxiv.org/abs/2312.03732).")
    target_modules: str | tuple[str, ...] = _option(
        "all-linear", "Projections with an adapter, such as 'q_proj,v_proj', or 'all-linear': all but the head."
    )
    rank_pattern: str | tuple[tuple[str, int], ...] = _option("", "Other ranks, of projections: 'q_proj=8,v_proj=4'.")
    alpha_pattern: str | tuple[tuple[str, float], ...] = _option("", "Other alphas, of projections, in the same way.")
    modules_to_save: str | tuple[str, ...] = _option(
        "", "Matrices to train whole, beside the adapters: 'lm_head', 'embed_tokens'; both of them where they are tied."
    )
    seed: int = _option(42, "Of lora_A. lora_B starts at zero, so step 0 equals the base model.")

    def __post_init__(self) -> None:
        _check_types(self)
        _check_seed(self.seed)
        check(self.r >= 1, "r", "must be at least 1", self.r)
        check(is_positive(self.lora_alpha), "lora_alpha", "must be a positive number", self.lora_alpha)
        for name, rule in (("rank_pattern", "whole numbers of at least 1"), ("alpha_pattern", "positive numbers")):
            object.__setattr__(self, name, _pattern(name, getattr(self, name), rule, int if "whole" in rule else float))
        whole = () if self.modules_to_save is None else self.modules_to_save  # PEFT writes None for no modules
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", whole))
        unknown = [name for name in self.modules_to_save if name not in WHOLE_MODULES]
        check(not unknown, "modules_to_save", f"must be among {WHOLE_MODULES}", unknown)
        check(0 <= self.lora_dropout < 1, "lora_dropout", "must be in [0, 1)", self.lora_dropout)
        if self.target_modules != "all-linear":
            names = _names("target_modules", self.target_modules)
            check(names != (), "target_modules", "must name at least one module", names)
            object.__setattr__(self, "target_modules", names)

    @property
    def scaling(self) -> float:
        """Returns the factor of `lora_B @ lora_A @ x` for projections without a pattern of their own."""
        return self.scaling_of("")

    def rank_of(self, projection: str) -> int:
        """Returns the rank of a projection's adapter."""
        return dict(self.rank_pattern).get(projection, self.r)

    def scaling_of(self, projection: str) -> float:
        """Returns the factor of `lora_B @ lora_A @ x` for a projection."""
        rank, alpha = self.rank_of(projection), dict(self.alpha_pattern).get(projection, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Holds the settings of a training run. They have the names and meaning of TRL's `SFTConfig` where it has them.

    An optimizer step takes `per_device_train_batch_size * gradient_accumulation_steps` rows with `packing`, and as many
    documents without it. Without `packing`, the documents of a micro-batch lie end to end in one row
    (`padding_free=True`), or in one padded row each (`padding_free=False`); the loss is the same.
    """

    output_dir: str | None = _option(None, "Where metrics.jsonl, report.md and checkpoints/ go; None writes nothing.")
    max_length: int = _option(1024, "Tokens in a packed row, and the most that is read of a document, or of its piece.")
    packing: bool = _option(False, "Lay documents end to end in full rows of max_length.")
    packing_strategy: PackingStrategy = _option(
        "bfd",
        "bfd: longer documents are truncated; bfd_split: they are cut in pieces; wrapped: cut wherever a row ends.",
    )
    padding_free: bool = _option(True, "Without packing: lay the documents of a micro-batch end to end in one row.")
    per_device_train_batch_size: int = _option(8, "Rows (packing) or documents in a micro-batch.")
    gradient_accumulation_steps: int = _option(1, "Micro-batches in a step.")
    num_train_epochs: float = _option(3.0, "Passes over the data.")
    max_steps: int = _option(-1, "Steps to run, where positive, instead of num_train_epochs.")
    learning_rate: float = _option(2e-5, "Peak of the schedule; LoRA wants about ten times the default.")
    lr_scheduler_type: Schedule = _option("linear", "After warm-up: linear or cosine decay to 0, or none.")
    warmup_steps: float = _option(0, "Steps of linear warm-up from 0; below 1, a share of all steps.")
    weight_decay: float = _option(0.0, "AdamW's; norm scales and biases do not decay.")
    adam_beta1: float = _option(0.9, "AdamW's.")
    adam_beta2: float = _option(0.999, "AdamW's.")
    adam_epsilon: float = _option(1e-8, "AdamW's.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this global norm; 0 does not clip.")
    logging_steps: int = _option(10, "Steps between two lines of metrics.")
    report_to: str | tuple[str, ...] | None = _option(
        "none", "Where metrics go, beside metrics.jsonl: tensorboard, wandb, both with a comma between, or none."
    )
    eval_steps: int | None = _option(
        None, "Steps between two evaluations, and one after the last step; None takes those of save_steps."
    )
    save_steps: int = _option(
        _SAVE_STEPS,
        "Steps between two checkpoints, and one after the last step; the default is rounded up to a multiple of "
        "eval_steps; 0 saves that of a run that is stopped (Ctrl-C, SIGTERM) and no other.",
    )
    save_total_limit: int = _option(2, "The last checkpoints that are kept; that of the lowest eval loss is kept, too.")
    resume_from_checkpoint: str | None = _option(
        None,
        "The folder of a checkpoint to go on from, or of a run, for its newest; or latest: the newest in output_dir, "
        "or from the start without any.",
    )
    seed: int = _option(42, "Of the data's order and of dropout (on the command line, of new adapters too).")
    dataset_text_field: str = _option("text", "Key of plain text; another than text is read whatever else rows have.")
    assistant_only_loss: bool = _option(True, "Train on the assistant's turns of messages; if not, on all of them.")
    remat: RematSetting = _option(
        "auto",
        "What the backward pass recomputes: every layer (full), all of it but attention, all but attention and the "
        "projections, or nothing (none): each takes less time and more memory than the one before. With offload, every "
        "layer, from what waits in the host's memory, and with offload_heads from more of it. With auto, the fastest "
        "that is predicted to fit on a GPU, and full on a CPU without a memory_limit.",
    )
    memory_limit: float | None = _option(
        None, "GiB of the device's memory that remat auto may fill; None for what is free, less 9 % for safety."
    )
    implementation: Implementation | None = _option(
        None,
        "Of all kernels: xla, or pallas (interpreted without a GPU; projections of odd sizes, or ranks above 256, stay "
        "XLA's). None takes the faster on each device.",
    )
    compilation_cache_dir: str = _option(
        "auto",
        "Folder that keeps compiled programs for the next run, or none. auto: the one that JAX is set to "
        "(JAX_COMPILATION_CACHE_DIR), else ~/.cache/jaxpack/programs (within XDG_CACHE_HOME, where that is set).",
    )

    def __post_init__(self) -> None:
        _check_types(self)
        check(
            self.max_length >= 2,
            "max_length",
            "must be at least 2 (one token to read, one to predict)",
            self.max_length,
        )
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_total_limit"):
            check(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        object.__setattr__(self, "report_to", _destinations(self.report_to))
        check(self.output_dir != "", "output_dir", "must be a folder, or None", self.output_dir)
        for name in ("output_dir", "resume_from_checkpoint", "compilation_cache_dir"):
            folder = getattr(self, name)
            object.__setattr__(self, name, folder if folder is None else os.path.expanduser(folder))
        check(
            not self.report_to or self.output_dir is not None,
            "report_to",
            "must be 'none' where there is no `output_dir`",
            self.report_to,
        )
        if self.eval_steps is not None:
            whole = type(self.eval_steps) is int and self.eval_steps >= 1
            check(whole, "eval_steps", "must be a whole number of at least 1, or None", self.eval_steps)
        if self.resume_from_checkpoint is not None:
            resumed = self.resume_from_checkpoint
            check(resumed != "", "resume_from_checkpoint", "must be a folder or 'latest'", resumed)
            check(
                self.resume_from_checkpoint != "latest" or self.output_dir is not None,
                "resume_from_checkpoint",
                "must be a folder where there is no `output_dir`",
                self.resume_from_checkpoint,
            )
        check(not self.packing or self.padding_free, "padding_free", "must be true with `packing`", self.padding_free)
        row = self.max_length if self.packing else LANES
        positions = self.per_device_train_batch_size * self.gradient_accumulation_steps * row
        check(
            positions < 2**31,
            "per_device_train_batch_size",
            "times `gradient_accumulation_steps` times the length of a row must be below 2**31",
            positions,
        )
        check(
            self.max_steps > 0 or self.max_steps == -1,
            "max_steps",
            "must be positive, or -1 for whole epochs",
            self.max_steps,
        )
        for name in ("num_train_epochs", "learning_rate", "adam_epsilon"):
            check(is_positive(getattr(self, name)), name, "must be a positive number", getattr(self, name))
        _check_seed(self.seed)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "save_steps"):
            value = getattr(self, name)
            check(value == 0 or is_positive(value), name, "must be 0 or a positive number", value)
        for name in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, name) < 1, name, "must be in [0, 1)", getattr(self, name))
        if self.lr_scheduler_type == "constant":
            check(
                self.warmup_steps == 0,
                "warmup_steps",
                "must be 0 with 'constant' (see 'constant_with_warmup')",
                self.warmup_steps,
            )
        folder = self.compilation_cache_dir
        check(folder != "", "compilation_cache_dir", "must be a folder, 'auto' or 'none'", folder)
        if self.memory_limit is not None:
            check(is_positive(self.memory_limit), "memory_limit", "must be a positive number", self.memory_limit)
            check(self.remat == "auto", "memory_limit", "must be None unless `remat` is 'auto'", self.memory_limit)
        choices = {"packing_strategy": PackingStrategy, "lr_scheduler_type": Schedule, "remat": RematSetting}
        if self.implementation is not None:
            choices["implementation"] = Implementation
        for name, values in choices.items():
            allowed = get_args(values)
            check(getattr(self, name) in allowed, name, f"must be one of {allowed}", getattr(self, name))

    @property
    def layout(self) -> Layout:
        """Returns the layout that `packing` and `padding_free` select."""
        if self.packing:
            return "packed"
        return "padding-free" if self.padding_free else "padded"

    @property
    def steps_between_saves(self) -> int:
        """Returns `save_steps`; its default is rounded up to a multiple of `eval_steps`.

        So each checkpoint has an eval loss.
        """
        is_rounded = self.eval_steps is not None and self.save_steps == _SAVE_STEPS
        return -(-self.save_steps // self.eval_steps) * self.eval_steps if is_rounded else self.save_steps

    def in_layout(self, layout: Layout, rows: int) -> "TrainConfig":
        """Returns the same run in another layout, with `rows` packed rows or documents in a micro-batch."""
        return dataclasses.replace(
            self,
            packing=layout == "packed",
            padding_free=layout != "padded",
            per_device_train_batch_size=rows,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Holds the settings of text generation, named as in transformers' `GenerationConfig` where it has them."""

    max_new_tokens: int = _option(128, "Tokens to write after each prompt, unless it ends before.")
    temperature: float = _option(0.0, "Logits are divided by it before a token is drawn; 0 takes the likeliest.")
    top_k: int | None = _option(None, "Draw from so many likeliest tokens only.")
    top_p: float | None = _option(None, "Draw from the fewest likeliest tokens that have this share only.")
    seed: int = _option(0, "Of what is drawn; each prompt draws for itself.")
    batch_size: int = _option(8, "Prompts that are generated from at a time.")

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("max_new_tokens", "batch_size"):
            check(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        _check_seed(self.seed)
        value = self.temperature
        check(value == 0 or is_positive(value), "temperature", "must be 0 or a positive number", value)
        k, p = self.top_k, self.top_p
        check(k is None or (type(k) is int and k >= 1), "top_k", "must be a whole number of at least 1", k)
        check(p is None or (is_positive(p) and p <= 1), "top_p", "must be in (0, 1]", p)
        for name in ("top_k", "top_p"):
            value = getattr(self, name)
            check(value is None or self.temperature > 0, name, "must be None unless `temperature` is above 0", value)


def _names(field: str, value: Any) -> tuple[str, ...]:
    """Returns the names in a list, or in a string with commas between them."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    names = tuple(value) if isinstance(value, Iterable) else (value,)
    check(all(isinstance(name, str) for name in names), field, "must be names, in a list or with commas", value)
    return names


def _destinations(value: Any) -> tuple[str, ...]:
    """Returns the destinations that `report_to` names, each once."""
    names = list(_names("report_to", value)) if isinstance(value, str | tuple | list) else [value]
    if names in (["none"], [None]):
        return ()
    allowed = get_args(Destination)
    check(all(name in allowed for name in names), "report_to", f"must be 'none' or among {allowed}", value)
    return tuple(dict.fromkeys(names))


def _pattern(name: str, value: Any, rule: str, kind: type) -> tuple[tuple[str, Any], ...]:
    """Returns pairs of projection and number, read from a mapping, pairs, or a string such as 'q_proj=8,v_proj=4'."""
    try:
        if isinstance(value, str):
            pairs = [one.split("=") for one in _names(name, value)]
            pairs = [(key.strip(), kind(number)) for key, number in pairs]
        else:
            pairs = [(key, number) for key, number in (value.items() if isinstance(value, Mapping) else value)]
        allowed = (int,) if kind is int else (int, float)
        whole = all(isinstance(key, str) and type(number) in allowed and is_positive(number) for key, number in pairs)
        whole = whole and len(dict(pairs)) == len(pairs)  # no name occurs twice
    except (TypeError, ValueError):
        whole = False
    check(whole, name, f"must be {rule} by projection, such as 'q_proj=8,v_proj=4'", value)
    return tuple(pairs)


def _check_types(config: Any) -> None:
    """Refuses values of the wrong type, since Python itself would accept 2.5 rows, or "no" as true.

    NumPy scalars are converted to Python numbers, and paths to text.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, np.generic | os.PathLike):
            value = value.item() if isinstance(value, np.generic) else os.fspath(value)
            object.__setattr__(config, field.name, value)
        if field.type is int:
            check(type(value) is int, field.name, "must be a whole number", value)
        elif field.type is float:
            check(type(value) in (int, float), field.name, "must be a number", value)
        elif field.type is bool:
            check(type(value) is bool, field.name, "must be true or false", value)
        elif field.type is str:
            check(isinstance(value, str), field.name, "must be text", value)
        elif field.type == str | None:
            check(value is None or isinstance(value, str), field.name, "must be text or None", value)


def _check_seed(seed: int) -> None:
    check(0 <= seed < 2**32, "seed", "must be in [0, 2**32)", seed)
