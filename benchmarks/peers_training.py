"""Measures the opponents of `bench_training.py`: the same step in Unsloth, TRL, and TRL with Liger's kernels.

    python benchmarks/peers_training.py REQUEST RESULT

`bench_training.py` starts this for one case, with the opponents' packages on the path and without ours. It trains on
random weights, over the same documents, with the same optimizer. Real tokens are counted in the batches that the step
receives, after the warm-up (see `steady`); peak memory is the allocator's own, of the training. A layout, an attention
or adapters that were not asked for are an error.
"""

import json
import math
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

SYSTEMS = {"unsloth": ("unsloth", "unsloth_zoo", "xformers"), "trl": (), "trl-liger": ("liger_kernel",)}
RECOMPUTE = {"unsloth": "unsloth", "full": True, "none": False}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROJECTIONS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # the fused weights of transformers 5
STD = 0.02  # of random weights
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")  # below the ids of the documents
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# A checkpoint without weights, and the random weights that a model gets after loading it.


def write_checkpoint(folder: Path, config: Any) -> None:
    """Writes a checkpoint of `config`'s shape (a `ModelConfig`) whose weights are all 0, and a byte tokenizer."""
    from torch_bridge.config_json import config_to_hf

    eos, pad = SPECIAL_TOKENS.index("<|im_end|>"), SPECIAL_TOKENS.index("<|pad|>")
    fields = {"max_position_embeddings": 40_960} | config_to_hf(config)
    fields |= {"dtype": "bfloat16", "eos_token_id": eos, "pad_token_id": pad}
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_zeros(folder / "model.safetensors", tensor_shapes(fields))
    # The config is written last: a folder with a config is complete.
    (folder / "config.json").write_text(json.dumps(fields, indent=1))


def tensor_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a checkpoint, by its name in transformers, from a `config.json`'s fields.

    The experts of a layer are fused, as the model holds them: transformers loads them from either form.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    return {name: tuple(x.shape) for name, x in model.named_parameters()}  # a tied weight comes once


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a bfloat16 safetensors file of zeros, which takes no disk space: a 30B model is 57 GiB."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(file.tell() + end)  # a file system stores no blocks that were never written


def fill(model: Any) -> None:
    """Fills a loaded model with random numbers, in place and before it has adapters.

    Weights are normal with a standard deviation of 0.02, norm scales are 1 and biases 0. Steps on zeros must not be
    timed: all tokens would choose the same experts, and a GPU multiplies zeros with less power, thus faster.
    """
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if getattr(parameter, "quant_state", None) is not None:
                fill_four_bit(parameter)
            elif name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1 and "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(std=STD)


def fill_four_bit(parameter: Any) -> None:
    """Fills a weight of bitsandbytes with a random matrix in 4 bits, quantised as the loaded zeros were."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    state = parameter.quant_state
    quantised: Any = quantize_4bit(
        torch.randn(state.shape, dtype=state.dtype, device=parameter.device) * STD,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=parameter.dtype,
    )
    codes, drawn = quantised
    parameter.data.copy_(codes)  # in place, because layers hold the same tensors
    state.absmax.copy_(drawn.absmax)
    if state.nested:  # the scales are in 8 bits, with scales of their own
        state.offset.copy_(drawn.offset)
        state.state2.absmax.copy_(drawn.state2.absmax)


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with one token per byte: unused, but loading needs a tokenizer with a pad token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "model_max_length": 40_960,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))


# Each process runs one configuration and imports one system.


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Trains and measures one case. Unsloth patches other packages, so it is imported before them."""
    begin = time.perf_counter()
    request = request | request["case"]
    if request["remat"] == "unsloth" and request["system"] != "unsloth":
        raise ValueError(f"`remat` must be full or none for {request['system']}, got 'unsloth'.")
    unsloth = request["system"] == "unsloth"
    if unsloth:
        import unsloth as _  # noqa: F401
    import torch
    import trl
    from datasets import Dataset

    of_trl: Any = trl  # its types are those of one version, and depend on what else is installed
    model, tokenizer, peft_config = (load_with_unsloth if unsloth else load)(request)
    packed, padding_free = (request["layout"] == name for name in ("packed", "padding-free"))
    settings: dict[str, Any] = {
        "output_dir": "output",
        "max_steps": request["warm_up"] + request["steps"],
        "per_device_train_batch_size": request["rows"],
        "gradient_accumulation_steps": 1,
        "packing": packed,
        "max_length": request["max_length"],
        "learning_rate": request["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "router_aux_loss_coef": 0.0,  # as in ours: no loss that balances experts, which TRL adds by default
        "optim": {"adamw": "adamw_torch_fused"}.get(request["optim"], request["optim"]),
        "bf16": True,
        "dataloader_drop_last": True,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # the filter would read every loss from the device
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    if packed and (request["full_finetuning"] or not unsloth):
        # Attention is then flex_attention, which recompiles for each new number of tokens.
        settings["pad_to_multiple_of"] = request["rows"] * request["max_length"]
    if unsloth:
        # By default Unsloth lays documents end to end, and its model remembers what to recompute.
        settings |= {"padding_free": False} if request["layout"] == "padded" else {}
    else:
        settings |= {
            "padding_free": padding_free or packed,
            "max_length": None if padding_free else request["max_length"],  # refused; documents are already cut
            "gradient_checkpointing": RECOMPUTE[request["remat"]],
            "use_liger_kernel": request["system"] == "trl-liger",
        }
        settings |= {"use_cpu": True} if not torch.cuda.is_available() else {}
    clock = make_clock(request)
    trainer = of_trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=of_trl.SFTConfig(**settings),
        train_dataset=Dataset.from_dict({"input_ids": read_documents(request)}),
        callbacks=[clock],
        **({} if peft_config is None else {"peft_config": peft_config}),
    )
    clock.watch(trainer)
    check_adapters(request, trainer.model)
    loaded = 0
    if torch.cuda.is_available():
        loaded = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()  # loading may briefly take more than the model, which we do not charge
    clock.begin = time.perf_counter()
    trainer.train()
    if unsloth:
        check_unsloth_attention(request)
    states = [x for state in trainer.optimizer.state_dict()["state"].values() for x in state.values()]
    return {
        **clock.result(),
        "load_seconds": clock.begin - begin,
        "loaded_memory_bytes": loaded,
        "attention": trainer.model.config._attn_implementation if not unsloth else unsloth_attention(),
        "experts": experts_of(trainer.model, unsloth),
        "trainable_parameters": sum(x.numel() for x in trainer.model.parameters() if x.requires_grad),
        "trainable_dtypes": sorted({str(x.dtype) for x in trainer.model.parameters() if x.requires_grad}),
        "optimizer_dtypes": sorted({str(x.dtype) for x in states if getattr(x, "ndim", 0)}),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {
            name: version_of(name)
            for name in ("torch", "triton", "transformers", "peft", "trl", "datasets", *SYSTEMS[request["system"]])
        },
    }


def read_documents(request: dict[str, Any]) -> list[list[int]]:
    """Reads documents written by `jaxpack.data.synthetic.save_documents`, cut to the same length as ours."""
    with np.load(request["documents"]) as arrays:
        tokens, starts, lengths = (arrays[name] for name in ("tokens", "starts", "lengths"))
    ends = starts + np.minimum(lengths, request["max_length"])
    return [tokens[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def load(request: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Returns the model, its tokenizer and a LoRA configuration, as TRL takes them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(  # leaves fused experts in 16 bits
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    config = AutoConfig.from_pretrained(request["checkpoint"])
    sdpa = request["layout"] == "padded" and config.model_type != "gpt_oss"  # `sdpa` has no attention sinks
    model = AutoModelForCausalLM.from_pretrained(
        request["checkpoint"],
        dtype=torch.bfloat16,
        attn_implementation="sdpa" if sdpa else "flex_attention",
        device_map={"": 0} if torch.cuda.is_available() else None,
        **({"quantization_config": four_bit} if request["load_in_4bit"] else {}),
        # This is the fastest implementation that downloads no kernels. As the default it would fall back to a loop.
        **({"experts_implementation": "grouped_mm"} if has_experts(config) else {}),
    )
    fill(model)
    if config.model_type == "gpt_oss":
        keep_documents_apart(model)
    lora = LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=ATTENTION if has_experts(config) else PROJECTIONS,
        target_parameters=EXPERTS if request["adapts_experts"] else None,
        task_type="CAUSAL_LM",
    )
    tokenizer = AutoTokenizer.from_pretrained(request["checkpoint"])
    return model, tokenizer, None if request["full_finetuning"] else lora


def load_with_unsloth(request: dict[str, Any]) -> tuple[Any, Any, None]:
    """Returns the model with its adapters, and its tokenizer.

    Unsloth adapts the experts if the projections of an MLP are named. In 4 bits it holds the experts in 4 bits, too.
    """
    import torch
    from unsloth import FastLanguageModel

    recompute = RECOMPUTE[request["remat"]]
    model, tokenizer = FastLanguageModel.from_pretrained(
        request["checkpoint"],
        max_seq_length=request["max_length"],
        dtype=torch.bfloat16,
        load_in_4bit=request["load_in_4bit"],
        full_finetuning=request["full_finetuning"],
        use_gradient_checkpointing=recompute,
    )
    check_unsloth_attention(request)
    fill(model)
    if not request["full_finetuning"]:
        only_attention = has_experts(model.config) and not request["adapts_experts"]
        model = FastLanguageModel.get_peft_model(
            model,
            r=16,
            lora_alpha=16,
            lora_dropout=0.0,
            bias="none",
            target_modules=ATTENTION if only_attention else PROJECTIONS,
            use_gradient_checkpointing=recompute,
        )
    return model, tokenizer, None


def keep_documents_apart(model: Any) -> None:
    """Gives a GPT-OSS of transformers masks that keep packed documents apart.

    Versions 5.17 to 5.23 make them without `position_ids`, so that documents of a row would see each other.
    """
    import torch
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    def add_masks(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
        if ids is None or positions is None or kwargs.get("attention_mask") is not None:
            return args, kwargs
        about: dict[str, Any] = {
            "config": module.config,
            "inputs_embeds": torch.empty((*ids.shape, 1), dtype=module.dtype, device=ids.device),  # only its shape
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": positions,
        }
        masks = {
            "full_attention": create_causal_mask(**about),
            "sliding_attention": create_sliding_window_causal_mask(**about),
        }
        return args, kwargs | {"attention_mask": masks}

    model.get_decoder().register_forward_pre_hook(add_masks, with_kwargs=True)


def has_experts(config: Any) -> bool:
    """Returns whether a configuration of transformers is that of a mixture of experts."""
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))


def experts_of(model: Any, unsloth: bool) -> str | None:
    """Returns the name of the implementation of the experts, or None for a dense model."""
    if not has_experts(model.config):
        return None
    if not unsloth:
        return model.config._experts_implementation
    from unsloth_zoo.temporary_patches.moe_utils import select_moe_backend

    backend = select_moe_backend()  # "grouped_mm" by default
    if backend == "native_torch":
        raise RuntimeError("Unsloth fell back to a loop over experts, which nobody would use on this device.")
    return backend


def check_adapters(request: dict[str, Any], model: Any) -> None:
    """Raises RuntimeError unless the experts have adapters exactly if the request asks for them."""
    if request["full_finetuning"]:
        return
    trained = any(".experts." in name for name, x in model.named_parameters() if x.requires_grad)
    if trained != request["adapts_experts"]:
        raise RuntimeError(f"The experts must have adapters: {request['adapts_experts']}. They have: {trained}.")


def unsloth_attention() -> dict[str, Any]:
    """Returns Unsloth's report on its attention: its banner's xformers version, its backend, its varlen counters."""
    from unsloth.models._utils import xformers_version
    from unsloth.utils.attention_dispatch import select_attention_backend
    from unsloth.utils.hf_packed_attention import HF_PACKED_ATTENTION_STATS

    return {
        "xformers": xformers_version,
        "backend": select_attention_backend(use_varlen=True),
        "through_transformers": dict(HF_PACKED_ATTENTION_STATS),
    }


def check_unsloth_attention(request: dict[str, Any]) -> None:
    """Raises RuntimeError if Unsloth's attention is a dense mask, which halves its speed and nobody would use."""
    found = unsloth_attention()
    if found["xformers"] is None or found["backend"] not in ("xformers", "flash_varlen"):
        raise RuntimeError(f"Unsloth fell back to PyTorch's attention ({found}). Is libcudart.so.12 on the path?")
    ran = found["through_transformers"]
    if ran["fallback"] > ran["fast"] + ran["compiled"]:
        raise RuntimeError(f"Unsloth ran packed rows through a dense mask, which halves its speed: {found}")

    from unsloth.utils import attention_dispatch

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Unsloth builds a dense mask of packed rows.")

    if request["layout"] != "padded":
        attention_dispatch.build_sdpa_packed_attention_mask = refuse


def steady(positions: list[int]) -> np.ndarray:
    """Marks the steps that count (bool): those with no more positions than some step before.

    A step with more positions grows the allocator's pool and, with Unsloth, its buffers on the host, which takes half a
    step longer. This is rare in an epoch, but not in the first steps.
    """
    sizes = np.array(positions)
    return sizes <= np.concatenate([[0], np.maximum.accumulate(sizes)[:-1]])


def make_clock(request: dict[str, Any]) -> Any:
    """Returns a `TrainerCallback` that counts each step's inputs and times the steps after the warm-up."""
    import torch
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark() -> Any:
        # Events do not synchronize: the host may run ahead between the first and the last timed step.
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    class Clock(TrainerCallback):
        begin = start = 0.0

        def __init__(self) -> None:
            self.tokens, self.slots, self.documents, self.losses, self.marks = [], [], [], [], []
            self.positions: list[int] = []

        def watch(self, trainer: Any) -> None:
            """Counts the inputs of every `training_step`, without reading a value from the device before the end."""
            step = trainer.training_step

            def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
                self.count(inputs)
                loss = step(model, inputs, *args, **kwargs)
                self.losses.append(loss.detach())
                return loss

            trainer.training_step = counted

        def count(self, inputs: dict[str, Any]) -> None:
            given: list[Any] = [inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")]
            ids, mask, positions = given
            shapes = {name: getattr(value, "shape", value) for name, value in inputs.items()}
            if request["layout"] == "padded":
                if mask is None or ids.shape[0] != request["rows"]:
                    raise RuntimeError(f"The step must get `layout` 'padded', got the shapes {shapes}.")
                self.documents.append(ids.shape[0])
                self.tokens.append(mask.sum())
            else:
                if mask is not None or positions is None or ids.shape[0] != 1:
                    raise RuntimeError(f"The step must get `layout` {request['layout']!r}, got the shapes {shapes}.")
                padding = (positions.flatten().flip(0).cumsum(0) == 0).sum()  # positions after the last document, all 0
                self.documents.append((positions == 0).sum() - padding)
                self.tokens.append(ids.numel() - padding)
            self.positions.append(ids.numel())
            self.slots.append(request["rows"] * request["max_length"] if request["layout"] == "packed" else ids.numel())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == request["warm_up"]:
                self.start = now()  # waits
            if state.global_step >= request["warm_up"]:
                self.marks.append(mark())
            if state.global_step == request["warm_up"] + request["steps"]:
                now()  # waits for the events

        def result(self) -> dict[str, Any]:
            """Returns the figures, under the names of `bench_training.py`."""
            tokens, documents, losses = ([float(x) for x in xs] for xs in (self.tokens, self.documents, self.losses))
            assert len(tokens) == request["warm_up"] + request["steps"], f"{len(tokens)} batches were seen"
            if not np.isfinite(losses).all():  # a matmul of numbers that are all NaN takes less power, thus less time
                raise RuntimeError(f"The losses are not finite, so the rates mean nothing: {losses}")
            pairs = zip(self.marks, self.marks[1:], strict=False)
            seconds = np.array([a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in pairs])
            counted = steady(self.positions)[request["warm_up"] :]
            counted |= not counted.any()
            return {
                "tokens_per_second": sum(np.array(tokens[request["warm_up"] :])[counted]) / seconds[counted].sum(),
                "step_seconds": seconds[counted].mean(),
                "each_step_seconds": seconds.tolist(),
                "counted_steps": counted.tolist(),
                "warm_up_seconds": self.start - self.begin,
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
                "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
                "tokens": tokens,
                "documents_in_step": documents,
                "padding_share": 1 - sum(tokens) / sum(self.slots),
                "losses": losses,
            }

    return Clock()


def version_of(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:])
    answered.write_text(json.dumps(measure(json.loads(asked.read_text()))))
