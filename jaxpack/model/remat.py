"""Defines the choices of `remat`: which residuals of a layer are kept, where, and what is computed again.

The parts of a layer name the activations that are expensive to compute (`jax.ad_checkpoint.checkpoint_name`) and
declare their cost (`cost`). Each choice is a set of such names: named activations are kept, and the rest is computed
again from the layer's input. The input is always kept: in device memory or, offloaded, in pinned host memory
(`offload.py`). The residual stream between a layer's halves is offloaded with it, so that each half is computed again
by itself. `planning/` estimates what a choice costs for a whole step, and picks the best one.
"""

import os
import re
from collections.abc import Callable, Collection
from typing import Any, get_args

import jax

from jaxpack.constants import Remat
from jaxpack.model.config import ModelConfig
from jaxpack.parallel.device import current_device

# The names that each choice keeps on the device. "lora" and "routing" are so small that all choices keep them. Only
# models with norms after their branches have "branch", and only models with experts have "routing".
_SMALL = frozenset({"lora", "routing"})
KEPT: dict[Remat, frozenset[str] | None] = {
    "offload": _SMALL,
    "offload_heads": _SMALL,
    "full": _SMALL,
    "keep_attention": _SMALL | {"attention"},
    "keep_projections": _SMALL | {"qkv", "attention", "residual", "gate_up", "branch"},
    "none": None,  # keeps everything that the derivatives read, named or not
}
assert set(KEPT) == set(get_args(Remat))

# The names that are offloaded to host memory with a layer's input. With "residual", the backward pass need not repeat
# the matmul before it. "heads" (the queries, keys and values) saves one more matmul, and pays off if the link can carry
# that much during the forward pass.
OFFLOADED: dict[Remat, frozenset[str]] = {
    "offload": frozenset({"residual"}),
    "offload_heads": frozenset({"residual", "heads"}),
}


def keeps(remat: Remat, name: str) -> bool:
    """Returns whether a choice keeps an activation of this name on the device."""
    names = KEPT[remat]
    return names is None or name in names


def offloaded(remat: Remat, config: ModelConfig, *, casts_weights: bool) -> frozenset[str]:
    """Returns the names of `OFFLOADED` that a model offloads.

    A norm after a branch reads the projection's output again, so "residual" saves nothing there and is left out. Where
    weights are trained, and therefore cast, only the layers' inputs are offloaded: see `RMSNorm.weight`.

    Args:
      casts_weights: whether weights are trained in float32 and read in a narrower dtype (`Transformer.casts_weights`).
    """
    if casts_weights:
        return frozenset()
    return OFFLOADED.get(remat, frozenset()) - ({"residual"} if config.post_norms else set())


def unrolls(remat: Remat) -> bool:
    """Returns whether the program repeats the code of each layer instead of looping over the layers.

    A loop copies all residuals into arrays stacked over layers, and out again: 12 % of a step where much is kept. But a
    loop compiles in a fifth of the time.
    """
    return remat in ("keep_projections", "none")


def recompute(
    layer: Callable[..., Any], remat: Remat, with_input: Collection[str], *, gathers: bool = False
) -> Callable[..., Any]:
    """Wraps `layer(x, ...)`, for use in a scan, to keep the activations named by the choice and by `with_input`.

    Args:
      with_input: the names that are offloaded with the layer's input, see `offloaded`.
      gathers: whether the layer gathers matrices from several devices. Every choice gathers them again in the backward
        pass: kept, they would be the whole model. So "none", which would keep them, keeps what "keep_projections" does.
    """
    names = KEPT["keep_projections" if gathers and remat == "none" else remat]
    if names is None:
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*names, *with_input)
    # Without a loop, XLA would merge the recomputation with the forward pass, and so keep everything. Within a loop
    # there is no forward pass to merge with, so nothing has to be prevented.
    return jax.checkpoint(layer, policy=policy, prevent_cse=unrolls(remat))


def compiler_options(remat: Remat, *, fetches_layers: bool = False, fetches_head: bool = False) -> dict[str, Any]:
    """Returns the XLA options of a program, which are empty unless it copies from the host's memory on a GPU.

    They turn CUDA graphs off and double buffering on, and where layers are fetched, the scheduler that hides latencies
    off.

    CUDA graphs, XLA's default, start many kernels at a time. With "none", a step of 1,024 tokens of Qwen3-0.6B takes
    12.0 ms with graphs and 15.5 ms without; 16,384 tokens of Qwen3-4B gain 0.2 %. But a graph holds back copies between
    device and host until its kernels are done. With graphs off, layer i's residuals are fetched while layer i + 1 runs.
    Double buffering puts two layers into each iteration of the loop, so that the fetched residuals need not be copied
    from the next layer's buffer into this layer's.

    The scheduler expects any copy to take 5 ms. Residuals are fetched accordingly (see `offload.py`), but one matrix of
    a layer may take longer: a step of Qwen3-32B in 16 bits waited for weights in a quarter of its time. Without the
    scheduler, a fetch starts as soon as it can (see `host_weight.copies_first`). But then residuals of layers in 4 bits
    may be sent too late: a step of Qwen3-8B took a fifth longer. An option that the user sets in `XLA_FLAGS` is left as
    it is there.

    Args:
      fetches_layers: whether the program fetches the layers' frozen weights from the host's memory.
      fetches_head: whether it fetches the head from there, in pieces.
    """
    if current_device().platform != "gpu" or not (fetches_layers or fetches_head or remat in OFFLOADED):
        return {}
    options: dict[str, Any] = {
        "xla_gpu_enable_command_buffer": "",
        "xla_gpu_enable_while_loop_double_buffering": True,
    }
    options |= {"xla_gpu_enable_latency_hiding_scheduler": False} if fetches_layers else {}
    by_user = re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", ""))
    return {name: value for name, value in options.items() if name not in by_user}
