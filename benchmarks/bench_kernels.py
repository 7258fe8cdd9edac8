"""Measures every kernel beside its floor, XLA alone, Unsloth, Liger and torch, at one model's shapes.

    PYTHONPATH=. python benchmarks/bench_kernels.py --lengths LENGTHS.csv --peers-site FOLDER

First the opponents run, each group in its own process (`peers_kernels.py`), then JAX in this process. `timing.py` says
what is timed. LENGTHS.csv is a histogram of document lengths as in `bench_training.py`; FOLDER holds Unsloth and Liger.
Prints a table and the bars, and writes a JSON file.
"""

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import KERNEL_TOKENS, MIXES, KernelShape, causal_pairs, document_lengths
from rich.console import Console
from rich.table import Table
from timing import num_sets, time_jax

from jaxpack.kernels import attention, gated_activation, rope
from jaxpack.kernels import cudnn as cudnn_limits

BYTES_PER_SECOND = 4.3e12  # the best device copy on an H200, reads plus writes
OPERATIONS = ("rope", "norm_rope", "swiglu", "geglu_tanh", "geglu_exact", "attention")
ACTIVATIONS = {"swiglu": "silu", "geglu_tanh": "gelu_tanh", "geglu_exact": "gelu"}
PEERS = {"torch": 180, "liger": 60, "unsloth": 110}  # time limits in seconds
TOLERANCE = 0.02  # relative error of a bfloat16 result from the float32 reference; more is wrong
EPS = 1e-6
LAYERS = 4  # layers in a program that stands for a model
IN_LAYERS = ", in layers"
_XLA_ATTENTION_LIMIT = 16_384  # tokens; at 65,536 its float32 scores are 34 GB at a time

COPY, XLA, OURS, OWN_USE, CHOSEN = "copy", "XLA", "ours", "ours, own use", "ours, None"
CUDNN, CUDNN_PACKED = "cuDNN (JAX)", "cuDNN packed (JAX)"  # for rows of equal length, and for segments
COLUMNS = (COPY, "copy (torch)", XLA, OURS, OWN_USE, "ours, two arrays", CHOSEN, CUDNN_PACKED, CUDNN)
COLUMNS += ("Unsloth", "Liger", CHOSEN + IN_LAYERS, CUDNN_PACKED + IN_LAYERS, CUDNN + IN_LAYERS)
COLUMNS += ("torch flex", "torch varlen", "cuDNN (torch)")


@dataclass
class Variant:
    """Holds one way to compute a case: `function(**inputs)` -> a pytree of arrays.

    Attributes:
      donates: the inputs whose memory the function may reuse for its outputs, as in the model.
      prepare: converts the case's inputs to the variant's inputs; not timed.
      arrange: converts the variant's outputs to the case's outputs; not timed.
      layers: how often the function repeats the work in sequence; times are divided by it.
      slow: whether it compiles slowly; it then comes last and may be given up.
    """

    column: str
    function: Callable
    donates: tuple[str, ...] = ()
    prepare: Callable = lambda inputs: inputs
    arrange: Callable = lambda outputs: outputs
    note: str = ""
    layers: int = 1
    slow: bool = False


@dataclass
class Case:
    """Holds one row of the table; `reference(**inputs)` computes the result of all variants in float32."""

    operation: str
    direction: str
    mix: str | None
    tokens: int
    shapes: dict[str, tuple[int, ...]]
    common: dict[str, Any]
    reference: Callable
    variants: list[Variant]
    bytes_moved: int
    flops: int | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, Any]:
        """Returns the row without times."""
        row = {"operation": self.operation, "direction": self.direction, "mix": self.mix, "tokens": self.tokens}
        if self.flops:
            return {**row, "flops": self.flops, "columns": {}}
        floor = self.bytes_moved / BYTES_PER_SECOND
        return {**row, "bytes": self.bytes_moved, "floor_seconds": floor, "columns": {}}


def wide(tree: Any) -> Any:
    """Casts all floating-point arrays of a pytree to float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


# The cases.


def rope_cases(tokens: int, shape: KernelShape) -> Iterator[Case]:
    """Yields the cases of RoPE, and of the heads' norm with RoPE."""
    N, K, H = shape.num_heads, shape.num_kv_heads, shape.head_dim
    q, k = (1, tokens, N, H), (1, tokens, K, H)
    both = 2 * tokens * (N + K) * H
    frequencies = 1e6 ** -(jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angles = rope.rotary_angles(jnp.arange(tokens, dtype=jnp.int32)[None], frequencies)
    angle_bytes = 2 * angles.cos.size * 4

    def plain(q, k, angles):
        return rope.rotate_reference(q, angles), rope.rotate_reference(k, angles)

    def backward(function):
        def run(dq, dk, **inputs):
            inputs = {"q": dq, "k": dk, **inputs}  # RoPE is linear: its backward pass needs no q and k
            others = {name: value for name, value in inputs.items() if name not in wanted}
            wanted_inputs = [inputs[name] for name in wanted]
            return jax.vjp(lambda *args: function(**dict(zip(wanted, args, strict=True)), **others), *wanted_inputs)[1](
                (dq, dk)
            )

        wanted = ("q", "k") if function in linear else ("q", "k", "q_scale", "k_scale")
        return run

    ours = partial(rope.apply_rope, implementation="pallas")
    linear = (plain, ours)
    common = {"angles": angles}
    yield Case(
        "rope",
        "forward",
        None,
        tokens,
        {"q": q, "k": k},
        common,
        plain,
        [
            Variant(COPY, lambda q, k, angles: (jnp.copy(q), jnp.copy(k)), arrange=lambda _: None),
            Variant(XLA, plain),
            Variant(OURS, ours, note="q and k stay: XLA copies them first"),
            Variant(OWN_USE, ours, donates=("q", "k"), note="in place"),
        ],
        2 * both + angle_bytes,
    )
    yield Case(
        "rope",
        "backward",
        None,
        tokens,
        {"dq": q, "dk": k},
        common,
        backward(plain),
        [
            Variant(XLA, backward(plain)),
            Variant(OURS, backward(ours), note="dq and dk stay: XLA copies them first"),
            Variant(OWN_USE, backward(ours), donates=("dq", "dk"), note="in place"),
        ],
        2 * both + angle_bytes,
    )

    def plain_norm(q, k, q_scale, k_scale, angles):
        return (
            rope.norm_rotate_reference(q, q_scale, angles, EPS),
            rope.norm_rotate_reference(k, k_scale, angles, EPS),
        )

    ours_norm = partial(rope.norm_rope, eps=EPS, implementation="pallas")
    scales = {"q_scale": (H,), "k_scale": (H,)}
    yield Case(
        "norm_rope",
        "forward",
        None,
        tokens,
        {"q": q, "k": k, **scales},
        common,
        plain_norm,
        [Variant(XLA, plain_norm), Variant(OURS, ours_norm)],
        2 * both + angle_bytes,
    )
    yield Case(
        "norm_rope",
        "backward",
        None,
        tokens,
        {"dq": q, "dk": k, "q": q, "k": k, **scales},
        common,
        backward(plain_norm),
        [
            Variant(XLA, backward(plain_norm)),
            Variant(OURS, backward(ours_norm), note="dq and dk stay: XLA copies them first"),
            Variant(OWN_USE, backward(ours_norm), donates=("dq", "dk"), note="in place"),
        ],
        3 * both + angle_bytes,
    )


def gate_cases(operation: str, tokens: int, shape: KernelShape) -> Iterator[Case]:
    """Yields the cases of a gated activation: forward, backward, and backward with the product recomputed."""
    F = shape.intermediate_size
    act = {
        "silu": jax.nn.silu,
        "gelu_tanh": partial(jax.nn.gelu, approximate=True),
        "gelu": partial(jax.nn.gelu, approximate=False),
    }[ACTIVATIONS[operation]]
    options: dict[str, Any] = {"activation": ACTIVATIONS[operation], "implementation": "pallas"}
    inputs, gradient = {"gate_up": (1, tokens, 2 * F)}, {"d_out": (1, tokens, F)}
    size = 2 * tokens * F

    def plain(gate_up):
        gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
        return (act(gate) * up).astype(gate_up.dtype)

    def plain_backward(gate_up, d_out, with_product):
        product, pull = jax.vjp(plain, gate_up)
        return (*pull(d_out), product) if with_product else pull(d_out)

    def apart(inputs):
        inputs = dict(inputs)
        gate, up = (jnp.copy(x) for x in jnp.split(inputs.pop("gate_up"), 2, axis=-1))
        return {"gate": gate, "up": up, **inputs}

    def together(outputs):
        d_gate, d_up, *product = jax.tree.leaves(outputs)
        return [jnp.concatenate([d_gate, d_up], axis=-1), *product]

    def ours(gate_up):
        return gated_activation.gated_activation(gate_up, **options)

    def ours_apart(gate, up):
        return gated_activation.gated_activation(gate, up, **options)

    def ours_backward(d_out, with_product, gate_up: Any = None, gate: Any = None, up=None):
        first = gate_up if up is None else gate
        return gated_activation.gated_activation_backward(first, up, d_out, with_product=with_product, **options)

    yield Case(
        operation,
        "forward",
        None,
        tokens,
        inputs,
        {},
        plain,
        [Variant(XLA, plain), Variant(OURS, ours), Variant("ours, two arrays", ours_apart, prepare=apart)],
        3 * size,
    )
    for direction, product in (("backward", False), ("backward_product", True)):
        backward = partial(ours_backward, with_product=product)
        yield Case(
            operation,
            direction,
            None,
            tokens,
            {**inputs, **gradient},
            {},
            partial(plain_backward, with_product=product),
            [
                Variant(XLA, partial(plain_backward, with_product=product)),
                Variant(OURS, backward),
                Variant("ours, two arrays", backward, prepare=apart, arrange=together),
            ],
            (6 if product else 5) * size,
        )


def attention_cases(tokens: int, mix: str, lengths: list[int], shape: KernelShape) -> Iterator[Case]:
    """Yields the cases of attention within the documents of one row: forward, and forward with backward."""
    N, K, H = shape.num_heads, shape.num_kv_heads, shape.head_dim
    ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]
    bounds = attention.segment_bounds(jnp.asarray(ids))
    flops = 4 * H * N * causal_pairs(lengths)
    max_segments = len(lengths)
    inputs = {"q": (1, tokens, N, H), "k": (1, tokens, K, H), "v": (1, tokens, K, H)}
    gradient = {"d_out": (1, tokens, N, H)}

    def plain(q, k, v, bounds):
        options = attention.make_options(H, None, None, None, None, "xla")
        return attention.attention_reference(q, k, v, bounds, None, options)

    def ours(implementation):
        return partial(attention.attention, max_segments=max_segments, implementation=implementation)

    def cudnn(q, k, v, bounds):
        del bounds
        q, k, v = (x.reshape(len(lengths), -1, *x.shape[2:]) for x in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return out.reshape(1, tokens, N, H)

    def cudnn_packed(q, k, v, bounds):
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        del bounds
        sizes = jnp.array([lengths], jnp.int32)
        offsets = jnp.array([[*np.cumsum([0, *lengths[:-1]]), -1]], jnp.int32)
        return dot_product_attention(
            q, k, v,
            q_seqlen=sizes, kv_seqlen=sizes, q_offsets=offsets, kv_offsets=offsets,
            scale=H**-0.5, mask_type=MaskType.PADDING_CAUSAL,
        )  # fmt: skip

    def with_backward(function):
        def run(q, k, v, d_out, bounds):
            out, pull = jax.vjp(lambda q, k, v: function(q, k, v, bounds=bounds), q, k, v)
            return out, *pull(d_out)

        return run

    def in_layers(function):
        def run(q, **inputs):
            results = [function(q=q, **inputs)]
            for _ in range(LAYERS - 1):  # one after another
                q, results[-1] = jax.lax.optimization_barrier((q, results[-1]))
                results.append(function(q=q, **inputs))
            return results

        return run

    def joined(inputs):
        inputs = dict(inputs)
        return {"qkv": jnp.concatenate([inputs.pop("q"), inputs.pop("k"), inputs.pop("v")], axis=2), **inputs}

    def heads_of(qkv):
        return attention.Heads(qkv, 0), attention.Heads(qkv, N), attention.Heads(qkv, N + K)

    own_options = attention.make_options(H, None, None, None, max_segments, "pallas")

    def own_forward(qkv, bounds):
        return attention.attention_forward(*heads_of(qkv), N, K, bounds, None, own_options)[0]

    def own_both(qkv, d_out, bounds):
        out, lse = attention.attention_forward(*heads_of(qkv), N, K, bounds, None, own_options)
        d_qkv, _ = attention.attention_backward(*heads_of(qkv), bounds, None, out, lse, d_out, own_options)
        return out, d_qkv

    def apart(outputs):
        return [outputs[0], *jnp.split(outputs[1], [N, N + K], axis=2)]

    missing = {}
    if tokens > _XLA_ATTENTION_LIMIT:
        missing[XLA] = "its float32 scores do not fit"
    if len(set(lengths)) > 1:
        missing[CUDNN] = "documents of different lengths"
    if len(lengths) > cudnn_limits.MAX_SEGMENTS:
        missing[CUDNN_PACKED] = "its scratch memory grows with the number of documents"
    if jax.default_backend() != "gpu":
        missing |= dict.fromkeys((CUDNN, CUDNN_PACKED), "no GPU")
    functions = {XLA: plain, OURS: ours("pallas"), CHOSEN: ours(None), CUDNN: cudnn, CUDNN_PACKED: cudnn_packed}
    functions = {column: function for column, function in functions.items() if column not in missing}
    one_array = "q, k and v are heads of one array"
    for direction in ("forward", "forward_backward"):
        both = direction == "forward_backward"
        here = {column: with_backward(f) if both else f for column, f in functions.items()}
        yield Case(
            "attention",
            direction,
            mix,
            tokens,
            {**inputs, **(gradient if both else {})},
            {"bounds": bounds},
            attention_oracle if both else lambda **inputs: attention_oracle(**inputs, d_out=None)[0],
            [
                # XLA autotunes a separate matmul for every chunk of queries.
                *(Variant(column, f, slow=column == XLA) for column, f in here.items()),
                # In layers, a GPU at its power limit lowers its clock: compare these two columns with each other only.
                *(
                    Variant(
                        column + IN_LAYERS,
                        in_layers(f),
                        arrange=lambda outputs: outputs[-1],
                        layers=LAYERS,
                        note=f"one of {LAYERS} layers, which share what is computed once per batch",
                    )
                    for column, f in here.items()
                    if column in (CHOSEN, CUDNN, CUDNN_PACKED)
                ),
                Variant(OWN_USE, own_both, prepare=joined, arrange=apart, note=one_array)
                if both
                else Variant(OWN_USE, own_forward, prepare=joined, note=one_array),
            ],
            2 * tokens * 2 * (N + K) * H,
            flops * 7 // 2 if both else flops,
            missing,
        )


def attention_oracle(q, k, v, d_out, bounds):
    """Returns output and gradients in float32 with dense scores, for one key head and some queries at a time."""
    B, T, N, H = q.shape
    K = k.shape[2]
    chunk = min(512, T)
    assert B == 1
    assert T % chunk == 0

    def forward(q, k, v):
        def one_head(head):
            queries, keys, values = head

            @jax.checkpoint
            def one_chunk(part):
                queries, first, token = part
                scores = jnp.einsum("TGH,SH->GTS", queries, keys) * H**-0.5
                key = jnp.arange(T)[None, :]
                allowed = (key >= first[:, None]) & (key <= token[:, None])
                weights = jax.nn.softmax(jnp.where(allowed[None], scores, -1e30), axis=-1)
                return jnp.einsum("GTS,SH->TGH", weights, values)

            chunks = (queries, bounds.first[0].reshape(-1, chunk), jnp.arange(T).reshape(-1, chunk))
            return jax.lax.map(one_chunk, chunks)

        heads = q.reshape(T // chunk, chunk, K, N // K, H).transpose(2, 0, 1, 3, 4)
        out = jax.lax.map(one_head, (heads, k[0].transpose(1, 0, 2), v[0].transpose(1, 0, 2)))
        return out.transpose(1, 2, 0, 3, 4).reshape(q.shape)

    out, pull = jax.vjp(forward, q, k, v)
    return (out,) if d_out is None else (out, *pull(d_out))


# Measuring.


class Programs:
    """Holds the compiled programs of a case's variant."""

    def __init__(self, case: Case, variant: Variant, unroll: int) -> None:
        self.case, self.variant = case, variant
        arrays = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in case.shapes.items()}
        specs = {**jax.eval_shape(variant.prepare, arrays), **_specs(case.common)}
        donated = {name: specs.pop(name) for name in variant.donates}

        def call(donated, kept):
            return variant.function(**donated, **kept)

        self.call = jax.jit(call, donate_argnums=0).lower(donated, specs).compile()
        self.unrolled = None
        if unroll > 1 and not donated:

            def several(sets):
                results = []
                for donated, kept in sets:
                    if results:  # calls stay in this order, and are not fused with the call before
                        kept, results[-1] = jax.lax.optimization_barrier((kept, results[-1]))
                    results.append(call(donated, kept))
                return results

            self.unrolled = jax.jit(several).lower([({}, specs)] * unroll).compile(), unroll

    def sets(self, count: int, seed: int = 0) -> list[tuple[dict, dict]]:
        """Makes `count` new sets of arguments."""
        sets = []
        for i in range(count):
            inputs = {**_prepared(self.variant)(random_inputs(self.case, seed + i)), **self.case.common}
            donated = {name: inputs.pop(name) for name in self.variant.donates}
            sets.append((donated, inputs))
        return sets


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _prepared(variant: Variant) -> Callable:
    return jax.jit(variant.prepare)


@partial(jax.jit, static_argnums=1)
def _normals(seed: jax.Array, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {name: jax.random.normal(key, shape, jnp.bfloat16) for key, (name, shape) in zip(keys, shapes, strict=True)}


def random_inputs(case: Case, seed: int) -> dict[str, jax.Array]:
    """Returns standard normal inputs of a case in bfloat16."""
    return _normals(jnp.uint32(seed), tuple(case.shapes.items()))


_CHECKED = 1000  # seed of the inputs for the check


def expected(case: Case, reference: Any) -> Any:
    """Returns the outputs of the compiled reference on the inputs of the check."""
    return reference.result()(**wide(random_inputs(case, _CHECKED)), **case.common)


@jax.jit
def _relative_error(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())


def errors_of(programs: Programs, want: Callable[[], Any]) -> list[float]:
    """Returns the relative error of every output against the reference on the same inputs."""
    ((donated, kept),) = programs.sets(1, seed=_CHECKED)
    got = programs.variant.arrange(programs.call(donated, kept))
    if got is None:  # nothing to compare
        return []
    ours, theirs = jax.tree.leaves(got), jax.tree.leaves(want())
    assert [x.shape for x in ours] == [x.shape for x in theirs], "the outputs are not those of the reference"
    return [float(_relative_error(x, y)) for x, y in zip(ours, theirs, strict=True)]


def measure(
    cases: list[Case], *, slow: bool, main_tokens: int, threads: int, deadline: float, record: Callable
) -> bool:
    """Compiles the programs of `cases` side by side, then checks and times them one by one.

    Returns:
      Whether all programs compiled. Slow programs are not waited for beyond the deadline.
    """

    def compiled(case: Case, variant: Variant) -> Programs | Exception:
        try:
            _check_time(deadline)
            return Programs(case, variant, 4 if case.tokens == main_tokens and case.operation != "attention" else 1)
        except Exception as error:
            return error

    def compiled_reference(case: Case) -> Callable:
        arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in case.shapes.items()}
        return jax.jit(case.reference).lower(**arrays, **_specs(case.common)).compile()

    cases = [case for case in cases if any(v.slow == slow for v in case.variants)]
    pool = ThreadPoolExecutor(threads)
    references = [pool.submit(compiled_reference, case) for case in cases]
    programs = [[pool.submit(compiled, case, v) for v in case.variants if v.slow == slow] for case in cases]
    pool.shutdown(wait=not slow)
    started: list[Future[Any]] = [*references, *itertools.chain(*programs)]
    _, unfinished = wait(started, timeout=max(0, deadline - time.monotonic()) if slow else None)
    for case, reference, jobs in zip(cases, references, programs, strict=True):
        row, want = case.row, cache(partial(expected, case, reference))
        for column, why in case.missing.items():
            row["columns"][column] = {"missing": why}
        for variant, job in zip((v for v in case.variants if v.slow == slow), jobs, strict=True):
            try:
                if unfinished:
                    raise TimeoutError("the kernel had not compiled when the time ran out")
                _check_time(deadline)
                entry = timed(job.result(), want)
            except Exception as error:
                entry = {"missing": _reason(error)}
            del job
            if variant.note:
                entry["note"] = variant.note
            row["columns"][variant.column] = entry
            print(json.dumps({**{key: row[key] for key in _KEY}, "column": variant.column, **entry}), flush=True)
        jobs.clear()
        record(row)
    return not unfinished


def timed(programs: Programs | Exception, want: Callable[[], Any]) -> dict[str, Any]:
    """Returns the errors and times of one variant."""
    if isinstance(programs, Exception):
        raise programs
    errors = errors_of(programs, want)
    make = partial(programs.sets, num_sets(programs.case.bytes_moved))
    times = time_jax(programs.call, make, consumed=bool(programs.variant.donates), unrolled=programs.unrolled)
    layers = programs.variant.layers
    seconds = {name: getattr(times, name) / layers for name in ("median", "low", "high", "check", "kernels")}
    return {"errors": errors, **times._asdict(), **seconds}


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("not measured, because the time ran out")


_KEY = ("operation", "direction", "mix", "tokens")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# The opponents.


def run_peers(options: argparse.Namespace, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs the opponents one after another, each group in its own process, and yields their lines."""
    script = Path(__file__).resolve().with_name("peers_kernels.py")
    for peer, limit in PEERS.items():
        if peer != "torch" and set(options.only) == {"attention"}:  # the other opponents have no attention kernel
            continue
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
        if options.peers_site and peer != "torch":
            environment["PYTHONPATH"] = str(options.peers_site.resolve())
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder, "request.json"), Path(folder, "lines.jsonl")
            path.write_text(json.dumps({**request, "peer": peer, "seconds": limit - 15}))
            command = [sys.executable, script, path, out]
            start = time.monotonic()
            # A separate folder, since Unsloth writes a cache of compiled modules to its working folder.
            process = subprocess.Popen(command, env=environment, cwd=folder)
            try:
                status = f"exit code {process.wait(limit)}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = f"stopped after {limit} s"
            print(f"{peer}: {status}, {time.monotonic() - start:.0f} s", flush=True)
            lines = out.read_text().splitlines() if out.exists() else []
        yield {"peer": peer, "status": status}
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the line was cut off
                continue


# The results.


class Results:
    """Holds rows by operation, direction, mix and tokens, and rewrites the JSON file after each change.

    Rows of an existing file are kept, except rows of the operations and tokens that are measured now.
    """

    def __init__(self, path: Path, header: dict[str, Any], operations: Sequence[str], tokens: Sequence[int]) -> None:
        self.path, self.header = path, header
        self.rows: dict[tuple, dict[str, Any]] = {}
        if path.exists():
            before = json.loads(path.read_text())
            for kept in ("versions", "peers", "documents"):
                header[kept] = before[kept] | header[kept]
            for row in before["rows"]:
                if row["operation"] not in operations or row["tokens"] not in tokens:
                    self.rows[tuple(row[name] for name in _KEY)] = row

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row, or adds columns to an existing row."""
        row.setdefault("time", datetime.datetime.now().isoformat(timespec="minutes"))
        key = tuple(row[name] for name in _KEY)
        known = self.rows.setdefault(key, {**row, "columns": {}})
        columns = {**known["columns"], **row["columns"]}
        self.rows[key] = {**known, **row, "columns": columns}
        self.path.write_text(json.dumps({**self.header, "rows": list(self.rows.values())}, indent=1) + "\n")

    def seconds(self, operation: str, direction: str, mix: str | None, tokens: int, *columns: str) -> float | None:
        """Returns the shortest correct time in `columns` ("floor" is allowed), or None if there is none."""
        row = self.rows.get((operation, direction, mix, tokens), {"columns": {}})
        found = [row["columns"][name]["median"] for name in columns if right(row["columns"].get(name, {}))]
        if "floor" in columns and "floor_seconds" in row:
            found.append(row["floor_seconds"])
        return min(found, default=None)


def right(entry: dict[str, Any]) -> bool:
    """Returns whether a column has a time, and errors within `TOLERANCE`."""
    return "median" in entry and all(error <= TOLERANCE for error in entry["errors"])


def bars(results: Results, tokens: int) -> list[dict[str, Any]]:
    """Returns the bars for the kernels at `tokens` tokens, and whether each is reached."""
    own = (OWN_USE, OURS)  # the faster counts: donated memory costs a copy if no kernel writes in place
    found = []

    def bar(label: str, value: float | None, limit: float, *, at_least: bool = False) -> None:
        passed = None if value is None else (value >= limit if at_least else value <= limit)
        rule = f"{'>=' if at_least else '<='} {limit:g}"
        found.append({"bar": label, "value": value, "rule": rule, "passed": passed})

    def ratio(operation: str, direction: str, columns: tuple[str, ...], to: str) -> float | None:
        mine = results.seconds(operation, direction, None, tokens, *columns)
        other = results.seconds(operation, direction, None, tokens, to)
        return mine / other if mine and other else None

    for copy in (COPY, "copy (torch)"):
        bar(f"rope forward / device {copy}", ratio("rope", "forward", own, copy), 1.10)
    for direction in ("forward", "backward"):
        for peer in ("Unsloth", "Liger"):
            bar(f"rope {direction} / {peer}", ratio("rope", direction, own, peer), 1.0)
    for direction in ("forward", "backward"):
        share = ratio("norm_rope", direction, own, XLA)
        bar(f"norm + rope {direction}: XLA / ours", share and 1 / share, 1.5, at_least=True)
    for operation in ACTIVATIONS:
        bar(f"{operation} forward / floor", ratio(operation, "forward", own, "floor"), 1.05)
    for operation in ACTIVATIONS:
        to_peer = ratio(operation, "backward_product", own, "Unsloth")
        to_floor = ratio(operation, "backward_product", own, "floor")
        if to_peer is not None and to_peer <= 0.95:
            bar(f"{operation} backward with product / Unsloth", to_peer, 0.95)
        else:
            bar(f"{operation} backward with product / floor", to_floor, 1.05)
    for direction, limit in (("forward", 0.20), ("forward_backward", 0.80)):
        seconds = results.seconds("attention", direction, "alpaca", tokens, *own)
        bar(f"attention alpaca {direction}, ms", seconds and 1e3 * seconds, limit)
    for direction, limit, rate in (("forward", 0.99, 350), ("forward_backward", 4.60, 300)):
        for where in ("", IN_LAYERS):
            seconds, packed = (
                results.seconds("attention", direction, "long", tokens, column + where)
                for column in (CHOSEN, CUDNN_PACKED)
            )
            if not where:
                bar(f"attention long {direction}, implementation=None, ms", seconds and 1e3 * seconds, limit)
            share = seconds and packed and seconds / packed
            bar(f"attention long {direction}{where}, implementation=None / cuDNN packed", share, 1.0)
        row = results.rows.get(("attention", direction, "long", tokens))
        seconds = results.seconds("attention", direction, "long", tokens, *own)
        bar(
            f"attention long {direction}, Pallas, TFLOP/s",
            row["flops"] / seconds * 1e-12 if row and seconds else None,
            rate,
            at_least=True,
        )
    return found


def rate_of(row: dict[str, Any], seconds: float) -> tuple[float, str]:
    """Returns the rate and its unit: TFLOP/s for attention, GB/s for other operations."""
    return (row["flops"] / seconds * 1e-12, "TFLOP/s") if row.get("flops") else (row["bytes"] / seconds * 1e-9, "GB/s")


def label_of(row: dict[str, Any]) -> str:
    """Returns the label of a row: its direction, mix and tokens, without the operation."""
    return " ".join([row["direction"].replace("_", " + "), *filter(None, [row["mix"]]), f"{row['tokens']:,}"])


def print_tables(results: Results, found: list[dict[str, Any]], console: Console) -> None:
    """Prints one table per operation, then the bars."""
    for operation in OPERATIONS:
        rows = [row for row in results.rows.values() if row["operation"] == operation and "columns" in row]
        columns = [name for name in COLUMNS if any("median" in row["columns"].get(name, {}) for row in rows)]
        if not columns:
            continue
        unit = "TFLOP/s" if operation == "attention" else "GB/s"
        table = Table(title=f"{operation}: ms and {unit} (~: timed by the host's clock)")
        table.add_column("", no_wrap=True)
        for name in ["floor", *columns] if operation != "attention" else columns:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            cells = [] if operation == "attention" else [f"{1e3 * row['floor_seconds']:.3f}"]
            for name in columns:
                entry = row["columns"].get(name, {})
                if not right(entry):
                    cells.append("wrong" if "median" in entry else "-")
                    continue
                mark = "" if entry["method"] == "device" else "~"
                cells.append(f"{mark}{1e3 * entry['median']:.3f} {rate_of(row, entry['median'])[0]:,.0f}")
            table.add_row(label_of(row), *cells)
        console.print(table)
    table = Table(title="bars: values that our kernels must reach")
    for name in ("bar", "required", "measured", "result"):
        table.add_column(name, justify="right" if name == "measured" else "left")
    for one in found:
        value = "-" if one["value"] is None else f"{one['value']:.3f}"
        table.add_row(
            one["bar"], one["rule"], value, {None: "not measured", True: "pass", False: "FAIL"}[one["passed"]]
        )
    console.print(table)


def main() -> None:
    """Runs the opponents, then JAX, and writes tables and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--peers-site", type=Path, help="folder of the Python packages of Unsloth and Liger")
    parser.add_argument("--no-peers", action="store_true", help="measure only the JAX kernels")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="the other rows are kept")
    parser.add_argument("--tokens", type=int, nargs="+", default=KERNEL_TOKENS)
    parser.add_argument("--seconds", type=float, default=540, help="after this time nothing more is measured")
    parser.add_argument("--compile-threads", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="run tiny shapes on any machine: the times mean nothing")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds

    shape, tokens = KernelShape(), tuple(options.tokens)
    if options.smoke:
        shape = KernelShape(num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=128)
        tokens = (256,)
    lengths = {t: {mix: document_lengths(mix, t, options.lengths) for mix in MIXES} for t in tokens}
    date = datetime.date.today().isoformat()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {
        "benchmark": "kernels",
        "date": date,
        "device": "",
        "smoke": options.smoke,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "peers": {},
        "shape": asdict(shape),
        "documents": {f"{mix} {t}": len(lengths[t][mix]) for t in tokens for mix in MIXES},
        "bytes_per_second_of_floor": BYTES_PER_SECOND,
    }
    request = {"shape": asdict(shape), "tokens": tokens, "lengths": lengths, "only": list(options.only)}
    opponents: list[dict[str, Any]] = []
    for line in [] if options.no_peers else run_peers(options, {**request, "smoke": options.smoke}):
        if "column" in line:
            opponents.append(line)
        elif "versions" in line:
            header["versions"] |= line["versions"]
        else:
            header["peers"].setdefault(line["peer"], []).append({k: v for k, v in line.items() if k != "peer"})

    # Set before JAX starts: no CUDA graphs, since a profile may not show the kernels inside them.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the old name of the same option: jax refuses both
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    header["device"] = jax.devices()[0].device_kind
    where = "smoke" if options.smoke else header["device"].lower().removeprefix("nvidia ").replace(" ", "-")
    name = f"{date}_{where}_kernels"
    results = Results(options.output_dir / f"{name}.json", header, options.only, tokens)
    measured = partial(measure, main_tokens=tokens[0], threads=options.compile_threads, record=results.add)
    by_tokens: dict[int, list[Case]] = {}
    for t in tokens:
        cases = [*rope_cases(t, shape)]
        for operation in ACTIVATIONS:
            cases += gate_cases(operation, t, shape)
        for mix in MIXES:
            cases += attention_cases(t, mix, lengths[t][mix], shape)
        by_tokens[t] = [case for case in cases if case.operation in options.only]
        for case in by_tokens[t]:
            columns = [line for line in opponents if all(line[key] == getattr(case, key) for key in _KEY)]
            results.add(case.row | {"columns": {x["column"]: _without_key(x) for x in columns}})
        measured(by_tokens[t], slow=False, deadline=deadline)
    finished = all(measured(cases, slow=True, deadline=deadline) for cases in by_tokens.values())

    found = bars(results, tokens[0] if options.smoke else KERNEL_TOKENS[0])
    header["bars"] = found
    results.path.write_text(json.dumps({**header, "rows": list(results.rows.values())}, indent=1) + "\n")
    print_tables(results, found, Console(width=None if sys.stdout.isatty() else 240))
    print(json.dumps({"json": str(results.path), "bars": found}), flush=True)
    if not finished:
        os._exit(0)  # exits without waiting for programs that still compile


def _without_key(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in (*_KEY, "column")}


if __name__ == "__main__":
    main()
