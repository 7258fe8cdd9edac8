"""Tests that 4-bit codes become the bits that bitsandbytes makes of them, in both implementations."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.cuda_lowering import lower_for_cuda, triton_modules
from kernels.oracles import quick_jit
from plain_bitsandbytes import bitsandbytes

from jaxpack.errors import InputError
from jaxpack.kernels.dequantize import NF4_VALUES, NF4Arrays, NF4Places, dequantize_nf4, magnitudes
from jaxpack.kernels.dynamic_map import dynamic_map, nearest_codes

LAYERS = 3
both = pytest.mark.parametrize("implementation", ["xla", "pallas"])


class Form(NamedTuple):
    """The rows of the projections, the columns and the block size of a quantised matrix."""

    rows: tuple[int, ...]
    columns: int
    block_size: int


FORMS = [
    Form((64,), 256, 64),
    Form((48, 16, 16), 128, 64),
    Form((128, 32, 32), 512, 128),
    Form((16,), 2560, 4096),  # a block crosses rows, and 4,096 is no multiple of the columns
    Form((40, 24), 72, 64),  # a block crosses rows, and a projection's last block is not full
    Form(9 * (24,), 40, 64),  # more projections of equal size than are compared one by one
    Form((7, 3), 24, 32),  # rows that no block of a power of two divides
    Form((96,), 96, 2048),
    Form((1,), 8, 1024),  # less than a block
    Form((300, 20), 64, 32),  # more than one group of 256 blocks, and a projection's last group is not full
    Form((24, 24), 1024, 512),
]
all_forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.rows}x{form.columns}/{form.block_size}")
nested_or_not = pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])


@functools.cache
def draw(form: Form, nested: bool, seed: int = 0) -> NF4Arrays:
    """Draws codes and magnitudes of the shapes that the format says."""
    rng = np.random.default_rng(seed)
    places = NF4Places(*form)
    codes = rng.integers(0, 2**32, (LAYERS, sum(form.rows), form.columns // 8), np.uint32)
    if not nested:
        return NF4Arrays(codes, rng.uniform(1e-3, 4, (LAYERS, sum(places.blocks))).astype(np.float32))
    return NF4Arrays(
        codes,
        rng.integers(0, 256, (LAYERS, sum(places.blocks)), np.uint8),
        rng.uniform(1e-3, 2, (LAYERS, sum(places.groups))).astype(np.float32),
        rng.uniform(1, 2, (LAYERS, len(form.rows))).astype(np.float32),
        dynamic_map(),
    )


def on_device(arrays: NF4Arrays) -> NF4Arrays:
    return jax.tree.map(jnp.asarray, arrays)


def decoded(arrays: NF4Arrays, form: Form, layer: int, stored: str) -> np.ndarray:
    """Decodes one layer with NumPy, byte by byte, from the description of the format."""
    out, row, block, group = [], 0, 0, 0
    for i, rows in enumerate(form.rows):
        size = rows * form.columns
        packed = np.ascontiguousarray(arrays.codes[layer, row : row + rows]).view(np.uint8).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
        count = -(-size // form.block_size)
        absmax = arrays.absmax[layer, block : block + count]
        if arrays.table is not None:
            scales = np.repeat(arrays.scales[layer, group : group + -(-count // 256)], 256)[:count]
            absmax = arrays.table[absmax] * scales + arrays.means[layer, i]
            group += -(-count // 256)
        values = NF4_VALUES[codes] * np.repeat(absmax, form.block_size)[:size]
        out.append(values.reshape(rows, form.columns))
        row, block = row + rows, block + count
    return np.concatenate(out).astype(stored)


@pytest.mark.one_in(2)
@both
@nested_or_not
@all_forms
def test_a_layer_has_the_bits_that_numpy_decodes(form, nested, implementation):
    arrays = draw(form, nested)
    for layer, stored in zip((0, 2, 1), ("bfloat16", "float16", "float32"), strict=True):
        dense = functools.partial(
            dequantize_nf4, places=NF4Places(*form), stored=stored, dtype=jnp.float32, implementation=implementation
        )
        got = quick_jit(lambda arrays, layer, dense=dense: dense(arrays, layer))(arrays, jnp.int32(layer))
        np.testing.assert_array_equal(got, decoded(arrays, form, layer, stored).astype(np.float32))


@pytest.mark.one_in(4)
@both
@nested_or_not
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", FORMS[:5:2], ids=str)
def test_a_factor_stands_below_or_beside_the_matrix(form, dtype, nested, implementation):
    arrays, places = draw(form, nested), NF4Places(*form)
    options = {"stored": "bfloat16", "dtype": dtype, "implementation": implementation}
    rng = np.random.default_rng(1)
    want = decoded(arrays, form, 1, "bfloat16").astype(dtype)
    for rank in (16, 96):
        a = rng.standard_normal((rank, form.columns)).astype(dtype)
        b = rng.standard_normal((sum(form.rows), rank)).astype(dtype)
        dense = functools.partial(dequantize_nf4, places=places, **options)
        below = quick_jit(lambda arrays, a, dense=dense: dense(arrays, 1, rows_behind=a))(arrays, a)
        beside = quick_jit(lambda arrays, b, dense=dense: dense(arrays, 1, columns_behind=b))(arrays, b)
        assert below.dtype == beside.dtype == dtype
        np.testing.assert_array_equal(below, np.concatenate([want, a]))
        np.testing.assert_array_equal(beside, np.concatenate([want, b], axis=1))


@pytest.mark.one_in(4)
@both
@nested_or_not
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_bitsandbytes_decodes_to_the_same_bits(block_size, stored, nested, implementation):
    torch, functional = pytest.importorskip("torch"), bitsandbytes().functional
    for rows, columns in ((48, 64), (33, 520)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05
        codes, state = functional.quantize_4bit(
            weight.to(getattr(torch, stored)), blocksize=block_size, quant_type="nf4", compress_statistics=nested
        )
        arrays = [codes.numpy().reshape(rows, -1).view(np.uint32), state.absmax.numpy()]
        if nested:
            arrays += [state.state2.absmax.numpy(), state.offset.numpy()[None]]
        table = [state.state2.code.numpy()] if nested else []
        arrays = NF4Arrays(*(jnp.asarray(array)[None] for array in arrays), *map(jnp.asarray, table))
        options = {"stored": stored, "dtype": "float32", "implementation": implementation}
        dense = functools.partial(dequantize_nf4, places=NF4Places((rows,), columns, block_size), **options)
        got = quick_jit(lambda arrays, dense=dense: dense(arrays, 0))(arrays)
        np.testing.assert_array_equal(got, functional.dequantize_4bit(codes, state).float().numpy())


def test_nested_magnitudes_are_rounded_twice():
    # A compiler that fuses the product and the sum into one operation rounds once, and gets other bits.
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, 4096, np.uint8), rng.uniform(0.1, 3, 4096).astype(np.float32)
    means = rng.uniform(0.1, 3, 4096).astype(np.float32)
    table = dynamic_map()
    product = table[codes] * scales
    once = (table[codes].astype(np.float64) * scales + means).astype(np.float32)
    assert np.count_nonzero(once != product + means) > 100
    got = jax.jit(magnitudes)(*map(jnp.asarray, (table[codes], scales, means)))
    np.testing.assert_array_equal(got, product + means)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_array_equal(dynamic_map(signed=signed), functional.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_gets_the_code_of_the_nearest_value(signed):
    table = dynamic_map(signed=signed)
    assert len(np.unique(table)) == 256
    assert (float(table[0]), float(table[-1])) == pytest.approx((-0.99296875 if signed else 0.0, 1.0))
    x = np.random.default_rng(2).uniform(-1, 1, 1000).astype(np.float32)
    got = np.asarray(nearest_codes(jnp.asarray(x), signed=signed))
    best = np.abs(x[:, None].astype(np.float64) - table[None, :]).min(axis=1)
    np.testing.assert_allclose(np.abs(x - table[got]), best, atol=1e-7)
    np.testing.assert_array_equal(nearest_codes(jnp.asarray(table), signed=signed), np.arange(256))


def shapes_of(form: Form, layers: int, nested: bool = True) -> NF4Arrays:
    places = NF4Places(*form)
    shape = jax.ShapeDtypeStruct
    codes = shape((layers, sum(form.rows), form.columns // 8), jnp.uint32)
    blocks, groups = sum(places.blocks), sum(places.groups)
    if not nested:
        return NF4Arrays(codes, shape((layers, blocks), jnp.float32))
    more = (
        shape((layers, groups), jnp.float32),
        shape((layers, len(form.rows)), jnp.float32),
        shape((256,), jnp.float32),
    )
    return NF4Arrays(codes, shape((layers, blocks), jnp.uint8), *more)


@pytest.mark.parametrize("behind", ["rows_behind", "columns_behind", None])
@pytest.mark.parametrize("layers", [2, 64])
def test_cuda_reads_a_stack_of_any_size_in_one_launch(layers, behind):
    form = Form((8192, 1024, 1024), 5120, 64)  # queries, keys and values of Qwen3-32B
    rank = {"rows_behind": (32, form.columns), "columns_behind": (sum(form.rows), 32), None: None}[behind]
    factor = () if rank is None else (jax.ShapeDtypeStruct(rank, jnp.bfloat16),)

    def dense(arrays, layer, *factor):
        appended = {behind: factor[0]} if factor else {}
        return dequantize_nf4(arrays, layer, NF4Places(*form), stored="bfloat16", dtype="bfloat16", **appended)

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    (module,) = triton_modules(lower_for_cuda(dense, shapes_of(form, layers), layer, *factor))
    assert module.name == "jaxpack_dequantize_nf4"
    codes = module.arrays[0]
    assert codes.num_elements == layers * sum(form.rows) * form.columns // 8
    wide = codes.num_elements * 4 > 2**32
    assert codes.offset_bits <= ({64} if wide else {32})


def test_arrays_that_do_not_fit_are_refused_by_name():
    form = FORMS[1]
    arrays, places = on_device(draw(form, True)), NF4Places(*form)
    decode = functools.partial(dequantize_nf4, layer=0, stored="bfloat16", dtype="bfloat16")
    for name in ("codes", "absmax", "scales", "means"):
        wrong = arrays._replace(**{name: getattr(arrays, name)[:, :-1]})
        with pytest.raises(InputError, match=rf"`arrays.{name}` must have shape \(layers, "):
            decode(wrong, places=places)
    a, b = jnp.zeros((16, 128), jnp.bfloat16), jnp.zeros((80, 16), jnp.bfloat16)
    with pytest.raises(InputError, match="`rows_behind` and `columns_behind` must not both be given"):
        decode(arrays, places=places, rows_behind=a, columns_behind=b)
    with pytest.raises(InputError, match=r"`places.columns` must be a multiple of 8, got 12"):
        decode(shapes_of(Form((8,), 12, 32), 1, nested=False), places=NF4Places((8,), 12, 32))
    with pytest.raises(InputError, match=r"`arrays.absmax` must have fewer than 2\^31 codes"):
        decode(shapes_of(Form((2**17,), 2**13, 32), 64), places=NF4Places((2**17,), 2**13, 32))
