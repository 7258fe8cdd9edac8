"""Measures how long a layer's 4-bit weight takes to become dense, inside a scan over layers.

    PYTHONPATH=. python benchmarks/bench_dequantize.py [--tiles ROWS,COLUMNS,WARPS ...]

Each program loops over 36 layers. In each, it makes the dense matrix of that layer with an adapter's factor behind it,
as a training step does, and multiplies a few tokens with it. The time is that of the kernels that make the matrix, from
a profile. Compared are our kernel with several tiles, XLA's own fusion of the same arithmetic, and the copy of a
bfloat16 matrix. Prints a table, and writes a JSON file if `--output` names one.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from timing import jax_kernel_events

from jaxpack.kernels import dequantize
from jaxpack.kernels.weight import DenseWeight, Weight
from jaxpack.model.nf4 import NF4Weight, quantize_nf4

LAYERS, RANK, TOKENS, CALLS = 36, 32, 16, 3
SHAPES = {
    "gate and up, Qwen3-4B": ((9728, 9728), 2560, "columns"),
    "query, key and value, Qwen3-4B": ((4096, 1024, 1024), 2560, "columns"),
    "down, Qwen3-4B": ((2560,), 9728, "rows"),
    "output of attention, Qwen3-4B": ((2560,), 4096, "rows"),
}
TILES = ((16, 512, 4), (8, 512, 4), (32, 256, 4), (16, 512, 8), (16, 256, 4), (8, 1024, 4), (32, 512, 8), (4, 512, 2))


def stack_of(rows: tuple[int, ...], columns: int) -> tuple[jax.Array, NF4Weight]:
    """Returns a stack of random matrices, in bfloat16 and in 4 bits."""

    def one(layer: jax.Array) -> jax.Array:
        return (0.02 * jax.random.normal(jax.random.key(layer), (sum(rows), columns))).astype(jnp.bfloat16)

    dense = jax.lax.map(one, jnp.arange(LAYERS))
    abstract = jax.eval_shape(partial(quantize_nf4, rows=rows), dense)
    weight = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    write = jax.jit(lambda weight, layer, matrix: weight.write((layer, 0), matrix), donate_argnums=0)
    for layer in range(LAYERS):
        weight = write(weight, layer, dense[layer])
    return dense, weight


def program(side: str, read: Callable[[Weight, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Returns a function that multiplies tokens with each layer's matrix in turn, `[W, B]` or `[W; A]`."""

    def run(weight: Weight, factors: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, scanned: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            number, factor = scanned
            (x, factor), one = weight.at(number).after(x, factor)
            y = x @ read(one, factor) if side == "columns" else x @ read(one, factor).T
            return x + 1e-6 * jnp.sum(y), None  # the next layer waits for this one

        return jax.lax.scan(layer, x, (jnp.arange(LAYERS), factors))[0]

    return jax.jit(run)


def seconds_of(run: Callable[[], object]) -> dict[str, float]:
    """Returns the mean seconds of a layer in each kernel but the matmul, by the kernel's name."""
    jax.block_until_ready(run())
    found: dict[str, float] = defaultdict(float)
    for event in jax_kernel_events(lambda: [jax.block_until_ready(run()) for _ in range(CALLS)]):
        found[event.name] += event.seconds / CALLS / LAYERS
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def variants(side: str, tiles: list[tuple[int, ...]]) -> dict[str, Callable[[Weight, jax.Array], jax.Array]]:
    """Returns the ways to make the matrix of a 4-bit weight."""
    append: Callable[[Weight, jax.Array], jax.Array] = (
        (lambda weight, factor: weight.append_columns(factor))
        if side == "columns"
        else (lambda weight, factor: weight.append_rows(factor))
    )

    def with_tile(tile: tuple[int, ...], weight: Weight, factor: jax.Array) -> jax.Array:
        dequantize._ROWS, dequantize._COLUMNS, dequantize._NUM_WARPS = tile
        return append(weight, factor)

    def with_xla(weight: Any, factor: jax.Array) -> jax.Array:
        behind = {"columns_behind" if side == "columns" else "rows_behind": factor}
        options: dict[str, Any] = {"stored": "bfloat16", "dtype": "bfloat16", "implementation": "xla", **behind}
        return dequantize.dequantize_nf4(weight.arrays, weight.layer, weight.places, **options)

    return {f"ours {tile}": partial(with_tile, tile) for tile in tiles} | {"XLA": with_xla}


def main() -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", nargs="+", help="tiles to try: ROWS,COLUMNS,WARPS")
    parser.add_argument("--only", default="", help="measure shapes whose name contains this")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tiles: list[tuple[int, ...]] = [*TILES]
    if options.tiles:
        tiles = [tuple(map(int, tile.split(","))) for tile in options.tiles]
    rows = []
    for name, (projections, columns, side) in SHAPES.items():
        if options.only not in name:
            continue
        dense, weight = stack_of(projections, columns)
        size = sum(projections)
        shape = (LAYERS, size, RANK) if side == "columns" else (LAYERS, RANK, columns)
        factors = jnp.full(shape, 0.01, jnp.bfloat16)
        x = jnp.ones((TOKENS, size if side == "columns" else columns), jnp.bfloat16)
        stacks: dict[str, Weight] = {"copy of bfloat16": DenseWeight(dense)}
        reads = {"copy of bfloat16": variants(side, [(16, 512, 4)])["ours (16, 512, 4)"]} | variants(side, tiles)
        for what, read in reads.items():
            run = program(side, read)
            try:
                kernels = seconds_of(partial(run, stacks.get(what, weight), factors, x))
            except Exception as error:  # a tile that does not compile
                print(f"{name}: {what}: {error!s:.200}", flush=True)
                continue
            rows.append({"shape": name, "variant": what, "kernels": kernels})
            first = ", ".join(f"{1e3 * seconds:.4f} {kernel:.40}" for kernel, seconds in list(kernels.items())[:4])
            print(f"{name}: {what}: {first}", flush=True)
        del dense, weight, stacks
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
