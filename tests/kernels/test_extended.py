"""The adapter kernels refuse sizes they cannot take if asked for by name; without a name, XLA takes these sizes."""

import functools

import jax.numpy as jnp
import pytest
from kernels.cuda_lowering import lower_for_cuda, triton_modules

from jaxpack.errors import InputError
from jaxpack.kernels.extended import (
    add_extended,
    append_lora_input,
    norm_append_lora_input,
    norm_append_lora_input_backward,
)

NORM = {"eps": 1e-6}


def calls(tokens: int, channels: int, rank: int):
    """Returns each function with arrays of these sizes bound to it; only `implementation` is left to give."""
    x, extended = jnp.ones((tokens, channels)), jnp.ones((tokens, channels + rank))
    scale, a = jnp.ones(channels), jnp.ones((rank, channels))
    return {
        "append_lora_input": functools.partial(append_lora_input, x, a),
        "norm_append_lora_input": functools.partial(norm_append_lora_input, x, scale, a, **NORM),
        "norm_append_lora_input_backward": functools.partial(
            norm_append_lora_input_backward, extended, extended, x, scale, a, x, with_scale=True, **NORM
        ),
        "add_extended": functools.partial(add_extended, extended, a.T, x),
        "add_extended alone": functools.partial(add_extended, extended, a.T, None),
    }


@pytest.mark.parametrize(
    ("sizes", "needs"),
    [
        ((8, 32, 16), "multiples of 16 tokens and channels, got 8 and 32"),
        ((32, 40, 16), "multiples of 16 tokens and channels, got 32 and 40"),
        # The rank is larger than the number of channels, too.
        ((32, 16, 512), "a rank of at most 256, padded to a power of two of at least 16, got 512"),
        ((32, 16, 8), "a rank of at most 256, padded to a power of two of at least 16, got 8"),
        ((32, 16, 24), "a rank of at most 256, padded to a power of two of at least 16, got 24"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", calls(16, 16, 16))
def test_what_no_kernel_can_take(name, sizes, needs):
    call = calls(*sizes)[name]
    with pytest.raises(InputError, match=f'`implementation` "pallas" needs {needs}'):
        call(implementation="pallas")
    assert not triton_modules(lower_for_cuda(lambda: call(implementation=None)))


@pytest.mark.parametrize("name", calls(16, 16, 16))
def test_what_a_kernel_can_take(name):
    call = calls(16, 16, 256)[name]
    assert len(triton_modules(lower_for_cuda(lambda: call(implementation=None)))) == 1
