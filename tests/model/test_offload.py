"""`scan_offloaded` computes what the plain scan does, and a GPU can make all of its copies beside computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from programs import equations

from jaxpack.model.offload import scan_offloaded

T, D = 6, 4
KEPT = jax.checkpoint_policies.save_only_these_names("between", "narrow")


@functools.partial(jax.checkpoint, policy=KEPT, prevent_cse=False)
def layer(x, slices, shared):
    """Applies a layer that reads its own floats and integers and a shared array; keeps two residuals, one small."""
    weights, place, key = slices
    x = checkpoint_name(x + jnp.tanh(x @ weights["a"]) * shared[place], "between")
    narrow = checkpoint_name(x @ weights["b"], "narrow")
    return x + jnp.sin(narrow @ weights["c"]) + 0.1 * jax.random.normal(key, x.shape)


def inputs(num_layers: int):
    a, b, c, x, shared = (jax.random.key(i) for i in range(5))
    weights = {
        "a": jax.random.normal(a, (num_layers, D, D)),
        "b": jax.random.normal(b, (num_layers, D, 1)),
        "c": jax.random.normal(c, (num_layers, 1, D)),
    }
    places = np.arange(num_layers, dtype=np.int32) % 2
    stacks = weights, places, jax.random.split(jax.random.key(9), num_layers)
    return jax.random.normal(x, (T, D)), stacks, jax.random.normal(shared, (2,))


def plain(x, stacks, shared):
    return jax.lax.scan(lambda x, slices: (layer(x, slices, shared), None), x, stacks)[0]


offloaded = functools.partial(scan_offloaded, layer)


def loss(loop, x, weights, rest, shared):
    return jnp.sum(loop(x, (weights, *rest), shared) ** 2)


@pytest.mark.parametrize("num_layers", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6))])
def test_it_is_the_plain_loop(num_layers):
    x, (weights, *rest), shared = inputs(num_layers)
    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(loss, loop), argnums=(0, 1)))(x, weights, rest, shared)
        for loop in (offloaded, plain)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), got, want)


def test_only_what_varies_has_a_gradient():
    x, (weights, *rest), shared = inputs(3)

    def of_c(loop, c):
        return loss(loop, x, weights | {"c": c}, rest, shared)

    got, want = (jax.jit(jax.grad(functools.partial(of_c, loop)))(weights["c"]) for loop in (offloaded, plain))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    program = jax.make_jaxpr(jax.grad(functools.partial(of_c, offloaded)))(weights["c"])
    made = [e.outvars[0].aval.shape for e in program.eqns if e.primitive.name == "broadcast_in_dim"]
    assert [shape for shape in made if shape[:1] == (3,)] == [(3, 1, D)]


def gradient():
    x, (weights, *rest), shared = inputs(4)
    return jax.make_jaxpr(jax.grad(functools.partial(loss, offloaded), argnums=1))(x, weights, rest, shared)


def test_the_host_gets_what_is_large_and_every_copy_is_in_a_loop():
    program = gradient()
    assert not [e for e in program.eqns if e.primitive.name == "device_put"]
    loops = [e for e in program.eqns if e.primitive.name in ("scan", "while")]
    assert len(loops) == 2
    for loop, space in zip(loops, (jax.memory.Space.Host, jax.memory.Space.Device), strict=True):
        body = loop.params["jaxpr" if loop.primitive.name == "scan" else "body_jaxpr"].jaxpr
        copied = [v.aval for e in equations(body) if e.primitive.name == "device_put" for v in e.outvars]
        copied = [aval for aval in copied if aval.memory_space == space]
        assert sorted(aval.shape[-2:] for aval in copied) == 2 * [(T, D)]  # a layer's input and "between"
    on_host = [v.aval.shape for v in loops[0].outvars if v.aval.memory_space == jax.memory.Space.Host]
    assert on_host == 2 * [(3, T, D)]  # every layer but the last sends its residuals


def test_where_to_fetch_from_is_a_sum():
    """XLA copies without a kernel only if the source of a copy follows from the iteration number by additions."""
    [loop] = [e for e in gradient().eqns if e.primitive.name == "while"]
    body = loop.params["body_jaxpr"].jaxpr
    turns = body.invars[loop.params["body_nconsts"]]
    made_by = {v: e for e in body.eqns for v in e.outvars}

    def is_sum(v) -> bool:
        if not isinstance(v, jax.extend.core.Var):
            return True
        return v is turns or (made_by[v].primitive.name in ("add", "sub") and all(map(is_sum, made_by[v].invars)))

    host = jax.memory.Space.Host
    fetches = [e for e in body.eqns if e.invars and getattr(e.invars[0].aval, "memory_space", None) == host]
    fetches = [e for e in fetches if e.primitive.name != "device_put"]
    assert len(fetches) == 2
    for fetch in fetches:
        within = {e.primitive.name for e in equations(fetch.params["jaxpr"])}
        assert "dynamic_slice" in within
        assert not within & {"select_n", "max", "clamp"}
        assert is_sum(fetch.invars[1])
