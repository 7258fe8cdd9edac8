"""Finds the fastest tiles: times every kernel with each of a list of settings on an NVIDIA GPU.

    python benchmarks/tune_kernels.py --lengths LENGTHS.csv --output RESULT.json

Prints, for each kernel and mix of documents, its settings from fastest to slowest in milliseconds of device time. A
setting that does not compile is listed with the reason. The tables in `jaxpack/kernels` are set by hand from the
output.
"""

import argparse
import collections
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import KernelShape, document_lengths
from timing import jax_kernel_events, time_jax

from jaxpack.kernels import attention, extended, gated_activation, rope
from jaxpack.kernels.attention import Heads, Plan, Tiles, make_options, segment_bounds

ROUNDS = 12


class Candidate(NamedTuple):
    """Holds a kernel with one setting; `compile` makes a call without arguments, `kernel` is the name in a profile."""

    group: str
    setting: str
    kernel: str
    lower: Callable[[], tuple[jax.stages.Lowered, tuple]]


def attention_candidates(mix: str, tokens: int, lengths_csv: Path, shape: KernelShape) -> Iterator[Candidate]:
    """Yields the candidates of the three attention kernels."""
    lengths = document_lengths(mix, tokens, lengths_csv)
    ids = jnp.asarray(np.repeat(np.arange(1, len(lengths) + 1), lengths), jnp.int32)[None]
    bounds = segment_bounds(ids)
    N, K, H = shape.num_heads, shape.num_kv_heads, shape.head_dim
    random = jax.random.split(jax.random.key(0), 3)
    qkv, out, d_out = (
        jax.random.normal(key, (1, tokens, heads, H), jnp.bfloat16)
        for key, heads in zip(random, (N + 2 * K, N, N), strict=True)
    )
    options = make_options(H, None, None, None, None, "pallas")
    lse = jnp.full((1, K, tokens * N // K), 8.0)

    def forward(qkv, bounds):
        return attention.attention_forward(Heads(qkv), Heads(qkv, N), Heads(qkv, N + K), N, K, bounds, None, options)

    def backward(qkv, bounds, out, lse, d_out):
        heads = Heads(qkv), Heads(qkv, N), Heads(qkv, N + K)
        return attention.attention_backward(*heads, bounds, None, out, lse, d_out, options)[0]

    safe = Tiles(32, 32, 4, 1)
    arguments = (qkv, bounds, out, lse, d_out)

    def candidate(direction: str, tiles: Tiles) -> Candidate:
        if direction == "forward":
            plan, call, kernel = Plan(tiles, safe, safe), (forward, arguments[:2]), "jaxpack_attention"
        else:
            plan = Plan(safe, tiles, safe) if direction == "backward_q" else Plan(safe, safe, tiles)
            call, kernel = (backward, arguments), f"jaxpack_attention_{direction}"
        lower = functools.partial(_lowered, *call, _patch=(attention, "plan", lambda *_: plan))
        return Candidate(f"{direction} {mix}", str(tuple(tiles)), kernel, lower)

    for rows, keys, warps, stages, split in itertools.product(
        (32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4), (False, True)
    ):
        if (warps == 4 or rows == 128) and not (split and mix == "alpaca" and keys < 32):
            yield candidate("forward", Tiles(rows, keys, warps, stages, split))
    for rows, keys, warps, stages in itertools.product((32, 64, 128), (32, 64), (4, 8), (1, 2, 3)):
        if warps == 4 or rows == 128:
            yield candidate("backward_q", Tiles(rows, keys, warps, stages))
    for rows, keys, warps, stages in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
        if (warps == 4 or keys == 128) and rows * keys <= 64 * 128:
            yield candidate("backward_kv", Tiles(rows, keys, warps, stages))


def elementwise_candidates(tokens: int, shape: KernelShape) -> Iterator[Candidate]:
    """Yields the candidates of RoPE, RoPE with norm, and gated activations."""
    N, K, H, F = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(keys[i], (1, tokens, heads, H), jnp.bfloat16) for i, heads in enumerate((N, K)))
    angles = rope.rotary_angles(jnp.arange(tokens)[None], 1e6 ** -(jnp.arange(H // 2) / (H // 2)))
    scales = tuple(jnp.ones((2, H), jnp.bfloat16))
    apply = functools.partial(rope.apply_rope, implementation="pallas")
    norm = functools.partial(rope.norm_rope, eps=1e-6, implementation="pallas")

    def norm_backward(q, k, q_scale, k_scale, angles):
        _, pull = jax.vjp(functools.partial(norm, angles=angles), q, k, q_scale, k_scale)
        return pull((q, k))

    arguments = {"rope": (q, k, angles), "norm_rope": (q, k, *scales, angles)}
    arguments["norm_rope_backward"] = arguments["norm_rope"]
    kernels: dict[str, Any] = {"rope": (apply, "_ROTATE"), "norm_rope": (norm, "_NORM_ROTATE")}
    kernels["norm_rope_backward"] = norm_backward, "_NORM_ROTATE_BACKWARD"
    for block, heads, warps, steps in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4, 8), (1, 4, 16)):
        if not 4 * 32 * warps <= block * heads * H <= 64 * 32 * warps:
            continue  # between 4 and 64 elements a thread
        tile = rope._Tile(block, heads, warps, steps)
        for name, (function, constant) in kernels.items():
            if steps > 1 and name != "norm_rope_backward":
                continue
            lower = functools.partial(_lowered, function, arguments[name], _patch=(rope, constant, tile))
            yield Candidate(name, str(tuple(tile)), f"jaxpack_{name}", lower)

    gate_up, d_out = (
        jax.random.normal(key, (tokens, n * F), jnp.bfloat16) for key, n in zip(keys[2:], (2, 1), strict=True)
    )
    for activation, elements, channels, warps in itertools.product(
        ("silu", "gelu_tanh", "gelu"), (512, 1024, 2048, 4096), (512, 1024), (2, 4, 8)
    ):
        if not 4 * 32 * warps <= elements <= 64 * 32 * warps:
            continue
        tile = gated_activation._Tile(elements, min(channels, elements), warps)
        forward = functools.partial(gated_activation.gated_activation, activation=activation, implementation="pallas")
        backward = functools.partial(
            gated_activation.gated_activation_backward,
            activation=activation, with_product=True, implementation="pallas",
        )  # fmt: skip
        yield Candidate(
            activation, str(tuple(tile)), f"jaxpack_gated_{activation}",
            functools.partial(_lowered, forward, (gate_up,), _patch=(gated_activation, "_FORWARD", tile)),
        )  # fmt: skip
        yield Candidate(
            f"{activation}_backward", str(tuple(tile)), f"jaxpack_gated_{activation}_backward",
            functools.partial(
                _lowered, lambda g, d, f=backward: f(g, None, d), (gate_up, d_out),
                _patch=(gated_activation, "_BACKWARD", {activation: tile}),
            ),
        )  # fmt: skip


def extended_candidates(tokens: int, shape: KernelShape) -> Iterator[Candidate]:
    """Yields the candidates of norms, the adapters' narrow products and residual connections."""
    D, R = shape.hidden_size, 2 * shape.rank  # of gate and up
    keys = jax.random.split(jax.random.key(0), 4)
    x, d = (jax.random.normal(key, (tokens, D), jnp.bfloat16) for key in keys[:2])
    e, a = (
        jax.random.normal(key, size, jnp.bfloat16)
        for key, size in zip(keys[2:], ((tokens, D + R), (R, D)), strict=True)
    )
    scale, eps = jnp.ones(D, jnp.bfloat16), {"eps": 1e-6, "implementation": "pallas"}
    backward = functools.partial(extended.norm_append_lora_input_backward, with_scale=False, **eps)
    kernels = {
        "append_lora_input": (
            "_APPEND",
            functools.partial(extended.append_lora_input, implementation="pallas"),
            (x, a),
        ),
        "norm_append_lora_input": (
            "_NORM_APPEND",
            functools.partial(extended.norm_append_lora_input, **eps),
            (x, scale, a),
        ),
        "norm_append_lora_input_backward": ("_BACKWARD", lambda *inputs: backward(*inputs)[0], (e, e, x, scale, a, d)),
        "add_extended": ("_ADD", functools.partial(extended.add_extended, implementation="pallas"), (e, a.T, x)),
    }
    sizes = (16, 32, 64, 128), (32, 64, 128, 256, 512)
    for rows, channels, warps, stages in itertools.product(*sizes, (2, 4, 8), (1, 3)):
        if not 8 * 32 * warps <= rows * channels <= 32 * 32 * warps:
            continue  # between 8 and 32 elements a thread
        tile = extended._Tile(rows, channels, warps, stages)
        for name, (constant, function, arguments) in kernels.items():
            lower = functools.partial(_lowered, function, arguments, _patch=(extended, constant, tile))
            yield Candidate(name, str(tuple(tile)), f"jaxpack_{name}", lower)


def _lowered(
    function: Callable, arguments: tuple, *, _patch: tuple[ModuleType, str, Any]
) -> tuple[jax.stages.Lowered, tuple]:
    """Lowers the function with a setting in place of the module's own."""
    module, name, value = _patch
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        return jax.jit(lambda *arguments: function(*arguments)).lower(*arguments), arguments
    finally:
        setattr(module, name, kept)


def print_pallas_against_cudnn(shape: KernelShape) -> None:
    """Compares attention with cuDNN on 16,384 tokens, to find the length of documents from which cuDNN is faster."""
    N, K, H = shape.num_heads, shape.num_kv_heads, shape.head_dim
    print("\nattention by rows x documents x length: milliseconds of forward / forward and backward")
    for rows, documents, length in ((1, 8, 2048), (1, 4, 4096), (1, 2, 8192), (4, 4, 1024), (4, 2, 2048), (8, 1, 2048)):
        T = documents * length
        ids = jnp.repeat(jnp.arange(1, documents + 1, dtype=jnp.int32), length)[None].repeat(rows, axis=0)
        bounds = segment_bounds(ids)
        q, k, v = (jax.random.normal(jax.random.key(0), (rows, T, heads, H), jnp.bfloat16) for heads in (N, K, K))
        cells = []
        for implementation in ("pallas", "cudnn"):
            attend = functools.partial(
                attention.attention, bounds=bounds, max_segments=documents, implementation=implementation
            )

            def both(q, k, v, attend=attend):
                out, pull = jax.vjp(attend, q, k, v)
                return out, *pull(out)

            times = [
                time_jax(jax.jit(f), lambda q=q, k=k, v=v: [(q, k, v)] * 4, consumed=False) for f in (attend, both)
            ]
            cells.append(" / ".join(f"{1e3 * one.median:.3f}" for one in times))
        print(f"  {rows} x {documents} x {length}: pallas {cells[0]}, cudnn {cells[1]}", flush=True)


def times_of(members: list[tuple[Candidate, Callable]]) -> Iterator[tuple[str, float]]:
    """Yields each setting with its median seconds, from one profile of all settings, each run `ROUNDS` times."""

    def run(rounds: int) -> None:
        for _, call in members:
            for _ in range(rounds):
                result = call()
            jax.block_until_ready(result)

    run(1)
    profile = jax_kernel_events(lambda: run(ROUNDS))
    events = sorted(event for event in profile if event.name == members[0][0].kernel)
    if len(events) != ROUNDS * len(members):
        found = collections.Counter(event.name for event in profile)
        raise RuntimeError(
            f"{members[0][0].kernel} was started {ROUNDS * len(members)} times, but the profile holds {found}."
        )
    for i, (candidate, _) in enumerate(members):
        own = events[i * ROUNDS : (i + 1) * ROUNDS]
        yield candidate.setting, statistics.median(event.seconds for event in own)


def main() -> None:
    """Compiles all candidates side by side, then times them one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--only", default="", help="groups whose name contains this; cudnn: Pallas beside cuDNN")
    parser.add_argument("--hidden-size", type=int, default=KernelShape.hidden_size)
    parser.add_argument("--intermediate-size", type=int, default=KernelShape.intermediate_size)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    shape = KernelShape(hidden_size=options.hidden_size, intermediate_size=options.intermediate_size)
    candidates = [
        *itertools.chain(
            *(attention_candidates(m, options.tokens, options.lengths, shape) for m in ("alpaca", "long"))
        ),
        *elementwise_candidates(options.tokens, shape),
        *extended_candidates(options.tokens, shape),
    ]
    candidates = [candidate for candidate in candidates if options.only in candidate.group]
    results: dict[str, list[tuple[float, str]]] = collections.defaultdict(list)
    refused: dict[str, list[str]] = collections.defaultdict(list)

    def compiled(candidate: Candidate, lowered: jax.stages.Lowered, arguments: tuple) -> Callable | None:
        try:
            return functools.partial(lowered.compile(), *arguments)
        except Exception as error:
            refused[candidate.group].append(f"{candidate.setting}: {str(error).splitlines()[0][:120]}")
            return None

    with ThreadPoolExecutor(16) as pool:
        programs = [pool.submit(compiled, candidate, *candidate.lower()) for candidate in candidates]
    groups: dict[str, list[tuple[Candidate, Callable]]] = collections.defaultdict(list)
    for candidate, program in zip(candidates, programs, strict=True):
        if call := program.result():
            groups[candidate.group].append((candidate, call))
    for group, members in groups.items():
        try:
            results[group] += [(seconds * 1e3, setting) for setting, seconds in times_of(members)]
        except RuntimeError as error:
            print(f"{group}: {error}", flush=True)
    for group, times in results.items():
        times.sort()
        print(f"\n{group}: {len(times)} tilings measured, {len(refused[group])} did not compile")
        for milliseconds, setting in times[:6]:
            print(f"  {milliseconds:8.4f} ms  {setting}")
    if "cudnn".startswith(options.only):
        print_pallas_against_cudnn(shape)
    if options.output:
        device = jax.devices()[0].device_kind
        options.output.write_text(json.dumps({"device": device, "results": results, "refused": refused}) + "\n")


if __name__ == "__main__":
    main()
