"""Tests that steps compile for cards with little shared memory, and that copies from the host begin with a layer.

These tests need jax's CUDA plugin, but no card: `make test-cards` provides it.
"""

import dataclasses
import re
from collections import Counter
from typing import NamedTuple

import pytest

pytest.importorskip("jax_plugins.xla_cuda13", reason="needs jax's CUDA plugin: run `make test-cards`")

from cards.compiling import Step, compiled

from jaxpack import LoraConfig
from jaxpack.bench.models import abstract_model
from jaxpack.model.presets import SHAPES
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import peak_bytes

STEPS = {
    "dense": Step("Qwen3-4B", remat="offload_heads"),
    "4-bit": Step("Qwen3-8B", store="nf4"),
    "experts": Step("Qwen3-30B-A3B", experts=True),
    "4-bit experts": Step("Qwen3-30B-A3B", store="nf4", experts=True),
    "MXFP4 experts": Step("gpt-oss-20b", store="mxfp4", experts=True),
}
OF_EXPERTS = ("grouped_matmul", "grouped_matmul_transposed", "grouped_outer")
KERNELS = {  # beside those of attention and norms
    "dense": ("gated_silu", "add_extended"),
    "4-bit": ("dequantize_nf4",),
    "experts": ("grouped_silu", *OF_EXPERTS),
    "4-bit experts": ("dequantize_nf4", "grouped_silu", *OF_EXPERTS),
    "MXFP4 experts": ("dequantize_mxfp4", "grouped_clamped_silu", *OF_EXPERTS),
}


# Every step on the card with the least shared memory that most people have, and on others what differs most.
PAIRS = [(step, "NVIDIA GeForce RTX 4090") for step in STEPS]
PAIRS += [(step, "NVIDIA A100-SXM4-80GB") for step in ("experts", "MXFP4 experts")]
PAIRS += [(step, card) for step in ("dense", "4-bit experts") for card in ("NVIDIA A10", "NVIDIA RTX PRO 6000")]


@pytest.mark.parametrize(("step", "card"), PAIRS, ids="-".join)
def test_every_kernel_of_a_step_fits_the_card(step, card, monkeypatch):
    program = compiled(STEPS[step], card, monkeypatch).as_text()
    launched = set(re.findall(r"jaxpack_(\w+)", program))
    for kernel in ("attention", "attention_backward_kv", "norm_rope", *KERNELS[step]):  # and not their references
        assert kernel in launched or (kernel == "norm_rope" and "rope" in launched)


@pytest.mark.parametrize(
    ("remat", "gated", "matmuls"), [("offload", "grouped_silu", 3 + 1), ("none", "grouped_silu_with_gate_up", 3)]
)
def test_gate_and_up_of_experts_are_computed_where_they_are_read(remat, gated, matmuls, monkeypatch):
    """Counts the launches of a layer: two products with A, the last projection, and perhaps gate and up once more."""
    step = Step("Qwen3-30B-A3B", experts=True, remat=remat)
    program = compiled(step, "NVIDIA H200", monkeypatch).as_text()
    launches = Counter(re.findall(r" custom-call\(.*jaxpack_((?:grouped|gated)_\w+)", program))
    layers = launches["gated_silu_backward"]
    assert layers == step.layers
    others = {name: count for name, count in launches.items() if not re.search("backward|transposed|outer", name)}
    assert others == {gated: layers, "grouped_matmul": matmuls * layers}


@pytest.mark.parametrize("remat", ["offload", "full"])
def test_a_long_document_takes_the_predicted_memory(remat, monkeypatch):
    step = Step("Qwen3-4B", layers=4, rows=1, length=131_072, remat=remat)
    memory = compiled(step, "NVIDIA H200", monkeypatch).memory_analysis()
    model = abstract_model(dataclasses.replace(SHAPES[step.model], num_layers=step.layers), LoraConfig(r=16))
    predicted = peak_bytes(StepShape.of(model, (1, step.rows, step.length)), remat)
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    # A layer of this length takes so long that XLA may fetch residuals behind the peak, where they take no more memory.
    assert (0.88 if remat == "offload" else 0.95) * predicted < needed < 1.05 * predicted


class Copy(NamedTuple):
    """A copy in a loop: how many of the iteration's kernels and matmuls come before its start and end."""

    is_fetch: bool
    before_start: int
    before_end: int
    kernels: int
    has_engine: bool


def copies(text: str) -> list[Copy]:
    """Returns the copies between host and device in the loops of a compiled program, in both halves of an iteration."""
    found = []
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        lines = computation.splitlines()
        if "double_buffer_clone" not in computation or "slice-start" not in computation:
            continue
        for half in (False, True):
            named = [(re.match(r"\s*(?:ROOT )?%(\S+) = ", line), line) for line in lines]
            own = [(i, m[1], line) for i, (m, line) in enumerate(named) if m and ("double_buffer" in m[1]) == half]
            kernels = [i for i, _, line in own if re.search(r'"__gpu\$xla.gpu.triton"| %gemm_fusion_dot\S* = ', line)]
            ends = {re.search(r"\(%(\S+?)\)", line)[1]: i for i, name, line in own if "slice-done" in name}
            for i, name, line in own:
                if re.match(r"dynamic-(update-)?slice-start", name):
                    called = re.search(r"calls=%(\S+?)[, ]", line)[1]
                    body = re.search(rf"\n%{re.escape(called)} .*?\n}}\n", text, re.DOTALL)[0]
                    found.append(
                        Copy(
                            is_fetch="update" not in name,
                            before_start=sum(kernel < i for kernel in kernels),
                            before_end=sum(kernel < ends[name] for kernel in kernels),
                            kernels=len(kernels),
                            has_engine="dynamic_slice_config" in body,
                        )
                    )
    return found


@pytest.mark.parametrize(
    ("step", "of_half", "latest"),
    [
        # Forward four matrices, backward these and two residuals.
        (Step("Qwen3-32B", layers=8, rows=16, offload_weights=True), 4 + 6, 0),
        (Step("Qwen3-4B", rows=1, remat="full", store="nf4", offload_embedding=True), 1, 1),  # a piece of the head
    ],
    ids=["weights", "head"],
)
def test_weights_are_copied_while_the_layer_or_piece_before_computes(step, of_half, latest, monkeypatch):
    found = copies(compiled(step, "NVIDIA H200", monkeypatch).as_text())
    fetches = [copy for copy in found if copy.is_fetch]
    assert len(fetches) == 2 * of_half  # Each half of an iteration has a layer, or a piece.
    assert all(copy.has_engine for copy in found)
    assert all(copy.before_start <= latest for copy in found)
    assert all(copy.before_end > 0.85 * copy.kernels for copy in fetches)  # The last ones compute small gradients.


@pytest.mark.parametrize("store", ["dense", "nf4"])
def test_residuals_are_sent_while_the_whole_next_layer_computes_and_fetched_in_two_groups(store, monkeypatch):
    """A layer of these rows has 450 MiB of residuals, for which PCIe 5 takes twice as long as XLA plans for a copy."""
    step = Step("Qwen3-8B", layers=6, rows=16, remat="offload_heads", store=store)
    found = copies(compiled(step, "NVIDIA H200", monkeypatch).as_text())
    assert len(found) == 2 * (3 + 3)
    assert all(copy.has_engine for copy in found)
    assert all(copy.before_start == 0 for copy in found if not copy.is_fetch)
    for half in (slice(0, 3), slice(3, 6)):
        first, *second = [copy for copy in found if copy.is_fetch][half]
        assert first.before_start <= 2
        assert first.before_end - first.before_start >= 4  # two large matmuls among them
        for copy in second:
            assert first.before_end <= copy.before_start < copy.kernels / 2
            assert copy.before_end > 0.85 * copy.kernels
