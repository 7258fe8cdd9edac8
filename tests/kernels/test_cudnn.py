"""Tests attention by cuDNN: the code around it on any machine, and its results on a GPU."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import oracles
from kernels.cuda_lowering import lower_for_cuda, triton_modules
from kernels.oracles import assert_as_good_as_plain_bfloat16, documents, exactly, quick_jit, rows_of

from jaxpack.errors import InputError
from jaxpack.kernels import cudnn
from jaxpack.kernels.attention import attention, segment_bounds
from jaxpack.kernels.rope import rotary_angles
from jaxpack.kernels.rotary_attention import HeadNorms, rotary_attention

ROWS = {
    "one document": rows_of([24], length=24),
    "full and short rows": rows_of([5, 1, 18], [24], [7], length=24),
    "padding before, between and after": rows_of([-3, 5, -4, 8], [-23, 1], length=24),
    "a row of padding": rows_of([4, 4], [], length=24),
}
all_rows = pytest.mark.parametrize("ids", [pytest.param(ids, id=name) for name, ids in ROWS.items()])


@all_rows
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_table_of_segments(ids, count):
    T = ids.shape[1]
    table = cudnn.segment_table(*segment_bounds(jnp.asarray(ids)), count, 6, 2)
    starts, lengths, covered = [], [], []
    for row in range(len(ids)):
        segments = [here for b, here in documents(ids) if b == row]
        missing = [T] * (count + 1 - len(segments))
        begins = [int(here[0]) for here in segments] + missing
        starts += [row * T + begin for begin in begins[:count]]
        lengths += [len(here) for here in segments[:count]] + [0] * len(missing[1:])
        covered.append(begins[count])
    starts.append(ids.size)
    assert table.lengths.tolist() == lengths
    assert table.q_offsets.tolist() == [6 * start for start in starts]
    assert table.kv_offsets.tolist() == [2 * start for start in starts]
    assert table.covered.tolist() == covered


@all_rows
@pytest.mark.parametrize("heads", [1, 3])
def test_what_is_not_written_is_filled_in(ids, heads):
    first, last = segment_bounds(jnp.asarray(ids))
    covered = cudnn.segment_table(first, last, 2, 1, 1).covered
    x = jnp.full((*ids.shape, heads, 40), 3.0)
    filled, more = quick_jit(cudnn._blank)([x, 2 * x[:, :, :1]], first, covered)
    third = (np.arange(ids.shape[1]) >= np.asarray(covered)[:, None])[..., None, None]
    want = np.where(ids[..., None, None] == 0, 0.0, np.where(third, np.nan, 3.0))
    np.testing.assert_array_equal(filled, np.broadcast_to(want, x.shape))
    np.testing.assert_array_equal(more, 2 * np.asarray(filled)[:, :, :1])


# When cuDNN is chosen.


@pytest.fixture
def on_hopper(monkeypatch):
    """Pretends that a Hopper GPU is present, so that programs can be lowered for it."""
    monkeypatch.setattr(cudnn, "_device_refusal", lambda: None)


def call(T=16, H=64, dtype=jnp.bfloat16, max_segments=2, implementation="cudnn", **options):
    q = jax.ShapeDtypeStruct((1, T, 4, H), dtype)
    kv = jax.ShapeDtypeStruct((1, T, 2, H), dtype)
    options |= {"max_segments": max_segments, "implementation": implementation}

    def both(q, k, v):
        bounds = segment_bounds(jnp.ones((1, T), jnp.int32))  # traced, since a test has eight million tokens
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, bounds, **options), q, k, v)
        return pull(out)

    return lower_for_cuda(both, q, kv, kv)


needs_new_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.11 or newer")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 4}, r"no `window`, `softcap` or `sinks`"),
        ({"softcap": 4.0}, r"no `window`, `softcap` or `sinks`"),
        ({"dtype": jnp.float32}, r"bfloat16 or float16, got float32"),
        ({"H": 264}, r"a head_dim of at most 256 and a multiple of 8, got 264"),
        ({"H": 60}, r"a head_dim of at most 256 and a multiple of 8, got 60"),
        ({"max_segments": None}, r"`max_segments` of at most 8, got None"),
        ({"max_segments": 9}, r"`max_segments` of at most 8, got 9"),
        ({"T": 2**23}, r"fewer than 2\^31 elements, got \[1, 8388608, 4, 64\]"),
    ],
)
@pytest.mark.usefixtures("on_hopper")
def test_what_cudnn_cannot_do_is_refused_and_never_chosen(wrong, message):
    with pytest.raises(InputError, match=f'`implementation` "cudnn" needs {message}'):
        call(**wrong)
    if wrong.get("H") != 60:  # the kernels run any head_dim, slowly
        assert len(triton_modules(call(**{"T": 4096, **wrong}, implementation=None))) == 4


def test_without_a_gpu_it_is_refused():
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    needs = "an NVIDIA GPU, got cpu" if jax.__version_info__ >= (0, 11) else "jax 0.11 or newer, got"
    with pytest.raises(InputError, match=f'`implementation` "cudnn" needs {needs}'):
        call()


def test_beside_a_gpu_a_program_for_the_cpu_has_none(monkeypatch):
    class Client(NamedTuple):
        platform_version: str = "cuda 13"

    class Gpu(NamedTuple):
        platform: str = "gpu"
        compute_capability: str = "9.0"
        client: Client = Client()

    cpus = jax.devices("cpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: cpus if backend == "cpu" else [Gpu()])
    assert cudnn._device_refusal() is None
    for default in ("cpu", cpus[0]):
        with jax.default_device(default):
            assert cudnn._device_refusal() == "an NVIDIA GPU, got cpu"


@needs_new_jax
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"T": 8192, "max_segments": 2}, True),
        ({"T": 8192, "max_segments": 4}, True),
        ({"T": 8064, "max_segments": 4}, False),
        ({"T": 16384, "max_segments": 5}, False),
        ({"T": 8192, "max_segments": 2, "H": 192}, False),
        ({"T": 128, "max_segments": 8, "implementation": "cudnn"}, True),
        ({"T": 128, "max_segments": 1, "implementation": "cudnn"}, True),
        ({"T": 8192, "max_segments": 2, "implementation": "pallas"}, False),
    ],
)
@pytest.mark.usefixtures("on_hopper")
def test_rows_of_a_few_long_documents_take_it(options, chosen):
    program = call(**{"implementation": None, **options})
    names = [module.name for module in triton_modules(program)]
    kernels = ("contain", "attention", "attention_backward_q", "attention_backward_kv")
    attends = [f"jaxpack_{name}" for name in kernels]
    assert names == (["jaxpack_segment_table", *["jaxpack_blank"] * 2] if chosen else attends)
    assert program.as_text().count("custom_call @__cudnn$fmha") == (2 if chosen else 0)


# Results.

LONG = rows_of([200, 31, 1], [-20, 100, -30, 150], [256], [], length=300)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (6, 1, 80)])
def test_attention_is_that_of_float64(heads, kv_heads, head_dim):
    rng = np.random.default_rng(0)
    q, d_out = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((2, *LONG.shape, heads, head_dim)))
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((2, *LONG.shape, kv_heads, head_dim)))
    bounds = segment_bounds(jnp.asarray(LONG))

    def results(implementation):
        @jax.jit
        def run(q, k, v, d_out):
            options = {"max_segments": 3, "implementation": implementation}
            out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, bounds, **options), q, k, v)
            return out, *pull(d_out)

        return dict(zip(("out", "dq", "dk", "dv"), run(q, k, v, d_out), strict=True))

    exact = oracles.attention(*(exactly(x) for x in (q, k, v)), LONG, d_out=exactly(d_out))
    got, plain = results("cudnn"), results("xla")
    for name, want in exact.items():
        assert_as_good_as_plain_bfloat16(got[name], plain[name], want, name)
        np.testing.assert_array_equal(np.asarray(got[name], np.float32)[LONG == 0], 0)


@pytest.mark.gpu
def test_more_segments_than_promised_yield_nan():
    q, k, v = jnp.ones((3, *LONG.shape, 2, 64), jnp.bfloat16)
    out = attention(q, k, v, segment_bounds(jnp.asarray(LONG)), max_segments=2, implementation="cudnn")
    third = LONG[0] == 3
    assert np.all(np.isnan(np.asarray(out, np.float32)[0, third]))
    assert np.all(np.isfinite(np.asarray(out, np.float32)[0, ~third]))


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True], ids=["rope", "norm and rope"])
def test_after_rope_it_equals_the_kernels(normed):
    rng = np.random.default_rng(0)
    N, K, H = 8, 2, 128
    qkv = jnp.asarray(rng.standard_normal((*LONG.shape, N + 2 * K, H)), jnp.bfloat16)
    d_out = jnp.asarray(rng.standard_normal((*LONG.shape, N, H)), jnp.bfloat16)
    angles = rotary_angles(jnp.asarray(rng.integers(0, 300, LONG.shape), jnp.int32), 1e4 ** -(jnp.arange(64) / 64))
    bounds = segment_bounds(jnp.asarray(LONG))

    def results(implementation, dtype):
        norms = HeadNorms(*jnp.ones((2, H), dtype)) if normed else None
        options = {"num_heads": N, "eps": 1e-6, "max_segments": 3, "implementation": implementation}

        @jax.jit
        def run(qkv, norms, d_out):
            f = lambda qkv, norms: rotary_attention(qkv, angles, bounds, norms=norms, **options)  # noqa: E731
            out, pull = jax.vjp(f, qkv, norms)
            return jax.tree.leaves((out, pull(d_out)))

        return run(qkv.astype(dtype), norms, d_out.astype(dtype))

    exact = results("xla", jnp.float32)
    for got, plain, want in zip(results("cudnn", jnp.bfloat16), results("xla", jnp.bfloat16), exact, strict=True):
        assert_as_good_as_plain_bfloat16(got, plain, exactly(want))
