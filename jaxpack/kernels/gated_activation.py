"""Gated activations (https://arxiv.org/abs/2002.05202): `act(gate) * up`.

Only gate and up are kept for the backward pass. Everything is computed in float32 and rounded once.
"""

import functools
import math
from typing import Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpack.constants import Activation, Implementation
from jaxpack.errors import InputError
from jaxpack.kernels._launch import check_no_byte_arrays, dispatch, launch, pl, power_of_two_divisor


def gated_activation(
    gate: Float[Array, "*B F"],
    up: Float[Array, "*B F"] | None = None,
    *,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
) -> Float[Array, "*B F_out"]:
    """Computes `act(gate) * up`: SwiGLU for "silu", GeGLU for "gelu" (exact, by erf) and "gelu_tanh" (approximate).

    "clamped_silu" is GPT-OSS' form: `min(gate, 7) * sigmoid(1.702 min(gate, 7)) * (clip(up, -7, 7) + 1)`.

    Args:
      gate: the gate. If `up` is None, gate and up side by side on the last axis, `[..., 2F]`, as one projection yields
        them.
      implementation: see `jaxpack.kernels`.
    """
    return _gated_activation(gate, up, _checked(gate, up, activation), implementation)


def gated_activation_backward(
    gate: Float[Array, "*B F"],
    up: Float[Array, "*B F"] | None,
    d_out: Float[Array, "*B F_out"],
    *,
    activation: Activation = "silu",
    with_product: bool = False,
    in_place: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*B F"], Float[Array, "*B F"] | None, Float[Array, "*B F_out"] | None]:
    """Returns the gradients of `gate` and `up` and, with `with_product`, the product `act(gate) * up` again.

    The gradients of the next projection, which reads the product, need it. Because it is computed again here, it need
    not be kept.

    Args:
      in_place: the gradients take the memory of `gate` and `up`, and the product takes the memory of `d_out`. If XLA
        does not see that these arrays are no longer read, it copies them first.

    Returns:
      `(d_gate, d_up, product)`. Without `up`, `d_gate` holds both gradients side by side and `d_up` is None; `product`
      is None unless requested.
    """
    _checked(gate, up, activation)
    features = gate.shape[-1] // (2 if up is None else 1)
    if d_out.shape != (*gate.shape[:-1], features):
        raise InputError(f"`d_out` must have shape {[*gate.shape[:-1], features]}, got {list(d_out.shape)}.")
    return _backward(gate, up, d_out, activation, with_product, in_place, implementation)


def check_activation(activation: str) -> None:
    """Raises an InputError for the name of an activation that does not exist."""
    if activation not in get_args(Activation):
        raise InputError(f"`activation` must be one of {', '.join(get_args(Activation))}, got {activation!r}.")


def _checked(gate: jax.Array, up: jax.Array | None, activation: str) -> Activation:
    check_activation(activation)
    if up is None and gate.shape[-1] % 2:
        raise InputError(
            "`gate` must hold gate and up side by side if `up` is None, so its last axis must have an even number of"
            f" channels, got {gate.shape[-1]}."
        )
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise InputError(
            "`gate` and `up` must have the same shape and dtype, got "
            f"{gate.dtype}{list(gate.shape)} and {up.dtype}{list(up.shape)}."
        )
    check_no_byte_arrays(gate=gate)
    return cast(Activation, activation)


CLAMPED_SCALE, CLAMPED_LIMIT = 1.702, 7.0  # of "clamped_silu"


# The arithmetic of the kernels: float32 in, float32 out.


def gated_product(gate: jax.Array, up: jax.Array, activation: Activation) -> jax.Array:
    """Returns `act(gate) * up`, for the kernels here and for those that compute gate and up themselves."""
    return _activate(gate, activation)[0] * _linear(up, activation)[0]


def _linear(up: jax.Array, activation: Activation) -> tuple[jax.Array, jax.Array | None]:
    """Returns the factor that multiplies `act(gate)`, and its derivative with respect to `up`; None for 1."""
    if activation != "clamped_silu":
        return up, None
    return jnp.clip(up, -CLAMPED_LIMIT, CLAMPED_LIMIT) + 1, jnp.where(jnp.abs(up) <= CLAMPED_LIMIT, 1.0, 0.0)


def _activate(gate: jax.Array, activation: Activation) -> tuple[jax.Array, jax.Array]:
    """Returns `act(gate)` and its derivative."""
    if activation == "clamped_silu":
        below = jnp.minimum(gate, CLAMPED_LIMIT)
        sigmoid = 1 / (1 + jnp.exp(-CLAMPED_SCALE * below))
        slope = sigmoid * (1 + CLAMPED_SCALE * below * (1 - sigmoid))
        return below * sigmoid, jnp.where(gate <= CLAMPED_LIMIT, slope, 0.0)
    if activation == "silu":
        sigmoid = 1 / (1 + jnp.exp(-gate))
        return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    if activation == "gelu_tanh":
        inner = gate * (_TANH_LINEAR + _TANH_CUBIC * gate * gate)
        # (1 + tanh(z)) / 2 = sigmoid(2 z). Its derivative, 2 e / (1 + e)^2, has no cancellation.
        e = jnp.exp(-2 * jnp.abs(inner))
        inverse = 1 / (1 + e)
        half = jnp.where(inner < 0, e, 1.0) * inverse
        slope = 2 * e * inverse * inverse * (_TANH_LINEAR + 3 * _TANH_CUBIC * gate * gate)
        return gate * half, half + gate * slope
    tail = 0.5 * _erfc(jnp.abs(gate) * math.sqrt(0.5))
    cumulative = jnp.where(gate < 0, tail, 1 - tail)  # distribution function of the normal distribution
    density = jnp.exp(-0.5 * gate * gate) * (1 / math.sqrt(2 * math.pi))
    return gate * cumulative, cumulative + gate * density


_TANH_LINEAR = math.sqrt(2 / math.pi)
_TANH_CUBIC = _TANH_LINEAR * 0.044715
_ERFC_COEFFICIENTS = (
    1.62790704,
    -0.524247646,
    0.148274183,
    -0.0275968052,
    -0.000356609613,
    0.00261620781,
    -0.00110612425,
    0.000268857722,
    -4.09585446e-05,
    3.63377012e-06,
    -1.43494503e-07,
)
_ERFC_LIMIT = 4.0


def _erfc(t: jax.Array) -> jax.Array:
    """Computes `1 - erf(t)` for t >= 0 as `exp2(-t^2 log2(e) - t r(t))`, where r is a polynomial: Triton has no erf.

    r was fitted at Chebyshev nodes of [0, 4] to `-log2(erfc(t) exp(t^2)) / t`. The absolute error is at most 8e-8
    everywhere, the relative error 2e-6 up to t = 4. Beyond 4, where erfc is under 2e-8, `t r(t)` keeps its value at 4.
    """
    near = jnp.minimum(t, _ERFC_LIMIT)
    r = _ERFC_COEFFICIENTS[-1]
    for coefficient in reversed(_ERFC_COEFFICIENTS[:-1]):
        r = r * near + coefficient
    return jnp.exp2(-(t * t * math.log2(math.e) + near * r))


# The reference.


def gated_activation_reference(
    gate: Float[Array, "*B F"], up: Float[Array, "*B F"] | None, activation: Activation
) -> Float[Array, "*B F_out"]:
    """Computes `gated_activation` in plain jnp."""
    dtype = gate.dtype
    gate, up = (x.astype(jnp.float32) for x in (jnp.split(gate, 2, axis=-1) if up is None else (gate, up)))
    if activation == "clamped_silu":
        gate, up = jnp.minimum(gate, CLAMPED_LIMIT), jnp.clip(up, -CLAMPED_LIMIT, CLAMPED_LIMIT)
        return (gate * jax.nn.sigmoid(CLAMPED_SCALE * gate) * (up + 1)).astype(dtype)
    act = {
        "silu": jax.nn.silu,
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
    }[activation]
    return (act(gate) * up).astype(dtype)


# The kernels, on `[rows, channels]`. A program takes a block of rows and of channels.


class _Tile(NamedTuple):
    """Sets the largest block of one program, and its warps, as measured on an H200 (`benchmarks/tune_kernels.py`)."""

    elements: int
    channels: int
    num_warps: int


_FORWARD = _Tile(4096, 1024, 4)
_BACKWARD = {
    "silu": _Tile(1024, 512, 8),
    "gelu_tanh": _Tile(1024, 512, 8),
    "gelu": _Tile(512, 512, 2),
    "clamped_silu": _Tile(1024, 512, 8),
}


class _Blocks:
    """Cuts `[rows, features]` into blocks without a remainder."""

    def __init__(self, rows: int, features: int, tile: _Tile):
        self.channels = power_of_two_divisor(features, limit=tile.channels)
        self.rows = power_of_two_divisor(rows, limit=tile.elements // self.channels)
        self.grid = (features // self.channels, rows // self.rows)
        self.features = features

    def here(self) -> tuple[Any, Any]:
        """Returns two indices, for use in a kernel: of the program's block, and of the same block in the second half.

        The second half of the last axis holds `up`, if gate and up are side by side.
        """
        rows = pl.ds(pl.program_id(1) * self.rows, self.rows)
        channel = pl.program_id(0) * self.channels
        return (rows, pl.ds(channel, self.channels)), (rows, pl.ds(self.features + channel, self.channels))


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _forward_kernel(gate: jax.Array, up: jax.Array | None, activation: Activation) -> jax.Array:
    features = gate.shape[-1] // (2 if up is None else 1)
    arrays = [_flat(x) for x in (gate, up) if x is not None]
    blocks = _Blocks(len(arrays[0]), features, _FORWARD)

    def kernel(*refs: Any) -> None:
        *inputs, out_ref = refs
        here, second = blocks.here()
        gate = inputs[0][here].astype(jnp.float32)
        up = (inputs[0][second] if len(inputs) == 1 else inputs[1][here]).astype(jnp.float32)
        out_ref[here] = gated_product(gate, up, activation).astype(out_ref.dtype)

    out = launch(
        kernel,
        *arrays,
        name=f"gated_{activation}",
        grid=blocks.grid,
        out_shape=jax.ShapeDtypeStruct((len(arrays[0]), features), gate.dtype),
        num_warps=_FORWARD.num_warps,
    )
    return out.reshape(*gate.shape[:-1], features)


def _backward_kernel(
    gate: jax.Array, up: jax.Array | None, d_out: jax.Array, activation: Activation, with_product: bool, in_place: bool
) -> list[jax.Array]:
    features = d_out.shape[-1]
    arrays = [_flat(x) for x in (gate, up) if x is not None]
    count = len(arrays)
    d_out = _flat(d_out)
    tile = _BACKWARD[activation]
    blocks = _Blocks(len(d_out), features, tile)

    def kernel(*refs: Any) -> None:
        inputs, d_out_ref, gradients, product_ref = refs[:count], refs[count], refs[count + 1 : 2 * count + 1], refs[-1]
        here, second = blocks.here()
        gate = inputs[0][here].astype(jnp.float32)
        up = (inputs[0][second] if count == 1 else inputs[1][here]).astype(jnp.float32)
        d_out = d_out_ref[here].astype(jnp.float32)
        act, slope = _activate(gate, activation)
        up, up_slope = _linear(up, activation)
        gradients[0][here] = (d_out * up * slope).astype(gradients[0].dtype)
        d_up = d_out * act if up_slope is None else d_out * act * up_slope
        d_up = d_up.astype(gradients[-1].dtype)
        gradients[-1][second if count == 1 else here] = d_up
        if with_product:
            product_ref[here] = (act * up).astype(product_ref.dtype)

    outputs = launch(
        kernel,
        *arrays,
        d_out,
        name=f"gated_{activation}_backward",
        grid=blocks.grid,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, *([d_out] if with_product else []))],
        num_warps=tile.num_warps,
        input_output_aliases={i: i for i in range(count + with_product)} if in_place else None,
    )
    return [x.reshape(*gate.shape[:-1], x.shape[-1]) for x in outputs]


# Derivatives.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated_activation(gate, up, activation, implementation):
    xla = functools.partial(gated_activation_reference, activation=activation)
    pallas = functools.partial(_forward_kernel, activation=activation)
    return dispatch(implementation, xla=xla, pallas=pallas)(gate, up)


def _backward(gate, up, d_out, activation, with_product, in_place, implementation):
    def xla(gate, up, d_out):
        product, pull = jax.vjp(functools.partial(gated_activation_reference, activation=activation), gate, up)
        gradients = [d for d in pull(d_out) if d is not None]
        return [*gradients, product] if with_product else gradients

    def pallas(gate, up, d_out):
        return _backward_kernel(gate, up, d_out, activation, with_product, in_place)

    outputs = dispatch(implementation, xla=xla, pallas=pallas)(gate, up, d_out)
    product = outputs.pop() if with_product else None
    return outputs[0], None if up is None else outputs[1], product


_gated_activation.defvjp(
    lambda gate, up, activation, implementation: (
        _gated_activation(gate, up, activation, implementation),
        (gate, up),
    ),
    lambda activation, implementation, arrays, d: _backward(
        arrays[0], arrays[1], d, activation, with_product=False, in_place=False, implementation=implementation
    )[:2],
)
