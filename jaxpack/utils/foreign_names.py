"""Says what settings of TRL, transformers, PEFT and Unsloth are called in jaxpack, and answers unknown names.

`docs/coming_from_trl.md` has the names that are used most, side by side.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from jaxpack.errors import InputError

Owner = TypeVar("Owner")

# Flags that have another name in TRL's and Unsloth's commands. The command line and settings files take both names.
ALIASES = {
    "model_name_or_path": "model",
    "model_name": "model",
    "dataset_name": "data",
    "dataset_streaming": "streaming",
    "train_dataset": "data",
    "eval_dataset": "eval_data",
    "output_dir": "output",
    "torch_dtype": "dtype",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "chat_template_path": "chat_template",
}
OPPOSITES = {"use_peft": "full_finetuning"}  # as ALIASES, but true stands for false

# Names that only an error knows, since older versions, other libraries or habit call a setting so.
_RENAMED = {
    "max_seq_length": "max_length",
    "model_max_length": "max_length",
    "random_state": "seed",
    "data_seed": "seed",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "resume": "resume_from_checkpoint",
    "args": "config",
    "processing_class": "tokenizer",
    "compute_loss_func": "objective",
    "optimizers": "optimizer",
    "instruction_template": "instruction_part",
    "response_template": "response_part",
}

# Some names have no counterpart of the same meaning. Each text says what to do instead, and precedes the names that it
# answers.
_ANSWERS = {
    "set `dtype` where the model is read, in `from_pretrained` or `jaxpack train`; on a GPU it is bfloat16": (
        "bf16 fp16 dtype torch_dtype bf16_full_eval fp16_full_eval load_in_16bit"
    ),
    "leave it out: JAX_DEFAULT_MATMUL_PRECISION sets the precision of float32 products": "tf32",
    "set `remat`: 'auto' keeps as many activations as fit into the memory, and 'full' recomputes every layer": (
        "gradient_checkpointing gradient_checkpointing_kwargs use_gradient_checkpointing activation_checkpointing "
        "activation_checkpointing_kwargs"
    ),
    "set `remat` to 'offload'": "activation_offloading",
    "set `warmup_steps` to a share of all steps, such as `warmup_steps=0.03`": "warmup_ratio",
    "leave it out: `eval_dataset` (`eval_data`) is evaluated every `eval_steps` steps and at the end": (
        "eval_strategy evaluation_strategy do_eval eval_delay"
    ),
    "set `save_steps`: a checkpoint is saved every `save_steps` steps and at the end": "save_strategy",
    "set `logging_steps`: metrics are recorded every `logging_steps` steps and at the end": "logging_strategy",
    "set `logging_steps` to 1 to see the first step": "logging_first_step",
    "leave it out: evaluation takes `per_device_train_batch_size` at a time, too": (
        "per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps"
    ),
    "leave it out: evaluation data is packed if training data is (`packing`)": "eval_packing",
    "leave it out: the best checkpoint is the one with the lowest eval loss": "metric_for_best_model greater_is_better",
    "leave it out: a run needs a new `output_dir`, or `resume_from_checkpoint`": "overwrite_output_dir",
    "leave it out: `jaxpack inspect` predicts what fits, and an error says which size does": "auto_find_batch_size",
    "leave it out: the data is tokenised once, before the first step, and batches are made from memory": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order dataset_num_proc dataset_kwargs "
        "dataset_batch_size remove_unused_columns label_names"
    ),
    "leave it out: the last step of an epoch takes the rows that are left": "dataloader_drop_last",
    "leave it out: the rows are shuffled anew in every epoch, by `seed`": "shuffle_dataset train_sampling_strategy",
    "leave it out: padding-free batches (`padding_free`) have hardly any padding": "group_by_length length_column_name",
    "leave it out: rows are always padded to a multiple of 128": "pad_to_multiple_of",
    "leave it out: documents longer than `max_length` lose their end": "truncation_mode",
    "choose the rows with `data` and `eval_data`, see docs/data.md": (
        "dataset_config dataset_train_split dataset_test_split datasets"
    ),
    "set it in the tokenizer's files; `chat_template` sets EOS to the token that ends an answer": (
        "eos_token map_eos_token"
    ),
    "set it in the tokenizer's files": "pad_token fix_tokenizer",
    "pass an `objective` to `Trainer`: without one, the loss is the cross entropy": "loss_type",
    "leave it out: each step is compiled, with jaxpack's own kernels; `implementation` chooses between them": (
        "use_liger_kernel liger_kernel_config attn_implementation torch_compile torch_compile_backend "
        "torch_compile_mode use_kernels unsloth_tiled_mlp"
    ),
    "set `mesh`, such as 'data=4' or 'fsdp=4'": (
        "fsdp fsdp_config deepspeed parallelism_config accelerator_config local_rank ddp_find_unused_parameters "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout device_map"
    ),
    "leave it out: the loss is always the mean over the tokens of all devices": "average_tokens_across_devices",
    "call torch_bridge's `push_to_hub` with the written folder; `jaxpack train` and `jaxpack export` have flags": (
        "push_to_hub hub_private_repo hub_model_id"
    ),
    "set the environment variable HF_TOKEN, or log in once with huggingface_hub's command, hf auth login": (
        "token hub_token push_to_hub_token"
    ),
    "leave it out: the result is uploaded once, at the end, to the main branch": (
        "hub_strategy hub_always_push hub_revision"
    ),
    "pass an optax transformation to `Trainer` as `optimizer`": "optim_target_modules",
    "set the environment variable JAX_PLATFORMS to cpu": "use_cpu no_cuda",
    "download that revision, and name its folder as the model": "model_revision revision",
    "leave it out: no code of a model is run": "trust_remote_code",
    "set `load_in_4bit`, or leave it out for 16 bits": "load_in_8bit load_in_fp8",
    "leave it out: `load_in_4bit` always means NF4 with nested quantisation": (
        "bnb_4bit_quant_type bnb_4bit_quant_storage bnb_4bit_compute_dtype quantization_config use_bnb_nested_quant"
    ),
    "give it to `from_pretrained`": "model model_name model_name_or_path load_in_4bit",
    "give the rows to `Trainer` as `train_dataset`": "data dataset_name train_dataset",
    "give the rows to `Trainer` as `eval_dataset`": "eval_data eval_dataset",
    "give the function to `Trainer`": "formatting_func",
    "leave it out for messages (`assistant_only_loss`); for text, set `instruction_part` and `response_part`": (
        "train_on_responses_only"
    ),
    "leave out `add_lora`: a model without adapters is trained whole": "full_finetuning",
    "call `add_lora`: a model with adapters trains these alone": "use_peft",
    "leave it out: no bias is trained beside the adapters, which is PEFT's 'none'": "bias",
    "leave it out: adapters have no bias": "lora_bias",
    "leave it out: adapters are LoRA, with `use_rslora` rank-stabilised LoRA, or with `use_dora` DoRA": (
        "use_qalora qalora_group_size use_bdlora alora_invocation_tokens arrow_config kasa_config "
        "velora_config monteclora_config"
    ),
    "leave it out: `lora_A` starts at random and `lora_B` at zero": (
        "init_lora_weights loftq_config eva_config corda_config lora_ga_config"
    ),
    "leave it out: the layers of a model are one list": "layers_pattern",
    "name the layers in `layers_to_transform`": "finetune_last_n_layers",
    "train the whole embedding with `modules_to_save`": "trainable_token_indices",
    "leave it out: what the model ties stays tied": "ensure_weight_tying",
    "leave it out: `save_adapter` writes what PEFT needs": (
        "task_type lora_task_type peft_type inference_mode base_model_name_or_path auto_mapping peft_version "
        "fan_in_fan_out megatron_config megatron_core runtime_config"
    ),
    "give the model its adapters before, with `add_lora`": "peft_config",
    "call `resize_vocab`; `jaxpack train` has a flag, --resize-vocab": "resize_model_vocab",
    "leave it out: batches are made from documents, and need no function to collate them": "data_collator",
    "override a method of `Callback`, or pass a `compute_metrics`": "preprocess_logits_for_metrics",
    "leave it out: it has no counterpart": (
        "ignore_bias_buffers layer_replication use_cache torch_empty_cache_steps log_on_each_node "
        "debug do_predict logging_nan_inf_filter logging_dir include_num_input_tokens_seen log_level disable_tqdm "
        "log_level_replica run_name project trackio_space_id trackio_bucket_id do_train trackio_static_space_id "
        "prediction_loss_only eval_do_concat_batches batch_eval_metrics eval_use_gather_object "
        "include_for_metrics save_only_model save_on_each_node save_safetensors enable_jit_checkpoint "
        "ignore_data_skip full_determinism restore_callback_states_from_checkpoint skip_memory_metrics "
        "model_init_kwargs rope_scaling use_exact_model_name float32_mixed_precision "
        "text_only fast_inference gpu_memory_utilization float8_kv_cache max_lora_rank disable_log_stats "
        "qat_scheme embedding_learning_rate"
    ),
}
_ADVICE = {name: answer for answer, names in _ANSWERS.items() for name in names.split()}
_CONFIGS: list[type] = []  # the classes that `answers_unknown_names` has seen


def hint(name: str, known: Iterable[str], *, is_of_training: bool = True) -> str:
    """Returns words in brackets that say what to write instead of an unknown name; "" if no known name is like it.

    Args:
      name: the unknown name, with underscores or dashes.
      known: the names that are known, with underscores.
      is_of_training: whether the known names are settings of training, as the names of other libraries here are.

    Example:
      >>> hint("max-seq-length", ["max_length"])
      ' (it is `max_length` here)'
      >>> hint("learning_rte", ["learning_rate"])
      ' (did you mean `learning_rate`?)'
    """
    known, name = list(known), name.replace("-", "_").lower()
    ours = _RENAMED.get(name, ALIASES.get(name, name))
    names = ours, f"lora_{ours}", ours.removeprefix("lora_")  # the rank is `r` in LoraConfig, and `lora_r` as a flag
    for one in names:
        if one in known:
            return f" (it is `{one}` here)"
    if is_of_training and name in _ADVICE:
        return f" ({_ADVICE[name]})"
    owners = [config.__name__ for config in _CONFIGS if not _fields(config).isdisjoint(names)]
    if is_of_training and owners:
        return f" (it is a setting of `{owners[0]}`)"
    near = get_close_matches(name, known, 1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def answers_unknown_names(owner: type[Owner]) -> type[Owner]:
    """Makes a class answer unknown arguments with an InputError that says what to write instead.

    Python itself raises a TypeError that names the first of them.
    """
    if dataclasses.is_dataclass(owner):
        _CONFIGS.append(owner)
    make: Any = owner.__init__
    known = set(inspect.signature(make).parameters) - {"self"}

    @functools.wraps(make)
    def init(self: Owner, *values: Any, **given: Any) -> None:
        if unknown := [f"`{name}`{hint(name, known)}" for name in given if name not in known]:
            raise InputError(f"`{owner.__name__}` has no {listed('argument', unknown)}.")
        make(self, *values, **given)

    owner.__init__ = init
    return owner


def listed(kind: str, names: list[str]) -> str:
    """Returns names after the word for their kind, which is in the plural for several.

    Example:
      >>> listed("flag", ["`a`", "`b`"])
      'flags `a` and `b`'
    """
    return f"{kind}{'s' * (len(names) > 1)} {' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"


def _fields(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}
