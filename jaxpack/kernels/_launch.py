"""Chooses implementations and launches kernels. This is the only module that knows the Pallas backend.

The platform is decided where a program is lowered, not where it is traced. A kernel compiles on an NVIDIA GPU and is
interpreted on a CPU, so that tests run the code that GPUs run. A process without a GPU traces only the code for a CPU,
which halves its tracing, unless the mesh in context consists of GPUs: then the process can lower for GPUs.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxpack.errors import InputError
from jaxpack.parallel.device import may_lower_for_gpu, shared_memory_bytes

Tile = TypeVar("Tile")

# JAX 0.11 deprecated this backend and names no release that removes it; the upper bound on jax moves with the tests.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def dispatch(implementation: str | None, *, xla: Callable, pallas: Callable) -> Callable:
    """Returns the function to call: the named one, or for None Pallas on an NVIDIA GPU and XLA elsewhere.

    Both functions take the same arguments, arrays only, and return arrays of the same shapes and dtypes.

    Raises:
      InputError: `implementation` is another name.
    """
    named = {"xla": xla, "pallas": pallas}
    if implementation is None:
        return _by_platform(cuda=pallas, default=xla)
    if implementation not in named:
        raise InputError(f"`implementation` must be None or one of {', '.join(named)}, got {implementation!r}.")
    return named[implementation]


def launch(
    kernel: Callable,
    *args: Any,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int = 1,
    input_output_aliases: dict[int, int] | None = None,
) -> Any:
    """Runs `kernel(*input_refs, *output_refs)` once for every index of `grid`; the refs are whole arrays.

    The refs are whole arrays for two reasons. On a GPU, a block that reaches past an array's edge is not masked. And
    indices into each axis stay below 2^31 where offsets into the array do not: Pallas computes offsets from them in 64
    bits for an array of more than 4 GiB, and in 32 bits otherwise.

    Args:
      name: the kernel's name in a profile, without the prefix `jaxpack_`.
      grid: at most three axes; the first varies fastest.
      out_shape: a `jax.ShapeDtypeStruct` or a pytree of them.
      num_warps: warps of 32 threads for each index of the grid.
      num_stages: how many iterations the loads of a loop run ahead of the arithmetic.
      input_output_aliases: maps the index of an input to the index of the output that takes its place in memory. If the
        caller still needs the input, XLA copies it.
    """
    call = functools.partial(
        pl.pallas_call,
        kernel,
        out_shape=out_shape,
        grid=grid,
        input_output_aliases=input_output_aliases or {},
        name=f"jaxpack_{name}",
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
    )
    return _by_platform(cuda=call(interpret=False), cpu=call(interpret=True))(*args)


def _by_platform(*, cuda: Callable, **elsewhere: Callable) -> Callable:
    """Returns a function that calls `cuda` on an NVIDIA GPU, and the one function in `elsewhere` on other platforms."""
    if not may_lower_for_gpu():
        (function,) = elsewhere.values()
        return function
    return lambda *args: jax.lax.platform_dependent(*args, cuda=cuda, **elsewhere)


def fitting(tiles: Sequence[Tile], shared_bytes: Callable[[Tile], int]) -> Tile:
    """Returns the first tile whose shared memory the card has, or the last tile if there is none."""
    return next((tile for tile in tiles if shared_bytes(tile) <= shared_memory_bytes()), tiles[-1])


def powers_of_two(size: int, *, limit: int | None = None) -> list[tuple[int, int]]:
    """Cuts `[0, size)` into pieces `(start, length)` whose lengths are powers of two, longest first.

    Triton's blocks must have such lengths. 128 stays whole and 80 becomes 64 + 16, so no lane is masked or idle.
    """
    pieces, start = [], 0
    while start < size:
        length = 1 << ((size - start).bit_length() - 1)
        length = min(length, limit or length)
        pieces.append((start, length))
        start += length
    return pieces


def power_of_two_divisor(*sizes: int, limit: int) -> int:
    """Returns the largest power of two that divides all `sizes` and is at most `limit`."""
    divisor = 1
    while 2 * divisor <= limit and all(size % (2 * divisor) == 0 for size in sizes):
        divisor *= 2
    return divisor


def check_no_byte_arrays(**arrays: jax.Array) -> None:
    """Raises an InputError for one-byte dtypes: Pallas computes their offsets in 32 bits up to 2^32 elements.

    Such offsets would overflow.
    """
    for argument, array in arrays.items():
        if array.dtype.itemsize < 2:
            raise InputError(f"`{argument}` must have a dtype of two bytes or more, got {array.dtype}.")
