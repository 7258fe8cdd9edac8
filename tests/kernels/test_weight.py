"""A weight reads the same in every form, and its derivative keeps the form in which it is stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from int8_weight import Int8Weight

from jaxpack.errors import InputError
from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy
from jaxpack.kernels.normed_linear import normed_linear
from jaxpack.kernels.residual_linear import gated_residual_linear, residual_linear
from jaxpack.kernels.weight import DenseWeight, as_weight

O, I, R, T = 40, 24, 3, 16  # noqa: E741


def draw(i: int, *shape: int) -> jax.Array:
    return 0.3 * jax.random.normal(jax.random.key(i), shape)


STACK = draw(0, 4, O, I)
FORMS = {
    "array": lambda: (STACK[2], STACK[2]),
    "dense": lambda: (DenseWeight(STACK).at(2), STACK[2]),
    "int8": lambda: (weight := Int8Weight.of(STACK[2]), weight.dense(jnp.float32)),
    "int8 layer": lambda: (weight := Int8Weight.of(STACK).at(jnp.int32(2)), weight.dense(jnp.float32)),
}
all_forms = pytest.mark.parametrize("form", FORMS)


@all_forms
def test_every_form_reads_as_its_dense_matrix(form):
    weight, dense = FORMS[form]()
    weight = as_weight(weight)
    assert weight.shape == (O, I)
    a, b, x, rows = draw(1, R, I), draw(2, O, R), draw(3, T, I), jnp.array([[3, 0], [O - 1, 3]])
    np.testing.assert_array_equal(weight.dense(jnp.float32), dense)
    np.testing.assert_array_equal(weight.append_columns(b), jnp.concatenate([dense, b], axis=1))
    np.testing.assert_array_equal(weight.append_rows(a), jnp.concatenate([dense, a]))
    np.testing.assert_array_equal(weight.take(rows, jnp.float32), dense[rows])
    np.testing.assert_allclose(weight.matmul(x), x @ dense.T, rtol=1e-6, atol=1e-6)
    assert weight.dense(jnp.bfloat16).dtype == jnp.bfloat16


def operations():
    """Returns each operation that reads a weight, as a function of the weight and the differentiated arrays."""
    x, scale, residual, gate_up = draw(4, T, I), draw(5, I), draw(6, T, O), draw(7, T, 2 * I)
    a, b, targets = draw(8, R, I), draw(9, O, R), jnp.arange(T) % O
    return {
        "normed_linear": (lambda w, x, a, b: normed_linear(x, scale, w, a, b, eps=1e-6)[1], (x, a, b)),
        "residual_linear": (lambda w, x, a, b: residual_linear(residual, x, w, a, b), (x, a, b)),
        "gated_residual_linear": (lambda w, x, a, b: gated_residual_linear(residual, x, w, a, b), (gate_up, a, b)),
        "matmul": (lambda w, x: as_weight(w).matmul(x), (x,)),
        "cross_entropy": (lambda w, x: linear_cross_entropy(x, w, targets), (x,)),
    }


all_operations = pytest.mark.parametrize("name", operations())


@all_forms
@all_operations
def test_outputs_and_gradients_are_those_of_the_dense_matrix(name, form):
    operation, arguments = operations()[name]
    weight, dense = FORMS[form]()

    def value_and_gradients(weight):
        out, pull = jax.vjp(lambda *arguments: operation(weight, *arguments), *arguments)
        return out, pull(jnp.ones_like(out))

    got, want = jax.jit(value_and_gradients)(weight), jax.jit(value_and_gradients)(dense)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["int8", "int8 layer"])
@all_operations
def test_a_derivative_keeps_codes_and_scales_and_no_dense_matrix(name, form):
    operation, arguments = operations()[name]
    weight, _ = FORMS[form]()
    pull = jax.eval_shape(lambda: jax.vjp(lambda *arguments: operation(weight, *arguments), *arguments)[1])
    kept = jax.tree.leaves(pull)
    matrices = {x.dtype for x in kept if x.shape[-2:] == (O, I)}
    assert matrices <= {jnp.dtype("int8")}
    assert matrices or name == "cross_entropy"  # the loss computes its gradients in the forward pass


@all_operations
def test_a_frozen_form_is_not_differentiated(name):
    operation, arguments = operations()[name]

    def of_scales(scales):
        return jnp.sum(operation(Int8Weight(Int8Weight.of(STACK[0]).codes, scales), *arguments))

    with pytest.raises(InputError, match="Int8Weight is frozen and has no gradient"):
        jax.grad(of_scales)(Int8Weight.of(STACK[0]).scales)


def test_a_dense_matrix_has_a_gradient_in_its_own_dtype():
    x, scale = draw(4, T, I).astype(jnp.bfloat16), draw(5, I)
    run = functools.partial(normed_linear, eps=1e-6)
    gradient = jax.grad(lambda w: jnp.sum(run(x, scale, w)[1].astype(jnp.float32)))
    for dtype in (jnp.float32, jnp.bfloat16):
        assert gradient(DenseWeight(STACK[0].astype(dtype))).value.dtype == dtype


def test_bytes_are_those_of_what_is_stored():
    assert Int8Weight.of(STACK).nbytes == 4 * O * I + 4 * 4 * O
    assert DenseWeight(STACK.astype(jnp.bfloat16)).nbytes == 2 * 4 * O * I
