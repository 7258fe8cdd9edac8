"""Tests which implementation runs, and that every kernel lowers for CUDA on a machine without a GPU."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from kernels.cuda_lowering import H200, TRITON_CALL, TritonModule, lower_for_cuda, triton_modules

from jaxpack.errors import InputError
from jaxpack.kernels._launch import check_no_byte_arrays, dispatch, power_of_two_divisor, powers_of_two
from jaxpack.kernels.attention import attention, segment_bounds
from jaxpack.kernels.gated_activation import gated_activation
from jaxpack.kernels.gated_experts import ExpertLinear, gated_experts
from jaxpack.kernels.normed_linear import normed_linear
from jaxpack.kernels.residual_linear import gated_residual_linear, residual_linear
from jaxpack.kernels.rope import apply_rope, norm_rope, rotary_angles
from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention
from jaxpack.kernels.routing import route
from jaxpack.kernels.weight import DenseStack
from jaxpack.parallel.device import may_lower_for_gpu

# The choice of an implementation.


@pytest.mark.parametrize("name", ["triton", "", "XLA"])
def test_an_unknown_implementation_is_refused_by_name(name):
    with pytest.raises(InputError, match=rf"`implementation` .* one of xla, pallas, got '{name}'"):
        dispatch(name, xla=max, pallas=min)


def test_a_named_implementation_is_the_one_that_runs():
    assert dispatch("xla", xla=max, pallas=min) is max
    assert dispatch("pallas", xla=max, pallas=min) is min


def test_without_a_name_a_cpu_runs_xla():
    with jax.default_device(jax.devices("cpu")[0]):
        assert dispatch(None, xla=lambda x: x + 1, pallas=lambda x: x - 1)(jnp.zeros(())) == 1


@pytest.mark.skipif(may_lower_for_gpu(), reason="this process has a GPU, and traces for both")
@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_without_a_gpu_only_what_a_cpu_runs_is_traced(implementation):
    def branches() -> int:
        x = jnp.zeros((2, 8))
        traced = jax.make_jaxpr(lambda x: gated_activation(x, x, activation="silu", implementation=implementation))(x)
        return str(traced).count("interpret=False")

    assert branches() == 0
    with jax.sharding.use_abstract_mesh(H200):
        assert branches() > 0
    assert branches() == 0  # neither trace is taken from a cache for the other


# Sizes.


@pytest.mark.parametrize("limit", [None, 1, 64])
@pytest.mark.parametrize("size", [0, 1, 20, 80, 96, 128, 211])
def test_powers_of_two_cut_a_range_into_few_pieces(size, limit):
    pieces = powers_of_two(size, limit=limit)
    covered = [i for start, length in pieces for i in range(start, start + length)]
    assert covered == list(range(size))
    assert all(length & (length - 1) == 0 and length <= (limit or size) for _, length in pieces)
    assert limit is not None or len(pieces) == size.bit_count()  # the fewest possible pieces


@pytest.mark.parametrize(("sizes", "limit"), [((12,), 8), ((24, 8), 8), ((32, 8), 4), ((7,), 8), ((16, 6), 16)])
def test_power_of_two_divisor_is_the_largest(sizes, limit):
    common = [2**i for i in range(10) if 2**i <= limit and all(size % 2**i == 0 for size in sizes)]
    assert power_of_two_divisor(*sizes, limit=limit) == max(common)


def test_byte_arrays_are_refused():
    check_no_byte_arrays(x=jnp.zeros(1, jnp.bfloat16))
    with pytest.raises(InputError, match=r"`weight` must have a dtype of two bytes or more, got uint8"):
        check_no_byte_arrays(x=jnp.zeros(1), weight=jnp.zeros(1, jnp.uint8))


# Lowering: no kernel uses an operation that Triton lacks, and every kernel is launched when it is asked for.


def rope(implementation, q, k, *, rotary_dim):
    angles = rotary_angles(jnp.zeros(q.shape[:2], jnp.int32), jnp.ones(rotary_dim // 2))
    return apply_rope(q, k, angles, implementation=implementation)


def normed_rope(implementation, q, k, q_scale, k_scale, *, rotary_dim):
    angles = rotary_angles(jnp.zeros(q.shape[:2], jnp.int32), jnp.ones(rotary_dim // 2))
    return norm_rope(q, k, q_scale, k_scale, angles, eps=1e-6, implementation=implementation)


def attend(implementation, q, k, v, sinks=None, **options):
    bounds = segment_bounds(jnp.ones(q.shape[:2], jnp.int32))
    return attention(q, k, v, bounds, sinks=sinks, implementation=implementation, **options)


def gated(implementation, gate, up=None, *, activation):
    return gated_activation(gate, up, activation=activation, implementation=implementation)


def fused(implementation, qkv, q_scale=None, k_scale=None, *, num_heads):
    angles = rotary_angles(jnp.zeros(qkv.shape[:2], jnp.int32), jnp.ones(qkv.shape[3] // 2))
    bounds = segment_bounds(jnp.ones(qkv.shape[:2], jnp.int32))
    norms = None if q_scale is None else HeadNorms(q_scale, k_scale)
    return rotary_attention(qkv, angles, bounds, num_heads=num_heads, norms=norms, implementation=implementation)


def normed(implementation, *arrays):
    return normed_linear(*arrays, eps=1e-6, implementation=implementation)


def residual(implementation, *arrays):
    return residual_linear(*arrays, implementation=implementation)


def gated_residual(implementation, *arrays):
    return gated_residual_linear(*arrays, implementation=implementation)


def experts(implementation, x, shares, gate_up, down, *factors, num_experts, trained, keeps_gate_up=True):
    if not trained:
        gate_up, down = (DenseStack(jax.lax.stop_gradient(stack)).at(jnp.int32(1)) for stack in (gate_up, down))
    routing = route(jnp.broadcast_to(jnp.arange(shares.shape[1])[None, :], shares.shape), num_experts)
    pairs = (factors[:2], factors[2:]) if factors else (None, None)
    linears = (ExpertLinear(weight, None, pair) for weight, pair in zip((gate_up, down), pairs, strict=True))
    run = functools.partial(gated_experts, keeps_gate_up=keeps_gate_up, implementation=implementation)
    if not keeps_gate_up:
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names("lora"))
    return run(x, x, shares, routing, *linears)


class Case(NamedTuple):
    """A public function of `(implementation, *arrays, **options)`, with its shapes for T tokens and its launches."""

    function: Callable
    shapes: Callable[[int], list[tuple[int, ...]]]
    options: dict
    forward: list[str]
    backward: list[str]


def rope_case(heads: int, kv_heads: int, head_dim: int, rotary_dim: int) -> Case:
    shapes = lambda T: [(1, T, heads, head_dim), (1, T, kv_heads, head_dim)]  # noqa: E731
    return Case(rope, shapes, {"rotary_dim": rotary_dim}, ["rope"], ["rope_backward"])


def norm_rope_case(heads: int, kv_heads: int, head_dim: int, rotary_dim: int) -> Case:
    shapes = lambda T: [(1, T, heads, head_dim), (1, T, kv_heads, head_dim), (head_dim,), (head_dim,)]  # noqa: E731
    return Case(normed_rope, shapes, {"rotary_dim": rotary_dim}, ["norm_rope"], ["norm_rope_backward"])


def attention_case(heads: int, kv_heads: int, head_dim: int, *, sinks: bool = False, **options) -> Case:
    kv = (kv_heads, head_dim)
    shapes = lambda T: [(1, T, heads, head_dim), (1, T, *kv), (1, T, *kv)] + [(heads,)] * sinks  # noqa: E731
    return Case(attend, shapes, options, ["contain", "attention"], ["attention_backward_q", "attention_backward_kv"])


def gated_case(activation: str, features: int, *, two_arrays: bool = False) -> Case:
    shapes = lambda T: [(T, features)] * 2 if two_arrays else [(T, 2 * features)]  # noqa: E731
    return Case(gated, shapes, {"activation": activation}, [f"gated_{activation}"], [f"gated_{activation}_backward"])


def fused_case(num_heads: int, kv_heads: int, head_dim: int, *, normed: bool) -> Case:
    shapes = lambda T: [(1, T, num_heads + 2 * kv_heads, head_dim)] + [(head_dim,)] * 2 * normed  # noqa: E731
    attends = ["attention_backward_q", "attention_backward_kv"]
    backward = ["norm_rope", *attends, "norm_rope_backward"] if normed else [*attends, "rope_backward"]
    return Case(
        fused, shapes, {"num_heads": num_heads}, ["norm_rope" if normed else "rope", "contain", "attention"], backward
    )


def normed_linear_case(channels: int, rank: int | None) -> Case:
    out = 2 * channels
    factors = [] if rank is None else [(rank, channels), (out, rank)]
    shapes = lambda T: [(1, T, channels), (channels,), (out, channels), *factors]  # noqa: E731
    return Case(normed, shapes, {}, ["norm_append_lora_input"], ["norm_append_lora_input_backward"])


def residual_linear_case(channels: int, rank: int, *, activation: bool = False) -> Case:
    out, wide = channels // 2, channels * (2 if activation else 1)
    shapes = lambda T: [(1, T, out), (1, T, wide), (out, channels), (rank, channels), (out, rank)]  # noqa: E731
    if not activation:
        return Case(residual, shapes, {}, ["add_extended"], ["append_lora_input"])
    return Case(
        gated_residual, shapes, {}, ["gated_silu", "add_extended"], ["append_lora_input", "gated_silu_backward"]
    )


def experts_case(
    num_experts: int, choices: int, D: int, F: int, rank: int = 0, *, layers: int = 0, keeps_gate_up: bool = True
) -> Case:
    """Makes a case of frozen matrices in a stack of some layers, or of trained matrices without a stack.

    Gate and up are kept, or computed again in the backward pass; the products with the A factors are always kept.
    """
    E, stack, R = num_experts, (layers,) * (layers > 0), rank
    matrices = [(*stack, E * 2 * F, D), (*stack, E * D, F)]
    factors = [(E, R, D), (E, 2 * F, R), (E, R, F), (E, D, R)] if R else []
    shapes = lambda T: [(T, D), (T, choices), *matrices, *factors]  # noqa: E731
    project, back = [["grouped_matmul"] * (1 + bool(R)), ["grouped_matmul_transposed"] * (1 + bool(R))]
    outers = ["grouped_outer"] * ((not layers) + 2 * bool(R))
    gated = "grouped_silu_with_gate_up" if keeps_gate_up else "grouped_silu"
    forward = [*project[1:], gated, *project]
    again = [] if keeps_gate_up else ["grouped_matmul"]
    backward = [*again, *back, "gated_silu_backward", *outers, *back, *outers]
    options = {"num_experts": E, "trained": not layers, "keeps_gate_up": keeps_gate_up}
    return Case(experts, shapes, options, forward, backward)


CASES = {
    "silu": gated_case("silu", 9728),
    "gelu_tanh, two arrays": gated_case("gelu_tanh", 384, two_arrays=True),
    "gelu": gated_case("gelu", 96),
    "fused": fused_case(8, 2, 128, normed=False),
    "fused, normed": fused_case(6, 2, 64, normed=True),
    "rope": rope_case(8, 2, 128, 128),
    "rope, partial, head_dim 80": rope_case(6, 3, 80, 32),
    "rope, head_dim 20": rope_case(2, 2, 20, 20),
    "norm_rope": norm_rope_case(8, 2, 128, 128),
    "norm_rope, partial, head_dim 96": norm_rope_case(6, 3, 96, 24),
    "norm_rope, head_dim 256": norm_rope_case(4, 1, 256, 256),
    "normed_linear": normed_linear_case(2560, 48),
    "normed_linear, no adapter": normed_linear_case(2304, None),
    "residual_linear, rank 8": residual_linear_case(4096, 8),
    "gated_residual_linear, rank 256": residual_linear_case(1792, 256, activation=True),
    "experts": experts_case(128, 8, 2048, 768, layers=2),
    "experts, rank 16": experts_case(8, 2, 80, 48, 16, layers=2),
    "trained experts": experts_case(6, 1, 96, 16),
    "recomputed experts, rank 16": experts_case(8, 2, 80, 48, 16, layers=2, keeps_gate_up=False),
    "attention, one head": attention_case(1, 1, 64),
    "attention, head_dim 22": attention_case(4, 4, 22),
    "attention, head_dim 64": attention_case(4, 4, 64),
    "attention, head_dim 72": attention_case(4, 2, 72),
    "attention, head_dim 80": attention_case(6, 2, 80),
    "attention, head_dim 96": attention_case(7, 1, 96),
    "attention, head_dim 128": attention_case(8, 2, 128),
    "attention, head_dim 256": attention_case(8, 1, 256),
    "attention, window": attention_case(8, 2, 128, window=100),
    "attention, softcap": attention_case(8, 2, 128, softcap=50.0),
    "attention, sinks": attention_case(8, 2, 64, sinks=True),
    "attention, long documents": attention_case(8, 2, 128, max_segments=1),
    "attention, everything": attention_case(8, 2, 80, sinks=True, scale=0.1, window=9, softcap=5.0, max_segments=1),
}


def lowered(name: str, dtype, implementation: str | None, *, T: int = 1024, platform: str = "cuda"):
    """Lowers the forward and backward pass of a case for T tokens."""
    case = CASES[name]

    def both(*arrays):
        out, pull = jax.vjp(lambda *arrays: case.function(implementation, *arrays, **case.options), *arrays)
        return out, pull(out)

    avals = [jax.ShapeDtypeStruct(shape, dtype) for shape in case.shapes(T)]
    return lower_for_cuda(both, *avals, platform=platform)


@functools.cache
def modules_of(name: str, T: int) -> tuple[TritonModule, ...]:
    """Returns the kernels of a case in bfloat16, lowered once for the tests that read them."""
    program = lowered(name, jnp.bfloat16, "pallas", T=T)
    modules = triton_modules(program)
    assert program.as_text().count(TRITON_CALL) == len(modules)
    return tuple(modules)


all_cases = pytest.mark.parametrize("case", CASES)


@all_cases
def test_cuda_gets_one_launch_per_kernel(case):
    names = [f"jaxpack_{name}" for name in CASES[case].forward + CASES[case].backward]
    assert [module.name for module in modules_of(case, 1024)] == names


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("implementation", "dtype"), [(None, jnp.bfloat16), ("pallas", jnp.float32)])
@all_cases
def test_cuda_gets_the_same_launches_without_a_named_implementation_and_in_float32(case, dtype, implementation):
    names = [f"jaxpack_{name}" for name in CASES[case].forward + CASES[case].backward]
    program = lowered(case, dtype, implementation)
    assert [module.name for module in triton_modules(program)] == names
    assert program.as_text().count(TRITON_CALL) == len(names)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("implementation", "platform"), [("xla", "cuda"), (None, "cpu")])
@all_cases
def test_xla_and_cpus_get_none(case, implementation, platform):
    assert TRITON_CALL not in lowered(case, jnp.bfloat16, implementation, T=256, platform=platform).as_text()


def wide_offsets(case: str, T: int) -> set[bool]:
    """Checks the width of the offsets into each array, and returns whether each kernel has some of 64 bits."""
    for module in modules_of(case, T):
        for array in module.arrays:
            if array.num_elements > 2**31:
                assert array.offset_bits <= {64}
            elif array.num_elements <= 2**30:  # Pallas counts bytes: larger float32 arrays need 64 bits
                assert array.offset_bits <= {32}
    return {any(64 in array.offset_bits for array in module.arrays) for module in modules_of(case, T)}


@all_cases
def test_offsets_are_32_bits_wide_into_small_arrays(case):
    assert wide_offsets(case, 1024) == {False}


@pytest.mark.one_in(2)
@all_cases
def test_offsets_are_64_bits_wide_where_an_array_has_more_than_2_to_the_31_elements(case):
    assert wide_offsets(case, 2**26) == {True}  # 2^26 tokens have at least 64 bfloat16 channels: activations > 4 GiB


_DOT = re.compile(r"= tt\.dot (.*) : tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>")


@all_cases
def test_tensor_cores_get_no_block_narrower_than_16(case):
    # Triton compiles a narrower bfloat16 block without an error, but its products are wrong: a GPU shows this, and
    # interpreting does not. Float32 blocks run on tensor cores only if they may be rounded to tf32.
    for module in modules_of(case, 1024):
        matmuls = _DOT.findall(module.text)
        assert len(matmuls) == module.text.count("= tt.dot ")
        assert matmuls or not module.name.startswith(("jaxpack_attention", "jaxpack_add_extended", "jaxpack_grouped"))
        for options, *sizes, dtype, columns in matmuls:
            if min(map(int, (*sizes, columns))) < 16:
                assert dtype == "f32"
                assert "tf32" not in options


def test_experts_are_read_in_place_from_a_stack_of_more_than_4_gib():
    """The shapes are those of Qwen3-30B-A3B with adapters of rank 16 and 16,384 tokens."""
    case = experts_case(128, 8, 2048, 768, 16, layers=48)
    avals = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes(16_384)]

    def step(*arrays):
        out, pull = jax.vjp(lambda *arrays: experts("pallas", *arrays, **case.options), *arrays)
        return out, pull(out)

    program = lower_for_cuda(step, *avals)
    modules = triton_modules(program)
    assert [module.name for module in modules] == [f"jaxpack_{name}" for name in case.forward + case.backward]
    wide = [array.offset_bits for module in modules for array in module.arrays if array.num_elements > 2**31]
    assert wide == 4 * [{64}]  # gate and up, then down, in both passes
    narrow = [array.offset_bits for module in modules for array in module.arrays if array.num_elements <= 2**31]
    assert set().union(*narrow) == {32}
    # No copy of a layer's matrices, of their stack or of a row for each block is made.
    for rows, columns in ((2 * 768, 2048), (2048, 768)):
        for shape in (f"{128 * rows}x{columns}", f"128x{rows}x{columns}"):
            assert f"tensor<{shape}xbf16>" not in program.as_text()
            assert f"tensor<1x{shape}xbf16>" not in program.as_text()
