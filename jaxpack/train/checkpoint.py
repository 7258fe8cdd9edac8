"""Saves and resumes a run: orbax writes checkpoints while the run goes on; a checkpoint's folder is whole or absent.

`checkpoints/<step>` holds the arrays of the state (trained weights, optimizer state, step) with the losses so far; in
`run`, a description of the run (`record.Record`); and a checksum of each file (`utils.checksums`), which is checked
before the run resumes. The order of the data and dropout follow from the seed and the step alone (`data.batching`,
`train.step`), so a checkpoint needs no other random state.
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt32

from jaxpack.data.documents import Documents
from jaxpack.errors import InputError, reason
from jaxpack.kernels.host_weight import HostMatrix, HostWeight
from jaxpack.model.config import ModelConfig
from jaxpack.model.lora import layers_of_adapters
from jaxpack.model.nf4 import holds_4bit
from jaxpack.model.targets import names_for
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import current_device, on_host
from jaxpack.parallel.placement import put
from jaxpack.parallel.processes import is_first_process
from jaxpack.settings import TrainConfig
from jaxpack.train.record import ARRAY, Record, describe_array, read_record, shown
from jaxpack.train.step import TrainState
from jaxpack.utils.checksums import CHECKSUMS, DamagedError, check_folder, sync_folder, write_checksums
from jaxpack.utils.console import console

Read = TypeVar("Read")

FOLDER = "checkpoints"
LATEST = "latest"
ADAPTERS = "adapters' "  # how the names of adapters' settings begin in the identity of a run

_STATE, _RUN, _LOSSES = "state", "run", "losses"  # two parts of a checkpoint, and an array in the first part
_STREAM = "stream."  # how the names of the arrays of a place in a stream begin, in the first part
# Folders with these endings are not checkpoints. Orbax appends the second one to the first while it writes.
_UNFINISHED, _ORBAX_UNFINISHED, _DELETED = ".unfinished", ".orbax-checkpoint-tmp", ".deleted"
_DAMAGED = ".damaged"  # the ending of a checkpoint that was not resumed from, kept for its user
_SPARE = 2**20  # Bytes that a checkpoint may take in addition to its arrays.
_SLICE_BYTES = 64 * 2**20  # of an array in the host's memory that go to the device at a time, for its checksum
_PART = 2**20  # Values that are looked at together: their bits stay in the cache of a processor.
# Settings that may differ between a run and its continuation. `remat`, `implementation` and
# `offload_embedding` change only how a step is rounded, and on a GPU `offload_weights` changes nothing.
_FREE = {
    *("output_dir", "logging_steps", "report_to", "eval_steps", "save_steps", "save_total_limit"),
    *("eval_on_start", "load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold"),
    *("resume_from_checkpoint", "compilation_cache_dir", "memory_limit", "remat", "implementation"),
    *("offload_weights", "offload_embedding", "mesh"),
    # They change only the data, which has a checksum.
    *("allow_lost_thoughts", "chat_template", "chat_template_date", "eval_split"),
}
# Their product is the number of rows, or of documents, in a step, which must stay; each of them may change.
_STEP_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
_STEP_SIZE = "per_device_train_batch_size x devices x gradient_accumulation_steps"
# Settings and facts of a model that checkpoints of older versions may lack, with the values that these had.
_BEFORE = {"optim": "adamw", "optim_args": [], "lr_scheduler_kwargs": [], "loraplus_lr_ratio": None, "streaming": False}
_BEFORE |= {"completion_only_loss": True, "instruction_part": None, "response_part": None}
_BEFORE |= {"router_aux_loss_coef": 0.0, "label_smoothing_factor": 0.0, "z_loss_coef": 0.0}
_BEFORE |= {"neftune_noise_alpha": None, f"{ADAPTERS}use_dora": False} | {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.default is not dataclasses.MISSING and field.name != "name_or_path"
}


@dataclasses.dataclass
class Progress:
    """Holds the results of a run so far: the loss of each step, and the evaluation losses by step.

    `stream` is the place in a stream of documents, see `StreamedBatches.state_at`; empty without a stream.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    evaluations: dict[int, float] = dataclasses.field(default_factory=dict)
    stream: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


# --- Identity of a run ------------------------------------------------------------------------------------------------


def identity_of(
    model: Transformer,
    config: TrainConfig,
    state: TrainState,
    frozen: nnx.State,
    num_devices: int = 1,
    **datasets: Documents | Mapping[str, Documents] | None,
) -> dict[str, Any]:
    """Returns everything that must be equal for one run to continue another, under names that a user knows.

    Model, adapters, settings and the shapes and dtypes of arrays are listed as they are; data and frozen weights are
    represented by checksums.
    """
    settings = {name: value for name, value in vars(config).items() if name not in (*_FREE, *_STEP_SIZES)}
    settings[_STEP_SIZE] = num_devices * math.prod(getattr(config, name) for name in _STEP_SIZES)
    lora = {} if model.lora_config is None else dataclasses.asdict(model.lora_config)
    if lora:  # Resolved and sorted, because a user can write the same adapters in several ways.
        lora["target_modules"] = sorted(names_for(model, layers_of_adapters(model)))
        for name in ("target_parameters", "exclude_modules", "layers_to_transform"):
            del lora[name]
        lora |= {name: sorted(lora[name]) for name in ("rank_pattern", "alpha_pattern", "modules_to_save")}
    structure = dataclasses.asdict(model.config)
    del structure["name_or_path"]  # a folder that was moved holds the same model
    weights = _frozen_arrays(frozen)
    of_jax: Any = jax.config  # JAX declares no types for its settings
    identity = (
        structure
        | settings
        | {f"{ADAPTERS}{name}": value for name, value in lora.items()}
        | {name: _describe(documents) for name, documents in datasets.items()}
        | {f"{ARRAY}{name}": describe_array(leaf) for name, leaf in arrays_by_name(state).items()}
        | {
            f"frozen {name}": f"{describe_array(leaf)} {checksum:08x}"
            for (name, leaf), checksum in zip(weights.items(), checksums(list(weights.values())).tolist(), strict=True)
        }
        | ({"weights in 4 bits": True} if holds_4bit(frozen) else {})
        | {"jax_default_prng_impl": str(of_jax.jax_default_prng_impl)}
        | {"jax_threefry_partitionable": of_jax.jax_threefry_partitionable}
    )
    return json.loads(json.dumps(identity))  # as a checkpoint stores it: JSON turns tuples into lists


def _describe(documents: Documents | Mapping[str, Documents] | None) -> Any:
    """Returns a description of documents, or of each set of them by its name; None if there are none."""
    if documents is None:
        return None
    if isinstance(documents, Mapping):
        return {name: _describe(of_set) for name, of_set in documents.items()}
    digest = hashlib.sha256()
    for array in (documents.tokens, documents.labels, documents.starts, documents.lengths):
        digest.update(np.ascontiguousarray(array))
    return f"{len(documents):,} documents of {documents.num_tokens:,} tokens, {digest.hexdigest()[:16]}"


def _frozen_arrays(frozen: nnx.State) -> dict[str, Any]:
    """Returns the arrays of frozen weights by name, the same whether they lie on the device or in the host's memory."""

    def is_in_host_memory(value: Any) -> bool:
        return isinstance(value, HostWeight | HostMatrix)

    def array(value: Any) -> Any:
        return value.in_numpy if is_in_host_memory(value) else value

    return arrays_by_name(jax.tree.map(array, nnx.to_pure_dict(frozen), is_leaf=is_in_host_memory))


def checksums(arrays: list[Array | np.ndarray]) -> UInt32[np.ndarray, " arrays"]:
    """Returns a checksum of each array, from its bits and their positions; every device gives the same numbers.

    The device computes those of all its arrays in one pass. Arrays of NumPy go to the device in slices.
    """
    sums = np.zeros(len(arrays), np.uint32)
    there = [place for place, array in enumerate(arrays) if isinstance(array, jax.Array)]
    if there:
        sums[there] = _checksums([arrays[place] for place in there], 0)
    for place, array in enumerate(arrays):
        if isinstance(array, np.ndarray):
            size = max(1, _SLICE_BYTES // array[:1].nbytes)
            slices = [_checksums([array[first : first + size]], 1)[0] for first in range(0, len(array), size)]
            sums[place] = _checksums([jnp.concatenate(slices)], 0)[0]
    return sums


@functools.partial(jax.jit, static_argnums=1)
def _checksums(arrays: list[Array], ndim: int) -> Array:
    """Returns a checksum of each array, or of each of its slices along the first `ndim` axes."""

    def checksum(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        while bits.ndim > ndim:  # Axis by axis: an index over all elements may need more than 32 bits.
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
    once it is whole, checksums included. After that, checkpoints that are no longer kept are renamed and deleted. A
    save that fails (a full disk) prints a message and does not end the run; the earlier checkpoints stay.

    Each process of a run has a `Checkpoints`, and all save together. The first process writes.

    Args:
      output_dir: the folder of the run.
      keep: how many of the last checkpoints are kept; None keeps all.
      identity: the facts that must be the same in a run that resumes from a checkpoint, see `identity_of`.
      notes: the facts that may differ in such a run; a message then names them, see `notes_of`.
      date: the date that the run gives its chat template; a resumed run keeps it.
      base: the name or path of the model that is trained, which may be somewhere else when the run resumes.
      on_saved: is called, in the writing thread, with the step and the folder of each finished checkpoint.
      chat_template: the text of the chat template with which the data was read; empty if there is none.
    """

    def __init__(
        self,
        output_dir: str,
        keep: int | None,
        identity: dict[str, Any],
        notes: dict[str, str],
        date: datetime.date,
        base: str = "",
        on_saved: Callable[[int, Path], None] = lambda step, path: None,
        chat_template: str = "",
    ):
        self.folder = Path(output_dir) / FOLDER
        self._on_saved, self._chat_template = on_saved, chat_template
        self._keep, self._identity, self._notes, self._date, self._base = keep, identity, notes, date, base
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jaxpack-checkpoint")
        self._writing: Future[bool] | None = None
        self._writes = is_first_process()
        if not self._writes:
            return
        cut_off = set()
        for ending in (_UNFINISHED, _ORBAX_UNFINISHED, _DELETED):
            for leftover in self.folder.glob(f"*{ending}"):  # from a run that was killed
                _remove(leftover)
                if ending != _DELETED:
                    cut_off.add(leftover.name.split(".")[0])
        for step in sorted(cut_off):
            console.print(f"the run was ended while it wrote the checkpoint of step {step}: its files are deleted")

    def set_aside(self, after: int) -> None:
        """Renames the checkpoints of steps later than `after`: they are damaged, and the run repeats these steps."""
        for step in steps_in(self.folder) if self._writes else ():
            if step > after:
                path, number = self.folder / str(step), 1
                while os.path.lexists(aside := self.folder / f"{step}{_DAMAGED}-{number}"):
                    number += 1
                try:
                    path.rename(aside)
                    console.print(f"the damaged checkpoint {path} is now {aside}; nothing reads it, it may be deleted")
                except OSError as error:
                    console.print(f"{path} cannot be renamed to {aside}: {reason(error)}", style="yellow")

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Waits for the previous save, and starts to save the state after `step` steps.

        When the method returns, the arrays are on the host, so the state may be donated.
        """
        self.wait()
        arrays = {}
        for name, leaf in arrays_by_name(state).items():
            array = leaf if isinstance(leaf, np.ndarray) else on_host(leaf)
            if self._writes:  # The other processes only take part in gathering what is in shards.
                arrays[name] = array
        if not self._writes:
            return
        arrays[_LOSSES] = np.array(progress.losses, np.float64)
        evaluations = dict(progress.evaluations)
        self._writing = self._writer.submit(self._write, step, arrays, evaluations, progress.stream)

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

    def _write(
        self, step: int, arrays: dict[str, np.ndarray], evaluations: dict[int, float], stream: dict[str, np.ndarray]
    ) -> bool:
        if (fault := _fault(arrays)) is not None:  # Saving it would delete earlier, sound checkpoints.
            console.print(f"step {step} is not saved: {fault}, and no run can continue from that", style="yellow")
            return False
        path = self.folder / str(step)
        in_stream = {f"{_STREAM}{name}": array for name, array in stream.items()}
        shapes = {name: describe_array(array) for name, array in in_stream.items()}
        record = Record(
            self._identity, self._notes, self._date, step, evaluations, self._base, shapes, self._chat_template
        )
        arrays |= {name: array for name, array in in_stream.items() if array.size}  # orbax refuses empty arrays
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            needed = sum(array.nbytes for array in arrays.values()) + _SPARE
            if shutil.disk_usage(self.folder).free < needed:  # orbax would print pages of errors
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _write(path, arrays, record.to_json())
        except Exception as error:  # The libraries under orbax raise errors of any type.
            for ending in (_UNFINISHED, _UNFINISHED + _ORBAX_UNFINISHED):
                _remove(path.with_name(path.name + ending))
            console.print(f"step {step} could not be saved in {path}: {_reason(error)}; the run goes on", style="red")
            return False
        console.print(f"saved the checkpoint {path}")
        self._on_saved(step, path)
        try:
            self._prune(step, evaluations)
        except OSError as error:
            console.print(f"an older checkpoint could not be deleted: {reason(error)}", style="yellow")
        return True

    def _prune(self, step: int, evaluations: dict[int, float]) -> None:
        """Deletes the checkpoints that are no longer kept, now that the one of `step` is written."""
        if self._keep is None:
            return
        # A later one is damaged, see `set_aside`: it must not count in the place of a whole one.
        steps = [other for other in steps_in(self.folder) if other <= step]
        kept = {*steps[-self._keep :], _best_step(steps, evaluations)}
        for other in set(steps) - kept:
            # Renamed first: a half-deleted checkpoint must never look like a whole one.
            shutil.rmtree((self.folder / str(other)).rename(self.folder / f"{other}{_DELETED}"))


def best_checkpoint(folder: Path, evaluations: dict[int, float]) -> Path | None:
    """Returns the checkpoint in a folder with the lowest evaluation loss, or None if none of them was evaluated."""
    step = _best_step(steps_in(folder), evaluations)
    return None if step is None else folder / str(step)


def _best_step(steps: list[int], evaluations: dict[int, float]) -> int | None:
    """Returns the step with the lowest evaluation loss, or None if none of the steps was evaluated."""
    evaluated = [step for step in steps if not math.isnan(evaluations.get(step, math.nan))]
    return min(evaluated, key=evaluations.__getitem__, default=None)


def steps_in(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint in a folder, ascending; a damaged one may be no folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and name == str(int(name)))


def _fault(arrays: dict[str, np.ndarray]) -> str | None:
    """Returns the reason why no run could resume from these arrays, or None.

    Checks the last loss and the state: a loss is computed before its step's update, so it can be finite while the
    updated weights are not. A single number of the optimizer may be infinite: a schedule that watches the loss begins
    with an infinite best loss.
    """
    if not math.isfinite(loss := arrays[_LOSSES][-1]):
        return f"its loss is {loss}"
    for name, array in sorted(arrays.items(), key=lambda item: not item[0].startswith("trainable.")):
        if name != _LOSSES and jnp.issubdtype(array.dtype, jnp.floating):
            may_be_infinite = array.ndim == 0 and name.startswith("optimizer.")
            if not (_is_finite(array) or (may_be_infinite and not math.isnan(array))):
                return f"`{name}` has values that are not finite"
    return None


def _is_finite(array: np.ndarray) -> bool:
    # By the bits: numpy compares the values of bfloat16 arrays about 20 times more slowly.
    bits = array.reshape(-1).view(f"uint{8 * array.dtype.itemsize}")
    exponent = np.array(np.inf, array.dtype).view(bits.dtype)
    parts = (bits[begin : begin + _PART] for begin in range(0, bits.size, _PART))
    return not any(((part & exponent) == exponent).any() for part in parts)


def _write(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    parts = {_STATE: ocp.args.StandardSave(arrays), _RUN: ocp.args.JsonSave(about)}
    unfinished = path.with_name(path.name + _UNFINISHED)
    with _quiet(), _checkpointer(*parts) as checkpointer:
        checkpointer.save(unfinished.absolute(), args=ocp.args.Composite(**parts))
    write_checksums(unfinished)
    unfinished.rename(path)
    sync_folder(path.parent)  # before an older checkpoint is deleted


def _remove(path: Path) -> None:
    """Deletes a folder or another entry, or leaves it if it cannot be deleted. Never follows a link."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# --- Finding ----------------------------------------------------------------------------------------------------------


def find_checkpoints(config: TrainConfig) -> list[Path]:
    """Returns the checkpoints that a run may resume from, newest first: it takes the first that is not damaged.

    The list is empty for a fresh start, and has one entry if `resume_from_checkpoint` names a checkpoint.

    Raises:
      InputError: `output_dir` holds a run that this one does not continue, or there is no checkpoint to resume from.
    """
    own = [] if config.output_dir is None else _newest_first(Path(config.output_dir) / FOLDER, "output_dir")
    choice = config.resume_from_checkpoint
    if choice == LATEST:
        return own
    found = []
    if choice is not None:
        path, name = Path(choice), "resume_from_checkpoint"
        found = _newest_first(path / FOLDER, name) or _newest_first(path, name) or [path]
        parts = (_RUN, _STATE, CHECKSUMS)
        # Other folders have names of digits, too. In a folder of checkpoints, one at least has a part of one.
        if not any(os.path.lexists(one / part) for one in found for part in parts):
            raise InputError(
                "`resume_from_checkpoint` must be the folder of a checkpoint, a folder of checkpoints, the folder of a"
                f" run, or 'latest', got {choice!r}."
            )
    chosen = next((path for path in own if found and path.resolve() == found[0].resolve()), None)
    if own and (chosen is None or not all(map(_is_damaged, own[: own.index(chosen)]))):
        raise InputError(
            f"`output_dir` must not hold {FOLDER}/, unless `resume_from_checkpoint` is the newest checkpoint there or"
            f" 'latest', got {config.output_dir!r}, which holds {own[0]}. Continue that run, or choose another folder."
        )
    return found


def _newest_first(folder: Path, name: str) -> list[Path]:
    try:
        return [folder / str(step) for step in reversed(steps_in(folder))]
    except (OSError, ValueError) as error:  # It is not permitted, or the name is too long or has a null character.
        raise InputError(f"`{name}` must be readable, got {str(folder)!r:.200}: {reason(error)}.") from error


def _is_damaged(path: Path) -> bool:
    try:
        _described(path)
    except DamagedError:
        return True
    except OSError:
        return False  # That is not known.
    return False


def date_of_run(paths: list[Path]) -> datetime.date | None:
    """Returns the date that the run of some checkpoints gave its chat template; None for those of older versions.

    Raises:
      InputError: all of the checkpoints are damaged.
    """
    if not paths:
        return None
    record, _ = _first_whole(paths, read_record)
    return record.date


# --- Reading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(
    paths: list[Path], state: TrainState, identity: dict[str, Any], notes: dict[str, str], num_steps: int
) -> tuple[Path, TrainState, Progress]:
    """Reads the first of some checkpoints that is not damaged, and says so if it is not the first of all.

    The arrays come in the place of those of `state`, which are deleted one by one as the new ones arrive.

    Args:
      paths: checkpoints of one run, newest first, see `find_checkpoints`.
      state: the state of the run before its first step.
      identity: the facts that must be the same in the run of the checkpoint, see `identity_of`.
      notes: the facts that may differ, which is then said, see `notes_of`.
      num_steps: the number of steps of the run.

    Raises:
      InputError: the checkpoint is of another run, all checkpoints are damaged, or one is not readable; `state` is then
        unchanged.
    """
    named = arrays_by_name(state)
    (path, record, arrays), faults = _first_whole(
        paths, lambda path: (path, *_read(path, named, identity, notes, num_steps))
    )
    for damaged, fault in faults.items():
        console.print(f"the checkpoint {damaged} is damaged, so it is not used: {fault}", style="yellow")
    if faults:
        first, last = record.step + 1, int(paths[0].name)
        repeated = f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"
        line = f"the one before, {path}, is whole: the run resumes from it and repeats {repeated}"
        console.print(line, style="yellow")
    differ = [f"{name} {there}, not {notes[name]}" for name, there in record.notes.items() if there != notes[name]]
    if differ:
        line = f"the checkpoint was written with {'; '.join(differ)}: losses may differ by rounding"
        console.print(line, style="yellow")
    leaves = []
    for name, leaf in named.items():
        # An uncommitted array stays uncommitted, so that the same program is compiled.
        device = leaf.sharding if leaf.committed else None
        leaf.delete()  # Deleted first: a device may have no room for both.
        leaves.append(put(arrays.pop(name), device))
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    stream = {name.removeprefix(_STREAM): arrays[name] for name in record.stream}
    return path, state, Progress(arrays[_LOSSES].tolist(), record.evaluations, stream)


def _first_whole(paths: list[Path], read: Callable[[Path], Read]) -> tuple[Read, dict[Path, str]]:
    """Returns what `read` returns for the first checkpoint that is not damaged, and what is wrong with those before.

    Raises:
      InputError: all of the checkpoints are damaged, or one is not readable.
    """
    faults = {}
    for path in paths:
        try:
            return read(path), faults
        except DamagedError as error:
            faults[path] = str(error)
        except OSError as error:
            raise _unreadable(path, error) from error
    raise _refusal(faults)


def _read(
    path: Path, named: dict[str, Array], identity: dict[str, Any], notes: dict[str, str], num_steps: int
) -> tuple[Record, dict[str, np.ndarray]]:
    """Returns the record and the arrays of a checkpoint, all of them checked."""
    record, has_checksums = _described(path)
    _require_same(path, record.identity, identity)
    if path.parent.name == FOLDER and path.name.isdecimal() and path.name != str(record.step):
        raise DamagedError(f"its step must be {path.name}, as its folder's name, got {record.step}")
    if record.step > num_steps:
        raise DamagedError(f"its step must be at most {num_steps}, the number of steps of the run, got {record.step}")
    if record.notes.keys() != notes.keys():
        raise DamagedError(f"its `notes` must be {sorted(notes)}, got {shown(sorted(record.notes))}")
    arrays = _arrays_of(path, record, {name: (leaf.shape, leaf.dtype) for name, leaf in named.items()}, has_checksums)
    if not has_checksums:
        console.print(
            f"the checkpoint {path} has no checksums, because an earlier version of jaxpack wrote it: damage to its"
            " numbers cannot be found",
            style="yellow",
        )
    return record, arrays


def read_checkpoint(path: Path) -> tuple[Record, dict[str, np.ndarray]]:
    """Returns the record and the arrays of a checkpoint, without the run that wrote it.

    Raises:
      InputError: the checkpoint is damaged, or not readable.
    """

    def read(path: Path) -> tuple[Record, dict[str, np.ndarray]]:
        record, has_checksums = _described(path)
        return record, _arrays_of(path, record, record.arrays, has_checksums)

    return _first_whole([path], read)[0]


def read_description(path: Path) -> Record:
    """Returns the record of a checkpoint alone. Raises `InputError` as `read_checkpoint` does."""
    (record, _), _ = _first_whole([path], _described)
    return record


def _described(path: Path) -> tuple[Record, bool]:
    """Returns the record of a checkpoint whose files are whole, and whether it has checksums."""
    has_checksums = check_folder(path)
    return read_record(path), has_checksums


def _arrays_of(
    path: Path, record: Record, expected: dict[str, tuple[tuple[int, ...], Any]], has_checksums: bool
) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint, with the shapes and dtypes that are expected, and all of them finite."""
    expected = expected | record.stream_arrays
    wanted = {name: np.zeros(shape, dtype) for name, (shape, dtype) in expected.items()}
    wanted[_LOSSES] = np.zeros(record.step)
    empty = {name: array for name, array in wanted.items() if not array.size}
    try:
        arrays = empty | _restore(path, {name: array for name, array in wanted.items() if array.size})
    except Exception as error:  # The libraries under orbax raise errors of any type.
        if has_checksums or isinstance(error, MemoryError):  # The checkpoint before is no easier to read.
            raise _unreadable(path, error) from error
        raise DamagedError(f"its arrays cannot be read: {_reason(error)}") from error
    for name, array in wanted.items():
        found = arrays.get(name)
        if not isinstance(found, np.ndarray) or (found.shape, found.dtype) != (array.shape, array.dtype):
            raise DamagedError(f"its array `{name}` must be {array.dtype}{list(array.shape)}")
    if (step := int(arrays["step"])) != record.step:
        raise DamagedError(f"its array `step` must be {record.step}, as its record, got {step}")
    if (fault := _fault(arrays)) is not None:
        raise DamagedError(fault)
    return arrays


def _restore(path: Path, wanted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    with _quiet(), _checkpointer(_STATE) as checkpointer:
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(wanted)})
        return checkpointer.restore(path.absolute(), args=args)[_STATE]


def _checkpointer(*parts: str) -> Any:
    """Returns orbax's reader and writer, which waits for no other process: each reads, and the first one writes."""
    import orbax.checkpoint as ocp  # Here, because the import takes half a second.

    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(*parts, composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"`resume_from_checkpoint` must be readable, got {str(path)!r}, which may be whole: {_reason(error)}. Mend the"
        " cause, and resume again."
    )


def _refusal(faults: dict[Path, str]) -> InputError:
    """Returns the error of a damaged checkpoint, or of several if there is no other."""
    path, fault = next(iter(faults.items()))
    if len(faults) > 1:
        told = "; ".join(f"{path.name} ({fault})" for path, fault in list(faults.items())[:5])
        return InputError(
            f"`resume_from_checkpoint` must lead to a whole checkpoint, got {str(path.parent)!r}, where all"
            f" {len(faults)} are damaged: {told}. Put back a copy of one, or start a new run in another folder."
        )
    before = [other for other in _newest_first(path.parent, "resume_from_checkpoint") if _is_before(other, path)]
    whole = next((other for other in before if not _is_damaged(other)), None)
    advice = (
        "There is no whole checkpoint before it: put back a copy, or start a new run in another folder."
        if whole is None
        else f"The one before it, {str(whole)!r}, is whole: resume from that."
    )
    return InputError(
        f"`resume_from_checkpoint` must be a whole checkpoint, got {str(path)!r}, which is damaged: {fault}. {advice}"
    )


def _is_before(other: Path, path: Path) -> bool:
    return path.name.isdecimal() and int(other.name) < int(path.name)


def notes_of(remat: str, implementation: str | None) -> dict[str, str]:
    """Returns the facts that may change the rounding of a run but not its meaning: remat, kernels, device, versions."""
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    device = {"device": current_device().device_kind}
    return {"remat": remat, "implementation": str(implementation)} | device | versions


def _require_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    there = {name: value for name, value in _BEFORE.items() if name in here} | there
    if _STEP_SIZE not in there and all(isinstance(there.get(name), int) for name in _STEP_SIZES):
        there[_STEP_SIZE] = math.prod(there.pop(name) for name in _STEP_SIZES)  # of a version for one device
    differ = [name for name in here | there if not _is_same(there.get(name), here.get(name))]
    if not differ:
        return
    # If sizes or settings differ, arrays differ too, so arrays are named only if nothing else differs.
    told = [name for name in differ if not name.startswith((ARRAY, "frozen "))] or differ
    what = ", ".join(f"`{name:.80}` {shown(there.get(name))} (here {here.get(name)!r})" for name in told[:4])
    more = f" and {len(told) - 4} more" if len(told) > 4 else ""
    raise InputError(
        f"`resume_from_checkpoint` must be a checkpoint of the same run, got {str(path)!r} with {what}{more}. Use the"
        " model, data and settings of that run, or start a new run."
    )


def _is_same(there: Any, here: Any) -> bool:
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(_is_same(there[name], here[name]) for name in here)
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(_is_same, there, here))
    return there == here and isinstance(there, bool) == isinstance(here, bool)  # Python's True equals 1.


def _reason(error: BaseException) -> str:
    """Returns the cause of an orbax error: the operating system's reason if there is one, or the first 200 characters.

    The whole text may fill pages.
    """
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return reason(error)[:200] if code is None else os.strerror(int(code[1]))


def _is_no_task_of_orbax(record: logging.LogRecord) -> bool:
    """Returns False for the error of a task that orbax has begun and forgotten when another one failed."""
    trace = record.exc_info[2] if record.exc_info else None
    frames = traceback.extract_tb(trace)
    return not ("never retrieved" in str(record.msg) and any("orbax" in frame.filename for frame in frames))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences orbax's log of errors that it also raises, and its tasks' complaints about a closed event loop.

    A forgotten task is told of when it is collected as garbage, which may be at any time later.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    logging.getLogger("asyncio").addFilter(_is_no_task_of_orbax)

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
