"""What the backward pass keeps of each layer, and what it computes again.

The model names what is dear to compute (`jax.ad_checkpoint.checkpoint_name`), and each choice of `remat` is a list of
those names: what is named is kept, the rest is computed again from the layer's input, which is kept always.
"""

from collections.abc import Callable
from typing import Any, get_args

import jax

from jaxpack.config import Remat

# Names, in the order of a layer. "attention" is the output and the log-sum-exp of the attention kernel, which is not
# run again where both are kept; "lora" what adapters pass between their factors, small.
NAMES = ("qkv", "attention", "residual", "gate_up", "lora")

KEPT: dict[Remat, tuple[str, ...] | None] = {
    "full": (),
    "keep_attention": ("attention", "lora"),
    "keep_projections": NAMES,
    "none": None,  # all that the derivatives read, named or not
}
assert set(KEPT) == set(get_args(Remat))


def recompute(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`layer`, for use in a scan, keeping what the choice says."""
    names = KEPT[remat]
    if names is None:
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)  # within a scan there is nothing to share
