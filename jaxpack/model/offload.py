"""A loop over layers that leaves with the host what the backward pass reads again, and fetches it a layer ahead.

`jax.checkpoint` can offload what it keeps within `jax.lax.scan`, and XLA can shift the copies by a turn, to run beside
computation. But those of the last layer then stand outside of the loops, where XLA copies with kernels that leave the
GPU to nothing else: 20 of 1,100 ms with Qwen3-8B. Here the loops themselves are shifted, so that every copy is in one:
each turn of the first sends what the layer before it made, the last layer keeps its own, and each turn of the second
fetches what the next one reads.
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
    """`x` after `x = layer(x, slices, shared)` for each slice of what is stacked in `stacks`.

    Of what a layer keeps for its backward pass (`jax.checkpoint` says what that is), all that is as large as `x` waits
    in pinned memory of the host. `shared` has no gradient.
    """
    leaves, tree = jax.tree.flatten(stacks)
    if leaves[0].shape[0] == 1:  # there is nothing to copy beside
        return layer(x, jax.tree.map(lambda leaf: leaf[0], stacks), shared)
    return _scan(lambda x, leaves, shared: layer(x, tree.unflatten(leaves), shared), x, leaves, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(layer, x, leaves, shared):
    return jax.lax.scan(lambda x, of_layer: (layer(x, of_layer, shared), None), x, leaves)[0]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Pullback:
    """A layer's derivative by its input and some of its leaves, apart from the arrays that it reads."""

    varied: tuple[int, ...]  # the places of those leaves
    tree: Any
    places: tuple[int, ...]  # of each array, among those that are kept and, after them, those that are there anyway

    def __call__(self, d: jax.Array, kept: _Arrays, there: _Arrays) -> tuple[jax.Array, dict[int, jax.Array]]:
        arrays = [*kept, *there]
        return self.tree.unflatten([arrays[place] for place in self.places])(d)


def _take_apart(
    derivative: Any, varied: tuple[int, ...], x: jax.Array, there: _Arrays
) -> tuple[_Pullback, _Arrays, _Arrays]:
    """Of what `jax.vjp` gives: also what is to be kept for it, first what is as large as `x`, then the rest."""
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
        nonlocal pullback  # each layer's is the same
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
        fetched = [jax.device_put(array, jax.memory.Space.Device) for array in _at(on_host, i - 1)]  # at the end, any
        d, of_layer = pullback(d, large + _at(small, i), _at(leaves, i) + jax.tree.leaves(shared))
        update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0, allow_negative_indices=False)
        updated = jax.tree.map(update, gradients, of_layer)
        return turns + 1, d, fetched, updated

    # Where to copy from must follow from the number of turns by sums alone: else XLA copies with kernels here, too. A
    # scan over the numbers of layers would read it from an array.
    zeros = {place: jnp.zeros_like(leaves[place]) for place in pullback.varied}
    _, d, _, gradients = jax.lax.while_loop(lambda state: state[0] < num_layers, turn, (0, d, large, zeros))
    return d, [gradients.get(place) for place in range(len(leaves))], None


def _at(stacks: _Arrays, i: jax.Array | int) -> _Arrays:
    """One slice of each; of a negative number the first."""
    return [jax.lax.dynamic_index_in_dim(stack, i, keepdims=False, allow_negative_indices=False) for stack in stacks]


_scan.defvjp(_forward, _backward, symbolic_zeros=True)
