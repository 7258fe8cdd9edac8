"""Measures the loss and its gradients at one shape: milliseconds, and memory beyond its arguments.

    PYTHONPATH=. python benchmarks/bench_loss.py --tokens 16384 --vocab 248320 --hidden 2048

Every token has a target. The peak is the allocator's own, of the whole process, and includes XLA's autotuning: a second
process that finds the program in `JAX_COMPILATION_CACHE_DIR` holds only arguments, gradients and temporary arrays.
"""

import argparse
import collections
import json
import statistics
import time

import jax
import jax.numpy as jnp
from timing import jax_kernel_events

from jaxpack.kernels.linear_cross_entropy import linear_cross_entropy
from jaxpack.parallel.device import peak_memory_bytes

REPEATS = 10


def main() -> None:
    """Measures the loss, prints the kernels by their share of the time, and prints one line of JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocab", type=int, default=248_320)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--frozen-head", action="store_true", help="compute no gradient of the head")
    options = parser.parse_args()

    @jax.jit
    def make(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = jax.random.split(key, 3)
        hidden = jax.random.normal(keys[0], (options.tokens, options.hidden), jnp.bfloat16)
        head = jax.random.normal(keys[1], (options.vocab, options.hidden), jnp.bfloat16)
        return hidden, head * jnp.bfloat16(0.02), jax.random.randint(keys[2], (options.tokens,), 0, options.vocab)

    inputs = jax.block_until_ready(make(jax.random.key(0)))
    gradient = jax.value_and_grad(linear_cross_entropy, argnums=(0,) if options.frozen_head else (0, 1))
    program = jax.jit(gradient).lower(*inputs).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    loss = float(jax.block_until_ready(program(*inputs))[0])

    def run() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        return time.perf_counter() - begin

    seconds = statistics.median(run() for _ in range(REPEATS))
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    for event in jax_kernel_events(run):
        by_name[event.name].append(event.seconds)
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:10]:
        print(f"{1e3 * sum(times):8.3f} ms {len(times):4} x {name}")
    result = {
        **vars(options),
        "seconds": seconds,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "gradient_bytes": analysis.output_size_in_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "loss": loss / options.tokens,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
