"""Muon for the matrices of the layers: each update is a matrix whose singular values are about equal.

Keller Jordan, https://kellerjordan.github.io/posts/muon/. Scaled as in "Muon is Scalable for LLM Training"
(https://arxiv.org/abs/2502.16982), so that learning rates and weight decays of AdamW fit.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxpack.optimizers.matrices import Rows, is_matrix, join, names_of, split

_RMS = 0.2  # about the root mean square of AdamW's updates
_ELEMENTS = 2**24  # of matrices that are orthogonalised at a time: 64 MiB in float32, for each array that is needed


def scale_by_muon_or_adam(
    adam: optax.GradientTransformation, rows: Rows, *, momentum: float = 0.95, nesterov: bool = True
) -> optax.GradientTransformation:
    """Returns Muon's transformation of gradients for matrices of layers and adapters, and Adam's for all else.

    Embedding and head are Adam's, as Muon's authors advise. For a matrix `[out, in]` with momentum
    `m = momentum * m + g`, Muon's update is `0.2 * sqrt(max(out, in)) * orthogonal(g + momentum * m)` (without
    `nesterov`, of `m`). It is torch's `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, in float32 instead of
    bfloat16.
    """

    def labels(params: optax.Params) -> optax.Params:
        def label(path: tuple, parameter: jax.Array) -> str:
            return "muon" if "blocks" in names_of(path) and is_matrix(path, parameter) else "adam"

        return jax.tree_util.tree_map_with_path(label, params)

    muon = optax.chain(optax.trace(momentum, nesterov), optax.stateless(lambda updates, _: orthogonal(updates, rows)))
    return optax.partition({"muon": muon, "adam": adam}, labels)


def orthogonal(updates: optax.Updates, rows: Rows) -> optax.Updates:
    """Returns updates in which each projection of each layer is orthogonalised alone, and scaled by its shape."""

    def of_parameter(path: tuple, update: Array) -> Array:
        return join(path, [_orthogonal(part) for part in split(path, update, rows)], update, rows)

    return jax.tree_util.tree_map_with_path(of_parameter, updates)


def _orthogonal(matrices: Float[Array, "n O I"]) -> Float[Array, "n O I"]:
    # Muon without momentum is the iteration alone, and needs no state.
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    iteration = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=dimensions)

    def of_one(matrix: Float[Array, "O I"]) -> Float[Array, "O I"]:
        update, _ = iteration.update(matrix, iteration.init(matrix))
        return jnp.asarray(update)

    most = max(1, _ELEMENTS // math.prod(matrices.shape[1:]))
    # In a loop where they are large: the iteration holds several arrays of the size of what it works on.
    found = jax.vmap(of_one)(matrices) if len(matrices) <= most else jax.lax.map(of_one, matrices, batch_size=most)
    return _RMS * math.sqrt(max(matrices.shape[1:])) * found
