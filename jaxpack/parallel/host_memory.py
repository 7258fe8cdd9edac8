"""Makes arrays in the host's memory that a GPU copies from by itself, and gives NumPy access to them.

Such memory is pinned: it stays at one place, so that the GPU copies from it at the link's full speed, beside its
computation. A program that gets such an array must copy what it reads of it to the device (`to_device`).
"""

import ctypes
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from jaxpack.parallel.device import current_device

_KIND = "pinned_host"


def _sharding() -> SingleDeviceSharding:
    return SingleDeviceSharding(current_device(), memory_kind=_KIND)


def abstract_pinned(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """Returns an abstract array in pinned host memory."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding())


def is_pinned(leaf: Any) -> bool:
    """Returns whether an array, which may be abstract, lies in pinned host memory."""
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == _KIND


def pinned_zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Makes an array of zeros in pinned host memory.

    NumPy's zeros take no memory on Linux until they are written to, so the source of this copy costs nothing.
    """
    zeros = jax.device_put(np.zeros(like.shape, like.dtype), _sharding())
    return jax.block_until_ready(zeros)  # An unfinished copy would overwrite what the caller writes next.


def to_pinned(array: jax.Array) -> jax.Array:
    """Copies an array to pinned host memory."""
    return jax.device_put(array, _sharding())


def to_device(array: jax.Array) -> jax.Array:
    """Copies an array to the device. In a compiled program, this may be a slice of an array in host memory."""
    return jax.device_put(array, jax.memory.Space.Device)


def host_buffer(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Returns an array in host memory that a program fills by updating slices of it. Only within a compiled program.

    If zeros were made on the device and sent to the host, they would take as much memory on the device.
    """
    return _HOST_BUFFER.bind(shape=shape, dtype=jnp.dtype(dtype))


_HOST_BUFFER = Primitive("host_buffer")


@_HOST_BUFFER.def_abstract_eval
def _abstract_buffer(*, shape: tuple[int, ...], dtype: jnp.dtype) -> ShapedArray:
    return ShapedArray(shape, dtype, memory_space=jax.memory.Space.Host)


def _zeros(*, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jnp.zeros(shape, dtype)


# JAX cannot make zeros in host memory within a program. This primitive lowers to plain zeros. XLA puts them into host
# memory, because nothing but slices in host memory is written to them.
mlir.register_lowering(_HOST_BUFFER, mlir.lower_fun(_zeros, multiple_results=False))


def numpy_view(array: jax.Array) -> np.ndarray:
    """Returns an array in pinned host memory as a NumPy array that shares its memory, and may be written to.

    `np.asarray` would copy the array. A write must end before a program reads the array, and `array` must live as long
    as the view is used.
    """
    (shard,) = array.addressable_shards
    pointer = shard.data.unsafe_buffer_pointer()
    raw = (ctypes.c_uint8 * array.nbytes).from_address(pointer)
    return np.frombuffer(raw, np.uint8).view(array.dtype).reshape(array.shape)
