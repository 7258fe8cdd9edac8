"""Measures how closely jaxpack matches transformers and PEFT for each model family.

`python -m tests.torch_bridge.families` prints the table.
"""

import dataclasses
import functools
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import transformers
from flax import nnx
from safetensors.numpy import load_file

import torch_bridge
from jaxpack import Batches, Documents, LoraConfig, TrainConfig, Transformer, add_lora
from jaxpack.model.lora import adapters
from jaxpack.model.moe import experts_of
from jaxpack.model.weights import Frozen, weight_of
from jaxpack.train.step import loss_and_gradients
from tests.kernels.oracles import quick_jit
from tests.torch_bridge import hf
from torch_bridge.adapter import adapter_tensors
from torch_bridge.io.experts import Cut, split_experts
from torch_bridge.tensors import model_tensors

LORA = LoraConfig(r=4, lora_alpha=8)
_LONGEST = 150
LENGTHS = [90, 61, 33, 17, 5, 2, 100]  # some exceed every window and every original context, some are far shorter


class Figures(NamedTuple):
    """Holds the largest float32 differences between jaxpack and torch for one family."""

    logits: float  # whole rows, compared with transformers
    loss: float  # jaxpack: packed documents with adapters; PEFT: one document after another
    gradients: float  # all adapters and weights, compared with PEFT: |difference| / |value| of the worst tensor
    packed: float  # logits of packed documents, compared with each document alone
    adapter_out: bool  # we write the tensors PEFT writes for "all-linear", and rewrite PEFT's own file byte for byte
    adapter_in: float  # logits with an adapter that PEFT wrote, compared with PEFT
    merged: float  # logits of the merged folder in transformers, compared with PEFT and the unmerged adapter


def measure(checkpoint: str, folder: Path) -> Figures:
    """Writes a random checkpoint to `folder` and measures its differences."""
    reference, path = hf.save_model(folder / "model", checkpoint)
    model, _ = torch_bridge.from_pretrained(path, dtype="float32")
    logits, packed = _logits(model, reference)
    experts = [module.name for module in experts_of(model)]
    add_lora(model, dataclasses.replace(LORA, target_parameters=experts))
    for i, adapter in enumerate(adapters(model).values()):  # with B = 0 the gradient of A is zero
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
    torch_bridge.save_adapter(model, str(folder / "adapter"))
    theirs = peft.PeftModel.from_pretrained(reference, folder / "adapter")
    loss, gradients = _step(model, theirs)
    ours = {name: x.shape for name, x in load_file(folder / "adapter" / "adapter_model.safetensors").items()}
    targets = {"target_modules": "all-linear"}
    if experts:  # PEFT's "all-linear" would also mean the router, and the experts with twice the rank.
        targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": experts}
    fresh = peft.get_peft_model(hf.make_model(checkpoint), peft.LoraConfig(r=LORA.r, task_type="CAUSAL_LM", **targets))
    expected = {name: tuple(x.shape) for name, x in peft.get_peft_model_state_dict(fresh).items()}
    adapter_in, merged, same_bytes = _round_trip(path, theirs, folder)
    return Figures(logits, loss, gradients, packed, ours == expected and same_bytes, adapter_in, merged)


def _round_trip(path: str, theirs: peft.PeftModel, folder: Path) -> tuple[float, float, bool]:
    """Loads an adapter of PEFT, merges it and writes it again: logit differences (loaded, merged) and equal bytes."""
    theirs.save_pretrained(folder / "theirs")
    model, _ = torch_bridge.from_pretrained(path, dtype="float32")
    torch_bridge.load_adapter(model, str(folder / "theirs"))
    torch_bridge.save_adapter(model, str(folder / "back"))
    read = [(folder / name / "adapter_model.safetensors").read_bytes() for name in ("theirs", "back")]
    torch_bridge.save_merged(model, str(folder / "merged"), dtype="float32")
    tokens = hf.random_tokens(2, _LONGEST)  # torch's dynamic NTK keeps the frequencies of the longest row seen
    expected = hf.logits(theirs, tokens)
    ours = np.asarray(model.logits(jnp.asarray(tokens)))
    merged = hf.logits(transformers.AutoModelForCausalLM.from_pretrained(folder / "merged"), tokens)
    return float(np.abs(ours - expected).max()), float(np.abs(merged - expected).max()), read[0] == read[1]


def _logits(model: Transformer, reference) -> tuple[float, float]:
    """Compares logits with torch (two whole rows), and of packed documents with each alone, in one program."""
    lengths, T = [70, 1, 33, 46], _LONGEST
    assert sum(lengths) == T
    rows = hf.random_tokens(3, T)
    segments = np.ones_like(rows)
    segments[2] = np.repeat(np.arange(1, 5), lengths)
    starts = np.cumsum([0, *lengths])[:-1]
    alone = np.zeros((4, T), np.int32)
    for row, start, length in zip(alone, starts, lengths, strict=True):
        row[:length] = rows[2, start : start + length]
    alone_segments = (np.arange(T)[None, :] < np.array(lengths)[:, None]).astype(np.int32)
    tokens, segments = np.concatenate([rows, alone]), np.concatenate([segments, alone_segments])
    ours = np.asarray(model.logits(jnp.asarray(tokens), jnp.asarray(segments)))
    theirs = hf.logits(reference, rows[:2])
    assert theirs.std() > 0.5, "a tolerance would say little"
    packed = [
        np.abs(ours[2, start : start + length] - ours[3 + i, :length]).max()
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    return float(np.abs(ours[:2] - theirs).max()), float(max(packed))


def _step(model: Transformer, theirs: peft.PeftModel) -> tuple[float, float]:
    """Compares the loss of one batch, and the gradients of all adapters and weights, with PEFT."""
    documents = hf.random_documents(LENGTHS)
    tokens, labels = (np.concatenate(x).astype(np.int32) for x in zip(*documents, strict=True))
    lengths = np.array(LENGTHS)
    config = TrainConfig(max_length=128, packing=True, per_device_train_batch_size=3, num_train_epochs=1)
    batches = Batches(Documents(tokens, labels, np.cumsum(lengths) - lengths, lengths), config)
    assert len(batches) == 1
    for module in experts_of(model):  # frozen experts, which are read in place, have no gradient
        module.weight = nnx.Param(weight_of(module.weight).dense(jnp.float32))
    graph, parameters, rest = nnx.split(model, nnx.Any(nnx.Param, Frozen), ...)
    loss, gradients = quick_jit(functools.partial(loss_and_gradients, graph))(parameters, rest, batches[0])
    model = nnx.merge(graph, gradients, rest)
    ours = adapter_tensors(model) | {name: np.asarray(x) for name, x in model_tensors(model)}

    theirs.requires_grad_(True)
    their_loss, count = 0.0, sum(label != -100 for document in documents for label in document.labels[1:])
    for document in sorted(documents, key=lambda document: len(document.tokens)):  # alone: see `jaxpack.model.rope`
        part = theirs(**hf.padded([document]), num_items_in_batch=count).loss
        part.backward()
        their_loss += part.item()
    expected = {}
    for name, parameter in theirs.named_parameters():
        name = name.replace(".default.", ".")
        if ".lora_" not in name:
            name = name.replace(".base_layer", "").removeprefix("base_model.model.")
        expected[name] = parameter.grad.numpy()
    expected = split_experts(expected, _cut)
    assert ours.keys() == expected.keys()
    # All experts of a layer together: few tokens may have chosen one of them.
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, x in expected.items():
        groups.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append((ours[name] - x, x))
    errors, sizes = (
        np.array([np.sqrt(sum(np.sum(pair[which] ** 2) for pair in pairs)) for pairs in groups.values()])
        for which in (0, 1)
    )
    assert sizes.min() > 1e-3, "a tensor with next to no gradient: no comparison"
    return abs(float(loss) - their_loss), float(max(errors / sizes))


def _cut(whole: np.ndarray, cut: Cut) -> np.ndarray:
    one = whole[cut.expert]
    return (one.T if cut.is_transposed else one)[cut.rows]


def main() -> None:
    """Prints the table in Markdown."""
    print("| family | logits | loss | gradients | packed | adapter out | adapter in | merged out |")
    print("|---|---|---|---|---|---|---|---|")
    for name in hf.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(f"{name}-untied", Path(folder))
        cells = [("differs", "equal")[x] if isinstance(x, bool) else f"{x:.0e}" for x in figures]
        print("|", " | ".join([name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
