"""Provides bitsandbytes with its own decoding in torch operations, in place of its compiled one for CPUs.

On a CPU with AVX-512, the compiled decoding of bitsandbytes 0.50.2 takes the wrong magnitude for a block that crosses
the end of a row. Where the CPU also has its instructions for bfloat16, it computes in bfloat16 outside of training, and
takes only matrices whose rows are a multiple of 32. On GPUs it does neither.
"""

import functools
import inspect
import warnings
from types import ModuleType

import pytest


@functools.cache
def bitsandbytes() -> ModuleType:
    """Returns the package, or skips the test if it is missing."""
    torch, package = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    from bitsandbytes.backends.default import ops
    from bitsandbytes.backends.utils import _get_4bit_code

    compute = inspect.unwrap(ops._dequantize_4bit_compute)  # without `torch.compile`

    def dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
        return compute(
            A.view(torch.uint8).reshape(-1), absmax, _get_4bit_code(quant_type, A.device), blocksize, shape, dtype
        )

    def gemv_4bit(A, B, shapeB, absmax, code, blocksize):
        return A @ dequantize_4bit(B, absmax, blocksize, "nf4", shapeB, A.dtype).T

    package.nn.modules.has_avx512bf16 = lambda: False
    _LIBRARIES.append(library := torch.library.Library("bitsandbytes", "IMPL"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is overridden
        for function in (dequantize_4bit, gemv_4bit):
            library.impl(function.__name__, function, "CPU", allow_override=True)
    return package


_LIBRARIES: list = []  # an implementation ends with its library
