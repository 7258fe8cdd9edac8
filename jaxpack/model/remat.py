"""Each choice of `remat` says what the backward pass keeps of each layer, where, and what it computes again.

The parts of a layer name what is dear to compute (`jax.ad_checkpoint.checkpoint_name`) and say what it costs (`cost`).
Each choice is a set of those names: what is named is kept, the rest is computed again from the layer's input. The input
is kept always: in the device's memory or, offloaded, in pinned memory of the host (`offload.py`). With it goes the
residual stream between a layer's halves, so that each half is computed again for itself.
`planning/` says what a choice comes to for a whole step, and which one is best.
"""

from collections.abc import Callable, Collection
from typing import Any, get_args

import jax

from jaxpack.constants import Remat
from jaxpack.model.config import ModelConfig
from jaxpack.parallel.device import current_device

# The names that each choice keeps on the device. "lora" is so small that all keep it. A model need not give every name:
# only one with norms behind its branches gives "branch".
KEPT: dict[Remat, frozenset[str] | None] = {
    "offload": frozenset({"lora"}),
    "offload_heads": frozenset({"lora"}),
    "full": frozenset({"lora"}),
    "keep_attention": frozenset({"attention", "lora"}),
    "keep_projections": frozenset({"qkv", "attention", "residual", "gate_up", "branch", "lora"}),
    "none": None,  # all that the derivatives read, named or not
}
assert set(KEPT) == set(get_args(Remat))

# The names that wait in the host's memory with a layer's input. "residual" spares the backward pass the matmul before
# it, and "heads", which become queries, keys and values, one more: where the link carries that much in the time of the
# forward pass.
OFFLOADED: dict[Remat, frozenset[str]] = {
    "offload": frozenset({"residual"}),
    "offload_heads": frozenset({"residual", "heads"}),
}


def offloaded(remat: Remat, config: ModelConfig, *, casts: bool) -> frozenset[str]:
    """Returns the names of `OFFLOADED` that a model offloads.

    With a norm behind a projection, which reads the projection's output again, "residual" spares nothing and is left
    out. Where weights are trained, and so cast, nothing is offloaded but inputs: see `RMSNorm.weight`.

    Args:
      casts: whether weights are trained, in float32, and read in a narrower dtype (`Transformer.casts_weights`).
    """
    if casts:
        return frozenset()
    return OFFLOADED.get(remat, frozenset()) - ({"residual"} if config.post_norms else set())


def unrolls(remat: Remat) -> bool:
    """Whether layers are laid out one after another in the program, and not a loop over them.

    A loop copies all that is kept into arrays stacked over layers, and out again: 12 % of a step where much is kept.
    But it compiles in a fifth of the time.
    """
    return remat in ("keep_projections", "none")


def recompute(layer: Callable[..., Any], remat: Remat, with_input: Collection[str]) -> Callable[..., Any]:
    """`layer(x, ...)`, for use in a scan, keeping what the choice says, and what is `offloaded` with its input."""
    names = KEPT[remat]
    if names is None:
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*names, *with_input)
    # Within a loop there is nothing to share with the forward pass; in a program without, XLA would share all of it.
    return jax.checkpoint(layer, policy=policy, prevent_cse=unrolls(remat))


def compiler_options(remat: Remat) -> dict[str, Any]:
    """What a step wants of XLA on a GPU: by itself it starts kernels many at a time, in CUDA graphs.

    With "none", 1,024 tokens of Qwen3-0.6B take 12.0 ms so for 15.5 without; 16,384 of Qwen3-4B gain 0.2 %. But a graph
    holds back copies between device and host until its kernels are done: without, what a layer left with the host is
    fetched while the layer after it is at work. Two such layers at a time in a loop, and nothing is copied from a place
    for the next layer's into one for this layer's.
    """
    if current_device().platform != "gpu" or remat not in OFFLOADED:
        return {}
    return {"xla_gpu_enable_command_buffer": "", "xla_gpu_enable_while_loop_double_buffering": True}
