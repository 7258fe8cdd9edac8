"""Launches kernels with rows of guards before and after every array, and checks that none was read or written."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack.kernels import _launch

_GUARD = 7.25  # guards an output, and is exact in bfloat16; NaN guards an input


class _Shifted:
    """A view of a ref without its guard rows: index 0 of the first axis is row 1 of the ref."""

    def __init__(self, ref: Any):
        self.ref, self.dtype = ref, ref.dtype
        self.shape = (ref.shape[0] - 2, *ref.shape[1:])

    def __getitem__(self, index: Any) -> Any:
        return self.ref[_shift(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.ref[_shift(index)] = value

    @property
    def at(self) -> Any:
        ref = self.ref

        class At:
            def __getitem__(self, index: Any) -> Any:
                return ref.at[_shift(index)]

        return At()


def _shift(index: Any) -> tuple:
    first, *rest = index if isinstance(index, tuple) else (index,)
    first = _launch.pl.ds(first.start + 1, first.size) if isinstance(first, _launch.pl.Slice) else first + 1
    return (first, *rest)


def _guarded(x: jax.Array, value: float) -> jax.Array:
    guard = jnp.full((1, *x.shape[1:]), value if jnp.issubdtype(x.dtype, jnp.floating) else 2**20, x.dtype)
    return jnp.concatenate([guard, x, guard])


def guard_launches(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[str]:
    """Guards every launch of `modules`, and returns a list that receives the names of the launches.

    The results of a launch are checked at once, so call the kernels outside of `jax.jit`.
    """
    names = []

    def launch(kernel, *args, name, out_shape, input_output_aliases=None, **options):
        names.append(name)
        outputs, structure = jax.tree.flatten(out_shape)
        aliases = dict(input_output_aliases or {})
        shapes = [jax.ShapeDtypeStruct((s.shape[0] + 2, *s.shape[1:]), s.dtype) for s in outputs]
        # An output that aliases no input gets a new input to alias, which is full of guard values.
        fresh = [i for i in range(len(outputs)) if i not in aliases.values()]
        inputs = [
            *(_guarded(x, jnp.nan) for x in args),
            *(jnp.full(shapes[i].shape, _GUARD, shapes[i].dtype) for i in fresh),
        ]

        def shifted(*refs):
            refs = [*refs[: len(args)], *refs[len(inputs) :]]
            kernel(*map(_Shifted, refs))

        results = _launch.launch(
            shifted,
            *inputs,
            name=name,
            out_shape=shapes,
            input_output_aliases=aliases | {len(args) + n: i for n, i in enumerate(fresh)},
            **options,
        )
        for i, result in enumerate(results):
            edges = np.asarray(result[np.array([0, -1])], np.float32)
            assert np.all(edges == _GUARD if i in fresh else np.isnan(edges)), f"{name} wrote around output {i}"
            assert not np.any(np.isnan(np.asarray(result[1:-1], np.float32))), f"{name} read around an input"
            # `attention_backward_q` leaves the places of keys and values in its output to the next kernel.
            if name != "attention_backward_q":
                assert not np.any(np.asarray(result[1:-1], np.float32) == _GUARD), f"{name} left out some of output {i}"
        return jax.tree.unflatten(structure, [result[1:-1] for result in results])

    for module in modules:
        monkeypatch.setattr(module, "launch", launch)
    return names
