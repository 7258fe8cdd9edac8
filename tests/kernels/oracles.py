"""Computes the kernels' results and gradients in float64 NumPy: loops and textbook formulas, none of their code."""

import functools
import math

import jax
import numpy as np

# A kernel in interpret mode is a large program that a test runs once, so most of the time would go into compiling it.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def rows_of(*documents_per_row: list[int], length: int) -> np.ndarray:
    """Returns segment ids of rows with documents of these lengths, padded at the end; a negative length is padding."""
    rows = []
    for lengths in documents_per_row:
        real = np.array(lengths, int) > 0
        row = np.repeat(np.cumsum(real) * real, np.abs(np.array(lengths, int)))
        rows.append(np.pad(row, (0, length - len(row))))
    return np.stack(rows).astype(np.int32)


def documents(segment_ids: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Returns `(row, indices of its tokens)` for every document."""
    return [
        (b, np.flatnonzero(row == segment)) for b, row in enumerate(segment_ids) for segment in np.unique(row[row > 0])
    ]


def exactly(x: jax.Array | np.ndarray) -> np.ndarray:
    """Converts an array of any float dtype to float64, which holds every value exactly."""
    return np.asarray(x, np.float64)


def assert_as_good_as_plain_bfloat16(
    kernel: jax.Array, plain: jax.Array, exact: np.ndarray, name: str = "result"
) -> None:
    """Asserts that the kernel's largest error is at most twice that of plain jnp in bfloat16, on the same inputs.

    The factor is two because the largest of many rounding errors depends on the order in which the same terms are
    added.
    """
    error, allowed = (np.max(np.abs(exactly(x) - exact), initial=0.0) for x in (kernel, plain))
    assert error <= 2 * allowed + 1e-6, f"{name}: off by {error:.2e}, plain bfloat16 by {allowed:.2e}"


# Root mean square norm over the last axis.


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """Returns `x / sqrt(mean(x^2) + eps) * scale`."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rms_norm_gradients(
    x: np.ndarray, scale: np.ndarray, eps: float, d_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the gradients of `rms_norm` with respect to `x` and `scale`, from the Jacobian of every row."""
    D = x.shape[-1]
    size = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    # d(x_i / size) / d x_j = delta_ij / size - x_i x_j / (D size^3)
    jacobian = np.eye(D) / size[..., None] - x[..., :, None] * x[..., None, :] / (D * size[..., None] ** 3)
    d_scale = (d_out * x / size).reshape(-1, D).sum(axis=0)
    return np.einsum("...i,...ij->...j", d_out * scale, jacobian), d_scale


# Rotary embedding. Channels i and i + half are the real and imaginary parts of a complex number that is rotated.


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotates the first `2 * half` channels of `x` `[B, T, A, H]` by the angles of `cos + i sin`, `[B, T, half]`."""
    half = cos.shape[-1]
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * (cos + 1j * sin)[:, :, None, :]
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


def rope_gradient(d_out: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotates a gradient back, as the transpose of `rope` does; a scale in `cos` and `sin` scales the gradient too."""
    return rope(d_out, cos, -sin)


def norm_rope(x: np.ndarray, scale: np.ndarray, cos: np.ndarray, sin: np.ndarray, eps: float) -> np.ndarray:
    """Applies RMSNorm to every head, then `rope`."""
    return rope(rms_norm(x, scale, eps), cos, sin)


def norm_rope_gradients(
    x: np.ndarray, scale: np.ndarray, cos: np.ndarray, sin: np.ndarray, eps: float, d_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the gradients of `norm_rope` with respect to `x` and `scale`."""
    return rms_norm_gradients(x, scale, eps, rope_gradient(d_out, cos, sin))


# Attention.


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    segment_ids: np.ndarray,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: np.ndarray | None = None,
    d_out: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns `out`, `dq`, `dk`, `dv` and, with `sinks`, `dsinks`, one document and one query head at a time."""
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dsinks = np.zeros(q.shape[2])
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    for b, here in documents(segment_ids):
        distance = here[:, None] - here[None, :]
        allowed = (distance >= 0) & (distance < (window or len(distance)))
        for n in range(q.shape[2]):
            head = n // (q.shape[2] // k.shape[2])
            queries, keys, values, d = q[b, here, n], k[b, here, head], v[b, here, head], d_out[b, here, n]
            raw = scale * queries @ keys.T
            scores = raw if softcap is None else softcap * np.tanh(raw / softcap)
            scores = np.where(allowed, scores, -np.inf)
            if sinks is not None:  # a sink is one more key, whose value is zero
                scores = np.concatenate([scores, np.full((len(here), 1), sinks[n])], axis=1)
                values = np.concatenate([values, np.zeros((1, values.shape[1]))])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[b, here, n] = weights @ values
            d_weights = d @ values.T
            d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
            dv[b, here, head] += (weights.T @ d)[: len(here)]
            if sinks is not None:
                dsinks[n] += d_scores[:, -1].sum()
            d_raw = d_scores[:, : len(here)]
            if softcap is not None:
                d_raw = d_raw / np.cosh(raw / softcap) ** 2
            dq[b, here, n] = scale * d_raw @ keys
            dk[b, here, head] += scale * d_raw.T @ queries
    results = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return results if sinks is None else {**results, "dsinks": dsinks}


# Gated activations.


def activate(gate: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the activation and its derivative, in float64."""
    if activation == "clamped_silu":
        below = np.minimum(gate, 7)
        with np.errstate(over="ignore"):
            sigmoid = 1 / (1 + np.exp(-1.702 * below))
        slope = sigmoid + 1.702 * below * sigmoid * (1 - sigmoid)
        return below * sigmoid, np.where(gate < 7, slope, 0)
    if activation == "silu":
        with np.errstate(over="ignore"):
            sigmoid = 1 / (1 + np.exp(-gate))
        return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    if activation == "gelu_tanh":
        tanh = np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
        inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate**2)
        return 0.5 * gate * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh**2) * inner
    cumulative = 0.5 * np.vectorize(math.erfc)(-gate / math.sqrt(2))
    return gate * cumulative, cumulative + gate * np.exp(-(gate**2) / 2) / math.sqrt(2 * math.pi)


# Experts. `choices` `[N, C]` holds the experts of each token; all are negative for padding, which no expert computes.


def copies_of(choices: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns `(token, choice, expert)` for every copy of a token that is no padding."""
    return [(n, c, int(choices[n, c])) for n, c in np.ndindex(choices.shape) if choices[n, c] >= 0]


def experts(
    residual: np.ndarray,
    x: np.ndarray,
    shares: np.ndarray,
    choices: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    gate_up_factors: tuple[np.ndarray, np.ndarray] | None = None,
    down_factors: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    gate_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
    activation: str = "silu",
    d_out: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns the output of a mixture of experts and all gradients, one token and one of its experts at a time.

    The matrices are `[E, 2F, D]` and `[E, D, F]`, the factors `[E, R, I]` and `[E, O, R]`, the biases `[E, O]`.
    """
    E, F = down.shape[0], down.shape[2]
    given = {"gate_up": gate_up_bias, "down": down_bias}
    biases = {
        name: np.zeros(matrices.shape[:2]) if given[name] is None else given[name]
        for name, matrices in (("gate_up", gate_up), ("down", down))
    }
    d_biases = {name: np.zeros_like(bias) for name, bias in biases.items()}
    pairs = {"gate_up": (gate_up, gate_up_factors), "down": (down, down_factors)}
    whole = {
        name: matrices if factors is None else matrices + np.stack([factors[1][e] @ factors[0][e] for e in range(E)])
        for name, (matrices, factors) in pairs.items()
    }
    out, d_x, d_shares = residual.copy(), np.zeros_like(x), np.zeros_like(shares)
    d_whole = {name: np.zeros_like(matrices) for name, matrices in whole.items()}
    for n, c, e in copies_of(choices):
        hidden = whole["gate_up"][e] @ x[n] + biases["gate_up"][e]
        gate, up = hidden[:F], hidden[F:]
        act, slope = activate(gate, activation)
        up_slope = 1.0
        if activation == "clamped_silu":
            up, up_slope = np.clip(up, -7, 7) + 1, np.abs(up) < 7
        product = act * up
        result = whole["down"][e] @ product + biases["down"][e]
        out[n] += shares[n, c] * result
        d_shares[n, c] = d_out[n] @ result
        d_result = shares[n, c] * d_out[n]
        d_product = whole["down"][e].T @ d_result
        d_hidden = np.concatenate([d_product * up * slope, d_product * act * up_slope])
        d_biases["down"][e] += d_result
        d_biases["gate_up"][e] += d_hidden
        d_whole["down"][e] += np.outer(d_result, product)
        d_whole["gate_up"][e] += np.outer(d_hidden, x[n])
        d_x[n] += whole["gate_up"][e].T @ d_hidden
    results = {"out": out, "d_residual": d_out, "d_x": d_x, "d_shares": d_shares}
    for name, (_, factors) in pairs.items():
        results[f"d_{name}"] = d_whole[name]
        if given[name] is not None:
            results[f"d_{name}_bias"] = d_biases[name]
        if factors is not None:  # of W + B A
            a, b = factors
            results[f"d_{name}_a"] = np.stack([b[e].T @ d_whole[name][e] for e in range(E)])
            results[f"d_{name}_b"] = np.stack([d_whole[name][e] @ a[e].T for e in range(E)])
    return results
