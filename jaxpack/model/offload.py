"""Scans over layers whose residuals, and perhaps frozen weights, lie in the host's memory.

Residuals move to the host in the forward pass. Residuals and weights are fetched one layer ahead.

`jax.checkpoint` can offload residuals within `jax.lax.scan`, and XLA can shift the copies by one iteration, so that
they overlap with computation. But then the copies of the last layer stand outside the loops, where XLA copies with
kernels that block the GPU for everything else: 20 of 1,100 ms with Qwen3-8B. Here the loops themselves are shifted, so
that every copy but that of the first layer's weights is inside a loop. Each forward iteration sends the residuals of
the layer before, the last layer keeps its own on the device, and each backward iteration fetches the residuals that the
next iteration reads. Each iteration, forward and backward, fetches the weights that the next iteration reads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxpack.kernels.host_weight import HostWeight, copies_first, loop_with
from jaxpack.kernels.weight import Weight, instantiate
from jaxpack.parallel.device import link_bytes_per_second
from jaxpack.parallel.host_memory import host_buffer, to_device

_PLANNED_SECONDS = 5e-3  # the time that XLA's scheduler expects of any copy from the host

_Arrays = list[jax.Array]
Stream = TypeVar("Stream")


def scan_offloaded(
    layer: Callable[[Stream, Any, Any, Any], Stream], x: Stream, stacks: Any, shared: Any, hosted: Any = None
) -> Stream:
    """Applies `x = layer(x, slices, shared, weights)` for each slice along the first axis of `stacks`; returns `x`.

    Moves residuals at least as large as the largest array of `x` to pinned host memory; smaller ones stay on the
    device. `jax.checkpoint` in `layer` decides which residuals there are.

    Args:
      layer: computes a layer's output from its input, its slices, `shared`, and its matrices in host memory.
      x: the input of the first layer, an array or a pytree.
      stacks: arrays with a leading axis for the layers.
      shared: arrays that all layers read. They get no gradient.
      hosted: a pytree of `HostWeight`. Each layer gets its own matrices as `weights`, on the device. They get no
        gradient.
    """
    leaves, tree = jax.tree.flatten(stacks)
    if leaves[0].shape[0] == 1:  # no other layer runs that a copy could overlap with
        return layer(x, jax.tree.map(lambda leaf: leaf[0], stacks), shared, _matrices(_fetch(hosted, 0)))

    def of_leaves(x: Stream, leaves: _Arrays, shared: Any, fetched: Any) -> Stream:
        return layer(x, tree.unflatten(leaves), shared, fetched)

    return _scan(of_leaves, x, leaves, shared, hosted)


def _fetch(hosted: Any, layer: jax.Array | int) -> Any:
    return jax.tree.map(lambda weight: weight.fetch(layer), hosted, is_leaf=lambda leaf: isinstance(leaf, HostWeight))


def _matrices(fetched: Any) -> Any:
    """Returns the only matrix of each stack; a loop carries the stacks, which hold nothing but arrays."""
    return jax.tree.map(lambda weight: weight.at(0), fetched, is_leaf=lambda leaf: isinstance(leaf, Weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(layer, x, leaves, shared, hosted):
    """Runs the layers without a derivative: keeps no residuals."""

    def turn(i, fetched, x):
        return layer(x, _at(leaves, i), shared, _matrices(fetched))

    return loop_with(_fetch, hosted, _length(leaves), turn, x)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Pullback:
    """Holds a layer's pullback (for its input and some of its leaves) without the arrays that the pullback reads."""

    varied: tuple[int, ...]  # the indices of the leaves that get a gradient
    tree: Any
    places: tuple[int, ...]  # for each array that the pullback reads: its index in [*kept, *there]

    def __call__(self, d: Any, kept: _Arrays, there: _Arrays) -> tuple[Any, dict[int, jax.Array]]:
        arrays = [*kept, *there]
        return self.tree.unflatten([arrays[place] for place in self.places])(d)


def _take_apart(derivative: Any, varied: tuple[int, ...], x: Any, there: _Arrays) -> tuple[_Pullback, _Arrays, _Arrays]:
    """Splits a pullback of `jax.vjp` into its structure, its residuals that go to the host, and the smaller ones.

    Arrays in `there` are no residuals: the backward pass has them without keeping them. They are the layer's leaves,
    `shared`, and the matrices that are fetched again.
    """
    arrays, tree = jax.tree.flatten(derivative)
    known = {id(array) for array in there}
    kept = list({id(array): array for array in arrays if id(array) not in known}.values())
    least = max(array.size for array in jax.tree.leaves(x))
    large = [array for array in kept if array.size >= least]
    small = [array for array in kept if array.size < least]
    places = {id(array): place for place, array in enumerate([*large, *small, *there])}
    return _Pullback(varied, tree, tuple(places[id(array)] for array in arrays)), large, small


def _forward(layer, x, leaves, shared, hosted):
    varied = tuple(place for place, leaf in enumerate(leaves) if leaf.perturbed)
    x, leaves, shared, hosted = jax.tree.map(lambda argument: argument.value, (x, leaves, shared, hosted))
    pullback = None

    def one_layer(x, i, fetched):
        nonlocal pullback  # the same structure for every layer
        of_layer, matrices = _at(leaves, i), _matrices(fetched)

        def of_varied(x, some):
            return layer(x, [some.get(place, array) for place, array in enumerate(of_layer)], shared, matrices)

        out, derivative = jax.vjp(of_varied, x, {place: of_layer[place] for place in varied})
        there = of_layer + jax.tree.leaves((shared, matrices))
        pullback, large, small = _take_apart(derivative, varied, x, there)
        return out, large, small

    def turn(state):
        i, on_host, fetched, x, large, smalls = state
        x, here, following, on_host = copies_first((x, i, i + 1, on_host), (hosted, large))
        sent = [jax.device_put(array, jax.memory.Space.Host) for array in large]
        x, large, small = one_layer(x, following - 1, fetched)
        return i + 1, _put(on_host, sent, i), _fetch(hosted, i + 1), x, large, _put(smalls, small, here)

    num_layers, fetched = _length(leaves), _fetch(hosted, 0)
    _, large, small = jax.eval_shape(one_layer, x, 0, fetched)
    nothing = [jnp.zeros(array.shape, array.dtype) for array in large]  # what the first iteration sends
    # Slice i holds the residuals of layer i - 1, so that no place is negative.
    on_host = [host_buffer((num_layers, *array.shape), array.dtype) for array in large]
    smalls = [jnp.zeros((num_layers, *array.shape), array.dtype) for array in small]
    start = 0, on_host, fetched, x, nothing, smalls
    # The last iteration fetches the last layer again, and the backward pass begins with it.
    _, on_host, fetched, x, large, smalls = jax.lax.while_loop(lambda state: state[0] < num_layers, turn, start)
    return x, (leaves, shared, hosted, pullback, on_host, large, smalls, fetched)


def _backward(layer, kept, d):
    leaves, shared, hosted, pullback, on_host, large, small, fetched = kept
    num_layers = _length(leaves)
    # Where weights are fetched, too, XLA's scheduler is off (see `remat.compiler_options`): all copies start together.
    at_once = math.inf if jax.tree.leaves(hosted) else 1.1 * _PLANNED_SECONDS * link_bytes_per_second()
    d = jax.tree.map(instantiate, d, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))

    def turn(state):
        turns, d, large, fetched, gradients = state
        i = num_layers - 1 - turns
        d, here, place = copies_first((d, i, i - 1), (hosted, on_host))
        before = _fetch_in_turn(on_host, i, at_once)  # the residuals of layer i - 1
        there = _at(leaves, place + 1) + jax.tree.leaves((shared, _matrices(fetched)))
        d, of_layer = pullback(d, large + _at(small, here), there)
        update = functools.partial(
            jax.lax.dynamic_update_index_in_dim, index=here, axis=0, allow_negative_indices=False
        )
        # In the last iteration, i - 1 is -1: it fetches the first layer again, which nothing reads.
        return turns + 1, d, before, _fetch(hosted, i - 1), jax.tree.map(update, gradients, of_layer)

    # The loops count by themselves, so that XLA makes the copies with copy engines: see `host_weight.loop_with`.
    zeros = {place: jnp.zeros_like(leaves[place]) for place in pullback.varied}
    start = 0, d, large, fetched, zeros
    _, d, _, _, gradients = jax.lax.while_loop(lambda state: state[0] < num_layers, turn, start)
    return d, [gradients.get(place) for place in range(len(leaves))], None, None


def _fetch_in_turn(stacks: _Arrays, i: jax.Array | int, at_once: float) -> _Arrays:
    """Returns copies of slice `i` of each stack on the device, made in groups of at most `at_once` bytes, one by one.

    XLA's scheduler starts a copy early enough for it to take `_PLANNED_SECONDS`, whatever its size, and expects several
    copies at a time to take no longer than one. With 16 rows of 1,024 tokens of Qwen3-8B and "offload_heads", a layer's
    three residuals take 8.5 ms: started together, they held up each layer for 4.3 ms. So each group takes about the
    planned time, and depends on the group before.
    """
    groups: list[list[int]] = []
    room = 0.0
    for place in sorted(range(len(stacks)), key=lambda place: -stacks[place].size):
        nbytes = stacks[place].nbytes / _length(stacks)
        if nbytes <= room:
            groups[-1].append(place)
            room -= nbytes
        else:
            groups.append([place])
            room = at_once - nbytes

    fetched: dict[int, jax.Array] = {}
    for group in groups:
        sources = [stacks[place] for place in group]
        if fetched:
            sources, fetched = jax.lax.optimization_barrier((sources, fetched))
        fetched |= {place: to_device(array) for place, array in zip(group, _at(sources, i), strict=True)}
    return [fetched[place] for place in range(len(stacks))]


def _length(leaves: _Arrays) -> int:
    return leaves[0].shape[0]


def _put(stacks: _Arrays, slices: _Arrays, i: jax.Array | int) -> _Arrays:
    """Returns the stacks with slice `i` of each replaced."""
    update = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False)
    return [update(stack, new, i) for stack, new in zip(stacks, slices, strict=True)]


def _at(stacks: _Arrays, i: jax.Array | int) -> _Arrays:
    """Returns slice `i` of each stack; a negative `i` gives the first slice."""
    return [jax.lax.dynamic_index_in_dim(stack, i, keepdims=False, allow_negative_indices=False) for stack in stacks]


_scan.defvjp(_forward, _backward, symbolic_zeros=True)
