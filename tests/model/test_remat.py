"""Every choice of residuals gives the same gradients, takes the predicted bytes, and recomputes nothing it kept."""

import functools
import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from kernels.cuda_lowering import lower_for_cuda, triton_modules
from models import random_documents, small_config, small_model
from programs import equations

from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.model import remat as remat_module
from jaxpack.model.feed_forward import FeedForward
from jaxpack.model.linear import Linear
from jaxpack.model.remat import KEPT, OFFLOADED, compiler_options
from jaxpack.model.transformer import Transformer
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import host_bytes, layer_bytes
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.step import loss_and_gradients, split_trainable

CHOICES = get_args(Remat)
BETWEEN = [("keep_attention",), ("keep_projections",)]
LENGTHS = [17, 2, 40, 3, 22, 31, 9, 28, 5, 64]


@functools.cache
def parts(family: str, lora: bool, dtype=jnp.float32):
    return split_trainable(small_model(family, lora=LoraConfig(r=8) if lora else None, dtype=dtype))


@functools.cache
def batch():
    config = TrainConfig(max_length=128, per_device_train_batch_size=2, max_steps=1)
    return jax.tree.map(jnp.asarray, Batches(random_documents(LENGTHS), config)[0])


@functools.cache
def results(family: str, lora: bool, remat: Remat):
    graph, trainable, frozen = parts(family, lora)
    return jax.jit(functools.partial(loss_and_gradients, graph, remat=remat))(trainable, frozen, batch())


def slow(cases: Iterable[tuple]) -> list:
    """Marks cases as slow if they resemble cases that run every time."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("family", "lora", "remat"),
    [
        *itertools.product(["qwen3"], [True], [*OFFLOADED, "full"]),
        *slow(("qwen3", True, *between) for between in BETWEEN),
        *slow(itertools.product(["llama"], [False], CHOICES[:-1])),
        # Every family has every choice, with adapters or without; these are the other two pairs of family and adapters.
        *slow([("qwen3", False, "offload"), ("llama", True, "keep_projections")]),
        *slow([("gemma3", True, "keep_projections")]),
    ],
)
def test_loss_and_gradients_are_the_same(family, lora, remat):
    (loss, gradients), (want, want_gradients) = results(family, lora, remat), results(family, lora, "none")
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())


@pytest.fixture(params=["qwen3", "llama", "qwen3_moe", pytest.param("gemma3", marks=pytest.mark.slow)])
def any_family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_name_is_one_that_the_model_gives(any_family):
    graph, trainable, frozen = parts(any_family, True)
    program = jax.make_jaxpr(functools.partial(loss_and_gradients, graph, remat="none"))(trainable, frozen, batch())
    given = {equation.params["name"] for equation in equations(program.jaxpr) if equation.primitive.name == "name"}
    named = StepShape.of(nnx.merge(graph, trainable, frozen), (1, 1, 128)).layer.named
    assert given == set(named)
    assert all(activation.bytes for activation in named.values())
    assert ("branch" in given) == small_config(any_family).post_norms
    assert ("routing" in given) == bool(small_config(any_family).num_experts)
    known = given | {"branch", "routing"}
    assert all(names <= known for names in OFFLOADED.values())
    assert all(names <= known - {"heads"} for names in KEPT.values() if names is not None)


# How often these operations run per layer in the step that a GPU gets. With offloading, the program holds the forward
# pass of a layer twice, because the first layer runs before the loop.
RUNS = {
    "offload": {"attention": 2, "qkv": 2, "gate_up": 2, "out": 1},
    "offload_heads": {"attention": 2, "qkv": 1, "gate_up": 2, "out": 1},
    "full": {"attention": 2, "qkv": 2, "gate_up": 2, "out": 2},
    "keep_attention": {"attention": 1, "qkv": 2, "gate_up": 2, "out": 2},
    "keep_projections": {"attention": 1, "qkv": 1, "gate_up": 1, "out": 1},
    "none": {"attention": 1, "qkv": 1, "gate_up": 1, "out": 1},
}


@functools.cache
def looped_step(family: str, lora: bool, remat: Remat) -> jax.stages.Lowered:
    """Lowers a step for a GPU, with a loop over the layers, so that the program holds a layer once."""
    graph, trainable, frozen = parts(family, lora, jnp.bfloat16)
    step = functools.partial(loss_and_gradients, graph, remat=remat)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxpack.model.transformer.unrolls", lambda remat: False)
        return lower_for_cuda(step, trainable, frozen, batch())


@pytest.mark.parametrize("remat", [*OFFLOADED, "full", "none", *slow(BETWEEN)])
@pytest.mark.parametrize("any_family", ["qwen3", *slow([("llama",), ("gemma3",)])])
def test_what_is_kept_is_not_computed_again(any_family, remat):
    lowered = looped_step(any_family, True, remat)
    kernels = [module.name for module in triton_modules(lowered)]
    lines = lowered.as_text().splitlines()
    config = small_config(any_family)
    # With offloading, the post norm reads the output of the projection again.
    runs = RUNS[remat] | ({"out": 2} if remat in OFFLOADED and config.post_norms else {})
    assert kernels.count("jaxpack_attention") == runs["attention"]
    assert kernels.count("jaxpack_attention_backward_kv") == 1
    heads = config.num_heads + 2 * config.num_kv_heads
    # A matmul is known by its matrix, which includes the adapters' factors: three ranks of 8, padded to 32.
    matrices = {
        "qkv": (config.hidden_size + 32, heads * config.head_dim),
        "gate_up": (config.hidden_size + 16, 2 * config.intermediate_size),
        "out": (config.num_heads * config.head_dim, config.hidden_size + 16),
    }
    for name, (rows, columns) in matrices.items():
        matrix = f"tensor<{rows}x{columns}xbf16>) ->"
        matmuls = [line for line in lines if "dot_general" in line and matrix in line]
        # In these models the output of attention has as many channels as the product in the feed-forward, so both
        # projections count as "out". Without a post norm, nothing needs the second projection again.
        down = runs[name] if config.post_norms else 1
        assert len(matmuls) == runs[name] + (down if name == "out" else 0), name


# The bytes of the residuals.


def kept_arrays(parts, remat: Remat, dropout: bool = False):
    """Returns shapes and dtypes of the residuals of a row of 128 tokens, with the kernels of a GPU."""
    graph, trainable, frozen = parts

    def kept(trainable, frozen, *row):
        def hidden(trainable):
            key = jax.random.key(0) if dropout else None
            model = nnx.merge(graph, trainable, frozen)
            return model(*row, remat=remat, implementation="pallas", dropout_key=key)

        return jax.tree.leaves(jax.vjp(hidden, trainable)[1])

    row = 3 * [jax.ShapeDtypeStruct((1, 128), jnp.int32)]
    return jax.eval_shape(kept, trainable, frozen, *row)


def heads_of(model: Transformer) -> tuple[int, int]:
    """Returns the number of channels of all query heads, and of all key heads."""
    return model.config.num_heads * model.config.head_dim, model.config.num_kv_heads * model.config.head_dim


def kept_bytes(arrays, model: Transformer, remat: Remat) -> int:
    """Adds up the bytes of the layers' residuals that have a token axis, and of extended weight matrices among them.

    Only stacked residuals count. With offloading, the last layer's residuals are not stacked: they are gone before the
    backward pass of the next layer.
    """
    config = model.config
    (q, kv), D, F = heads_of(model), config.hidden_size, config.intermediate_size
    matrices = {
        (q + 2 * kv, D + model.blocks.attention.qkv.rank),
        (2 * F, D + model.blocks.feed_forward.gate_up.rank),
    }

    def counts(x) -> bool:
        may_be_on_host = remat in OFFLOADED and x.ndim == 4 and x.dtype == jnp.bfloat16  # unlike a table of `PerLayer`
        if x.ndim < 3 or x.shape[0] not in (config.num_layers, config.num_layers - may_be_on_host):
            return False
        per_layer = x.shape[1:]
        of_tokens = per_layer[:2] == (1, 128) or per_layer == (1, config.num_kv_heads, 128 * q // kv)
        return of_tokens or (per_layer in matrices and x.dtype == jnp.bfloat16)

    return sum(x.size * x.dtype.itemsize for x in arrays if counts(x))


ADAPTERS = [LoraConfig(r=8), LoraConfig(r=24, target_modules="q_proj,up_proj"), LoraConfig(r=8, use_dora=True), None]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("lora", ADAPTERS, ids=["lora", "few", "dora", "full"])
@pytest.mark.parametrize("remat", CHOICES)
@pytest.mark.parametrize("any_family", ["qwen3", "gemma3", *slow([("llama",), ("qwen2",)])])
def test_what_is_kept_has_the_bytes_that_are_predicted(any_family, lora, remat):
    model = small_model(any_family, lora=lora, dtype=jnp.bfloat16)
    step = StepShape.of(model, (1, 1, 128))
    got = kept_bytes(kept_arrays(split_trainable(model), remat), model, remat)
    if remat == "none":
        heads = step.num_layers * 128 * heads_of(model)[0] * 2
        got -= heads  # the output of attention is kept twice: as heads and as channels
        if model.config.qk_norm:
            # Rotated heads count too: XLA shares them between the passes.
            got += step.num_layers * 128 * sum(heads_of(model)) * 2
    assert got == step.num_layers * layer_bytes(step, remat) + host_bytes(step, remat)


@pytest.mark.parametrize("remat", CHOICES)
def test_dropout_keeps_what_it_lets_through(remat):
    model = small_model("llama", lora=LoraConfig(r=8, lora_dropout=0.1), dtype=jnp.bfloat16)
    step = StepShape.of(model, (1, 1, 128))
    got = kept_bytes(kept_arrays(split_trainable(model), remat, dropout=True), model, remat)
    predicted = step.num_layers * layer_bytes(step, remat) + host_bytes(step, remat)
    linears = [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    # The prediction pads the ranks, so it may be larger by up to the sum of the ranks in channels.
    assert 0 <= predicted - got <= step.num_layers * 128 * 2 * sum(linear.rank for linear in linears) * 2


class Squared(FeedForward):
    """A feed-forward that adds a square to its result; the derivative reads the squared array, which has a name."""

    def __call__(self, norm, x, context, keys):
        x, sums = super().__call__(norm, x, context, keys)
        return x + checkpoint_name(x / 2, "squared") ** 2, sums

    def cost(self, norm, context):
        return super().cost(norm, context).name_output("squared", norm.scale.shape[-1] * context.itemsize)


@pytest.mark.parametrize("remat", ["full", "keep_attention", *slow([("offload",), ("keep_projections",), ("none",)])])
def test_a_part_with_one_more_name_keeps_the_bytes_that_it_declares(remat, monkeypatch):
    monkeypatch.setattr("jaxpack.model.block.FeedForward", Squared)
    monkeypatch.setitem(KEPT, "keep_attention", KEPT["keep_attention"] | {"squared"})
    model = small_model("llama", lora=LoraConfig(r=8), dtype=jnp.bfloat16)
    step = StepShape.of(model, (1, 1, 128))
    got = kept_bytes(kept_arrays(split_trainable(model), remat), model, remat)
    if remat == "none":
        got -= step.num_layers * 128 * heads_of(model)[0] * 2  # kept twice, as above
    assert got == step.num_layers * layer_bytes(step, remat) + host_bytes(step, remat)


# Offloading.


@pytest.mark.parametrize("remat", [*OFFLOADED, "full", *slow([*BETWEEN, ("none",)])])
@pytest.mark.parametrize(
    ("any_family", "lora", "names"),
    [
        ("qwen3", True, {"offload": 2, "offload_heads": 3}),
        *slow(
            [("qwen3", False, {"offload": 1, "offload_heads": 1}), ("gemma3", True, {"offload": 1, "offload_heads": 2})]
        ),
    ],
)
def test_little_goes_to_the_host_and_comes_back(any_family, lora, names, remat):
    """A layer sends its input and, if that spares a matmul, the array between its halves or the source of its heads."""
    text = looped_step(any_family, lora, remat).as_text()
    there = [line for line in text.splitlines() if "annotate_device_placement" in line and '"pinned_host"' in line]
    assert len(there) == names.get(remat, 0)
    config = small_config(any_family)
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    assert {line.split("-> ")[-1].strip() for line in there} <= {f"tensor<1x128x{C}xbf16>" for C in (48, heads)}


def test_a_program_that_copies_from_the_host_gets_options_but_those_that_the_user_has_set(monkeypatch):
    graphs, double, hiding = (
        "xla_gpu_enable_command_buffer",
        "xla_gpu_enable_while_loop_double_buffering",
        "xla_gpu_enable_latency_hiding_scheduler",
    )
    assert compiler_options("offload") == {}  # on a CPU
    monkeypatch.setattr(remat_module, "current_device", lambda: SimpleNamespace(platform="gpu"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options("full") == {}
    for remat, fetches_head in (("offload", False), ("offload_heads", False), ("full", True)):
        assert compiler_options(remat, fetches_head=fetches_head) == {graphs: "", double: True}
    assert compiler_options("offload", fetches_layers=True) == {graphs: "", double: True, hiding: False}
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=dump --{graphs}=FUSION,CUBLAS --{hiding}=true")
    assert compiler_options("offload", fetches_layers=True) == {double: True}
