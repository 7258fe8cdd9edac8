"""What all tests share: strict jax, shapes checked at every call, and small models of both families."""

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes in signatures are checked at every call. This must come before the package's first import.
_CHECKED = ("kernels", "layers", "transformer", "training")
install_import_hook([f"jaxpack.{module}" for module in _CHECKED], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(params=["qwen3", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param
