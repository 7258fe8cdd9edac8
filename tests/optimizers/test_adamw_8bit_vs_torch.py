"""Tests that 8-bit AdamW follows bitsandbytes' own for 100 steps: its codes, its factors and the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpack.optimizers.adamw_8bit import Quantized, quantize, scale_by_adam_8bit

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")

STEPS = 100
LEARNING_RATE = 1e-2
SHAPES = {  # M matrices, one for each layer of a stack, and their shape
    "whole blocks": (1, 72, 64),
    "a last block that is not full": (1, 61, 83),
    "layers that end within a block": (3, 40, 130),
    "a vector": (1, 4096),
    "too small": (1, 63, 65),
    "a stack of what is too small": (2, 48, 64),
}


class Matrix(NamedTuple):
    """Holds what bitsandbytes made of one matrix; `moments` are codes with factors, or float32 values without."""

    parameter: np.ndarray
    moments: list[tuple[np.ndarray, np.ndarray | None]]


def quantize_exactly(x: torch.Tensor, code: torch.Tensor, absmax_out, codes_out, blocksize: int) -> None:
    """Quantises as bitsandbytes does on all devices but CPUs: each value gets the nearest number of the map.

    Its kernel for CPUs looks codes up in a table of 2**16 equal ranges of [-1, 1]: all values below 3e-5 of their
    block's largest one become 1.6e-5, zeros of the second moment included.
    """
    rows = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % blocksize)).reshape(-1, blocksize)
    absmax = rows.abs().amax(dim=1)
    scaled = rows / absmax.clamp(min=1e-38)[:, None]
    codes_out.copy_(torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).reshape(-1)[: x.numel()].reshape(x.shape))
    absmax_out.copy_(absmax)


def draw_gradient(rng: np.random.Generator, step: int, shape: tuple[int, ...], decades: float, zeros: float):
    """Draws values of several magnitudes; a share of them is zero, and until the tenth step the first 300 are."""
    values = rng.normal(size=shape) * 10 ** rng.uniform(-decades, 0, shape) * (rng.random(shape) >= zeros)
    if zeros:
        values.reshape(-1)[: 300 * (step < 10)] = 0
    return values.astype(np.float32)


def run_both(weight_decay: float, decades: float, zeros: float):
    """Runs both optimizers on the same gradients, with a learning rate that rises for ten steps.

    Returns our parameters and state, and bitsandbytes' matrices, by the names in `SHAPES`; and the first parameters.
    """
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    theirs = {name: [torch.nn.Parameter(torch.tensor(one)) for one in value] for name, value in start.items()}
    every = [one for matrices in theirs.values() for one in matrices]
    optimizer = bitsandbytes.optim.AdamW8bit(every, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    rates = [LEARNING_RATE * min(1, (step + 1) / 10) for step in range(STEPS)]
    ours = jax.tree.map(jnp.asarray, start)
    transformation = optax.chain(
        scale_by_adam_8bit(0.9, 0.999, 1e-8, lambda path, x: len(x)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(lambda count: jnp.asarray(rates, jnp.float32)[count]),
    )
    state = transformation.init(ours)

    @jax.jit
    def update(ours, state, gradients):
        updates, state = transformation.update(gradients, state, ours)
        return optax.apply_updates(ours, updates), state

    for step, rate in enumerate(rates):
        gradients = {name: draw_gradient(rng, step, shape, decades, zeros) for name, shape in SHAPES.items()}
        ours, state = update(ours, state, gradients)
        optimizer.param_groups[0]["lr"] = rate
        for name, matrices in theirs.items():
            for matrix, value in zip(matrices, gradients[name], strict=True):
                matrix.grad = torch.tensor(value)
        optimizer.step()

    def read(matrix: torch.nn.Parameter) -> Matrix:
        held = {name: value.numpy() for name, value in optimizer.state[matrix].items() if name != "step"}
        moments = [(held[f"state{i}"], held.get(f"absmax{i}")) for i in (1, 2)]
        return Matrix(matrix.detach().numpy(), moments)

    found = {name: [read(matrix) for matrix in matrices] for name, matrices in theirs.items()}
    return jax.tree.map(np.asarray, (ours, state[0])), found, start


@pytest.mark.parametrize("weight_decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_codes_and_parameters_are_those_of_bitsandbytes_after_100_steps(weight_decay, monkeypatch):
    monkeypatch.setattr("bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct", quantize_exactly)
    (ours, state), found, start = run_both(weight_decay, decades=3, zeros=0.1)
    for name, matrices in found.items():
        for moment, in_bits in ((state.mu[name], 0), (state.nu[name], 1)):
            assert isinstance(moment, Quantized) == ("small" not in name)
            for layer, (_, moments) in enumerate(matrices):
                values, factors = moments[in_bits]
                if not isinstance(moment, Quantized):
                    np.testing.assert_allclose(moment[layer], values, rtol=1e-5, atol=1e-6)
                    continue
                # Both round a moment up to four times a step, by 6e-8 of it each. One value in 1e5 is as near to the
                # middle between two codes as that; it may then stay apart for 10 steps, or 1,000 if it is a square.
                codes = moment.codes[layer].reshape(-1)[: values.size].astype(int)
                apart = np.abs(codes - values.reshape(-1))
                assert apart.max() <= 1, name
                assert (apart > 0).mean() <= 1e-3, name
                np.testing.assert_allclose(moment.absmax[layer], factors, rtol=2e-6)
        theirs = np.stack([matrix.parameter for matrix in matrices])
        error = np.abs(ours[name] - theirs) / (np.abs(theirs) + np.abs(theirs - start[name]) + 1e-2)
        # Each step rounds a parameter twice. A few were moved by a moment that was one code apart for a time.
        assert np.quantile(error, 0.999) <= 1e-5, name
        assert error.max() <= 1e-2, name


def test_parameters_follow_bitsandbytes_as_it_is_on_a_cpu():
    (ours, _), found, start = run_both(0.1, decades=1, zeros=0)
    for name, matrices in found.items():
        theirs = np.stack([matrix.parameter for matrix in matrices])
        apart = np.linalg.norm(ours[name] - theirs) / np.linalg.norm(theirs - start[name])
        # Without its table of ranges, bitsandbytes itself is as far from what it does with it.
        assert apart <= (1e-4 if "small" in name else 2e-2), name


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes(signed):
    code = bitsandbytes.functional.create_dynamic_map(signed=signed)
    rng = np.random.default_rng(0)
    middles = (code[1:] + code[:-1]).numpy() / 2
    around = [np.nextafter(middles, np.float32(end)) for end in (-1, 1)]  # the smallest differences that decide
    values = [
        rng.normal(size=2000),
        10 ** rng.uniform(-9, 0, 2000),
        -(10 ** rng.uniform(-9, 0, 2000)),
        middles,
        *around,
    ]
    values = np.concatenate([*values, np.zeros(300)]).astype(np.float32)
    values = values if signed else np.abs(values)
    values = np.pad(values, (0, -len(values) % 255)).reshape(-1, 255)
    rows = np.concatenate([np.full((len(values), 1), 8, np.float32), values], axis=1)  # a power of two: exact quotients
    rows[:, 1:] *= np.where(np.abs(values).max(1, keepdims=True) > 1, 1, 8)
    expected, factors = torch.empty(rows.shape), torch.empty(len(rows))
    quantize_exactly(torch.tensor(rows), code, factors, expected, 256)
    got = quantize(jnp.asarray(rows)[None], signed=signed)
    np.testing.assert_array_equal(got.codes[0], expected.numpy())
    np.testing.assert_array_equal(got.absmax[0], factors.numpy())
    assert len(np.unique(got.codes)) == 256
