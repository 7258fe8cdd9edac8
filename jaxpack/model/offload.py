"""Scans over layers, moves their residuals to the host, and fetches them one layer ahead in the backward pass.

`jax.checkpoint` can offload residuals within `jax.lax.scan`, and XLA can shift the copies by one iteration, so that
they overlap with computation. But then the copies of the last layer stand outside the loops, where XLA copies with
kernels that block the GPU for everything else: 20 of 1,100 ms with Qwen3-8B. Here the loops themselves are shifted, so
that every copy is inside a loop. Each forward iteration sends the residuals of the layer before, the last layer keeps
its own on the device, and each backward iteration fetches the residuals that the next iteration reads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_Arrays = list[jax.Array]
_Layer = Callable[[jax.Array, Any, Any], jax.Array]


def scan_offloaded(layer: _Layer, x: jax.Array, stacks: Any, shared: Any) -> jax.Array:
    """Applies `x = layer(x, slices, shared)` for each slice along the first axis of `stacks`, and returns `x`.

    Moves residuals at least as large as `x` to pinned host memory; smaller ones stay on the device. `jax.checkpoint`
    in `layer` decides which residuals there are. `shared` gets no gradient.
    """
    leaves, tree = jax.tree.flatten(stacks)
    if leaves[0].shape[0] == 1:  # no other layer runs that a copy could overlap with
        return layer(x, jax.tree.map(lambda leaf: leaf[0], stacks), shared)
    return _scan(lambda x, leaves, shared: layer(x, tree.unflatten(leaves), shared), x, leaves, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(layer, x, leaves, shared):
    return jax.lax.scan(lambda x, of_layer: (layer(x, of_layer, shared), None), x, leaves)[0]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Pullback:
    """Holds a layer's pullback (for its input and some of its leaves) without the arrays that the pullback reads."""

    varied: tuple[int, ...]  # the indices of the leaves that get a gradient
    tree: Any
    places: tuple[int, ...]  # for each array that the pullback reads: its index in [*kept, *there]

    def __call__(self, d: jax.Array, kept: _Arrays, there: _Arrays) -> tuple[jax.Array, dict[int, jax.Array]]:
        arrays = [*kept, *there]
        return self.tree.unflatten([arrays[place] for place in self.places])(d)


def _take_apart(
    derivative: Any, varied: tuple[int, ...], x: jax.Array, there: _Arrays
) -> tuple[_Pullback, _Arrays, _Arrays]:
    """Splits a pullback of `jax.vjp` into its structure, its residuals at least as large as `x`, and the smaller ones.

    Arrays in `there` exist anyway (the layer's leaves and `shared`), so they are not counted as residuals.
    """
    arrays, tree = jax.tree.flatten(derivative)
    known = {id(array) for array in there}
    kept = list({id(array): array for array in arrays if id(array) not in known}.values())
    large = [array for array in kept if array.size >= x.size]
    small = [array for array in kept if array.size < x.size]
    places = {id(array): place for place, array in enumerate([*large, *small, *there])}
    return _Pullback(varied, tree, tuple(places[id(array)] for array in arrays)), large, small


def _forward(layer, x, leaves, shared):
    varied = tuple(place for place, leaf in enumerate(leaves) if leaf.perturbed)
    x, leaves, shared = jax.tree.map(lambda argument: argument.value, (x, leaves, shared))
    pullback = None

    def one_layer(x, i):
        nonlocal pullback  # the same structure for every layer
        of_layer = _at(leaves, i)

        def of_varied(x, some):
            return layer(x, [some.get(place, array) for place, array in enumerate(of_layer)], shared)

        out, derivative = jax.vjp(of_varied, x, {place: of_layer[place] for place in varied})
        pullback, large, small = _take_apart(derivative, varied, x, of_layer + jax.tree.leaves(shared))
        return (out, large), small

    def turn(carry, i):
        x, large = carry
        sent = [jax.device_put(array, jax.memory.Space.Host) for array in large]
        carry, small = one_layer(x, i)
        return carry, (sent, small)

    first, of_first = one_layer(x, 0)
    (x, large), (on_host, small) = jax.lax.scan(turn, first, jnp.arange(1, leaves[0].shape[0]))
    small = [jnp.concatenate([array[None], stack]) for array, stack in zip(of_first, small, strict=True)]
    return x, (leaves, shared, pullback, on_host, large, small)


def _backward(layer, kept, d):
    leaves, shared, pullback, on_host, large, small = kept
    num_layers = leaves[0].shape[0]

    def turn(state):
        turns, d, large, gradients = state
        i = num_layers - 1 - turns
        # In the last iteration i - 1 is -1: it fetches the first slice, which nothing reads.
        fetched = [jax.device_put(array, jax.memory.Space.Device) for array in _at(on_host, i - 1)]
        d, of_layer = pullback(d, large + _at(small, i), _at(leaves, i) + jax.tree.leaves(shared))
        update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0, allow_negative_indices=False)
        updated = jax.tree.map(update, gradients, of_layer)
        return turns + 1, d, fetched, updated

    # XLA must be able to compute the source of each copy from the iteration number by additions alone, or it copies
    # with kernels here, too. A scan over the layer numbers would read the source from an array: hence a while loop.
    zeros = {place: jnp.zeros_like(leaves[place]) for place in pullback.varied}
    _, d, _, gradients = jax.lax.while_loop(lambda state: state[0] < num_layers, turn, (0, d, large, zeros))
    return d, [gradients.get(place) for place in range(len(leaves))], None


def _at(stacks: _Arrays, i: jax.Array | int) -> _Arrays:
    """Returns slice `i` of each stack; a negative `i` gives the first slice."""
    return [jax.lax.dynamic_index_in_dim(stack, i, keepdims=False, allow_negative_indices=False) for stack in stacks]


_scan.defvjp(_forward, _backward, symbolic_zeros=True)
