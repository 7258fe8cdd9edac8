"""What the backward pass keeps of each layer, where, and what it computes again.

The model names what is dear to compute (`jax.ad_checkpoint.checkpoint_name`), and each choice of `remat` is a list of
those names: what is named is kept, the rest is computed again from the layer's input. That is kept always: in the
device's memory, or, offloaded, in pinned memory of the host, from where it is fetched while the layer after it runs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxpack.config import ModelConfig, Remat
from jaxpack.errors import InputError

# Names, in the order of a layer. "attention" is the output and the log-sum-exp of the attention kernel, which is not
# run again where both are kept; "lora" what adapters pass between their factors: so small that it is kept always.
NAMES = ("qkv", "attention", "residual", "gate_up", "lora")

KEPT: dict[Remat, tuple[str, ...] | None] = {
    "offload": ("lora",),
    "full": ("lora",),
    "keep_attention": ("attention", "lora"),
    "keep_projections": NAMES,
    "none": None,  # all that the derivatives read, named or not
}
assert set(KEPT) == set(get_args(Remat))

_INPUT = "layer_input"


def unrolls(remat: Remat) -> bool:
    """Whether layers are laid out one after another in the program, and not a loop over them.

    A loop copies all that is kept into arrays stacked over layers, and out again: 12 % of a step where much is kept.
    But it compiles in a fifth of the time.
    """
    return remat in ("keep_projections", "none")


def recompute(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`layer(x, ...)`, for use in a scan, keeping what the choice says."""
    names = KEPT[remat]
    if names is None:
        return layer
    policies = jax.checkpoint_policies
    if remat == "offload":

        def named(x: jax.Array, *rest: Any) -> Any:
            return layer(checkpoint_name(x, _INPUT), *rest)

        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(names),
            names_which_can_be_offloaded=[_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        named, policy = layer, policies.save_only_these_names(*names)
    # Within a loop there is nothing to share with the forward pass; in a program without, XLA would share all of it.
    return jax.checkpoint(named, policy=policy, prevent_cse=unrolls(remat))


def compiler_options(remat: Remat) -> dict[str, Any]:
    """What a step wants of XLA on a GPU: kernels started one by one where there is no loop over layers, or offloading.

    A CUDA graph of thousands of kernels costs more between them than it saves: 16 ms of a step of 0.5 s, against 5. And
    it holds back copies between device and host until its kernels are done: without, a layer's input is fetched while
    the layer after it is at work.
    """
    options: dict[str, Any] = {}
    if jax.default_backend() != "gpu":
        return options
    if unrolls(remat) or remat == "offload":
        options["xla_gpu_enable_command_buffer"] = ""
    if remat == "offload":
        options["xla_gpu_enable_pipelined_host_offloading"] = True
    return options


def check_host_memory(remat: Remat, config: ModelConfig, tokens: int, itemsize: int) -> None:
    """Refuses to offload what the host has no room for.

    Args:
      tokens: of a micro-batch, with its padding.
      itemsize: bytes of an activation.
    """
    needed = config.num_layers * tokens * config.hidden_size * itemsize
    if remat == "offload" and (available := available_host_bytes()) is not None and needed > available:
        raise InputError(
            f'`remat` "offload" needs {needed / 2**30:.1f} GiB of host memory for the inputs of {config.num_layers} '
            f'layers, got {available / 2**30:.1f} GiB available. "full" keeps them on the device.'
        )


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """What Linux says can be allocated without swapping, within the limit of a container; None elsewhere."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    try:
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        return max(0, min(available, limit - used))
    except (OSError, ValueError):  # no container, or no limit: "max"
        return available
