"""Tests which moments are kept in 8 bits, what they take, and that an update is Adam's, matrix by matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from models import small_model
from planned_steps import abstract_model

from jaxpack import InputError, LoraConfig, TrainConfig
from jaxpack.model.weights import split_trained
from jaxpack.optimizers.adamw_8bit import BLOCK, Quantized, scale_by_adam_8bit
from jaxpack.optimizers.optimizer import make_optimizer, resolve_optimizer, state_bytes
from jaxpack.optimizers.placement import state_specs
from jaxpack.parallel.placement import is_partition
from jaxpack.train.checkpoint import arrays_by_name

IN_8_BITS = TrainConfig(optim="adamw_8bit")


def moments_of(lora: LoraConfig | None) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes of the parameters and of the first moments of Qwen3-0.6B, by name."""
    _, trained, _ = split_trained(abstract_model("Qwen3-0.6B", lora))
    state = jax.eval_shape(make_optimizer(IN_8_BITS, optax.constant_schedule(1e-3)).init, trained)
    return arrays_by_name(trained), arrays_by_name(state[1][0].mu)


@pytest.mark.parametrize("lora", [LoraConfig(r=16), LoraConfig(r=1), None], ids=["r=16", "r=1", "full"])
def test_moments_of_large_matrices_are_in_8_bits_and_those_of_the_embedding_are_not(lora):
    parameters, moments = moments_of(lora)
    for name, parameter in parameters.items():
        matrix = parameter.size // 28 if name.startswith("blocks.") else parameter.size
        if matrix < 4096 or name == "embedding":
            assert moments[name].shape == parameter.shape
            assert moments[name].dtype == jnp.float32
        else:
            codes, factors = moments[f"{name}.codes"], moments[f"{name}.absmax"]
            assert (codes.shape, codes.dtype) == ((28, -(-matrix // BLOCK), BLOCK), jnp.uint8)
            assert (factors.shape, factors.dtype) == (codes.shape[:2], jnp.float32)
    in_bits = [name for name in moments if name.endswith(".codes")]
    assert len(in_bits) == {16: 14, 1: 0}.get(lora.r if lora else None, 4)


def test_the_state_of_adapters_takes_a_quarter():
    model = abstract_model("Qwen3-4B", LoraConfig(r=16))
    trained = sum(x.size for x in jax.tree.leaves(split_trained(model)[1]))
    assert state_bytes(TrainConfig(), model) == pytest.approx(8 * trained, rel=1e-6)
    assert state_bytes(IN_8_BITS, model) == pytest.approx((2 + 8 / 256) * trained, rel=1e-6)


def run(gradients: list, layers: int, b1: float = 0.9) -> tuple[np.ndarray, object]:
    transformation = scale_by_adam_8bit(b1, 0.999, 1e-8, lambda path, x: layers)
    state, updates = transformation.init(jnp.zeros_like(gradients[0])), []
    for gradient in gradients:
        update, state = transformation.update(gradient, state)
        updates.append(np.asarray(update))
    return np.stack(updates), state


def test_no_layer_of_a_stack_feels_another():
    gradients = list(np.random.default_rng(0).normal(size=(2, 3, 41, 101)) * np.array([1.0, 1e-6, 1e6])[:, None, None])
    gradients = [jnp.asarray(gradient, jnp.float32) for gradient in gradients]
    together, state = run(gradients, 3)
    assert isinstance(state.mu, Quantized)
    for layer in range(3):
        alone, of_layer = run([gradient[layer] for gradient in gradients], 1)
        np.testing.assert_array_equal(together[:, layer], alone)
        np.testing.assert_array_equal(state.nu.codes[layer], of_layer.nu.codes[0])


@pytest.mark.parametrize("b1", [0.9, 0.0])
def test_updates_are_those_of_adam_as_far_as_8_bits_go(b1):
    signs = jnp.sign(jax.random.normal(jax.random.key(0), (64, 64)))
    sizes = jax.random.uniform(jax.random.key(1), (64, 64), minval=0.5, maxval=2)
    gradients = [signs * sizes * factor for factor in (1.0, 0.5, 2.0, 1.5)]
    updates, _ = run(gradients, 1, b1)
    adam = optax.scale_by_adam(b1, 0.999, 1e-8)
    state = adam.init(signs)
    for step, gradient in enumerate(gradients):
        expected, state = adam.update(gradient, state)
        # The first update reads no rounded moment. In later ones, a moment may be off by 0.7 % of the largest of its
        # block, which is up to 4 times this one (16 times, if it is a square); the square root halves that.
        np.testing.assert_allclose(updates[step], expected, rtol=0.09 if step else 5e-5)
        assert step == 0 or not np.allclose(updates[step], expected, rtol=1e-4)


def test_what_is_not_finite_is_not_hidden_and_stays_in_its_block():
    updates, _ = run([jnp.ones((64, 64)).at[3, 5].set(jnp.nan), jnp.ones((64, 64))], 1)
    assert np.argwhere(np.isnan(updates[0])).tolist() == [[3, 5]]
    np.testing.assert_allclose(updates[1, 4:], 1, rtol=1e-5)  # a block has 256 values, four rows


def test_an_update_keeps_no_more_than_three_arrays_of_the_size_of_a_leaf():
    transformation = scale_by_adam_8bit(0.9, 0.999, 1e-8, lambda path, x: 4)
    parameter = jax.ShapeDtypeStruct((4, 512, 256), jnp.float32)
    state = jax.eval_shape(transformation.init, parameter)

    def step(parameter, gradient, state):
        update, state = transformation.update(gradient, state)
        return parameter + update, state

    memory = jax.jit(step, donate_argnums=(0, 2)).lower(parameter, parameter, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 3.1 * 4 * parameter.size
    assert memory.alias_size_in_bytes >= (4 + 2) * parameter.size  # the codes and parameters are changed in place


def test_an_optimizer_of_ones_own_and_another_by_name_are_refused_together():
    model = small_model("qwen3", lora=LoraConfig(r=2))
    with pytest.raises(
        InputError, match=r"`optimizer` must be None or a schedule with `optim` 'adamw_8bit', got an opt"
    ):
        resolve_optimizer(optax.sgd(1.0), IN_8_BITS, 10, model)
    optimizer, _ = resolve_optimizer(optax.constant_schedule(1e-3), IN_8_BITS, 10, model)
    assert isinstance(optimizer.init({"weight": jnp.ones((64, 64))})[1][0].mu["weight"], Quantized)


@pytest.mark.parametrize("optim", ["adamw", "lion", "muon", "sgd", "adafactor"])
def test_the_state_lies_in_shards_as_the_matrices_do(optim):
    config = TrainConfig(optim=optim, optim_args="momentum=0.9" if optim in ("sgd", "muon") else "")
    model, mesh = small_model("qwen3", hidden_size=64), AbstractMesh((1, 4), ("data", "fsdp"))
    _, trained, _ = split_trained(model)
    state = jax.eval_shape(make_optimizer(config, optax.constant_schedule(1e-3), model).init, trained)
    placed = jax.tree.leaves(state_specs(state, trained, mesh), is_leaf=is_partition)
    in_shards = [leaf.size for leaf, spec in zip(jax.tree.leaves(state), placed, strict=True) if "fsdp" in spec]
    matrices = sum(leaf.size for leaf in jax.tree.leaves(trained.blocks) if leaf.ndim == 3)
    moments = {"adamw": 2, "adafactor": 0}.get(optim, 1)
    # The 97 rows of the embedding cannot be dealt evenly, so it is whole.
    assert sum(in_shards) == moments * matrices
    # Adafactor keeps a number for each row and column, and whole moments of vectors only.
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < (0.2 if optim == "adafactor" else 2.01) * sum(
        leaf.size for leaf in jax.tree.leaves(trained)
    )


def test_moments_in_8_bits_lie_in_shards_between_their_blocks():
    model, mesh = small_model("qwen3", hidden_size=128, vocab_size=256), AbstractMesh((2, 4), ("data", "fsdp"))
    _, trained, _ = split_trained(model)
    state = jax.eval_shape(make_optimizer(IN_8_BITS, optax.constant_schedule(1e-3), model).init, trained)
    specs = jax.tree.leaves(state_specs(state, trained, mesh), is_leaf=is_partition)
    moments = [(leaf, spec) for leaf, spec in zip(jax.tree.leaves(state), specs, strict=True) if leaf.ndim > 1]
    codes = [(leaf, spec) for leaf, spec in moments if leaf.dtype == jnp.uint8]
    matrices = sum(leaf.size for leaf in jax.tree.leaves(trained.blocks) if leaf.ndim == 3)
    in_shards = sum(leaf.size for leaf, spec in codes if spec == PartitionSpec(None, "fsdp"))
    assert in_shards == sum(leaf.size for leaf, _ in codes) == 2 * matrices
    factors = [spec for leaf, spec in moments if leaf.shape[:2] in {code.shape[:2] for code, _ in codes}]
    assert set(factors) == {PartitionSpec(None, "fsdp")}
    whole, shared = state_bytes(IN_8_BITS, model), state_bytes(IN_8_BITS, model, mesh)
    assert shared < 0.3 * whole


def test_parameters_of_an_optimizer_are_refused_with_those_that_there_are():
    for optim, given, told in (
        (
            "adamw",
            "momentum=0.9",
            r"must be empty with `optim` 'adamw', got 'momentum'\. It belongs to `optim` 'sgd' or",
        ),
        ("sgd", {"beta": 1}, r"must be among \('momentum', 'nesterov'\) with `optim` 'sgd', got 'beta'\."),
        ("sgd", {"momentum": 1}, r"must have a number in \[0, 1\) as `momentum`, got 1\."),
        ("muon", "nesterov=yes", r"must have true or false as `nesterov`, got 'yes'\."),
        ("sgd", "nesterov=true", "must have a `momentum` above 0 with `nesterov`"),
    ):
        with pytest.raises(InputError, match=f"`optim_args` {told}"):
            TrainConfig(optim=optim, optim_args=given)
