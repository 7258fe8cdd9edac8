"""Tests that `scan_offloaded` is the plain scan, and that a GPU can make all of its copies beside computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from programs import equations

from jaxpack.kernels.host_weight import HostWeight
from jaxpack.kernels.weight import DenseWeight
from jaxpack.model import offload
from jaxpack.model.offload import scan_offloaded

T, D, O = 6, 4, 5  # noqa: E741
KEPT = jax.checkpoint_policies.save_only_these_names("between", "narrow")


@functools.partial(jax.checkpoint, policy=KEPT, prevent_cse=False)
def layer(x, slices, shared, hosted):
    """Applies a layer that reads its own floats, integers and matrix, and a shared array; keeps two residuals."""
    weights, place, key = slices
    if hosted is not None:
        x = x + 0.1 * jnp.cos(hosted["matrix"].matmul(x)).sum(axis=-1, keepdims=True)
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


def plain(x, stacks, shared, matrices=None):
    def turn(x, scanned):
        slices, matrix = scanned
        return layer(x, slices, shared, None if matrix is None else {"matrix": DenseWeight(matrix)}), None

    return jax.lax.scan(turn, x, (stacks, matrices))[0]


offloaded = functools.partial(scan_offloaded, layer)


def loss(loop, x, weights, rest, shared, *hosted):
    return jnp.sum(loop(x, (weights, *rest), shared, *hosted) ** 2)


def matrices(num_layers: int) -> jax.Array:
    return 0.3 * jax.random.normal(jax.random.key(11), (num_layers, O, D))


@pytest.mark.parametrize("num_layers", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6))])
def test_it_is_the_plain_loop(num_layers):
    x, (weights, *rest), shared = inputs(num_layers)
    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(loss, loop), argnums=(0, 1)))(x, weights, rest, shared)
        for loop in (offloaded, plain)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), got, want)


def test_residuals_come_back_in_groups_as_they_do_together(monkeypatch):
    def layer(x, slices, shared, matrices):
        return jnp.sin(jnp.exp(slices["a"] * x))  # several residuals of the size of x

    def loss(x, a):
        return jnp.sum(scan_offloaded(layer, x, {"a": a}, ()) ** 2)

    arguments = jax.random.normal(jax.random.key(1), (T, D)), jnp.array([0.5, 0.4, -0.3])
    programs, results = [], []
    for seconds in (1, 0):  # that a group may take
        monkeypatch.setattr(offload, "_PLANNED_SECONDS", seconds)
        function = jax.value_and_grad(loss, argnums=(0, 1))
        programs.append(str(jax.make_jaxpr(function)(*arguments)))
        results.append(jax.jit(function)(*arguments))
    together, in_groups = (program.count("optimization_barrier") for program in programs)
    assert in_groups > together
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("num_layers", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 36))])
def test_fetched_weights_give_the_bits_of_weights_on_the_device(num_layers):
    x, (weights, *rest), shared = inputs(num_layers)
    stack = DenseWeight(matrices(num_layers))

    def of(read, hosted):
        def loop(x, stacks, shared, hosted):
            return scan_offloaded(read, x, stacks, shared, hosted)

        function = jax.value_and_grad(functools.partial(loss, loop), argnums=(0, 1))
        return jax.jit(function)(x, weights, rest, shared, hosted)

    got = of(layer, {"matrix": HostWeight.of(stack)})

    def resident(x, slices, shared, _):
        *slices, matrix = slices
        return layer(x, slices, shared, {"matrix": DenseWeight(matrix)})

    rest = (*rest, stack.value)
    want = of(resident, None)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    if num_layers < 4:  # More layers make rounding matter.
        plainly = jax.jit(functools.partial(loss, plain))(x, weights, rest[:-1], shared, stack.value)
        np.testing.assert_allclose(got[0], plainly, rtol=1e-4)


def test_only_what_varies_has_a_gradient():
    x, (weights, *rest), shared = inputs(3)

    def of_c(loop, c):
        return loss(loop, x, weights | {"c": c}, rest, shared)

    got, want = (jax.jit(jax.grad(functools.partial(of_c, loop)))(weights["c"]) for loop in (offloaded, plain))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    program = jax.make_jaxpr(jax.grad(functools.partial(of_c, offloaded)))(weights["c"])
    made = [e.outvars[0].aval.shape for e in program.eqns if e.primitive.name == "broadcast_in_dim"]
    # The small residuals of all layers, and the gradient.
    assert [shape for shape in made if shape[:1] == (3,)] == [(3, T, 1), (3, 1, D)]


def gradient(*, with_weights: bool = False):
    x, (weights, *rest), shared = inputs(4)
    hosted = {"matrix": HostWeight.of(DenseWeight(matrices(4)))} if with_weights else None
    return jax.make_jaxpr(jax.grad(functools.partial(loss, offloaded), argnums=1))(x, weights, rest, shared, hosted)


def loops(program):
    return [e for e in program.eqns if e.primitive.name == "while"]


@pytest.mark.parametrize("with_weights", [False, True])
def test_the_host_gets_what_is_large_and_every_copy_is_in_a_loop(with_weights):
    program = gradient(with_weights=with_weights)
    outside = [e.outvars[0].aval.shape for e in program.eqns if e.primitive.name == "device_put"]
    assert outside == with_weights * [(1, O, D)]  # the matrices of the first layer
    assert (4, O, D) not in {v.aval.shape for e in program.eqns for v in e.outvars}  # No matrix is a residual.
    forward, backward = loops(program)
    for loop, space in ((forward, jax.memory.Space.Host), (backward, jax.memory.Space.Device)):
        body = loop.params["body_jaxpr"].jaxpr
        copied = [v.aval for e in equations(body) if e.primitive.name == "device_put" for v in e.outvars]
        copied = [aval for aval in copied if aval.memory_space == space and aval.shape != (1, O, D)]
        assert sorted(aval.shape[-2:] for aval in copied) == 2 * [(T, D)]  # a layer's input and "between"
    on_host = [v.aval.shape for v in forward.outvars if v.aval.memory_space == jax.memory.Space.Host]
    assert on_host == 2 * [(4, T, D)]


@pytest.mark.parametrize("with_weights", [False, True])
def test_where_to_copy_from_is_a_sum(with_weights):
    """Tests that XLA can copy without a kernel: a copy's place follows from the iteration number by additions."""
    forward, backward = loops(gradient(with_weights=with_weights))
    for loop, reads, writes in ((forward, with_weights, 2), (backward, 2 + with_weights, 0)):
        body = loop.params["body_jaxpr"].jaxpr
        turns = body.invars[loop.params["body_nconsts"]]
        made_by = {v: e for e in body.eqns for v in e.outvars}

        def is_sum(v, turns=turns, made_by=made_by) -> bool:
            if not isinstance(v, jax.extend.core.Var) or v is turns:
                return True
            return made_by[v].primitive.name in ("add", "sub") and all(map(is_sum, made_by[v].invars))

        host = jax.memory.Space.Host
        touching = [e for e in body.eqns if e.invars and getattr(e.invars[0].aval, "memory_space", None) == host]
        touching = [e for e in touching if e.primitive.name != "device_put"]
        assert len(touching) == reads + writes
        for copy in touching:
            if copy.primitive.name != "dynamic_slice":  # `jnp` wraps it in a function
                within = {e.primitive.name for e in equations(copy.params["jaxpr"])}
                assert within & {"dynamic_slice", "dynamic_update_slice"}
                assert not within & {"select_n", "max", "clamp"}
            assert all(is_sum(v) for v in copy.invars if v.aval.shape == ())
