"""Measures the experts' matmuls and the routing of a mixture of experts, on the shapes of Qwen3-30B-A3B.

    PYTHONPATH=. python benchmarks/bench_experts.py [--tiles ROWS,COLUMNS,DEPTH,WARPS,STAGES ...] [--output FILE.json]

The tokens choose their experts unevenly, as a trained router's do: an expert's chance is a log-normal draw. TFLOP/s
count the tokens' copies alone, and neither empty rows nor empty blocks. The matrices lie in a stack of a few layers,
which the kernels read in place. Further tables split a layer's forward pass by kernel, and both passes with gate and up
computed again or kept: the share outside of matmuls is what routing, the sum over experts and, in the backward pass,
the activation take. Prints tables, and writes a JSON file if `--output` names one.
"""

import argparse
import functools
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from timing import jax_kernel_events

from jaxpack.kernels import grouped_matmul as module
from jaxpack.kernels import routing as routing_module
from jaxpack.kernels.gated_experts import ExpertLinear, gated_experts
from jaxpack.kernels.routing import Routing, route
from jaxpack.kernels.weight import DenseStack

TOKENS, EXPERTS, CHOICES, HIDDEN, WIDTH, LAYERS, RANK = 16_384, 128, 8, 2048, 768, 4, 16
CALLS, SPREAD = 5, 0.7  # SPREAD is the standard deviation of the logarithm of an expert's chance
Tile = tuple[int, int, int, int, int]
TILES: tuple[Tile, ...] = (
    (128, 256, 64, 8, 4),  # the kernels' own choice on an H200
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 4),
    (128, 256, 32, 8, 4),
    (128, 256, 128, 8, 2),
    (64, 256, 64, 4, 4),
    (64, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
)


def choices() -> jax.Array:
    """Returns distinct experts for each token, drawn with an uneven chance for each expert."""
    chance, noise = jax.random.split(jax.random.key(0))
    logits = SPREAD * jax.random.normal(chance, (EXPERTS,))[None, :]
    return jax.lax.top_k(logits + jax.random.gumbel(noise, (TOKENS, EXPERTS)), CHOICES)[1]


def normal(seed: int, *shape: int) -> jax.Array:
    """Returns random bfloat16 numbers, made layer by layer."""
    draw = jax.jit(lambda keys: jax.lax.map(lambda key: 0.02 * jax.random.normal(key, shape[1:], jnp.bfloat16), keys))
    return draw(jax.random.split(jax.random.key(seed), shape[0]))


def use(tile: Tile) -> None:
    """Lets the kernels of functions that are traced from now on use a tile."""
    rows, columns, depth, module._NUM_WARPS, num_stages = tile
    module._TILES = module._GATED_TILES = (module._Tile(columns, depth, num_stages),)
    routing_module._MOST_ROWS = rows


@functools.cache
def routing_of(rows: int) -> Routing:
    """Returns the routing in blocks of at most so many rows, which `use` has chosen."""
    assert rows == routing_module._MOST_ROWS
    return jax.jit(lambda picks: route(picks, EXPERTS))(choices())


def seconds_by_kernel(run: Callable[[], object]) -> dict[str, float]:
    """Returns the mean seconds of a call in each kernel, longest first."""
    jax.block_until_ready(run())
    found: dict[str, float] = defaultdict(float)
    for event in jax_kernel_events(lambda: [jax.block_until_ready(run()) for _ in range(CALLS)]):
        found[event.name] += event.seconds / CALLS
    return dict(sorted(found.items(), key=lambda item: -item[1]))


class Product(NamedTuple):
    """Holds one product to measure: its useful operations, and a function of its arrays and the routing."""

    operations: float
    function: Callable[..., Any]
    arrays: tuple[jax.Array, ...]


def products() -> dict[str, Product]:
    """Returns the products of a layer's forward and backward pass."""
    up, down = normal(1, LAYERS, EXPERTS, 2 * WIDTH, HIDDEN), normal(2, LAYERS, EXPERTS, HIDDEN, WIDTH)
    tokens, copies = normal(3, TOKENS, HIDDEN), TOKENS * CHOICES
    wide, narrow = 2 * copies * HIDDEN * 2 * WIDTH, 2 * copies * HIDDEN * RANK

    def rows(routing: Routing, channels: int) -> jax.Array:
        return jnp.ones((routing.copies.shape[0], channels), jnp.bfloat16)

    multiply = functools.partial(module.grouped_matmul, layer=1)
    gated = functools.partial(module.grouped_gated, layer=1, from_tokens=True)
    from_tokens = functools.partial(multiply, from_tokens=True)
    back = functools.partial(multiply, transposed=True)
    return {
        "gate and up": Product(wide, lambda up, x, r: from_tokens(x, up, r), (up, tokens)),
        "gate and up, their product alone": Product(wide, lambda up, x, r: gated(x, up, r)[0], (up, tokens)),
        "gate and up, and their product": Product(
            wide, lambda up, x, r: gated(x, up, r, with_gate_up=True), (up, tokens)
        ),
        "gate and up, gradient of its input": Product(wide, lambda up, r: back(rows(r, 2 * WIDTH), up, r), (up,)),
        "down": Product(wide / 2, lambda down, r: multiply(rows(r, WIDTH), down, r), (down,)),
        "down, gradient of its input": Product(
            wide / 2, lambda down, d, r: from_tokens(d, down, r, transposed=True), (down, tokens)
        ),
        "A of gate and up": Product(narrow, lambda a, x, r: from_tokens(x, a, r), (up[:, :, :RANK], tokens)),
        "gradient of A": Product(
            narrow, lambda x, r: module.grouped_outer(rows(r, RANK), x, r, x_from_tokens=True), (tokens,)
        ),
    }


def layer(*, backward: bool, keeps_gate_up: bool = False) -> Callable[[], Any]:
    """Returns a function that computes a layer's experts with adapters, or their gradients, too.

    The backward pass computes gate and up again, as most choices of `remat` do, or the forward pass keeps them.
    """
    up, down = normal(1, LAYERS, EXPERTS * 2 * WIDTH, HIDDEN), normal(2, LAYERS, EXPERTS * HIDDEN, WIDTH)
    x, picks = normal(3, TOKENS, HIDDEN), choices()
    shares = jnp.full((TOKENS, CHOICES), 1 / CHOICES, jnp.float32)
    sides = ((RANK, HIDDEN), (2 * WIDTH, RANK)), ((RANK, WIDTH), (HIDDEN, RANK))
    factors = tuple(tuple(normal(4, EXPERTS, *side) for side in pair) for pair in sides)

    def run(stacks: tuple[jax.Array, ...], *arguments: Any) -> Any:
        routing = route(picks, EXPERTS)

        def forward(x: jax.Array, shares: jax.Array, factors: Any) -> jax.Array:
            weights = (DenseStack(stack).at(jnp.int32(1)) for stack in stacks)
            linears = (ExpertLinear(weight, None, pair) for weight, pair in zip(weights, factors, strict=True))
            return gated_experts(x, x, shares, routing, *linears, keeps_gate_up=keeps_gate_up)

        if not backward:
            return forward(*arguments)
        if not keeps_gate_up:
            forward = jax.checkpoint(forward, policy=jax.checkpoint_policies.save_only_these_names("lora"))
        out, pull = jax.vjp(forward, *arguments)
        return pull(out)

    compiled = jax.jit(run)
    return lambda: compiled((up, down), x, shares, factors)


def main() -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", nargs="+", help="tiles to try: ROWS,COLUMNS,DEPTH,WARPS,STAGES")
    parser.add_argument("--only", default="", help="measure products whose name contains this")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tiles = [tuple(map(int, tile.split(","))) for tile in options.tiles] if options.tiles else [*TILES]
    console, results = Console(width=140), []
    for name, (operations, function, arrays) in products().items():
        if options.only not in name:
            continue
        table = Table("tile", "ms", "TFLOP/s", title=name)
        for tile in tiles:
            use(tile)  # pyright: ignore[reportArgumentType]
            try:
                run = jax.jit(lambda *arguments, function=function: function(*arguments))  # is traced anew
                kernels = seconds_by_kernel(functools.partial(run, *arrays, routing_of(tile[0])))
            except Exception as error:  # a tile that does not compile
                table.add_row(str(tile), f"{type(error).__name__}: {error!s:.60}", "")
                continue
            seconds = sum(value for kernel, value in kernels.items() if "grouped" in kernel)
            results.append({"product": name, "tile": tile, "seconds": seconds, "tflops": operations / seconds / 1e12})
            table.add_row(str(tile), f"{1e3 * seconds:.3f}", f"{operations / seconds / 1e12:.0f}")
        console.print(table)
    use(TILES[0])
    passes = {
        "forward": layer(backward=False),
        "forward and backward": layer(backward=True),
        "forward and backward, gate and up kept": layer(backward=True, keeps_gate_up=True),
    }
    for what, run in passes.items():
        kernels = seconds_by_kernel(run)
        total = sum(kernels.values())
        others = sum(value for kernel, value in kernels.items() if "grouped" not in kernel)
        table = Table(
            "kernel", "ms", "share", title=f"a layer's experts, {what}: {others / total:.1%} outside of matmuls"
        )
        for kernel, seconds in list(kernels.items())[:25]:
            table.add_row(kernel[:90], f"{1e3 * seconds:.3f}", f"{seconds / total:.1%}")
        console.print(table)
        results.append({"layer": what, "kernels": kernels, "share_without_matmuls": others / total})
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
