"""Measures the device time of a call in the same way in JAX and in torch.

The time of a call is the sum over its kernels and copies by the device's own clock (CUPTI, through either framework's
profiler), without launches and the gaps between them. Calls rotate over sets of arguments, so that at least `SPAN`
bytes pass between two uses of a set and no set is found in the L2 cache. A check measures the time in another way: in
JAX the wall clock over a queue of calls, in torch events around each call with a flushed L2 cache. The check
includes launches that the device waits for, so for short calls it is larger.
"""

import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SPAN = 400_000_000  # bytes: eight times the L2 cache of an H200
MIN_SETS, MAX_SETS = 4, 16
MIN_CALLS = 16


class Times(NamedTuple):
    """Holds times of one call in seconds; `median` is from `method`: the "device" clock, or the "check" without it."""

    median: float
    low: float
    high: float
    check: float
    kernels: float
    method: str


def num_sets(bytes_per_call: int) -> int:
    """Returns the number of sets of arguments over which calls rotate."""
    return min(MAX_SETS, max(MIN_SETS, math.ceil(SPAN / bytes_per_call)))


def num_rounds(sets: int, consumed: bool) -> int:
    """Returns the number of passes over the sets: one if a call overwrites its arguments."""
    return 1 if consumed else math.ceil(MIN_CALLS / sets)


class Event(NamedTuple):
    """Holds one kernel, copy or fill on the device, with times in seconds."""

    start: float
    seconds: float
    name: str


def from_events(events: Sequence[Event], calls: int, check: float) -> Times:
    """Computes the time of one call from everything that ran on the device during `calls` equal calls in sequence."""
    durations = [event.seconds for event in sorted(events)]
    each, rest = divmod(len(durations), calls)
    if not rest and each:
        per_call = [sum(durations[i : i + each]) for i in range(0, len(durations), each)]
        return Times(statistics.median(per_call), min(per_call), max(per_call), check, each, "device")
    # Something else ran once, or the profiler lost an event: count by name what belongs to one call.
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event.seconds)
    counts = {name: round(len(durations) / calls) for name, durations in by_name.items()}
    if not any(counts.values()):
        return Times(check, check, check, check, 0, "check")
    mean = sum(counts[name] * statistics.median(durations) for name, durations in by_name.items())
    return Times(mean, mean, mean, check, sum(counts.values()), "device")


@functools.cache
def _start_profiler(profile: Callable) -> None:
    """The first profile of a process may be short of its first kernels."""
    profile(lambda: None)


# JAX.


def time_jax(
    call: Callable,
    make_sets: Callable[[], list[tuple]],
    *,
    consumed: bool,
    unrolled: tuple[Callable, int] | None = None,
) -> Times:
    """Times a compiled `call(*arguments)`; each result is an output of its program, so XLA can drop none.

    Args:
      make_sets: makes new sets of arguments.
      consumed: whether a call overwrites its arguments, so that every set serves once.
      unrolled: one program of several calls over `(arguments, ...)`, and their number; the check then runs it.
    """
    import jax

    sets = jax.block_until_ready(make_sets())
    rounds = num_rounds(len(sets), consumed)
    calls = rounds * len(sets)

    def run() -> None:
        result = None
        for _ in range(rounds):
            for arguments in sets:
                result = call(*arguments)
        jax.block_until_ready(result)

    if not consumed:
        run()
    on_device = jax.default_backend() == "gpu"
    events = []
    if on_device:
        _start_profiler(jax_kernel_events)
        events = jax_kernel_events(run)

    if unrolled is not None:
        program, size = unrolled
        groups = [[sets[(i + j) % len(sets)] for j in range(size)] for i in range(0, len(sets), size)]
        jax.block_until_ready([program(group) for group in groups])
    checks = []
    for _ in range(1 if consumed else 5):
        if consumed and on_device:
            sets = jax.block_until_ready(make_sets())
        start = time.perf_counter()
        if unrolled is None:
            run()
        else:
            for _ in range(rounds):
                results = [program(group) for group in groups]
            jax.block_until_ready(results)
        seconds = time.perf_counter() - start
        checks.append(seconds / (calls if unrolled is None else rounds * len(groups) * size))
    return from_events(events, calls, statistics.median(checks))


def jax_kernel_events(run: Callable[[], object]) -> list[Event]:
    """Returns all device events during `run()`, which must wait for them; empty if there is no profile."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                run()
            (path,) = Path(folder).rglob("*.xplane.pb")
            return device_events(jax.profiler.ProfileData.from_file(str(path)))
    except Exception as error:  # the check is left
        print(f"the profiler gave no kernel times: {error!r}", flush=True)
        return []


def device_events(profile: Any) -> list[Event]:
    """Returns every kernel, copy and fill in a `jax.profiler.ProfileData`."""
    events = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        lines = list(plane.lines)
        # One line per stream; other lines ("XLA Ops", "XLA Modules", ...) repeat the same events by name.
        streams = [line for line in lines if line.name.startswith("Stream")] or [
            line for line in lines if not line.name.startswith(("XLA", "Framework", "TensorFlow", "Steps", "Source"))
        ]
        for line in streams:
            events += [Event(e.start_ns * 1e-9, e.duration_ns * 1e-9, e.name) for e in line.events]
    return events


# Torch.


def time_torch(call: Callable, make_sets: Callable[[], list[tuple]], *, consumed: bool) -> Times:
    """Times a torch function as `time_jax` does; makes new tensors before each pass if a call overwrites them."""
    import torch

    on_device = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if on_device else lambda: None
    call(*make_sets()[0])  # compiles
    sets = make_sets()
    rounds = num_rounds(len(sets), consumed)
    calls = rounds * len(sets)
    synchronize()

    def run() -> None:
        for _ in range(rounds):
            for arguments in sets:
                call(*arguments)
        synchronize()

    if not consumed:
        run()
    events = []
    if on_device:
        _start_profiler(_torch_events)
        events = _torch_events(run)
    if consumed:
        sets = make_sets()
    return from_events(events, calls, _flushed(call, sets) if on_device else _wall(run) / calls)


def _torch_events(run: Callable[[], object]) -> list[Event]:
    import torch
    from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
        events: Any = profile.events()
        return [
            Event(event.time_range.start * 1e-6, event.time_range.elapsed_us() * 1e-6, event.name)
            for event in events
            if event.device_type == DeviceType.CUDA
        ]
    except Exception as error:  # the check is left
        print(f"the profiler gave no kernel times: {error!r}", flush=True)
        return []


def _flushed(call: Callable, sets: list[tuple]) -> float:
    """Returns the median over the sets by events, with the L2 cache overwritten before each call (as in `do_bench`)."""
    import torch

    cache = torch.empty(SPAN // 4, dtype=torch.int32, device="cuda")
    pairs = []
    for arguments in sets:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        call(*arguments)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e-3 for start, end in pairs)


def _wall(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
