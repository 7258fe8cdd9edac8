"""Implements `jaxpack demo`: fine-tunes a small checkpoint, packed and offline, and writes a PEFT adapter."""

import dataclasses
import importlib.util
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer
from rich.table import Table

import torch_bridge
from jaxpack.data.batching import Batches
from jaxpack.errors import not_installed
from jaxpack.model.lora import add_lora
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.trainer import Trainer, TrainResult
from jaxpack.utils.console import console
from jaxpack.utils.files import require_free_folder, whole_folder

_LORA = LoraConfig(r=16, lora_alpha=32)
_PADDED_STEPS = 12


def demo(
    output: Annotated[
        Path, typer.Option(help="New folder for base/ (the model), adapter/ and the run's files.")
    ] = Path("jaxpack-demo"),
) -> None:
    """Fine-tune a small model on 500 bundled questions, packed, and check the adapter with PEFT. Works offline."""
    require_free_folder(output, "output")
    base, adapter = output / "base", output / "adapter"
    rows = sample()
    write_checkpoint(base, rows)

    config = TrainConfig(
        output_dir=str(output),
        packing=True,
        max_length=512,
        per_device_train_batch_size=2,
        num_train_epochs=3,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=20,
        remat="none",
    )
    console.rule("the same documents in padded batches, for comparison")
    padded_config = TrainConfig(
        padding_free=False, max_length=512, max_steps=_PADDED_STEPS, learning_rate=5e-3, remat="none"
    )
    padded, _ = _train(base, rows, padded_config)
    console.rule("packed")
    packed, trainer = _train(base, rows, config)
    torch_bridge.save_adapter(trainer.model, adapter, trainer.tokenizer, settings=vars(config))
    difference = peft_difference(trainer, base, adapter)

    before = Batches(trainer.documents, dataclasses.replace(padded_config, max_steps=-1)).padding_share
    table = Table(title="jaxpack demo", show_header=False)
    table.add_row("documents", f"{len(trainer.documents):,}")
    table.add_row("padding, batches of 8", f"{before:.1%}")
    table.add_row("padding, packed", f"{packed.padding_share:.1%}")
    table.add_row("real tokens/s, padded", f"{padded.tokens_per_second:,.0f}")
    table.add_row("real tokens/s, packed", f"{packed.tokens_per_second:,.0f}")
    table.add_row("loss, first and last step", f"{packed.losses[0]:.3f} -> {packed.losses[-1]:.3f}")
    table.add_row("adapter", str(adapter))
    table.add_row("largest logit difference in PEFT", f"{difference:.1e}")
    console.print(table)


def sample() -> list[dict[str, str]]:
    """Returns the bundled rows of GSM8K, each with `prompt` and `completion`."""
    text = resources.files("jaxpack.cli").joinpath("sample/gsm8k.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_checkpoint(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes a random Qwen3 of 2.4 million parameters and a BPE tokenizer trained on `rows`, with transformers.

    The model is untrained. Its weights are larger than usual (standard deviation 0.08), so that adapters have features
    to work with.
    """
    _require_torch()
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = train_tokenizer(rows)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,  # `generate` ends a text at this token
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with whole_folder(path, "output") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def train_tokenizer(rows: list[dict[str, str]]) -> Any:
    """Trains a byte-level BPE tokenizer with 2,048 tokens on `rows`, and returns it as a transformers tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text for row in rows for text in row.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def peft_difference(trainer: Trainer, base: Path, adapter: Path) -> float:
    """Returns the largest difference between the trained model's logits and PEFT's, over the first 8 documents."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    differences = []
    documents = trainer.documents
    for start, length in zip(documents.starts[:8], documents.lengths[:8], strict=True):
        tokens = documents.tokens[start : start + length][None]
        with torch.no_grad():
            expected = reference(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
        differences.append(np.abs(np.asarray(trainer.model.logits(jnp.asarray(tokens))) - expected).max())
    return float(max(differences))


def _train(base: Path, rows: list[dict[str, str]], config: TrainConfig) -> tuple[TrainResult, Trainer]:
    model, tokenizer = torch_bridge.from_pretrained(str(base), dtype="float32")
    trainer = Trainer(add_lora(model, _LORA), tokenizer, rows, config)
    return trainer.train(), trainer


def _require_torch() -> None:
    for name in ("peft", "tokenizers", "torch"):
        if importlib.util.find_spec(name) is None:
            raise not_installed("`jaxpack demo`", name, "hf,torch")
