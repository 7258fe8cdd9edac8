"""Saves and resumes a run: orbax writes checkpoints while the run goes on; a checkpoint's folder is whole or absent.

`checkpoints/<step>` holds the arrays of the state (trained weights, optimizer state, step) with the losses so far and,
in `run`, a description of the run (`identity_of`, `notes_of`). The order of the data and dropout follow from the seed
and the step alone (`data.batching`, `train.step`), so a checkpoint needs no other random state.
"""

import contextlib
import dataclasses
import datetime
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
from jaxpack.parallel.device import current_device, on_host
from jaxpack.settings import TrainConfig
from jaxpack.train.step import TrainState
from jaxpack.utils.console import console

FOLDER = "checkpoints"
LATEST = "latest"

_STATE, _RUN, _LOSSES = "state", "run", "losses"  # two parts of a checkpoint, and an array in the first part
_UNFINISHED, _DELETED = ".orbax-checkpoint-tmp", ".deleted"  # Folders with these endings are not checkpoints.
_SPARE = 2**20  # Bytes that a checkpoint may take in addition to its arrays.
# Settings that may differ between a run and its continuation. The last two change only how a step is rounded.
_FREE = {
    *("output_dir", "logging_steps", "report_to", "eval_steps", "save_steps", "save_total_limit"),
    *("resume_from_checkpoint", "compilation_cache_dir", "memory_limit", "remat", "implementation"),
    *("allow_lost_thoughts", "chat_template_date"),  # they change nothing but the data, which has a checksum
}


@dataclasses.dataclass
class Progress:
    """Holds the results of a run so far: the loss of each step, and the evaluation losses by step."""

    losses: list[float] = dataclasses.field(default_factory=list)
    evaluations: dict[int, float] = dataclasses.field(default_factory=dict)


# --- Identity of a run ------------------------------------------------------------------------------------------------


def identity_of(
    model: Transformer, config: TrainConfig, state: TrainState, frozen: nnx.State, **datasets: Documents | None
) -> dict[str, Any]:
    """Returns everything that must be equal for one run to continue another, under names that a user knows.

    Model, adapters, settings and the shapes and dtypes of arrays are listed as they are; data and frozen weights are
    represented by checksums.
    """
    settings = {name: value for name, value in vars(config).items() if name not in _FREE}
    lora = {} if model.lora_config is None else dataclasses.asdict(model.lora_config)
    if lora:  # Resolved and sorted, because a user can write the same adapters in several ways.
        lora["target_modules"] = sorted(adapters(model))
        lora |= {name: sorted(lora[name]) for name in ("rank_pattern", "alpha_pattern", "modules_to_save")}
    structure = dataclasses.asdict(model.config)
    del structure["name_or_path"]  # a folder that was moved holds the same model
    weights = arrays_by_name(frozen)
    of_jax: Any = jax.config  # JAX declares no types for its settings
    identity = (
        structure
        | settings
        | {f"adapters' {name}": value for name, value in lora.items()}
        | {name: None if documents is None else _describe(documents) for name, documents in datasets.items()}
        | {f"array {name}": f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays_by_name(state).items()}
        | {
            f"frozen {name}": f"{leaf.dtype}{list(leaf.shape)} {checksum:08x}"
            for (name, leaf), checksum in zip(weights.items(), checksums(list(weights.values())).tolist(), strict=True)
        }
        | {"jax_default_prng_impl": str(of_jax.jax_default_prng_impl)}
        | {"jax_threefry_partitionable": of_jax.jax_threefry_partitionable}
    )
    return json.loads(json.dumps(identity))  # as a checkpoint stores it: JSON turns tuples into lists


def _describe(documents: Documents) -> str:
    digest = hashlib.sha256()
    for array in (documents.tokens, documents.labels, documents.starts, documents.lengths):
        digest.update(np.ascontiguousarray(array))
    return f"{len(documents):,} documents of {documents.num_tokens:,} tokens, {digest.hexdigest()[:16]}"


def checksums(arrays: list[Array]) -> UInt32[np.ndarray, " arrays"]:
    """Returns a checksum of each array, from its bits and their positions.

    The device computes them in one pass; every device gives the same numbers.
    """
    return np.asarray(_checksums(arrays)) if arrays else np.zeros(0, np.uint32)


@jax.jit
def _checksums(arrays: list[Array]) -> Array:
    def checksum(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        while bits.ndim:  # Axis by axis: an index over all elements may need more than 32 bits.
            weights = jax.lax.iota(jnp.uint32, bits.shape[-1]) * jnp.uint32(2) + jnp.uint32(1)
            bits = (bits * jnp.broadcast_to(weights, bits.shape)).sum(axis=-1, dtype=jnp.uint32)
            bits = (bits ^ (bits >> 15)) * jnp.uint32(0x9E3779B1)
        return bits

    return jnp.stack([checksum(x) for x in arrays])


def arrays_by_name(tree: Any) -> dict[str, Array]:
    """Returns the arrays of a pytree by their paths, such as `trainable.blocks.mlp.down.lora_a`."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [next(getattr(key, kind) for kind in ("key", "name", "idx") if hasattr(key, kind)) for key in path]
        named[".".join(str(key) for key in keys if key != "value")] = leaf
    assert len(named) == len(jax.tree.leaves(tree)), "two arrays have the same name"
    return named


# --- Writing ----------------------------------------------------------------------------------------------------------


class Checkpoints:
    """Keeps a run's checkpoints in `output_dir/checkpoints`: the last few, and the one with the lowest eval loss.

    A save only waits until the arrays are on the host. A thread then writes them to a folder that gets its final name
    once it is whole. After that, checkpoints that are no longer kept are renamed and deleted. A save that fails (a full
    disk) prints a message and does not end the run; the earlier checkpoints stay.

    Args:
      output_dir: the folder of the run.
      keep: how many of the last checkpoints are kept.
      identity: the facts that must be the same in a run that resumes from a checkpoint, see `identity_of`.
      notes: the facts that may differ in such a run; a message then names them, see `notes_of`.
      date: the date that the run gives its chat template; a resumed run keeps it.
      on_saved: is called, in the writing thread, with the step and the folder of each finished checkpoint.
    """

    def __init__(
        self,
        output_dir: str,
        keep: int,
        identity: dict[str, Any],
        notes: dict[str, str],
        date: datetime.date,
        on_saved: Callable[[int, Path], None] = lambda step, path: None,
    ):
        self.folder = Path(output_dir) / FOLDER
        self._on_saved = on_saved
        self._keep, self._about = keep, {"identity": identity, "notes": notes, "date": date.isoformat()}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jaxpack-checkpoint")
        self._writing: Future[bool] | None = None
        for pattern in (f"*{_UNFINISHED}", f"*{_DELETED}"):
            for leftover in self.folder.glob(pattern):  # from a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Waits for the previous save, and starts to save the state after `step` steps.

        When the method returns, the arrays are on the host, so the state may be donated.
        """
        self.wait()
        arrays = {
            name: leaf if isinstance(leaf, np.ndarray) else on_host(leaf)
            for name, leaf in arrays_by_name(state).items()
        }
        arrays[_LOSSES] = np.array(progress.losses, np.float64)
        evaluations = dict(progress.evaluations)
        self._writing = self._writer.submit(self._write, step, arrays, evaluations)

    def wait(self) -> bool:
        """Waits until nothing is being written, and returns whether the last save, if any, is on the disk."""
        return self._writing is None or self._writing.result()

    def newest(self) -> Path | None:
        """Waits for the save that is being written, and returns the checkpoint of the last step, or None."""
        self.wait()
        steps = steps_in(self.folder)
        return self.folder / str(steps[-1]) if steps else None

    def close(self) -> None:
        """Waits for the save that is being written, and ends the thread."""
        self._writer.shutdown()

    def _write(self, step: int, arrays: dict[str, np.ndarray], evaluations: dict[int, float]) -> bool:
        if (fault := _fault(arrays)) is not None:  # Saving it would delete earlier, sound checkpoints.
            console.print(f"step {step} is not saved: {fault}, and no run can continue from that", style="yellow")
            return False
        path = self.folder / str(step)
        about = self._about | {"step": step, "evaluations": {str(at): loss for at, loss in evaluations.items()}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            needed = sum(array.nbytes for array in arrays.values()) + _SPARE
            if shutil.disk_usage(self.folder).free < needed:  # orbax would print pages of errors
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _write(path, arrays, about)
        except Exception as error:  # The libraries under orbax raise errors of any type.
            shutil.rmtree(path.with_name(path.name + _UNFINISHED), ignore_errors=True)
            console.print(f"step {step} could not be saved in {path}: {_reason(error)}; the run goes on", style="red")
            return False
        console.print(f"saved the checkpoint {path}")
        self._on_saved(step, path)
        try:
            self._delete_all_but(self._kept(evaluations))
        except OSError as error:
            console.print(f"an older checkpoint could not be deleted: {reason(error)}", style="yellow")
        return True

    def _kept(self, evaluations: dict[int, float]) -> set[int]:
        steps = steps_in(self.folder)
        evaluated = [step for step in steps if not math.isnan(evaluations.get(step, math.nan))]
        return {*steps[-self._keep :], *sorted(evaluated, key=evaluations.__getitem__)[:1]}

    def _delete_all_but(self, kept: set[int]) -> None:
        for step in set(steps_in(self.folder)) - kept:
            # Renamed first: a half-deleted checkpoint must never look like a whole one.
            shutil.rmtree((self.folder / str(step)).rename(self.folder / f"{step}{_DELETED}"))


def steps_in(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _fault(arrays: dict[str, np.ndarray]) -> str | None:
    """Returns the reason why no run could resume from these arrays, or None.

    Checks the last loss and the weights: a loss is computed before its step's update, so it can be finite while the
    updated weights are not.
    """
    if not math.isfinite(loss := arrays[_LOSSES][-1]):
        return f"its loss is {loss}"
    state = [array for name, array in arrays.items() if name != _LOSSES]
    floats = [array for array in state if array.size and jnp.issubdtype(array.dtype, jnp.floating)]
    ends = [float(end) for array in floats for end in (array.min(), array.max())]
    return None if all(map(math.isfinite, ends)) else "its weights are not finite"


def _write(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp  # Here, because the import takes half a second.

    parts = {_STATE: ocp.args.StandardSave(arrays), _RUN: ocp.args.JsonSave(about)}
    with _quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler(*parts)) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.Composite(**parts))


# --- Reading ----------------------------------------------------------------------------------------------------------


def find_checkpoint(config: TrainConfig) -> Path | None:
    """Returns the checkpoint that a run resumes from, or None for a fresh start.

    Raises:
      InputError: `output_dir` holds a run that this one does not continue, or there is no checkpoint to resume from.
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
            "`resume_from_checkpoint` must be the folder of a checkpoint, a folder of checkpoints, the folder of a run,"
            f" or 'latest', got {choice!r}."
        )
    if newest is not None and (path is None or path.resolve() != newest.resolve()):
        raise InputError(
            f"`output_dir` must not hold {FOLDER}/, unless `resume_from_checkpoint` is the newest checkpoint there or"
            f" 'latest', got {config.output_dir!r}, which holds {newest}. Continue that run, or choose another folder."
        )
    return path


def _read_part(path: Path, name: str, args: Any) -> Any:
    import orbax.checkpoint as ocp

    try:
        with _quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler(name)) as checkpointer:
            return checkpointer.restore(path.absolute(), args=ocp.args.Composite(**{name: args}))[name]
    except Exception as error:  # The libraries under orbax raise errors of any type.
        raise InputError(
            f"`resume_from_checkpoint` must be a complete checkpoint, got {str(path)!r}, which cannot be read:"
            f" {_reason(error)}."
        ) from error


def date_of_run(path: Path) -> datetime.date | None:
    """Returns the date that the run of a checkpoint gave its chat template; None for checkpoints of older versions.

    Raises:
      InputError: the checkpoint is not readable.
    """
    import orbax.checkpoint as ocp

    about = _read_part(path, _RUN, ocp.args.JsonRestore())
    found = about.get("date") if isinstance(about, dict) else None
    try:
        return None if found is None else datetime.date.fromisoformat(found)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`resume_from_checkpoint` must be a checkpoint that jaxpack wrote, got {str(path)!r} with the date"
            f" {found!r:.80}."
        ) from error


def load_checkpoint(
    path: Path, state: TrainState, identity: dict[str, Any], notes: dict[str, str]
) -> tuple[TrainState, Progress]:
    """Reads a checkpoint in place of `state`, whose arrays are deleted one by one as the new ones arrive.

    Raises:
      InputError: the checkpoint is of another run, damaged, or not readable; `state` is then unchanged.
    """
    import orbax.checkpoint as ocp

    about = _read_part(path, _RUN, ocp.args.JsonRestore())
    if missing := {"identity", "notes", "step", "evaluations"} - set(about):
        raise InputError(
            f"`resume_from_checkpoint` must be a checkpoint that jaxpack wrote, got {str(path)!r} without"
            f" {sorted(missing)}."
        )
    _require_same(path, about["identity"], identity)
    named = arrays_by_name(state)
    wanted = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in named.items()}
    found = _read_part(path, _STATE, ocp.args.StandardRestore(wanted | {_LOSSES: np.zeros(about["step"])}))
    changed = [f"{name} {there}, not {notes[name]}" for name, there in about["notes"].items() if there != notes[name]]
    if changed:
        console.print(
            f"the checkpoint was written with {'; '.join(changed)}: losses may differ by rounding", style="yellow"
        )
    leaves = []
    for name, leaf in named.items():
        # An uncommitted array stays uncommitted, so that the same program is compiled.
        device = leaf.sharding if leaf.committed else None
        leaf.delete()  # Deleted first: a device may have no room for both.
        leaves.append(jax.device_put(found.pop(name), device))
    evaluations = {int(step): loss for step, loss in about["evaluations"].items()}
    return jax.tree.unflatten(jax.tree.structure(state), leaves), Progress(found[_LOSSES].tolist(), evaluations)


def notes_of(remat: str, implementation: str | None) -> dict[str, str]:
    """Returns the facts that may change the rounding of a run but not its meaning: remat, kernels, device, versions."""
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    device = {"device": current_device().device_kind}
    return {"remat": remat, "implementation": str(implementation)} | device | versions


def _require_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [name for name in here | there if there.get(name) != here.get(name)]
    if not differ:
        return
    # If sizes or settings differ, arrays differ too, so arrays are named only if nothing else differs.
    told = [name for name in differ if not name.startswith(("array ", "frozen "))] or differ
    what = ", ".join(f"`{name}` {there.get(name)!r} (here {here.get(name)!r})" for name in told[:4])
    more = f" and {len(told) - 4} more" if len(told) > 4 else ""
    raise InputError(
        f"`resume_from_checkpoint` must be a checkpoint of the same run, got {str(path)!r} with {what}{more}. Use the"
        " model, data and settings of that run, or start a new run."
    )


def _reason(error: BaseException) -> str:
    """Returns the cause of an orbax error: the operating system's reason if there is one, or the first 200 characters.

    The whole text may fill pages.
    """
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return reason(error)[:200] if code is None else os.strerror(int(code[1]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences orbax's log of errors that it also raises, and its tasks' complaints about a closed event loop."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    disabled, logger.disabled = logger.disabled, True
    sys.unraisablehook = filtered
    try:
        yield
    except Exception:
        time.sleep(0.5)  # Lets the other tasks fail before the old hook is restored.
        raise
    finally:
        sys.unraisablehook = hook
        logger.disabled = disabled
