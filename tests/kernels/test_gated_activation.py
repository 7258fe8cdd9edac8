"""SwiGLU against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack.kernels.gated_activation import swiglu


def test_forward_and_backward():
    rng = np.random.default_rng(0)
    gate, up, dout = 3 * rng.standard_normal((3, 2, 5, 12)).astype(np.float32)
    gate_up = jnp.concatenate([gate, up], axis=-1)
    out, pull = jax.vjp(swiglu, gate_up)
    dgate, dup = jnp.split(pull(jnp.asarray(dout))[0], 2, axis=-1)

    gate, up, dout = (x.astype(np.float64) for x in (gate, up, dout))
    sigmoid = 1 / (1 + np.exp(-gate))
    np.testing.assert_allclose(out, gate * sigmoid * up, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dup, dout * gate * sigmoid, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dgate, dout * up * sigmoid * (1 + gate * (1 - sigmoid)), rtol=1e-5, atol=2e-6)
