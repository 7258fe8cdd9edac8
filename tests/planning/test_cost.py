"""A step's cost is the sum of what its parts say, whatever parts those are."""

import pytest
from flax import nnx
from models import small_config

from jaxpack import Transformer
from jaxpack.planning.cost import StepShape


def abstract_small(family: str, **changes) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(small_config(family, **changes), rngs=nnx.Rngs(0)))


def test_a_window_bounds_the_keys_of_its_layers():
    model, windowed = (abstract_small("qwen2", sliding_window=window) for window in (None, 7))
    without, within = (StepShape.of(model, (1, 1, 128)).keys_per_token for model in (model, windowed))
    assert without == 129 / 2
    # One layer of three: 1 + ... + 7 keys of the first seven tokens, 7 of each after.
    assert within == pytest.approx((2 * without + (28 + 121 * 7) / 128) / 3)
