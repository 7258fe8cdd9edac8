"""What the backward pass keeps of each layer, where, and what it computes again.

The model names what is dear to compute (`jax.ad_checkpoint.checkpoint_name`), and each choice of `remat` is a list of
those names: what is named is kept, the rest is computed again from the layer's input. That is kept always: in the
device's memory, or, offloaded, in pinned memory of the host (`offloading.py`). There goes with it the residual stream
between a layer's halves, so that each half is computed again for itself.
What that comes to for a whole step, and which choice is best, is in `predictions.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax

from jaxpack.constants import Remat
from jaxpack.model.config import ModelConfig
from jaxpack.parallel.device import current_device


class Ranks(NamedTuple):
    """Of the adapters of each projection together, made up to what kernels take; 0 without."""

    qkv: int = 0
    out: int = 0
    gate_up: int = 0
    down: int = 0


class Layer(NamedTuple):
    """The sizes of one layer that its bytes and its work follow from."""

    config: ModelConfig
    ranks: Ranks
    itemsize: int  # of activations
    drops: bool = False  # adapters read their input after dropout
    casts: bool = False  # weights are trained, in float32, and read as activations are

    @property
    def heads(self) -> tuple[int, int]:
        """Channels of all query heads, and of all key heads: as many as value heads have."""
        return self.config.num_heads * self.config.head_dim, self.config.num_kv_heads * self.config.head_dim

    @property
    def projections(self) -> Ranks:
        """Weights of each projection, with the factor of its adapters that rides along in its matmul."""
        (q, kv), D, F, ranks = self.heads, self.config.hidden_size, self.config.intermediate_size, self.ranks
        return Ranks(
            (D + ranks.qkv) * (q + 2 * kv), q * (D + ranks.out), (D + ranks.gate_up) * 2 * F, F * (D + ranks.down)
        )


# What has a name, in the order of a layer, and its bytes for each token. "attention" is the output and the float32
# log-sum-exp of the attention kernel, which is not run again where both are kept; "lora" what adapters pass between
# their factors: so small that it is kept always; "branch" what branches add to the residual stream, before its norm.
NAMED: dict[str, Callable[[Layer], int]] = {
    "qkv": lambda layer: (layer.heads[0] + 2 * layer.heads[1]) * layer.itemsize,
    "attention": lambda layer: layer.heads[0] * layer.itemsize + 4 * layer.config.num_heads,
    "residual": lambda layer: layer.config.hidden_size * layer.itemsize,
    "gate_up": lambda layer: 2 * layer.config.intermediate_size * layer.itemsize,
    "branch": lambda layer: 2 * layer.config.hidden_size * layer.itemsize if layer.config.post_norms else 0,
    "lora": lambda layer: (layer.ranks.out + layer.ranks.down) * layer.itemsize,
}
NAMES = tuple(NAMED)

KEPT: dict[Remat, tuple[str, ...] | None] = {
    "offload": ("lora",),
    "offload_heads": ("lora",),
    "full": ("lora",),
    "keep_attention": ("attention", "lora"),
    "keep_projections": NAMES,
    "none": None,  # all that the derivatives read, named or not
}
assert set(KEPT) == set(get_args(Remat))

# What waits in the host's memory with a layer's input. "residual" spares the backward pass the matmul before it, and
# "heads", which become queries, keys and values, one more: where the link carries that much in the time of the forward
# pass.
OFFLOADED: dict[Remat, tuple[str, ...]] = {"offload": ("residual",), "offload_heads": ("residual", "heads")}


def input_bytes(layer: Layer) -> int:
    """A token's input of a layer, which every choice keeps: offloaded, in the host's memory."""
    return layer.config.hidden_size * layer.itemsize


def unnamed_bytes(layer: Layer) -> int:
    """What derivatives read of a token besides its input and what has a name.

    That is what the two norms make, extended; or, of what all four projections read, what dropout leaves and its mask.
    And the bounds of attention and the angles of heads, float32, where layers differ in them.
    """
    D, F = layer.config.hidden_size, layer.config.intermediate_size
    chosen = 2 * 4 if len(set(layer.config.windows)) > 1 else 0
    if len(set(layer.config.ropes)) > 1:
        chosen += 4 * layer.config.rope.rotary_dim(layer.config.head_dim)
    if layer.drops:
        return chosen + (2 * D + layer.heads[0] + F) * (layer.itemsize + 1) + sum(layer.ranks) * layer.itemsize
    return chosen + (2 * D + layer.ranks.qkv + layer.ranks.gate_up) * layer.itemsize


def cast_weight_bytes(layer: Layer) -> int:
    """The matrices that are read with those, where they were cast: of the projections behind the norms."""
    return (layer.projections.qkv + layer.projections.gate_up) * layer.itemsize if layer.casts else 0


def offloaded(remat: Remat, config: ModelConfig, *, casts: bool) -> tuple[str, ...]:
    """Of `OFFLOADED` those of a model. With a norm behind a projection, which reads its output again, "residual" spares
    nothing.

    Where weights are trained (`Layer.casts`) there are none: see `RMSNorm.weight`.
    """
    if casts:
        return ()
    return tuple(name for name in OFFLOADED.get(remat, ()) if name != "residual" or not config.post_norms)


def offloaded_bytes(layer: Layer, remat: Remat) -> int:
    """Of a token, what waits in the host's memory."""
    if remat not in OFFLOADED:
        return 0
    size = {"residual": NAMED["residual"], "heads": NAMED["qkv"]}
    return input_bytes(layer) + sum(size[name](layer) for name in offloaded(remat, layer.config, casts=layer.casts))


def unrolls(remat: Remat) -> bool:
    """Whether layers are laid out one after another in the program, and not a loop over them.

    A loop copies all that is kept into arrays stacked over layers, and out again: 12 % of a step where much is kept.
    But it compiles in a fifth of the time.
    """
    return remat in ("keep_projections", "none")


def recompute(layer: Callable[..., Any], remat: Remat, with_input: tuple[str, ...]) -> Callable[..., Any]:
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
