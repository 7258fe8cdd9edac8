"""Writes the help of a command: its options in groups, each with its text below its name, and an example at the end."""

import textwrap
from typing import Any

import typer
from typer.core import TyperCommand

# The options of `train`, `inspect` and `evaluate` by groups, in the order of the help. Other commands have one group.
GROUPS = {
    "Model": ("model", "dtype", "load_in_4bit", "resize_vocab"),
    "Data": (
        "data",
        "eval_data",
        "eval_split",
        "streaming",
        "lengths",
        "dataset_text_field",
        "assistant_only_loss",
        "completion_only_loss",
        "instruction_part",
        "response_part",
        "allow_lost_thoughts",
        "chat_template",
        "chat_template_date",
    ),
    "Adapter": (
        "adapter",
        "full_finetuning",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "target_parameters",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
    ),
    "Batches and steps": (
        "max_length",
        "packing",
        "packing_strategy",
        "padding_free",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
        "seed",
    ),
    "Optimizer": (
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "loraplus_lr_ratio",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "label_smoothing_factor",
        "neftune_noise_alpha",
        "z_loss_coef",
        "router_aux_loss_coef",
    ),
    "Output, evaluation and checkpoints": (
        "output",
        "config_file",
        "logging_steps",
        "report_to",
        "eval_steps",
        "eval_on_start",
        "load_best_model_at_end",
        "early_stopping_patience",
        "early_stopping_threshold",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
    ),
    "Memory and devices": (
        "gpu",
        "remat",
        "memory_limit",
        "offload_weights",
        "offload_embedding",
        "mesh",
        "implementation",
        "compilation_cache_dir",
    ),
}
GROUPED = ("train", "inspect", "evaluate")
EXAMPLES = {
    "train": (
        "jaxpack train --model path/to/Qwen3-4B --data train.jsonl --output out \\",
        "    --packing --max-length 4096 --max-steps 200 --learning-rate 2e-4",
    ),
    "evaluate": ("jaxpack evaluate --adapter out/adapter --data test.jsonl --packing --max-length 4096",),
    "inspect": (
        "jaxpack inspect --model path/to/Qwen3-4B --data train.jsonl --gpu H200 \\",
        "    --packing --max-length 4096",
    ),
}
MAX_WIDTH = 160  # columns; longer lines are hard to read
_NO_BREAK = "\u00a0"  # a space at which no line is broken
_WORDS = {"True": "on", "False": "off"}


class HelpfulCommand(TyperCommand):
    """Writes its help in groups, in the width of the terminal; no name of an option is cut, and no word is broken."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:
        """Writes the options in the groups of `GROUPS`; those of no group come last."""
        left = {str(option.name): option for option in self.get_params(ctx) if option.get_help_record(ctx)}
        groups = GROUPS if self.name in GROUPED else {}
        for title, names in groups.items():
            _write(ctx, formatter, title, [left.pop(name) for name in names if name in left])
        _write(ctx, formatter, "Other options" if groups else "Options", list(left.values()))

    def format_epilog(self, ctx: typer.Context, formatter: Any) -> None:
        """Writes the command's example."""
        if (lines := EXAMPLES.get(str(self.name))) is not None:
            with formatter.section("Example"):
                formatter.write("".join(f"  {line}\n" for line in lines))


def _write(ctx: typer.Context, formatter: Any, title: str, options: list[Any]) -> None:
    if not options:
        return
    with formatter.section(title):
        for option in options:
            names = option.get_help_record(ctx)[0]
            if len(names) + 2 > formatter.width:
                names = names.replace("|", " | ")
            formatter.write(_wrapped(names, formatter.width, indent=2, further=4))
            formatter.write(_wrapped(_text(option), formatter.width, indent=6, further=6))


def _wrapped(text: str, width: int, indent: int, further: int) -> str:
    options: dict[str, Any] = {"initial_indent": indent * " ", "subsequent_indent": further * " "}
    lines = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False, **options)
    return lines.replace(_NO_BREAK, " ") + "\n"


def _text(option: Any) -> str:
    """Returns an option's help with its default. A default of None is shown if the help explains it."""
    help = option.help or ""
    given = option.show_default if isinstance(option.show_default, str) else option.default
    default = _WORDS.get(str(given), str(given))
    if option.required:
        return f"{help} [required]"
    if option.is_eager or default == "" or (default == "None" and "None" not in help):
        return help
    return f"{help} [default:{_NO_BREAK}{default}]"
