"""Save and resume: a run's state in folders that are whole or not there, written by orbax while the run goes on.

`checkpoints/<step>` holds the arrays of the state (trained weights, the optimizer's, the step) with the losses so far,
and in `run` what the run was made of. The order of the data and dropout follow from the seed and the step alone
(`batching`, `training`), so this is all of the random state.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt32

from jaxpack.data.documents import Documents
from jaxpack.errors import InputError, reason
from jaxpack.model.lora import adapters
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import current_device, platform_of
from jaxpack.settings import TrainConfig
from jaxpack.train.step import TrainState
from jaxpack.utils.console import console

FOLDER = "checkpoints"
LATEST = "latest"

_STATE, _RUN, _LOSSES = "state", "run", "losses"  # parts of a checkpoint, and an array of the first
_UNFINISHED, _DELETED = ".orbax-checkpoint-tmp", ".deleted"  # how folders end that are no checkpoints
_SPARE = 2**20  # bytes, beyond those of the arrays
# What may differ between a run and the one that goes on with it. The last two change how a step is rounded, no more.
_FREE = {
    *("output_dir", "logging_steps", "report_to", "eval_steps", "save_steps", "save_total_limit"),
    *("resume_from_checkpoint", "compilation_cache_dir", "memory_limit", "remat", "implementation"),
}


@dataclasses.dataclass
class Progress:
    """What a run has measured so far: the loss of each step, and, by step, those of evaluations."""

    losses: list[float] = dataclasses.field(default_factory=list)
    evaluations: dict[int, float] = dataclasses.field(default_factory=dict)


# --- What a checkpoint is of ------------------------------------------------------------------------------------------


def identity_of(
    model: Transformer, config: TrainConfig, state: TrainState, frozen: nnx.State, **datasets: Documents | None
) -> dict[str, Any]:
    """What must be the same for a run to go on where another stopped, by the name that a user knows it by.

    Model, adapters, settings and arrays as they are; data and frozen weights by their checksums.
    """
    settings = {name: value for name, value in vars(config).items() if name not in _FREE}
    lora = {} if model.lora_config is None else dataclasses.asdict(model.lora_config)
    if lora:  # whatever way it was written
        lora["target_modules"] = sorted(adapters(model))
        lora |= {name: sorted(lora[name]) for name in ("rank_pattern", "alpha_pattern", "modules_to_save")}
    structure = dataclasses.asdict(model.config)
    del structure["name_or_path"]  # a folder that was moved holds the same model
    weights = _named(frozen)
    identity = (
        structure
        | settings
        | {f"adapters' {name}": value for name, value in lora.items()}
        | {name: None if documents is None else _describe(documents) for name, documents in datasets.items()}
        | {f"array {name}": f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(state).items()}
        | {
            f"frozen {name}": f"{leaf.dtype}{list(leaf.shape)} {checksum:08x}"
            for (name, leaf), checksum in zip(weights.items(), checksums(list(weights.values())).tolist(), strict=True)
        }
        | {"jax_default_prng_impl": str(jax.config.jax_default_prng_impl)}
        | {"jax_threefry_partitionable": jax.config.jax_threefry_partitionable}
    )
    return json.loads(json.dumps(identity))  # as a checkpoint has it: tuples are lists


def _describe(documents: Documents) -> str:
    digest = hashlib.sha256()
    for array in (documents.tokens, documents.labels, documents.starts, documents.lengths):
        digest.update(np.ascontiguousarray(array))
    return f"{len(documents):,} documents of {documents.num_tokens:,} tokens, {digest.hexdigest()[:16]}"


def checksums(arrays: list[Array]) -> UInt32[np.ndarray, " arrays"]:
    """Of each array, from its bits and where they are: on the device, in one pass, the same on every device."""
    return np.asarray(_checksums(arrays)) if arrays else np.zeros(0, np.uint32)


@jax.jit
def _checksums(arrays: list[Array]) -> Array:
    def checksum(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        while bits.ndim:  # axis by axis, for an index of all elements may need more than 32 bits
            weights = jax.lax.iota(jnp.uint32, bits.shape[-1]) * jnp.uint32(2) + jnp.uint32(1)
            bits = (bits * jnp.broadcast_to(weights, bits.shape)).sum(axis=-1, dtype=jnp.uint32)
            bits = (bits ^ (bits >> 15)) * jnp.uint32(0x9E3779B1)
        return bits

    return jnp.stack([checksum(x) for x in arrays])


def _named(tree: Any) -> dict[str, Array]:
    """The arrays of a pytree by their paths, such as `trainable.blocks.mlp.down.lora_a`."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [next(getattr(key, kind) for kind in ("key", "name", "idx") if hasattr(key, kind)) for key in path]
        named[".".join(str(key) for key in keys if key != "value")] = leaf
    assert len(named) == len(jax.tree.leaves(tree)), "two arrays of one name"
    return named


# --- Writing ----------------------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of a run, in `output_dir/checkpoints`: the last few, and that of the lowest eval loss.

    A save waits for the arrays to reach the host and no longer: a thread writes them, to a folder that gets its name
    when it is whole. Then those that are not kept any more lose theirs, and are deleted. What cannot be saved (a full
    disk) is told and does not end the run; the checkpoints before it stay.

    Args:
      identity, notes: of the run; the latter may differ in one that goes on with it, which is told.
      on_saved: is called, in the thread that writes, with the step and the folder of each checkpoint that is whole.
    """

    def __init__(
        self,
        output_dir: str,
        keep: int,
        identity: dict[str, Any],
        notes: dict[str, str],
        on_saved: Callable[[int, Path], None] = lambda step, path: None,
    ):
        self.folder = Path(output_dir) / FOLDER
        self._on_saved = on_saved
        self._keep, self._about = keep, {"identity": identity, "notes": notes}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jaxpack-checkpoint")
        self._writing: Future[bool] | None = None
        for pattern in (f"*{_UNFINISHED}", f"*{_DELETED}"):
            for leftover in self.folder.glob(pattern):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Saves the state after `step` steps, which may be donated from then on. Waits for the save before it."""
        self.wait()
        arrays = {name: _on_host(leaf) for name, leaf in _named(state).items()}
        arrays[_LOSSES] = np.array(progress.losses, np.float64)
        evaluations = dict(progress.evaluations)
        self._writing = self._writer.submit(self._write, step, arrays, evaluations)

    def wait(self) -> bool:
        """Waits until nothing is being written; whether the last save, if there was one, is on the disk."""
        return self._writing is None or self._writing.result()

    def close(self) -> None:
        """Waits for what is being written, and ends the thread."""
        self._writer.shutdown()

    def _write(self, step: int, arrays: dict[str, np.ndarray], evaluations: dict[int, float]) -> bool:
        if (fault := _fault(arrays)) is not None:  # those before, which have none, would make way for it
            console.print(f"step {step} is not saved: {fault}", style="yellow")
            return False
        path = self.folder / str(step)
        about = self._about | {"step": step, "evaluations": {str(at): loss for at, loss in evaluations.items()}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            needed = sum(array.nbytes for array in arrays.values()) + _SPARE
            if shutil.disk_usage(self.folder).free < needed:  # orbax, out of room, prints pages
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _write(path, arrays, about)
        except Exception as error:  # of what orbax writes with, which raises what it likes
            shutil.rmtree(path.with_name(path.name + _UNFINISHED), ignore_errors=True)
            console.print(f"step {step} could not be saved in {path}: {_reason(error)}; the run goes on", style="red")
            return False
        console.print(f"saved {path}")
        self._on_saved(step, path)
        try:
            self._delete_all_but(self._kept(evaluations))
        except OSError as error:
            console.print(f"older checkpoints could not be deleted: {reason(error)}", style="yellow")
        return True

    def _kept(self, evaluations: dict[int, float]) -> set[int]:
        steps = steps_in(self.folder)
        evaluated = [step for step in steps if not math.isnan(evaluations.get(step, math.nan))]
        return {*steps[-self._keep :], *sorted(evaluated, key=evaluations.__getitem__)[:1]}

    def _delete_all_but(self, kept: set[int]) -> None:
        for step in set(steps_in(self.folder)) - kept:
            # First it loses its name: half of a checkpoint must never look like one.
            shutil.rmtree((self.folder / str(step)).rename(self.folder / f"{step}{_DELETED}"))


def steps_in(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _fault(arrays: dict[str, np.ndarray]) -> str | None:
    """What a run cannot go on from. A loss is that of the weights before its step: the step's own may be none still."""
    if not math.isfinite(loss := arrays[_LOSSES][-1]):
        return f"its loss is {loss}"
    state = [array for name, array in arrays.items() if name != _LOSSES]
    floats = [array for array in state if array.size and jnp.issubdtype(array.dtype, jnp.floating)]
    ends = [float(end) for array in floats for end in (array.min(), array.max())]
    return None if all(map(math.isfinite, ends)) else "its weights are not finite"


def _on_host(leaf: Array) -> np.ndarray:
    # A CPU's array would come as a view of memory that the next step is given to write to.
    return np.array(leaf) if platform_of(leaf) == "cpu" else np.asarray(leaf)


def _write(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp  # here, for it takes half a second

    parts = {_STATE: ocp.args.StandardSave(arrays), _RUN: ocp.args.JsonSave(about)}
    with _quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler(*parts)) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.Composite(**parts))


# --- Reading ----------------------------------------------------------------------------------------------------------


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that a run is to go on from, or None: a fresh start.

    Raises:
      InputError: `output_dir` holds a run that this one does not go on with, or there is no such checkpoint.
    """
    own = None if config.output_dir is None else Path(config.output_dir) / FOLDER
    newest = None if own is None or not (steps := steps_in(own)) else own / str(steps[-1])
    choice = config.resume_from_checkpoint
    if choice == LATEST:
        return newest
    path = None if choice is None else Path(choice)
    for folder in (path / FOLDER, path) if path is not None else ():
        if steps := steps_in(folder):
            path = folder / str(steps[-1])
            break
    if path is not None and not (path / _RUN).is_dir():
        raise InputError(
            f"`resume_from_checkpoint` must be the folder of a checkpoint, of several, or of a run, or 'latest', got"
            f" {choice!r}."
        )
    if newest is not None and (path is None or path.resolve() != newest.resolve()):
        raise InputError(
            f"`output_dir` must be without {FOLDER}/, unless `resume_from_checkpoint` is the newest of them or "
            f"'latest', got {config.output_dir!r} with {newest}."
        )
    return path


def load_checkpoint(
    path: Path, state: TrainState, identity: dict[str, Any], notes: dict[str, str]
) -> tuple[TrainState, Progress]:
    """Reads a checkpoint into the place of `state`, whose arrays are deleted one by one as the new ones come.

    Raises:
      InputError: it is of another run, damaged, or not readable; `state` is then as it was.
    """
    import orbax.checkpoint as ocp

    def part(name: str, args: Any) -> Any:
        try:
            with _quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler(name)) as checkpointer:
                return checkpointer.restore(path.absolute(), args=ocp.args.Composite(**{name: args}))[name]
        except Exception as error:  # of what orbax reads with, which raises what it likes
            raise InputError(
                f"`resume_from_checkpoint` must be a whole checkpoint, got {str(path)!r}: {_reason(error)}."
            ) from error

    about = part(_RUN, ocp.args.JsonRestore())
    if missing := {"identity", "notes", "step", "evaluations"} - set(about):
        raise InputError(
            f"`resume_from_checkpoint` must be a checkpoint of jaxpack, got {str(path)!r} without {sorted(missing)}."
        )
    _require_same(path, about["identity"], identity)
    named = _named(state)
    wanted = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in named.items()}
    found = part(_STATE, ocp.args.StandardRestore(wanted | {_LOSSES: np.zeros(about["step"])}))
    changed = [f"{name} {there}, not {notes[name]}" for name, there in about["notes"].items() if there != notes[name]]
    if changed:
        console.print(f"the checkpoint is from {'; '.join(changed)}: losses may differ by rounding", style="yellow")
    leaves = []
    for name, leaf in named.items():
        device = leaf.sharding if leaf.committed else None  # the same program is compiled for it
        leaf.delete()  # first, for a device may have no room for both
        leaves.append(jax.device_put(found.pop(name), device))
    evaluations = {int(step): loss for step, loss in about["evaluations"].items()}
    return jax.tree.unflatten(jax.tree.structure(state), leaves), Progress(found[_LOSSES].tolist(), evaluations)


def notes_of(remat: str, implementation: str | None) -> dict[str, str]:
    """What may round differently in the same run elsewhere."""
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    device = {"device": current_device().device_kind}
    return {"remat": remat, "implementation": str(implementation)} | device | versions


def _require_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [name for name in here | there if there.get(name) != here.get(name)]
    if not differ:
        return
    # Where sizes or settings differ, arrays do too: they are told where nothing else is.
    told = [name for name in differ if not name.startswith(("array ", "frozen "))] or differ
    what = ", ".join(f"`{name}` {there.get(name)!r} (here {here.get(name)!r})" for name in told[:4])
    more = f" and {len(told) - 4} more" if len(told) > 4 else ""
    raise InputError(f"`resume_from_checkpoint` must be of the same run, got {str(path)!r} with {what}{more}.")


def _reason(error: BaseException) -> str:
    """What orbax says is wrong: of the pages that it may say it in, the operating system's part, or the beginning."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return reason(error)[:200] if code is None else os.strerror(int(code[1]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what orbax logs of an error that it raises, too, and that its other tasks then find no event loop."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    disabled, logger.disabled = logger.disabled, True
    sys.unraisablehook = filtered
    try:
        yield
    except Exception:
        time.sleep(0.5)  # until they have
        raise
    finally:
        sys.unraisablehook = hook
        logger.disabled = disabled
