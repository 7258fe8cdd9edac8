"""Keeps the memory of a GPU in one piece: a step needs its temporary memory as one block.

JAX's allocator gives an array the smallest free block that it fits in. Arrays of a few bytes (a batch, a loss) live on
into the next step. If one of them is put right behind the block of a step, the freed block cannot grow, and a step of a
longer row finds no block that is long enough, although enough memory is free.
"""

import jax
import numpy as np

from jaxpack.errors import is_out_of_memory


def has_block(size: int, device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm]
    """Returns whether the device has a free block of `size` bytes, by allocating it for a moment."""
    try:
        with jax.default_device(device):
            block = jax.block_until_ready(jax.numpy.empty(-(-size // 4), "float32"))
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            return False
        raise
    block.delete()
    return True


def reserve_small_blocks(
    size: int,
    count: int,
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]
) -> list[jax.Array]:
    """Makes `count` free blocks of `size` bytes, which the allocator then prefers for arrays of up to this size.

    Returns the arrays that keep the blocks apart, a few bytes each: as long as they live, the blocks cannot merge with
    the large free block behind them.
    """
    blocks, walls = [], []
    for _ in range(count):
        blocks.append(jax.device_put(np.zeros(size, np.uint8), device))
        walls.append(jax.device_put(np.zeros(1, np.uint8), device))
    jax.block_until_ready((blocks, walls))
    for block in blocks:
        block.delete()
    return walls
