"""What a model is, what LoRA adds to it, and how a run trains it: frozen dataclasses, checked when they are made."""

import dataclasses
import math
from typing import Any, Literal, get_args

from jaxpack.errors import InputError

PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Remat = Literal["offload", "full", "keep_attention", "keep_projections", "none"]  # from the frugal to the fast
RematSetting = Literal["auto", Remat]  # what a user asks for; a step is made with one of the others
Implementation = Literal["xla", "pallas"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: the base, and Llama 3's rescaling of long wavelengths where `llama3` is set."""

    theta: float
    llama3: "Llama3RopeScaling | None" = None

    def __post_init__(self) -> None:
        _check(_is_positive(self.theta), "rope_theta", "must be a positive number", self.theta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency scaling, with the names that `config.json` uses."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check(_is_positive(value), field.name, "must be a positive number", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. `torch_bridge` makes one from a Hugging Face `config.json`."""

    architecture: str  # the Hugging Face class, which names the tensors of a checkpoint: "Qwen3ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # equal to `num_heads`: multi-head; fewer: grouped queries; 1: multi-query
    head_dim: int  # not always hidden_size / num_heads
    rms_norm_eps: float
    rope: RopeConfig
    qk_norm: bool  # RMSNorm of each query and key head before the rotation (Qwen3)
    tie_word_embeddings: bool
    name_or_path: str = ""  # where the weights came from; adapters name it as their base model

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in sizes:
            value = getattr(self, name)
            _check(isinstance(value, int) and value >= 1, name, "must be a whole number of at least 1", value)
        _check(self.head_dim % 2 == 0, "head_dim", "must be even", self.head_dim)
        _check(_is_positive(self.rms_norm_eps), "rms_norm_eps", "must be a positive number", self.rms_norm_eps)
        _check(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"must be a multiple of `num_kv_heads` ({self.num_kv_heads})",
            self.num_heads,
        )


def _option(default: Any, meaning: str) -> Any:
    """A field that a user sets: its default, and what it means, in the words of `--help`."""
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685), with the names and the meaning that PEFT gives them."""

    r: int = _option(16, "Rank of the adapters.")
    lora_alpha: float = _option(32, "Adapters are scaled by alpha / r.")
    lora_dropout: float = _option(0.0, "Dropout on the input of the adapters, one mask for those that share it.")
    use_rslora: bool = _option(False, "Scale by alpha / sqrt(r) instead (https://arxiv.org/abs/2312.03732).")
    target_modules: str | tuple[str, ...] = _option(
        "all-linear", "Projections with an adapter, such as 'q_proj,v_proj', or 'all-linear': all but the head."
    )
    seed: int = _option(42, "Of lora_A. lora_B starts at zero, so step 0 equals the base model.")

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self.r >= 1, "r", "must be at least 1", self.r)
        _check(_is_positive(self.lora_alpha), "lora_alpha", "must be a positive number", self.lora_alpha)
        _check(0 <= self.lora_dropout < 1, "lora_dropout", "must be in [0, 1)", self.lora_dropout)
        if self.target_modules != "all-linear":
            names = self.target_modules
            if isinstance(names, str):
                names = [name.strip() for name in names.split(",") if name.strip()]
            names = tuple(names)
            _check(names != (), "target_modules", "must name at least one module", names)
            object.__setattr__(self, "target_modules", names)

    @property
    def scaling(self) -> float:
        """What `lora_B @ lora_A @ x` is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains. Names and meaning are those of TRL's `SFTConfig` where it has them.

    A step takes `per_device_train_batch_size * gradient_accumulation_steps` rows with `packing`, as many documents
    without. Without packing these documents lie end to end in one row (`padding_free=True`), or in one padded row
    each (`padding_free=False`); the loss is the same.
    """

    output_dir: str | None = _option(None, "Where `metrics.jsonl` goes; None writes nothing.")
    max_length: int = _option(1024, "Tokens in a packed row, and the most that is read of a document.")
    packing: bool = _option(False, "Lay documents end to end in full rows of max_length.")
    packing_strategy: PackingStrategy = _option(
        "bfd",
        "bfd: longer documents are truncated; bfd_split: they are cut in pieces; wrapped: cut wherever a row ends.",
    )
    padding_free: bool = _option(True, "Without packing: lay the documents of a step end to end in one row.")
    per_device_train_batch_size: int = _option(8, "Rows (packing) or documents in a micro-batch.")
    gradient_accumulation_steps: int = _option(1, "Micro-batches in a step.")
    num_train_epochs: float = _option(3.0, "Passes over the data.")
    max_steps: int = _option(-1, "Steps to run, where positive, instead of num_train_epochs.")
    learning_rate: float = _option(2e-5, "Peak of the schedule; LoRA wants about ten times the default.")
    lr_scheduler_type: Schedule = _option("linear", "After warm-up: linear or cosine decay to 0, or none.")
    warmup_steps: float = _option(0, "Steps of linear warm-up from 0; below 1, a share of all steps.")
    weight_decay: float = _option(0.0, "AdamW's; norm scales do not decay.")
    adam_beta1: float = _option(0.9, "AdamW's.")
    adam_beta2: float = _option(0.999, "AdamW's.")
    adam_epsilon: float = _option(1e-8, "AdamW's.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this global norm; 0 does not clip.")
    logging_steps: int = _option(10, "Steps between two lines of metrics.")
    seed: int = _option(42, "Of the data's order and of dropout (on the command line, of new adapters too).")
    dataset_text_field: str = _option("text", "Key of plain text in a row.")
    assistant_only_loss: bool = _option(True, "Train on the assistant's turns of messages; if not, on every token.")
    remat: RematSetting = _option(
        "auto",
        "What the backward pass recomputes: every layer (full), all of it but attention, all but attention and the "
        "projections, or nothing (none): each takes less time and more memory than the one before. With offload, every "
        "layer, from inputs that wait in the host's memory. With auto, the fastest that is predicted to fit on a GPU, "
        "and full on a CPU without a memory_limit.",
    )
    memory_limit: float | None = _option(
        None, "GiB of the device's memory that remat auto may fill; None for what is free, less 9 % for safety."
    )
    implementation: Implementation | None = _option(
        None, "Of all kernels: xla, or pallas (interpreted without a GPU). None takes the faster on each device."
    )
    compilation_cache_dir: str = _option(
        "auto",
        "Folder that keeps compiled programs for the next run, or none. auto: the one that JAX is set to "
        "(JAX_COMPILATION_CACHE_DIR), else ~/.cache/jaxpack/programs (within XDG_CACHE_HOME, where that is set).",
    )

    def __post_init__(self) -> None:
        _check_types(self)
        _check(
            self.max_length >= 2,
            "max_length",
            "must be at least 2 (one token to read, one to predict)",
            self.max_length,
        )
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            _check(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        _check(
            self.max_steps > 0 or self.max_steps == -1,
            "max_steps",
            "must be positive, or -1 for whole epochs",
            self.max_steps,
        )
        for name in ("num_train_epochs", "learning_rate", "adam_epsilon"):
            _check(_is_positive(getattr(self, name)), name, "must be a positive number", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed"):
            value = getattr(self, name)
            _check(value == 0 or _is_positive(value), name, "must be 0 or a positive number", value)
        for name in ("adam_beta1", "adam_beta2"):
            _check(0 <= getattr(self, name) < 1, name, "must be in [0, 1)", getattr(self, name))
        if self.lr_scheduler_type == "constant":
            _check(
                self.warmup_steps == 0,
                "warmup_steps",
                "must be 0 with 'constant' (see 'constant_with_warmup')",
                self.warmup_steps,
            )
        folder = self.compilation_cache_dir
        _check(
            isinstance(folder, str) and folder, "compilation_cache_dir", "must be a folder, 'auto' or 'none'", folder
        )
        if self.memory_limit is not None:
            _check(_is_positive(self.memory_limit), "memory_limit", "must be a positive number", self.memory_limit)
            _check(self.remat == "auto", "memory_limit", "must be None unless `remat` is 'auto'", self.memory_limit)
        choices = {"packing_strategy": PackingStrategy, "lr_scheduler_type": Schedule, "remat": RematSetting}
        if self.implementation is not None:
            choices["implementation"] = Implementation
        for name, values in choices.items():
            allowed = get_args(values)
            _check(getattr(self, name) in allowed, name, f"must be one of {allowed}", getattr(self, name))


def _check_types(config: Any) -> None:
    """Every plain field holds what it says: Python would take 2.5 rows, or "no" for true."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            _check(type(value) is int, field.name, "must be a whole number", value)
        elif field.type is float:
            _check(type(value) in (int, float), field.name, "must be a number", value)
        elif field.type is bool:
            _check(type(value) is bool, field.name, "must be true or false", value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _check(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise InputError(f"`{name}` {rule}, got {value!r}.")
