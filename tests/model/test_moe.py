"""Tests the mixture of experts within the model: routing of packed rows, gradients, and adapters of experts."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kernels.cuda_lowering import lower_for_cuda, triton_modules
from models import random_documents, small_config, small_model
from programs import equations

from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.errors import InputError
from jaxpack.kernels.attention import segment_bounds
from jaxpack.kernels.weight import DenseStack, DenseWeight
from jaxpack.model.context import RowContext
from jaxpack.model.lora import adapters, add_lora
from jaxpack.model.moe import MoE, Router, experts_of
from jaxpack.model.norm import make_norm
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import weight_of
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.step import loss_and_gradients, split_trainable

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EVERYTHING = LoraConfig(r=4, target_parameters=EXPERTS)
both_implementations = pytest.mark.parametrize("implementation", ["xla", "pallas"])

# The model in packed rows.


ROUTERS = {
    "random": lambda weight: weight,
    "all experts": lambda weight: weight,
    # All experts have the same logit for every token, and in the last case always two.
    "ties": lambda weight: jnp.broadcast_to(weight[:, :1], weight.shape),
    "pairs of ties": lambda weight: jnp.repeat(weight[:, ::2], 2, axis=1),
}


def moe_model(case: str) -> Transformer:
    """Makes a model with adapters on everything, and with this kind of router."""
    model = small_model("qwen3_moe", lora=EVERYTHING, num_experts_per_tok=6 if case == "all experts" else 2)
    router = model.blocks.feed_forward.router
    router.weight.set_value(DenseWeight(ROUTERS[case](weight_of(router.weight).dense(jnp.float32))))
    return model


routers = pytest.mark.parametrize("case", ROUTERS)
LENGTHS = ([23, 1, 23], [], [1], [1, 23])  # of the documents in each row, one of which is padding alone


@functools.cache
def packed() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and segment ids of four rows."""
    rng = np.random.default_rng(0)
    tokens, ids = rng.integers(0, 97, (len(LENGTHS), 64)), np.zeros((len(LENGTHS), 64), int)
    for row, lengths in enumerate(LENGTHS):
        segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        ids[row, : len(segments)] = segments
    return tokens.astype(np.int32), ids.astype(np.int32)


def logits_of(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(model.logits(jnp.asarray(tokens), jnp.asarray(packed()[1])))


@routers
def test_a_packed_document_has_the_logits_that_it_has_alone(case):
    model, (tokens, ids) = moe_model(case), packed()
    logits = logits_of(model, tokens)
    assert np.isfinite(logits).all()  # of padding, too
    for row, lengths in enumerate(LENGTHS):
        for d in range(len(lengths)):
            here = ids[row] == d + 1
            alone = model.logits(jnp.asarray(tokens[row, here][None]))
            np.testing.assert_allclose(logits[row, here], alone[0], atol=1e-5)


@routers
def test_changing_a_document_or_padding_changes_no_other_in_the_last_bit(case):
    model, (tokens, ids) = moe_model(case), packed()
    before = logits_of(model, tokens)
    for row, document in ((0, 1), (0, 2), (2, 1), (3, 2), (1, 0), (0, 0)):
        here = np.zeros(ids.shape, bool)
        here[row] = ids[row] == document
        after = logits_of(model, np.where(here, (tokens + 1) % 97, tokens))
        np.testing.assert_array_equal(after[~here & (ids > 0)], before[~here & (ids > 0)])
        assert (after[here] != before[here]).any(axis=-1).all()


def test_a_document_that_is_not_finite_changes_no_other_in_the_last_bit():
    """Its tokens go to experts, too, and lie in the same blocks as tokens of other documents."""
    model, (tokens, ids) = moe_model("random"), packed()
    own = np.zeros(ids.shape, bool)
    own[0] = ids[0] == 1
    tokens = np.where(own & (np.arange(64) % 5 == 0), 96, np.where(tokens == 96, 95, tokens))

    def logits_with(value: float) -> np.ndarray:
        embedding = weight_of(model.embedding).dense(jnp.float32).at[96].set(value)
        model.embedding.set_value(DenseWeight(embedding))
        return logits_of(model, tokens)

    before, after = logits_with(0.01), logits_with(jnp.nan)
    np.testing.assert_array_equal(after[~own & (ids > 0)], before[~own & (ids > 0)])
    assert np.isnan(after[own]).all()


# The layer.


def layer(*, norm_topk_prob: bool) -> tuple[nnx.GraphDef, nnx.State, jax.Array, RowContext]:
    """Returns a norm and a mixture of experts, split, an input of two rows with padding, and its bounds."""
    config = small_config("qwen3_moe", norm_topk_prob=norm_topk_prob)
    norm, moe = make_norm(config, jnp.float32), MoE(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(moe):
        if hasattr(module, "weight"):
            module.weight.set_value(10 * module.weight[...])  # so that the shares and the experts' results differ
    ids = jnp.asarray(np.stack([np.repeat([1, 2, 0], [9, 4, 3]), np.repeat([1, 0], [1, 15])]))
    x = jax.random.normal(jax.random.key(0), (*ids.shape, config.hidden_size))
    angles = jnp.zeros(0)  # nothing rotates here
    return *nnx.split((norm, moe)), x, RowContext(segment_bounds(ids), angles, None, None)


def dense_reference(state: nnx.State, x: jax.Array, real: np.ndarray, *, norm_topk_prob: bool) -> jax.Array:
    """Computes all experts for all tokens; the shares of experts that a token did not choose are zero."""
    norm, moe = state[0], state[1]
    E, C = 6, 2
    normed = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * norm["scale"][...][None, None]
    logits = jnp.einsum("BTD,ED->BTE", normed, moe["router"]["weight"][...])
    least = jnp.sort(logits, axis=-1)[..., E - C, None]
    chosen = (logits >= least) & jnp.asarray(real)[..., None]
    among = jnp.where(chosen, logits, -1e30) if norm_topk_prob else logits
    shares = jnp.where(chosen, jax.nn.softmax(among), 0)
    gate_up, down = (moe[name]["weight"][...] for name in ("gate_up", "down"))
    gate_up, down = gate_up.reshape(E, -1, gate_up.shape[-1]), down.reshape(E, -1, down.shape[-1])
    gate, up = jnp.split(jnp.einsum("BTD,EFD->BTEF", normed, gate_up), 2, axis=-1)
    return x + jnp.einsum("BTE,BTEF,EDF->BTD", shares, jax.nn.silu(gate) * up, down)


@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["shares of the chosen", "shares of all"])
@both_implementations
def test_value_and_gradients_equal_a_model_that_computes_all_experts(implementation, norm_topk_prob):
    graph, state, x, context = layer(norm_topk_prob=norm_topk_prob)
    real = np.asarray(context.bounds.first) <= np.arange(x.shape[1])
    d_out = jax.random.normal(jax.random.key(1), x.shape)

    def sparse(state, x):
        norm, moe = nnx.merge(graph, state)
        return moe(norm, x, context._replace(implementation=implementation), (None, None))[0]

    def run(f):
        out, pull = jax.vjp(f, state, x)
        return out, *pull(d_out)

    got = jax.jit(functools.partial(run, sparse))()
    want = jax.jit(functools.partial(run, lambda *a: dense_reference(*a, real, norm_topk_prob=norm_topk_prob)))()
    found, expected = (jax.tree_util.tree_leaves_with_path(results) for results in (got, want))
    assert len(found) == 1 + 4 + 1  # the result; the norm, the router and two matrices; the input
    for (path, array), (_, exact) in zip(found, expected, strict=True):
        scale = np.abs(exact).max()
        assert scale > 1e-2
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(array, exact, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def test_the_derivative_of_the_router_scatters_nothing():
    graph, state, x, _ = layer(norm_topk_prob=True)

    def loss(state, x):
        norm, moe = nnx.merge(graph, state)
        tokens = norm(x).reshape(-1, x.shape[-1])
        return jnp.sum(moe.router(tokens, None)[0] ** 2)

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(state, x)
    assert not [e for e in equations(program.jaxpr) if e.primitive.name.startswith("scatter")]


@pytest.mark.parametrize("balances", [False, True])
def test_the_use_of_experts_is_counted_without_padding(balances):
    graph, state, x, context = layer(norm_topk_prob=True)
    norm, moe = nnx.merge(graph, state)
    _, sums = moe(norm, x, context._replace(balances=balances), (None, None))
    real = np.asarray(context.bounds.first) <= np.arange(x.shape[1])
    logits = np.asarray(jnp.einsum("BTD,ED->BTE", norm(x), moe.router.weight[...]))[real]
    chosen = np.argsort(-logits, axis=1)[:, :2]
    counts = np.bincount(chosen.reshape(-1), minlength=6)
    np.testing.assert_array_equal(sums.counts, counts)
    assert float(sums.tokens) == real.sum() == 14
    np.testing.assert_allclose(sums.busiest, counts.max() / counts.mean(), rtol=1e-6)
    np.testing.assert_allclose(sums.unused, np.mean(counts == 0), rtol=1e-6)
    if not balances:
        assert sums.probabilities is None
        return
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sums.probabilities, probabilities.sum(axis=0), rtol=1e-5)
    wanted = 6 * np.sum(counts / 14 * probabilities.mean(axis=0))
    np.testing.assert_allclose(sums.load_balancing_loss, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("counts", "busiest", "unused"), [([4, 4, 4, 4], 1, 0), ([8, 8, 0, 0], 2, 0.5), ([0] * 4, 0, 1)]
)
def test_figures_of_the_use_of_experts(counts, busiest, unused):
    router = Router(small_config("qwen3_moe"), dtype=jnp.float32, rngs=nnx.Rngs(0))
    sums = router._sums(jnp.zeros((8, 4)), jnp.array(counts), None, True)
    assert (float(sums.busiest), float(sums.unused)) == (busiest, unused)
    least = 0 if not any(counts) else 2  # the number of a token's experts, where their probabilities are equal
    np.testing.assert_allclose(sums.load_balancing_loss, least, rtol=1e-6)


# Training.


@functools.cache
def batch():
    config = TrainConfig(max_length=128, per_device_train_batch_size=2, max_steps=1)
    return jax.tree.map(jnp.asarray, Batches(random_documents([17, 1, 40, 3, 22, 31, 9, 28, 64]), config)[0])


@functools.cache
def step_results(remat: Remat, trained_whole: bool, router_aux_loss_coef: float = 0.3):
    model = small_model("qwen3_moe", lora=None if trained_whole else EVERYTHING)
    graph, trainable, frozen = split_trainable(model)
    options = {"remat": remat, "router_aux_loss_coef": router_aux_loss_coef}
    return jax.jit(functools.partial(loss_and_gradients, graph, **options))(trainable, frozen, batch())


@pytest.mark.parametrize("trained_whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "whole"])
@pytest.mark.parametrize(
    "remat",
    ["full", "offload", *(pytest.param(r, marks=pytest.mark.slow) for r in ("keep_projections", "keep_attention"))],
)
def test_every_choice_of_residuals_gives_the_same_gradients(remat, trained_whole):
    (loss, gradients), (want, want_gradients) = step_results(remat, trained_whole), step_results("none", trained_whole)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(got, expected, atol=1e-6 * scale)


def kernels_of_experts(f, *arguments) -> list[str]:
    """Returns the names of the experts' kernels in the program that a GPU gets, in their order."""
    with pytest.MonkeyPatch.context() as patch:  # a loop, in which the program holds a layer once
        patch.setattr("jaxpack.model.transformer.unrolls", lambda remat: False)
        names = [module.name.removeprefix("jaxpack_") for module in triton_modules(lower_for_cuda(f, *arguments))]
    return [name for name in names if name.startswith(("grouped", "gated"))]


TO_A, PROJECTED, BACK, OUTER = "grouped_matmul", "grouped_matmul", "grouped_matmul_transposed", "grouped_outer"
BACKWARD = [BACK, BACK, "gated_silu_backward", OUTER, OUTER, BACK, BACK, OUTER, OUTER]


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(r, marks=pytest.mark.slow) if r in ("offload_heads", "keep_attention") else r
        for r in get_args(Remat)
    ],
)
def test_a_step_writes_gate_and_up_once_and_their_product_once_in_each_direction(remat):
    """The backward pass writes the product together with the gradients of gate and up, without one more kernel."""
    graph, trainable, frozen = split_trainable(small_model("qwen3_moe", lora=EVERYTHING, dtype=jnp.bfloat16))
    step = functools.partial(loss_and_gradients, graph, remat=remat)
    is_kept = remat in ("keep_projections", "none")
    forward = [TO_A, "grouped_silu_with_gate_up" if is_kept else "grouped_silu", TO_A, PROJECTED]
    again = [] if is_kept else [PROJECTED]
    assert kernels_of_experts(step, trainable, frozen, batch()) == [*forward, *again, *BACKWARD]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_without_a_derivative_only_the_product_of_gate_and_up_is_written(remat):
    model = small_model("qwen3_moe", lora=EVERYTHING, dtype=jnp.bfloat16)
    graph, state = nnx.split(model)

    def hidden(state, *row):
        return nnx.merge(graph, state)(*row, remat=remat)

    row = (jax.ShapeDtypeStruct((1, 128), jnp.int32),) * 3
    assert kernels_of_experts(hidden, state, *row) == [TO_A, "grouped_silu", TO_A, PROJECTED]


def test_without_a_load_balancing_loss_residuals_on_the_host_change_nothing():
    """Tests that the loop takes sums that have no gradient."""
    (loss, gradients), (want, want_gradients) = (step_results(remat, False, 0.0) for remat in ("offload", "none"))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert float(step_results("none", False)[0]) > float(want) + 0.3
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())


# Adapters.


def merged(model: Transformer) -> Transformer:
    """Adds the experts' adapters to their matrices, one projection of one expert after another."""
    for module in experts_of(model):
        weight, first = np.array(weight_of(module.weight).dense(jnp.float32)), 0
        for name, size in module.projections:
            adapter = module.adapter_of(name)
            product = np.einsum("LOR,LRI->LOI", adapter.lora_b[...], adapter.lora_a[...])
            assert np.abs(product).max() > 1e-3
            weight[:, first : first + size] += adapter.scaling * product
            first += size
        assert first == weight.shape[1]
        module.weight.set_value(DenseStack(jnp.asarray(weight)))
        module.lora = nnx.Dict()
    return model


def test_adapters_of_experts_add_their_products_to_the_rows_of_their_projections():
    settings = LoraConfig(r=4, target_modules=(), target_parameters=EXPERTS, rank_pattern={EXPERTS[1]: 3})
    model, tokens = small_model("qwen3_moe", lora=settings), packed()[0]
    got = logits_of(model, tokens)
    np.testing.assert_allclose(logits_of(merged(model), tokens), got, atol=1e-5)


def test_new_adapters_of_experts_change_nothing():
    model, tokens = small_model("qwen3_moe"), packed()[0]
    before = logits_of(model, tokens)
    add_lora(model, EVERYTHING)
    np.testing.assert_allclose(logits_of(model, tokens), before, atol=1e-6)


def test_dropout_acts_on_the_adapters_of_attention_and_leaves_experts_alone():
    model = small_model("qwen3_moe", lora=LoraConfig(r=4, lora_dropout=0.5))
    assert all(not module.lora for module in experts_of(model))
    graph, trainable, frozen = split_trainable(model)
    run = jax.jit(lambda key: loss_and_gradients(graph, trainable, frozen, batch(), dropout_key=key))
    (loss, gradients), (other, _) = run(jax.random.key(0)), run(jax.random.key(1))
    assert np.isfinite(loss)
    assert loss != other
    found = adapters(nnx.merge(graph, gradients, frozen))
    assert found.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for adapter in found.values():
        assert 0 < np.abs(adapter.lora_a[...]).max() < np.inf


def test_a_dropout_key_changes_nothing_in_the_experts():
    graph, state, x, context = layer(norm_topk_prob=True)
    norm, moe = nnx.merge(graph, state)
    run = jax.jit(lambda keys: moe(norm, x, context, keys)[0])
    first, second = (run(jax.random.split(jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("settings", ["down_proj", "experts.down_proj", "mlp.experts.down_proj"])
def test_experts_alone_get_adapters_by_the_end_of_their_name(settings):
    model = small_model("qwen3_moe", lora=LoraConfig(r=4, target_modules=(), target_parameters=settings))
    assert set(adapters(model)) == {"mlp.experts.down_proj"}
    adapter = adapters(model)["mlp.experts.down_proj"]
    config = model.config
    stack = config.num_layers, config.num_experts
    assert adapter.lora_a.shape == (*stack, 4, config.moe_intermediate_size)
    assert adapter.lora_b.shape == (*stack, config.hidden_size, 4)
    bound = config.moe_intermediate_size**-0.5  # as PEFT draws the factors of one expert
    assert bound * 0.98 < float(jnp.abs(adapter.lora_a[...]).max()) <= bound
    _, trainable, _ = split_trainable(model)
    assert len(jax.tree.leaves(trainable)) == 2


def test_experts_get_no_adapter_unless_they_are_named():
    assert set(adapters(small_model("qwen3_moe", lora=LoraConfig()))) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(adapters(small_model("qwen3_moe", lora=EVERYTHING))) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        *EXPERTS,
    }


@functools.cache
def model_without_adapters(family: str) -> Transformer:
    return small_model(family)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "qwen3_moe",
            {"target_parameters": "up_proj"},
            r"`target_parameters` must be among \['mlp.experts.down_proj', ",
        ),
        ("qwen3_moe", {"target_parameters": "proj"}, r"`target_parameters` must be among .*got \['proj'\]"),
        (
            "qwen3_moe",
            {"target_parameters": "down_proj,gate_proj"},
            r"`target_parameters` must be .*got \['gate_proj'\]",
        ),
        ("qwen3_moe", {"target_modules": "gate_proj"}, r"`target_modules` must be .*got \['gate_proj'\]"),
        (
            "qwen3_moe",
            {"rank_pattern": f"{EXPERTS[0]}=2"},
            r"must be of projections with an adapter, got \['mlp.experts",
        ),
        ("qwen3", {"target_parameters": "down_proj"}, "must be empty for a model without experts, got .*down_proj"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_names_that_are_not_of_the_model_are_refused(family, settings, message):
    with pytest.raises(InputError, match=message):
        add_lora(model_without_adapters(family), LoraConfig(**settings))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(InputError, match=r"`lora_dropout` must be 0 with `target_parameters`.*got 0\.1"):
        LoraConfig(target_parameters="down_proj", lora_dropout=0.1)
    with pytest.raises(
        InputError, match="`target_modules` must name at least one module, or `target_parameters` a matrix"
    ):
        LoraConfig(target_modules=())
