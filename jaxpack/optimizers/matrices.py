"""Takes parameters apart into the matrices and vectors that a checkpoint has, for optimizers that treat each alone.

Our parameters are stacks over layers, `[L, out, in]`, and projections of the same input lie in one array. An optimizer
that looks at a matrix as a whole, such as Muon or Adafactor, must not mix layers or projections.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import projection_rows

# The rows of each projection in a matrix, or in its bias, by the path of the array in a model.
Rows = Mapping[tuple[str, ...], tuple[int, ...]]


def rows_of(model: Transformer) -> Rows:
    """Returns the rows of the projections that lie in one array, by the path of that array in the model."""
    found = {}
    for path, module in nnx.iter_modules(model):
        if (rows := projection_rows(module)) is not None:
            found |= {(*map(str, path), name): rows for name in ("weight", "bias")}
    return found


def names_of(path: tuple) -> tuple[str, ...]:
    """Returns the names in the path of a parameter, such as ("blocks", "attention", "qkv", "weight")."""
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def is_matrix(path: tuple, parameter: jax.Array) -> bool:
    """Returns whether a parameter holds matrices, not vectors such as norm scales and biases."""
    return parameter.ndim - ("blocks" in names_of(path)) >= 2


def split(path: tuple, parameter: Array, rows: Rows) -> list[Array]:
    """Returns the matrices `[n, out, in]`, or the vectors `[n, features]`, that a parameter holds.

    Each array of the list has all projections of one size that lie next to each other, for all layers.
    """
    shape = parameter.shape[-2:] if is_matrix(path, parameter) else parameter.shape[-1:]
    stack = parameter.reshape(-1, *shape)
    parts, first = [], 0
    for size, count in _runs(path, rows, shape[0]):
        part = stack[:, first : first + count * size]
        parts.append(part.reshape(-1, size, *shape[1:]))
        first += count * size
    return parts


def join(path: tuple, parts: list[Array], parameter: Any, rows: Rows) -> Array:
    """Returns the parameter that `split` took apart; `parameter` has its shape."""
    shape = parameter.shape[-2:] if is_matrix(path, parameter) else parameter.shape[-1:]
    layers = math.prod(parameter.shape[: parameter.ndim - len(shape)])
    return jnp.concatenate([part.reshape(layers, -1, *shape[1:]) for part in parts], axis=1).reshape(parameter.shape)


def _runs(path: tuple, rows: Rows, whole: int) -> list[tuple[int, int]]:
    """Returns the projections in an array as pairs of a size and how often it follows."""
    sizes = rows.get(names_of(path), (whole,))
    assert sum(sizes) == whole, "the rows are not of this array"
    return [(size, len(list(run))) for size, run in itertools.groupby(sizes)]


def each_alone(inner: optax.GradientTransformation, rows: Rows) -> optax.GradientTransformation:
    """Returns a transformation that treats every matrix and every vector of a model as a parameter of its own."""

    def init(params: optax.Params) -> optax.OptState:
        def of_parameter(path: tuple, parameter: jax.Array) -> list[optax.OptState]:
            return [jax.vmap(inner.init)(part) for part in split(path, parameter, rows)]

        return jax.tree_util.tree_map_with_path(of_parameter, params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        assert params is not None
        gradients, tree = jax.tree_util.tree_flatten_with_path(updates)
        states, parameters = tree.flatten_up_to(state), tree.flatten_up_to(params)
        new, new_states = [], []
        for (path, gradient), held, parameter in zip(gradients, states, parameters, strict=True):
            parts = zip(split(path, gradient, rows), held, split(path, parameter, rows), strict=True)
            found = [jax.vmap(inner.update)(*part) for part in parts]
            new.append(join(path, [jnp.asarray(one) for one, _ in found], parameter, rows))
            new_states.append([one for _, one in found])
        return tree.unflatten(new), tree.unflatten(new_states)

    return optax.GradientTransformation(init, update)
