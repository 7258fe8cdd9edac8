"""Tests that a step's cost is the sum of the costs that its parts declare, whatever the parts are."""

from typing import get_args

import jax
import pytest
from flax import nnx
from models import small_config
from planned_steps import KEYS_PER_TOKEN, LORA, abstract_model

from jaxpack import LoraConfig, Transformer, add_lora
from jaxpack.constants import Remat
from jaxpack.model.cost import NO_COST, BackwardPeak, Cost, PartCost
from jaxpack.model.feed_forward import FeedForward
from jaxpack.model.remat import KEPT, OFFLOADED
from jaxpack.planning.cost import StepShape, backward_cost, forward_cost, needed_flops, recomputed_cost
from jaxpack.planning.memory import backward_bytes, host_bytes, layer_bytes


def abstract_small(family: str, **changes) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(small_config(family, **changes), rngs=nnx.Rngs(0)))


def test_a_window_bounds_the_keys_of_its_layers():
    model, windowed = (abstract_small("qwen2", sliding_window=window) for window in (None, 7))
    without, within = (StepShape.of(model, (1, 1, 128)).keys_per_token for model in (model, windowed))
    assert without == 129 / 2
    # One layer of three has a window: 1 + ... + 7 keys for the first seven tokens, then 7 for each token.
    assert within == pytest.approx((2 * without + (28 + 121 * 7) / 128) / 3)


# Two parts that declare other costs than the model's own parts do. `planning` knows neither of them.

SHAPE = (1, 2, 128)
TOKENS = 2 * 128


class Routed(FeedForward):
    """Is a feed-forward that names one more activation, of 12 bytes a token."""

    def cost(self, norm, context):
        routed = PartCost(output=Cost(matmul=1000, weight_bytes=7), backward=Cost(matmul=3000))
        return super().cost(norm, context) + routed.name_output("routed", 12)


class Tiled(FeedForward):
    """Is a feed-forward that works on one tile of 64 tokens at a time and keeps no "gate_up"."""

    def cost(self, norm, context):
        whole = super().cost(norm, context)
        gate_up = whole.named["gate_up"]
        named = {name: activation for name, activation in whole.named.items() if name != "gate_up"}
        peak = BackwardPeak(bytes=0, weight_bytes=6400 * gate_up.bytes, rerun_bytes=0)
        return PartCost(named=named, backward=whole.backward + gate_up.cost, peaks=(peak,))


@pytest.fixture
def step_with(monkeypatch):
    def step_with(part: type[FeedForward]) -> StepShape:
        monkeypatch.setattr("jaxpack.model.block.FeedForward", part)
        model = nnx.eval_shape(lambda: add_lora(Transformer(small_config("qwen3"), rngs=nnx.Rngs(0)), LoraConfig(r=8)))
        return StepShape.of(model, SHAPE)

    return step_with


def test_a_new_part_counts_by_what_it_declares(step_with, monkeypatch):
    monkeypatch.setitem(KEPT, "keep_attention", KEPT["keep_attention"] | {"routed"})
    monkeypatch.setitem(OFFLOADED, "offload", OFFLOADED["offload"] | {"routed"})
    before, after = step_with(FeedForward), step_with(Routed)
    work = Cost(matmul=1000, weight_bytes=7)
    for remat in get_args(Remat):
        names_it = remat in ("keep_attention", "none")
        assert layer_bytes(after, remat) - layer_bytes(before, remat) == (12 * TOKENS if names_it else 0), remat
        offloads_it = remat == "offload"
        again = NO_COST if names_it or offloads_it else work.for_tokens(TOKENS)
        assert recomputed_cost(after, remat) == recomputed_cost(before, remat) + again
        assert host_bytes(after, remat) - host_bytes(before, remat) == offloads_it * before.num_layers * 12 * TOKENS
    assert forward_cost(after) == forward_cost(before) + work.for_tokens(TOKENS)
    assert backward_cost(after) == backward_cost(before) + Cost(matmul=3000).for_tokens(TOKENS)


def test_a_part_that_names_less_keeps_less(step_with):
    before, after = step_with(FeedForward), step_with(Tiled)
    gate_up = 2 * 80 * before.itemsize  # bytes a token
    assert layer_bytes(before, "keep_projections") - layer_bytes(after, "keep_projections") == TOKENS * gate_up
    assert backward_bytes(after, "none") == 6400 * gate_up  # more than attention holds


@pytest.mark.parametrize(("lora", "of_parameter"), [(None, 6), (LORA, 4)], ids=["all", "adapters"])
def test_a_token_needs_the_operations_that_its_parameters_need(lora, of_parameter):
    """6 operations for each trained parameter, 4 for each frozen one, and those of attention, few for short rows."""
    model = abstract_model("Qwen3-4B", lora)
    matrices = sum(x.size for x in jax.tree.leaves(nnx.state(model)) if x.ndim > 1)  # the embedding is the head, too
    step = StepShape.of(model, (1, 16, 1024), keys_per_token=KEYS_PER_TOKEN)
    assert needed_flops(step) == pytest.approx(of_parameter * matrices, rel=0.03)
    longer = StepShape.of(model, (1, 16, 1024), keys_per_token=10 * KEYS_PER_TOKEN)
    pairs = 9 * KEYS_PER_TOKEN * 32 * 128 * 36  # a head reads each of so many more keys
    assert needed_flops(longer) - needed_flops(step) == pytest.approx(12 * pairs)
    half = StepShape.of(model, (1, 16, 1024), keys_per_token=KEYS_PER_TOKEN, max_targets=8 * 1024)
    assert needed_flops(half) < needed_flops(step)
