"""Holds the settings of adapters, runs and generation: frozen dataclasses that check their values when created."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np

from jaxpack.arguments import OPTIMIZERS, SCHEDULES, by_name, read_arguments
from jaxpack.constants import (
    LANES,
    POLYNOMIAL_END,
    WHOLE_MODULES,
    Destination,
    Implementation,
    Layout,
    Offload,
    Optim,
    PackingStrategy,
    RematSetting,
    Schedule,
)
from jaxpack.errors import InputError
from jaxpack.utils.checks import check, check_parts, is_date, is_positive
from jaxpack.utils.foreign_names import answers_unknown_names

_SAVE_STEPS = 500
_MODULE = re.compile(r"[\w-]+(\.[\w-]+)*")  # a name, which is no pattern: as one, it would match the same modules
_RANGE = re.compile(r"\d{1,9}( *- *\d{1,9})?", re.ASCII)
_MAX_LAYERS = 10_000
# Booleans, as Python, settings files and the command line write them.
_OFFLOADS = {True: "on", False: "off", "true": "on", "false": "off"}
# Other names of the optimizers in transformers and TRL.
_OPTIMS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "lion_32bit": "lion",
}


def _option(default: Any, meaning: str) -> Any:
    """Declares a setting: `default` is its default value, `meaning` its text in `--help`."""
    return dataclasses.field(default=default, metadata={"help": meaning})


@answers_unknown_names
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Holds the settings of low-rank adapters (https://arxiv.org/abs/2106.09685).

    The settings have PEFT's names and meaning. In addition, a string that holds nothing but names with commas between
    them is a list of names, also in `target_modules` and `exclude_modules`. Any other string there is a regular
    expression that must match the whole path of a module, such as "model.layers.3.self_attn.q_proj".

    Example:
      >>> from jaxpack import LoraConfig
      >>> config = LoraConfig(r=32, lora_alpha=64, target_modules="q_proj,v_proj", layers_to_transform="0-3,7")
      >>> config.target_modules, config.layers_to_transform
      (('q_proj', 'v_proj'), (0, 1, 2, 3, 7))
    """

    r: int = _option(16, "Rank of the adapters. A higher rank can learn more, and takes more memory and time.")
    lora_alpha: float = _option(32, "Strength of the adapters: their output is multiplied by lora_alpha / rank.")
    lora_dropout: float = _option(
        0.0,
        "Dropout of the adapters: the probability, at least 0 and below 1, that a value of their input is set to 0 in "
        "training. Projections with the same input share one mask.",
    )
    use_rslora: bool = _option(
        False,
        "Multiply the adapters' output by lora_alpha / sqrt(rank) instead of lora_alpha / rank, as rank-stabilised "
        "LoRA does for high ranks (https://arxiv.org/abs/2312.03732).",
    )
    use_dora: bool = _option(
        False,
        "Also train the norm of each row of the adapted weights (DoRA, https://arxiv.org/abs/2402.09353). A step then "
        "takes longer: the norms are computed anew, and the projections' outputs are scaled in a pass of their own.",
    )
    target_modules: str | tuple[str, ...] = _option(
        "all-linear",
        "Projections that get an adapter: 'all-linear' for all except the output head and the experts; names with "
        "commas between them, such as 'q_proj,v_proj', each the end of a module's path; or a regular expression that "
        "must match the whole path, such as 'model.layers.[0-9].self_attn.(q|v)_proj'. Only by their names, also the "
        "output head ('lm_head') and the embedding ('embed_tokens').",
    )
    exclude_modules: str | tuple[str, ...] = _option(
        "",
        "Projections that get no adapter although target_modules chooses them: names with commas between them, or a "
        "regular expression, as in target_modules.",
    )
    layers_to_transform: str | int | tuple[int, ...] = _option(
        "",
        "Layers whose projections get adapters: numbers from 0 on, and ranges, such as '0-3,7'. Without it, all layers "
        "get them. Cannot be combined with a regular expression in target_modules, which can name layers itself.",
    )
    target_parameters: str | tuple[str, ...] = _option(
        "",
        "Experts' matrices that get an adapter, in a model with experts: 'mlp.experts.gate_up_proj', "
        "'mlp.experts.down_proj', or both with a comma between them. Each expert has its own factors, so this adds "
        "many parameters: 629 million for Qwen3-30B-A3B with rank 16.",
    )
    rank_pattern: str | tuple[tuple[str, int], ...] = _option(
        "", "Projections with a rank of their own, such as 'q_proj=8,v_proj=4'."
    )
    alpha_pattern: str | tuple[tuple[str, float], ...] = _option(
        "", "Projections with a lora_alpha of their own, such as 'q_proj=16,v_proj=8'."
    )
    modules_to_save: str | tuple[str, ...] = _option(
        "",
        "Matrices to train whole, in addition to the adapters: 'lm_head' (the output head), 'embed_tokens' (the "
        "embedding), or both with a comma between them. If the model ties the two, name both.",
    )
    seed: int = _option(
        42,
        "Seed for lora_A's initial random values. lora_B starts at zero, so before the first step the model equals its "
        "base model.",
    )

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
        parameters = () if self.target_parameters is None else self.target_parameters  # as for `modules_to_save`
        object.__setattr__(self, "target_parameters", _names("target_parameters", parameters))
        check(
            not (self.target_parameters and self.lora_dropout),
            "lora_dropout",
            "must be 0 with `target_parameters`, because experts' adapters have no dropout, as in PEFT",
            self.lora_dropout,
        )
        excluded = () if self.exclude_modules is None else self.exclude_modules  # as for `modules_to_save`
        object.__setattr__(self, "exclude_modules", _names_or_pattern("exclude_modules", excluded))
        object.__setattr__(self, "layers_to_transform", _layers(self.layers_to_transform))
        check(
            not (self.target_parameters and self.use_dora),
            "use_dora",
            "must be off with `target_parameters`, because experts' adapters have no magnitudes, as in PEFT",
            self.use_dora,
        )
        if self.target_modules != "all-linear":
            names = _names_or_pattern("target_modules", self.target_modules)
            named = names or self.target_parameters
            check(
                not (isinstance(names, str) and self.layers_to_transform),
                "layers_to_transform",
                f"must be left out beside the pattern {names!r} in `target_modules`, as in PEFT (name the layers in the"
                " pattern)",
                self.layers_to_transform,
            )
            check(
                named != (),
                "target_modules",
                "must name at least one module, or `target_parameters` a matrix of the experts",
                names,
            )
            object.__setattr__(self, "target_modules", names)
        check(
            not (self.target_parameters and self.layers_to_transform),
            "layers_to_transform",
            "must be left out beside `target_parameters`, to which PEFT does not apply it (name the layers in both"
            " lists, such as 'layers.3.mlp.experts.down_proj')",
            self.layers_to_transform,
        )

    @property
    def scaling(self) -> float:
        """Returns the factor that multiplies `lora_B @ lora_A @ x` in projections that no pattern names."""
        return self.scaling_of("")

    def rank_of(self, projection: str) -> int:
        """Returns the rank of a projection's adapter."""
        return by_name(self.rank_pattern).get(projection, self.r)

    def scaling_of(self, projection: str) -> float:
        """Returns the factor that multiplies `lora_B @ lora_A @ x` in a projection."""
        rank, alpha = self.rank_of(projection), by_name(self.alpha_pattern).get(projection, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@answers_unknown_names
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Holds the settings of a training run. Settings that are also in TRL's `SFTConfig` have the same name and meaning.

    An optimizer step takes `per_device_train_batch_size * gradient_accumulation_steps` rows with `packing`, and as many
    documents without it. Without `packing`, the documents of a micro-batch lie end to end in one row
    (`padding_free=True`), or in one padded row each (`padding_free=False`); the loss is the same.

    Example:
      >>> from jaxpack import TrainConfig
      >>> TrainConfig(packing=True, max_length=4096, learning_rate=2e-4, num_train_epochs=1).layout
      'packed'
    """

    output_dir: str | None = _option(
        None, "Folder for metrics.jsonl, about.json, report.md and checkpoints/. With None, a run writes no files."
    )
    max_length: int | None = _option(
        1024,
        "Maximum number of tokens in a packed row and in a document. Longer documents are truncated, or split if "
        "packing_strategy says so. None, which needs packing to be off, truncates no document.",
    )
    packing: bool = _option(
        False,
        "Pack documents end to end into full rows of max_length tokens, so that almost nothing is padding. Each token "
        "still sees only its own document.",
    )
    packing_strategy: PackingStrategy = _option(
        "bfd",
        "Treatment of documents longer than max_length with packing. 'bfd' truncates them; 'bfd_split' splits them "
        "into pieces; 'wrapped' fills the rows with the documents in their order, and splits a document wherever a row "
        "is full. With all three, the rows are shuffled.",
    )
    padding_free: bool = _option(
        True,
        "Without packing, lay the documents of a micro-batch end to end in one row. If this is off, each document gets "
        "a padded row of its own, which takes longer. The loss is the same.",
    )
    per_device_train_batch_size: int = _option(
        8, "Rows (with packing) or documents (without) in a micro-batch. A smaller value needs less memory."
    )
    gradient_accumulation_steps: int = _option(
        1, "Micro-batches in an optimizer step. A larger value makes the batch larger with little more memory."
    )
    num_train_epochs: float = _option(3.0, "Passes over the data; may be a fraction.")
    max_steps: int = _option(
        -1, "Optimizer steps to run, instead of num_train_epochs. -1 lets num_train_epochs decide."
    )
    streaming: bool = _option(
        False,
        "Read the training data while the run goes on, and hold only a window of it in memory. Needs packing and "
        "max_steps. The data may be larger than memory and disk, or have no end; after its last row, the run begins "
        "again with its first one.",
    )
    learning_rate: float = _option(
        2e-5, "Peak learning rate, reached at the end of the warm-up. LoRA needs about ten times the default."
    )
    lr_scheduler_type: Schedule = _option(
        "linear",
        "Learning rate after the warm-up: 'linear' or 'cosine' decay to 0, or no decay ('constant_with_warmup'). With "
        "'constant', there is no warm-up either. 'cosine_with_min_lr' ends at a learning rate above 0, "
        "'cosine_with_restarts' repeats the decay, 'polynomial' decays with a power, 'inverse_sqrt' with the square "
        "root of the steps, and 'warmup_stable_decay' stays at the peak and decays at the end. All are transformers' "
        "schedules, step by step.",
    )
    lr_scheduler_kwargs: str | tuple[tuple[str, int | float | str], ...] = _option(
        "",
        "Parameters of the schedule, such as 'num_cycles=2' or 'min_lr=1e-6', with transformers' names. 'cosine' and "
        "'cosine_with_restarts' take num_cycles; 'cosine_with_min_lr' needs min_lr or min_lr_rate; 'polynomial' takes "
        "lr_end and power; 'inverse_sqrt' takes timescale; 'warmup_stable_decay' needs num_decay_steps, and takes "
        "num_stable_steps, warmup_type, decay_type, min_lr_ratio and num_cycles.",
    )
    warmup_steps: float = _option(
        0, "Steps in which the learning rate rises linearly from 0. A value below 1 is a share of all steps."
    )
    optim: str = _option(
        "adamw",
        "Optimizer. 'adamw' keeps two float32 moments for each trained parameter. 'adamw_8bit' keeps them in 8 bits, "
        "as bitsandbytes does: 2 bytes a parameter instead of 8. The moments of the embedding, and of matrices with "
        "fewer than 4,096 elements, stay float32. 'lion' keeps one moment (4 bytes), and needs a smaller learning rate "
        "and a larger weight decay. 'adafactor' keeps only means over rows and columns, as transformers' Adafactor "
        "with a fixed learning rate. 'muon' keeps one moment, and orthogonalises the updates of the layers' matrices; "
        "everything else has AdamW. 'sgd' keeps nothing, or one moment with momentum (optim_args). The names "
        "'adamw_torch', 'adamw_torch_fused', 'adamw_bnb_8bit' and 'lion_32bit' of TRL and transformers mean the same.",
    )
    optim_args: str | tuple[tuple[str, int | float | str], ...] = _option(
        "",
        "Parameters of the optimizer, such as 'momentum=0.9,nesterov=true'. 'sgd' (momentum 0 by default) and 'muon' "
        "(momentum 0.95 and nesterov by default) take momentum and nesterov; other optimizers take none.",
    )
    loraplus_lr_ratio: float | None = _option(
        None,
        "Learning rate of the adapters' lora_B and magnitudes as a multiple of the learning rate of lora_A (LoRA+, "
        "https://arxiv.org/abs/2402.12354, whose authors take 16 with a smaller learning rate). None or 1 gives both "
        "the same.",
    )
    weight_decay: float = _option(0.0, "Weight decay of all optimizers. Norm scales and biases are not decayed.")
    adam_beta1: float = _option(
        0.9, "AdamW beta1: decay of the running mean of gradients. Lion's beta1 too: the mean's share in an update."
    )
    adam_beta2: float = _option(
        0.999,
        "AdamW beta2: decay of the running mean of squared gradients. With 'lion', decay of its moment; its authors "
        "take 0.99.",
    )
    adam_epsilon: float = _option(
        1e-8, "AdamW epsilon: added to the denominator of an update, so that it is never divided by zero."
    )
    max_grad_norm: float = _option(
        1.0, "Largest global norm of the gradients: larger gradients are scaled down to it. 0 turns clipping off."
    )
    label_smoothing_factor: float = _option(
        0.0,
        "Label smoothing: the share of the target's probability, at least 0 and below 1, that all tokens of the "
        "vocabulary get instead in the training loss. Evaluations report the plain cross entropy.",
    )
    neftune_noise_alpha: float | None = _option(
        None,
        "Noise on the embeddings in training (NEFTune, https://arxiv.org/abs/2310.05914, whose authors take 5 to 15): "
        "uniform, of at most neftune_noise_alpha / sqrt(length * hidden_size), where the length is that of each "
        "token's own document, packed or not. None adds no noise.",
    )
    z_loss_coef: float = _option(
        0.0,
        "Coefficient of the z-loss, the squared log-sum-exp of a token's logits, which keeps logits from drifting. It "
        "is added to the training loss of each target; 0 turns it off.",
    )
    router_aux_loss_coef: float = _option(
        0.0,
        "Coefficient of the load-balancing loss of a mixture of experts, which is least where all experts are used "
        "equally. It is added to the training loss; 0 turns it off.",
    )
    logging_steps: float = _option(
        10, "Optimizer steps from one line of metrics to the next. A value below 1 is a share of all steps, rounded up."
    )
    report_to: str | tuple[str, ...] | None = _option(
        "none",
        "Destinations of metrics in addition to metrics.jsonl: 'tensorboard', 'wandb', both with a comma between them, "
        "or 'none'.",
    )
    eval_steps: float | None = _option(
        None,
        "Optimizer steps from one evaluation to the next, if there is evaluation data. The last step is evaluated too. "
        "A value below 1 is a share of all steps, rounded up. None takes the value of save_steps.",
    )
    eval_on_start: bool = _option(False, "Also evaluate before the first step.")
    load_best_model_at_end: bool = _option(
        False,
        "At the end, take the weights of the checkpoint with the lowest eval loss, not the last ones. Needs evaluation "
        "data and an output folder.",
    )
    early_stopping_patience: int | None = _option(
        None,
        "Number of evaluations in a row without a lower eval loss after which the run ends. None runs all steps. Needs "
        "evaluation data.",
    )
    early_stopping_threshold: float = _option(
        0.0,
        "Amount by which an eval loss must be below the lowest one before it to count as lower. Needs "
        "early_stopping_patience.",
    )
    eval_split: float | None = _option(
        None,
        "Share of the training data's rows, above 0 and below 1, that is held out for evaluation instead of separate "
        "evaluation data. The seed decides which rows.",
    )
    save_steps: float = _option(
        _SAVE_STEPS,
        "Optimizer steps from one checkpoint to the next; there is also one after the last step. A value below 1 is a "
        "share of all steps, rounded up; a share and the default are then rounded up to a multiple of eval_steps. With "
        "0, a checkpoint is saved only if the run is stopped early (by Ctrl-C, SIGTERM or a callback).",
    )
    save_total_limit: int | None = _option(
        2,
        "Number of checkpoints to keep, counted from the newest. Older ones are deleted, except the one with the "
        "lowest eval loss. None keeps all of them.",
    )
    resume_from_checkpoint: str | None = _option(
        None,
        "Checkpoint to continue from: the folder of a checkpoint; the folder of a run, for its newest checkpoint; or "
        "'latest', for the newest one in output_dir (if there is none, the run starts from the beginning). If the "
        "newest is damaged, the run takes the one before; a damaged checkpoint that is named is refused.",
    )
    seed: int = _option(
        42,
        "Seed for the order of the data, dropout and noise; on the command line, also for new adapters' initial "
        "values.",
    )
    dataset_text_field: str = _option(
        "text",
        "Field of a row that holds plain text. If you set another name than 'text', this field is used even if the "
        "rows also have fields of another format.",
    )
    assistant_only_loss: bool = _option(
        True,
        "Train only on what the assistant writes in a conversation. If this is off, train on every token of the "
        "conversation, or of the completion if the row has one. With a chat template, rows of instruction and output "
        "are conversations, too.",
    )
    completion_only_loss: bool = _option(
        True,
        "In rows of prompt and completion, train only on the completion. If this is off, train on the prompt, too: on "
        "every token of texts, and on what the assistant writes in messages (on every token if assistant_only_loss is "
        "off).",
    )
    instruction_part: str | None = _option(
        None,
        "Text that begins each question in rows of plain text that a chat template has rendered before, such as "
        "'### Instruction:' or '<|im_start|>user\\n'. Needs response_part.",
    )
    response_part: str | None = _option(
        None,
        "Text that begins each answer in rows of rendered text, such as '### Response:' or "
        "'<|im_start|>assistant\\n'. Such rows are trained on only after it, up to the next question or to the end. "
        "Needs instruction_part. With None, rows of text are trained on as a whole.",
    )
    chat_template: str | None = _option(
        None,
        "Chat template, instead of the tokenizer's own: 'alpaca' or 'vicuna', which every base model takes; 'chatml', "
        "'gemma', 'llama3', 'phi3' or 'phi4', for models that have their special tokens; or a file with a Jinja "
        "template. It is saved with the tokenizer. The token with which it ends an answer becomes the EOS token. None "
        "keeps the tokenizer's template.",
    )
    chat_template_date: str | None = _option(
        None,
        "Date (YYYY-MM-DD) for chat templates that write today's date. With None, a run uses the day of its first "
        "start, and keeps it when it is resumed.",
    )
    allow_lost_thoughts: bool = _option(
        False,
        "Train on a last answer even if the chat template leaves out the thoughts that the row has for it. If this is "
        "off, such a row is refused. Thoughts that the template leaves out of earlier answers are counted and printed.",
    )
    remat: RematSetting = _option(
        "auto",
        "Choice between memory and time: the activations that the backward pass recomputes instead of keeping them. "
        "'full' recomputes every layer. 'keep_attention' recomputes everything but attention. 'keep_projections' "
        "recomputes everything but attention and the projections. 'none' recomputes nothing. In this order, each "
        "choice takes less time and more memory than the one before. 'offload' recomputes every layer from values that "
        "are kept in the host's memory; 'offload_heads' keeps more values there. 'auto' takes the fastest choice that "
        "is predicted to fit on the GPU; on a CPU without a memory_limit, it takes 'full'.",
    )
    offload_weights: str = _option(
        "auto",
        "Whether the frozen weights of all layers lie in the host's memory. Each layer is then copied to the GPU while "
        "the layer before it is computed, so that the GPU holds two layers at a time. Needs remat 'offload' or "
        "'offload_heads', which 'auto' then takes. 'auto' does this only if nothing faster is predicted to fit; 'on' "
        "(true) always does it, and 'off' (false) never.",
    )
    offload_embedding: str = _option(
        "auto",
        "Whether the embedding and the head lie in the host's memory, unless they are trained. The host takes the rows "
        "of a batch from the embedding, and the loss copies the head to the GPU in pieces. 'auto', 'on' and 'off' mean "
        "the same as for offload_weights.",
    )
    memory_limit: float | None = _option(
        None,
        "Device memory, in GiB, that a run with remat 'auto' may take. None takes the free memory, less 9 % for "
        "safety.",
    )
    mesh: str = _option(
        "auto",
        "Sizes of the mesh of devices, such as 'data=4', 'fsdp=8' or 'data=2,fsdp=4'; their product is the number of "
        "GPUs. Each device computes with its own rows. Along 'data' every device holds all weights; along 'fsdp' the "
        "devices share the matrices of the layers, their gradients and the optimizer's state. 'auto' takes all GPUs "
        "along 'data' if the weights fit on each, and else along 'fsdp'.",
    )
    implementation: Implementation | None = _option(
        None,
        "Implementation of all kernels: 'xla', or 'pallas', which is interpreted (and slow) without a GPU. Even with "
        "'pallas', projections of odd sizes or with ranks above 256 run in XLA. None takes the faster implementation "
        "on each device.",
    )
    compilation_cache_dir: str = _option(
        "auto",
        "Folder in which compiled programs are kept, so that the next run starts faster. With 'none', no programs are "
        "kept. 'auto' takes the folder that JAX is set to (JAX_COMPILATION_CACHE_DIR), or else "
        "~/.cache/jaxpack/programs (in XDG_CACHE_HOME, if that is set).",
    )

    def __post_init__(self) -> None:
        for name in ("offload_weights", "offload_embedding"):
            object.__setattr__(self, name, _OFFLOADS.get(getattr(self, name), getattr(self, name)))
        _check_types(self)
        check(
            self.max_length is None or self.max_length >= 2,
            "max_length",
            "must be at least 2 (one token to read, one to predict)",
            self.max_length,
        )
        check(
            self.max_length is not None or not self.packing,
            "max_length",
            "must be a number with `packing`, whose rows have that length, such as 4096",
            self.max_length,
        )
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, "must be at least 1", value)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            _set_steps(self, name)
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        rule = "must be a whole number of at least 1, or None"
        check(patience is None or (type(patience) is int and patience >= 1), "early_stopping_patience", rule, patience)
        check(
            threshold == 0 or is_positive(threshold),
            "early_stopping_threshold",
            "must be 0 or a positive number",
            threshold,
        )
        check(
            threshold == 0 or patience is not None,
            "early_stopping_threshold",
            "must be 0 without `early_stopping_patience`",
            threshold,
        )
        check(
            self.eval_split is None or 0 < self.eval_split < 1,
            "eval_split",
            "must be a share of the rows above 0 and below 1, such as 0.02",
            self.eval_split,
        )
        check(
            self.chat_template_date is None or is_date(self.chat_template_date),
            "chat_template_date",
            "must be a date such as 2026-01-31, or None",
            self.chat_template_date,
        )
        object.__setattr__(self, "report_to", _destinations(self.report_to))
        object.__setattr__(self, "optim", _optim(self.optim))
        object.__setattr__(self, "optim_args", _optimizer_arguments(self))
        check(self.output_dir != "", "output_dir", "must be a folder, or None", self.output_dir)
        check_parts(self.instruction_part, self.response_part)
        check(self.chat_template != "", "chat_template", "must be a name or a file, or None", self.chat_template)
        for name in ("output_dir", "resume_from_checkpoint", "compilation_cache_dir", "chat_template"):
            folder = getattr(self, name)
            object.__setattr__(self, name, folder if folder is None else os.path.expanduser(folder))
        check(
            not self.report_to or self.output_dir is not None,
            "report_to",
            "must be 'none' unless `output_dir` names a folder for the metrics",
            self.report_to,
        )
        check(
            not self.load_best_model_at_end or self.output_dir is not None,
            "load_best_model_at_end",
            "must be false unless `output_dir` names a folder for the checkpoints",
            self.load_best_model_at_end,
        )
        if self.resume_from_checkpoint is not None:
            resumed = self.resume_from_checkpoint
            check(resumed != "", "resume_from_checkpoint", "must be a folder or 'latest'", resumed)
            check(
                self.resume_from_checkpoint != "latest" or self.output_dir is not None,
                "resume_from_checkpoint",
                "must be the folder of a checkpoint or of a run if `output_dir` is not set ('latest' takes the newest "
                "checkpoint in `output_dir`)",
                self.resume_from_checkpoint,
            )
        check(not self.packing or self.padding_free, "padding_free", "must be true with `packing`", self.padding_free)
        row = (self.max_length if self.packing else None) or LANES
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
            "must be positive, or -1 to let `num_train_epochs` decide",
            self.max_steps,
        )
        if self.streaming:
            check(
                self.packing, "packing", "must be true with `streaming`, which packs a window at a time", self.packing
            )
            rule = "must be above 0 with `streaming`, because the number of rows is not known"
            check(self.max_steps > 0, "max_steps", rule, self.max_steps)
            rule = "must be None with `streaming`: give evaluation data of its own"
            check(self.eval_split is None, "eval_split", rule, self.eval_split)
        for name in ("num_train_epochs", "learning_rate", "adam_epsilon"):
            check(is_positive(getattr(self, name)), name, "must be a positive number", getattr(self, name))
        _check_seed(self.seed)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "router_aux_loss_coef", "z_loss_coef"):
            value = getattr(self, name)
            check(value == 0 or is_positive(value), name, "must be 0 or a positive number", value)
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            check(0 <= getattr(self, name) < 1, name, "must be in [0, 1)", getattr(self, name))
        if self.lr_scheduler_type == "constant":
            check(
                self.warmup_steps == 0,
                "warmup_steps",
                "must be 0 with `lr_scheduler_type` 'constant' (use 'constant_with_warmup' to have both)",
                self.warmup_steps,
            )
        if self.loraplus_lr_ratio is not None:
            ratio = self.loraplus_lr_ratio
            check(
                is_positive(ratio) and ratio is not True,
                "loraplus_lr_ratio",
                "must be a positive number or None",
                ratio,
            )
            object.__setattr__(self, "loraplus_lr_ratio", None if ratio == 1 else ratio)
        if self.neftune_noise_alpha is not None:
            alpha = self.neftune_noise_alpha
            rule = "must be 0 or a positive number, or None"
            check((alpha == 0 or is_positive(alpha)) and type(alpha) is not bool, "neftune_noise_alpha", rule, alpha)
            object.__setattr__(self, "neftune_noise_alpha", float(alpha) or None)
        folder = self.compilation_cache_dir
        check(folder != "", "compilation_cache_dir", "must be a folder, 'auto' or 'none'", folder)
        if self.memory_limit is not None:
            check(is_positive(self.memory_limit), "memory_limit", "must be a positive number", self.memory_limit)
            check(self.remat == "auto", "memory_limit", "must be None unless `remat` is 'auto'", self.memory_limit)
        choices = {"packing_strategy": PackingStrategy, "lr_scheduler_type": Schedule, "remat": RematSetting}
        choices |= {"offload_weights": Offload, "offload_embedding": Offload}
        if self.implementation is not None:
            choices["implementation"] = Implementation
        for name, values in choices.items():
            allowed = get_args(values)
            check(getattr(self, name) in allowed, name, f"must be one of {allowed}", getattr(self, name))
        object.__setattr__(self, "lr_scheduler_kwargs", _schedule_arguments(self))
        check(
            self.offload_weights != "on" or self.remat in ("auto", "offload", "offload_heads"),
            "remat",
            "must be 'auto', 'offload' or 'offload_heads' if `offload_weights` is 'on'",
            self.remat,
        )

    @property
    def layout(self) -> Layout:
        """Returns the layout that `packing` and `padding_free` select."""
        if self.packing:
            return "packed"
        return "padding-free" if self.padding_free else "padded"

    @property
    def steps_between_saves(self) -> float:
        """Returns `save_steps`; its default is rounded up to a multiple of `eval_steps`.

        Each checkpoint then has an eval loss.
        """
        if self.eval_steps is None or self.save_steps != _SAVE_STEPS:
            return self.save_steps
        return _multiple(self.save_steps, self.eval_steps)

    def in_whole_steps(self, num_steps: int) -> "TrainConfig":
        """Returns the same run, with the number of steps in place of each `_steps` that is a share of all steps.

        Example:
          >>> TrainConfig(logging_steps=0.1, save_steps=0).in_whole_steps(25).logging_steps
          3
        """
        names = [name for name in ("logging_steps", "eval_steps", "save_steps") if _is_share(getattr(self, name))]
        whole = {name: math.ceil(num_steps * getattr(self, name)) for name in names}
        every = whole.get("eval_steps", self.eval_steps)
        if "save_steps" in whole and every is not None:
            whole["save_steps"] = _multiple(whole["save_steps"], every)
        return dataclasses.replace(self, **whole) if whole else self

    def cut_at(self, longest: int) -> "TrainConfig":
        """Returns the same run, with `longest`, the length of the longest document, in place of no `max_length`."""
        return dataclasses.replace(self, max_length=max(2, longest)) if self.max_length is None else self

    @property
    def length_limit(self) -> int:
        """Returns `max_length`, in a run that `cut_at` has given a number."""
        assert self.max_length is not None
        return self.max_length

    def in_layout(self, layout: Layout, rows: int) -> "TrainConfig":
        """Returns the same run in another layout, with `rows` packed rows or documents in a micro-batch."""
        return dataclasses.replace(
            self,
            packing=layout == "packed",
            padding_free=layout != "padded",
            per_device_train_batch_size=rows,
        )


@answers_unknown_names
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Holds the settings of text generation. Settings that are also in transformers' `GenerationConfig` have its names.

    Example:
      >>> from jaxpack import GenerateConfig
      >>> GenerateConfig(max_new_tokens=64, temperature=0.7, top_p=0.9).top_k is None
      True
    """

    max_new_tokens: int = _option(
        128, "Maximum number of tokens to write after each prompt. A text may end earlier by itself."
    )
    temperature: float = _option(
        0.0,
        "Randomness of the text: logits are divided by the temperature before a token is drawn. 0 always takes the "
        "likeliest token.",
    )
    top_k: int | None = _option(
        None,
        "Number of likeliest tokens from which each token is drawn. None sets no limit. Needs a temperature above 0.",
    )
    top_p: float | None = _option(
        None,
        "Draw each token only from the smallest set of likeliest tokens whose probabilities add up to at least this "
        "share. None sets no limit. Needs a temperature above 0.",
    )
    seed: int = _option(0, "Seed for drawing tokens. Each prompt draws independently of the others.")
    batch_size: int = _option(8, "Prompts that are processed at a time. A smaller value needs less memory.")

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
    check(
        all(isinstance(name, str) for name in names),
        field,
        "must be a list of names, or text with commas between the names",
        value,
    )
    return names


def _names_or_pattern(field: str, value: Any) -> str | tuple[str, ...]:
    """Returns the names of modules that a list or a string holds, or else the regular expression that a string is."""
    if not isinstance(value, str) or all(_MODULE.fullmatch(name) for name in _names(field, value)):
        return _names(field, value)
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        check(False, field, f"must be names with commas between them, or a regular expression ({error})", value)
    return value


def _layers(value: Any) -> tuple[int, ...]:
    """Returns the numbers of layers in a number, in a list, or in text such as "0-3,7"; empty for all layers."""
    if value is None:  # PEFT writes None for all layers
        return ()
    rule = "must be numbers of layers from 0 on, and ranges of them, such as '0-3,7'"
    found: list[int] = []
    parts = _names("layers_to_transform", value) if isinstance(value, str) else value
    for part in parts if isinstance(parts, Iterable) else (parts,):
        is_range = isinstance(part, str) and _RANGE.fullmatch(part)
        ends: list[Any] = [int(end) for end in part.split("-")] if is_range else [part]
        whole = all(isinstance(end, int | np.integer) and 0 <= end < _MAX_LAYERS for end in ends)
        check(whole and bool not in map(type, ends) and ends[0] <= ends[-1], "layers_to_transform", rule, value)
        found += range(ends[0], ends[-1] + 1)
    return tuple(sorted(set(found)))


def _destinations(value: Any) -> tuple[str, ...]:
    """Returns the destinations that `report_to` names, each once."""
    names = list(_names("report_to", value)) if isinstance(value, str | tuple | list) else [value]
    if names in (["none"], [None]):
        return ()
    allowed = get_args(Destination)
    check(all(name in allowed for name in names), "report_to", f"must be 'none' or among {allowed}", value)
    return tuple(dict.fromkeys(names))


def _optim(name: str) -> str:
    """Returns the optimizer that a name of ours, of transformers or of TRL stands for."""
    found = _OPTIMS.get(name, name)
    if found not in get_args(Optim):
        raise InputError(
            f"`optim` must be among {(*get_args(Optim), *_OPTIMS)}, got {name!r}. Use 'adamw_8bit' to"
            " save memory; for another optimizer, pass an optax transformation to `Trainer` as `optimizer`."
        )
    return found


def _optimizer_arguments(config: TrainConfig) -> tuple[tuple[str, Any], ...]:
    """Returns the parameters of a run's optimizer, in which `nesterov` comes with a momentum."""
    pairs = read_arguments("optim_args", config.optim_args, "optim", config.optim, OPTIMIZERS)
    found = dict(pairs)
    momentum = found.get("momentum", 0.95 if config.optim == "muon" else 0.0)
    rule = "must have a `momentum` above 0 with `nesterov`"
    check(momentum > 0 or not found.get("nesterov", False), "optim_args", rule, found)
    return pairs


def _schedule_arguments(config: TrainConfig) -> tuple[tuple[str, Any], ...]:
    """Returns the parameters of a run's schedule, with those present that the schedule needs."""
    name, kind = "lr_scheduler_kwargs", config.lr_scheduler_type
    pairs = read_arguments(name, config.lr_scheduler_kwargs, "lr_scheduler_type", kind, SCHEDULES)
    found = dict(pairs)
    if kind == "cosine_with_min_lr":
        rule = f"must have either `min_lr` or `min_lr_rate` with `lr_scheduler_type` {kind!r}"
        check(("min_lr" in found) != ("min_lr_rate" in found), name, rule, found)
    if kind == "warmup_stable_decay":
        rule = f"must have `num_decay_steps`, the steps of the decay, with `lr_scheduler_type` {kind!r}"
        check("num_decay_steps" in found, name, rule, found)
    if kind == "polynomial":
        end = found.get("lr_end", POLYNOMIAL_END)
        check(end < config.learning_rate, name, "must have an `lr_end` below `learning_rate`", end)
    return pairs


def _pattern(name: str, value: Any, rule: str, kind: type) -> tuple[tuple[str, Any], ...]:
    """Returns pairs of projection and number, read from a mapping, pairs, or a string such as 'q_proj=8,v_proj=4'."""
    try:
        if isinstance(value, str):
            split = [one.split("=") for one in _names(name, value)]
            pairs = [(key.strip(), kind(number)) for key, number in split]
        else:
            pairs = [(key, number) for key, number in (value.items() if isinstance(value, Mapping) else value)]
        allowed = (int,) if kind is int else (int, float)
        whole = all(isinstance(key, str) and type(number) in allowed and is_positive(number) for key, number in pairs)
        whole = whole and len(dict(pairs)) == len(pairs)  # no name occurs twice
    except (TypeError, ValueError):
        whole = False
    check(whole, name, f"must map projections to {rule}, such as 'q_proj=8,v_proj=4'", value)
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
        elif field.type == int | None and field.default is not None:
            check(value is None or type(value) is int, field.name, "must be a whole number, or None", value)


def _set_steps(config: TrainConfig, name: str) -> None:
    """Checks a number or share of steps, and makes a whole number an int."""
    value, least = getattr(config, name), 0 if name == "save_steps" else 1
    if value is not None:
        right = _is_share(value) or (type(value) in (int, float) and least <= value < math.inf and value == int(value))
        rule = f"must be a whole number of at least {least}, or a share of all steps between 0 and 1"
        check(right, name, f"{rule}, or None" if name == "eval_steps" else rule, value)
        object.__setattr__(config, name, value if _is_share(value) else int(value))


def _is_share(value: Any) -> bool:
    return is_positive(value) and value < 1


def _multiple(value: float, factor: float) -> float:
    """Returns the least multiple of `factor` that is not below `value`."""
    return -(-value // factor) * factor


def _check_seed(seed: int) -> None:
    check(0 <= seed < 2**32, "seed", "must be in [0, 2**32)", seed)
