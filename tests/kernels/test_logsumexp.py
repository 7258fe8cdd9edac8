"""Compares the log-sum-exp over a long axis with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.cuda_lowering import lower_for_cuda, triton_modules
from kernels.oracles import quick_jit

from jaxpack.kernels.logsumexp import logsumexp


def oracle(logits: jax.Array) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    top = wide.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(wide - top).sum(axis=1))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1000), (2, 8192), (3, 2 * 8192 + 6144 + 384)])
def test_logsumexp(shape, scale, implementation):
    logits = scale * jax.random.normal(jax.random.key(0), shape)
    logits = logits.at[0, 0].set(-jnp.inf if shape[1] > 1 else 0.0)
    got = quick_jit(lambda x: logsumexp(x, implementation=implementation))(logits)
    np.testing.assert_allclose(got, oracle(logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("where", [5, 3 * 2048 + 5, 8192 + 2048 + 5, -1])
def test_where_the_largest_is(where):
    logits = jnp.full((2, 2 * 8192 + 3), -1e4).at[:, where].set(90.0)
    got = quick_jit(lambda x: logsumexp(x, implementation="pallas"))(logits)
    np.testing.assert_allclose(got, 90.0, rtol=1e-6)


def test_logits_of_nothing():
    got = quick_jit(lambda x: logsumexp(x, implementation="pallas"))(jnp.full((2, 8200), -jnp.inf))
    np.testing.assert_array_equal(got, -np.inf)


@pytest.mark.parametrize("vocab", [32_000, 50_257, 151_936, 262_208])
def test_it_lowers_for_a_gpu_and_reads_the_logits_once(vocab):
    (module,) = triton_modules(lower_for_cuda(logsumexp, jax.ShapeDtypeStruct((1024, vocab), jnp.float32)))
    assert module.name == "jaxpack_logsumexp"
    assert [array.num_elements for array in module.arrays] == [1024 * vocab, 1024]
