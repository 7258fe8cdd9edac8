"""Tests that nothing is resumed from a damaged checkpoint, and that a run then falls back to the one before, aloud."""

import dataclasses
import datetime
import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import small_model

from jaxpack.errors import InputError
from jaxpack.model.weights import Frozen
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train import checkpoint
from jaxpack.train.checkpoint import Checkpoints, Progress, find_checkpoints, identity_of, load_checkpoint, steps_in
from jaxpack.train.run import Run
from jaxpack.train.step import TrainState
from jaxpack.train.trainer import Trainer
from jaxpack.utils.checksums import CHECKSUMS, DamagedError, check_folder, read_checked, write_checksums

DAY = datetime.date(2031, 2, 3)
NOTES = {"device": "cpu", "remat": "none"}
SETTINGS = {"learning_rate": 1.0, "packing": True, "max_steps": 9, "train_dataset": "4 documents"}
ROWS = [{"input_ids": np.random.default_rng(i).integers(0, 97, 2 + 7 * i % 60).tolist()} for i in range(20)]
MODELS: dict[str, LoraConfig | None] = {
    "lora": LoraConfig(r=4, lora_dropout=0.2),
    "head": LoraConfig(r=4, modules_to_save=("lm_head",)),
    "full": None,
}


def trainer(kind: str = "lora", **changes: object) -> Trainer:
    settings = {"max_length": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "packing": True}
    config = TrainConfig(**settings | {"max_steps": 4, "save_steps": 1, "save_total_limit": 9} | changes)
    return Trainer(small_model("llama", lora=MODELS[kind]), None, ROWS, config)


def small_state(value: float = 0.0) -> TrainState:
    return TrainState(nnx.State({"a": jnp.full((3, 5), value)}), {"mu": jnp.arange(4.0) + value}, jnp.int32(value))


def require_equal(found: TrainState, expected: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def load(*paths: Path, state: TrainState | None = None, identity: dict | None = None) -> tuple[Path, TrainState]:
    """Loads the first of some checkpoints that is not damaged, and requires that a refusal leaves the state alone."""
    state = small_state() if state is None else state
    try:
        path, found, _ = load_checkpoint(list(paths), state, SETTINGS if identity is None else identity, NOTES, 9)
    except InputError:
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        raise
    return path, found


def refusal(*paths: Path) -> str:
    with pytest.raises(InputError) as error:
        load(*paths)
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the checkpoints of steps 1 to 3 of `small_state`."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(str(folder), 9, SETTINGS, NOTES, DAY)
    for step in (1, 2, 3):
        checkpoints.save(step, small_state(step), Progress(step * [0.5], {1: 0.25}))
    assert checkpoints.wait()
    checkpoints.close()
    return folder / "checkpoints"


@pytest.fixture
def copies(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def largest(path: Path) -> Path:
    return max(files_of(path / "state"), key=lambda file: file.stat().st_size)


def edit(path: Path, change: Callable[[dict], object], *, sealed: bool) -> None:
    """Changes the JSON of a checkpoint: of one with new checksums, or else of one as older versions wrote it."""
    file = path / "run" / "metadata"
    record = json.loads(file.read_text())
    (path / CHECKSUMS).unlink()
    if not sealed:
        del record["checksums"]
    changed = change(record)
    file.write_text(changed if isinstance(changed, str) else json.dumps(record))
    if sealed:
        write_checksums(path)


# --- Flipped bits -----------------------------------------------------------------------------------------------------


class Small(NamedTuple):
    """Holds a checkpoint, and what is needed to load it."""

    path: Path
    state: TrainState
    identity: dict[str, Any]


@pytest.fixture(scope="module", params=MODELS)
def of_a_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    training = trainer(request.param)
    run = Run(training.model, training.batches, training.config)
    identity = identity_of(training.model, training.config, run.state, run.frozen, train_dataset=training.documents)
    draws = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(draws.normal(size=x.shape), x.dtype), run.state)._replace(
        step=jnp.int32(3)
    )
    checkpoints = Checkpoints(str(tmp_path_factory.mktemp("model")), 9, identity, NOTES, DAY)
    checkpoints.save(3, state, Progress([0.5, 0.25, 0.125]))
    assert checkpoints.wait()
    checkpoints.close()
    return Small(checkpoints.folder / "3", state, identity)


def test_no_checkpoint_with_one_flipped_bit_is_resumed_from(of_a_model: Small) -> None:
    path, state, identity = of_a_model
    files, draw = files_of(path), random.Random(0)
    sizes = [file.stat().st_size for file in files]
    # Half of the flips are spread over the bytes, and half over the files, most of which are small.
    places = [*draw.choices(files, sizes, k=100), *draw.choices(files, k=100)]
    for file in places:
        before = file.read_bytes()
        flip(file, draw.randrange(8 * len(before)))
        with pytest.raises(InputError, match=r"must be a whole checkpoint, got .*, which is damaged: ") as error:
            load(path, state=state, identity=identity)
        assert file.relative_to(path).as_posix() in str(error.value)
        file.write_bytes(before)
    fresh = jax.tree.map(jnp.zeros_like, state)
    require_equal(load(path, state=fresh, identity=identity)[1], state)


@pytest.mark.parametrize("name", [CHECKSUMS, "run/metadata"])
def test_a_flip_anywhere_in_the_lists_is_found(name: str, copies: Path) -> None:
    file, draw = copies / "3" / name, random.Random(1)
    before = file.read_bytes()
    for byte in range(0, len(before), 3):
        flip(file, 8 * byte + draw.randrange(8))
        assert f"which is damaged: {name} (" in refusal(copies / "3")
        file.write_bytes(before)


def test_the_list_is_one_that_sha256sum_checks(saved: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=saved / "3", check=True, capture_output=True)
    listed = (saved / "3" / CHECKSUMS).read_text().splitlines()[:-1]
    names = [file.relative_to(saved / "3").as_posix() for file in files_of(saved / "3")]
    assert sorted(line.split("  ")[1] for line in listed) == sorted({*names} - {CHECKSUMS})


# --- Files ------------------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def swap_for_link(file: Path) -> None:
    file.rename(file.parent.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent.parent / "elsewhere")


def swap_for_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def swap_for_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = [Path.unlink, cut, empty, lengthen, swap_for_link, swap_for_pipe, swap_for_folder]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_found_whichever_it_is(damage: Callable, copies: Path) -> None:
    whole = copies / "3"
    for file in (path.relative_to(whole) for path in files_of(whole)):
        damaged = shutil.copytree(whole, copies.parent / "damaged")
        damage(damaged / file)
        said = refusal(damaged)
        assert f"must be a whole checkpoint, got '{damaged}', which is damaged: " in said
        assert file.as_posix() in said
        shutil.rmtree(damaged)
        (copies.parent / "elsewhere").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["notes.txt", "state/d/0123", "run/metadata2", "new/file", "a name\x1b[31m"])
def test_a_file_that_was_not_written_with_the_others_is_found(name: str, copies: Path) -> None:
    file = copies / "3" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    said = refusal(copies / "3")
    assert f"{name!r} was not written with the other files" in said
    assert said.isprintable()


@pytest.mark.parametrize("part", ["state", "run", "state/d"])
def test_a_folder_that_is_a_link_is_found(part: str, copies: Path) -> None:
    place = copies / "3" / part
    place.rename(copies.parent / "elsewhere")
    place.symlink_to(copies.parent / "elsewhere")
    assert f"'{part}' is a link, a pipe or a device, not a regular file" in refusal(copies / "3")


def test_a_file_that_must_not_be_read_is_no_damage(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def denied(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith("3/run/metadata"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", denied)
    assert "must be readable, got" in refusal(copies / "3", copies / "2")


@pytest.mark.parametrize("damage", [swap_for_link, swap_for_pipe, swap_for_folder], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [CHECKSUMS, "run/metadata"])
def test_a_file_that_is_read_alone_must_be_a_regular_file(damage: Callable, name: str, copies: Path) -> None:
    damage(copies / "3" / name)
    with pytest.raises(DamagedError, match=f"{name}' is a link, a pipe or a device, not a regular file"):
        read_checked(copies / "3", "run/metadata")


# --- Fields -----------------------------------------------------------------------------------------------------------

# A field, a value that it cannot have, and the rule that the refusal names.
FIELDS: list[tuple[str, Any, str]] = [
    ("step", "3", "the field `step` of run/metadata must be a whole number above 0, got '3'"),
    ("step", 3.0, "whole number above 0, got 3.0"),
    ("step", True, "whole number above 0, got True"),
    ("step", None, "whole number above 0, got None"),
    ("step", 0, "whole number above 0, got 0"),
    ("step", -3, "whole number above 0, got -3"),
    ("step", 2, "its step must be 3, as its folder's name, got 2"),
    ("step", 10**15, "got 1000000000000000"),
    ("date", 20310203, "must be a date in the form YYYY-MM-DD, got 20310203"),
    ("date", "03.02.2031", "YYYY-MM-DD, got '03.02.2031'"),
    ("date", "2031-02-30", "YYYY-MM-DD, got '2031-02-30'"),
    ("date", None, "YYYY-MM-DD, got None"),
    ("date", ["2031-02-03"], "YYYY-MM-DD, got ['2031-02-03']"),
    ("evaluations", [], "the field `evaluations` of run/metadata must be a JSON object, got []"),
    ("evaluations", None, "`evaluations` of run/metadata must be a JSON object, got None"),
    ("evaluations", {"00": 0.5}, "have whole numbers from 0 to 3 as names, got '00'"),
    ("evaluations", {"4": 0.5}, "from 0 to 3 as names, got '4'"),
    ("evaluations", {"-1": 0.5}, "from 0 to 3 as names, got '-1'"),
    ("evaluations", {"01": 0.5}, "from 0 to 3 as names, got '01'"),
    ("evaluations", {"\u0661": 0.5}, "from 0 to 3 as names, got"),
    ("evaluations", {"1" * 5000: 0.5}, "from 0 to 3 as names, got '1111"),
    ("evaluations", {"1": "0.5"}, "have a loss (a number with a point) as '1', got '0.5'"),
    ("evaluations", {"1": True}, "as '1', got True"),
    ("evaluations", {"1": None}, "as '1', got None"),
    ("evaluations", {"1": 10**400}, "as '1', got "),
    ("notes", "cpu", "the field `notes` of run/metadata must be a JSON object, got 'cpu'"),
    ("notes", {"device": "cpu", "remat": 3}, "have a text of 1 to 200 characters as 'remat', got 3"),
    ("notes", {"device": "", "remat": "none"}, "characters as 'device', got ''"),
    ("notes", {"device": "cpu" * 10**5, "remat": "none"}, "characters as 'device', got 'cpucpu"),
    ("notes", {"device": "cpu"}, "its `notes` must be ['device', 'remat'], got ['device']"),
    ("notes", NOTES | {"x": "y"}, "its `notes` must be ['device', 'remat'], got ['device', 'remat', 'x']"),
    ("chat_template", 3, "the field `chat_template` of run/metadata must be a text, got 3"),
    ("identity", [], "the field `identity` of run/metadata must be a JSON object, got []"),
    ("identity", None, "must be a JSON object, got None"),
    ("identity", SETTINGS | {"packing": 1}, "of the same run, got"),
    ("identity", SETTINGS | {"packing": "true"}, "`packing` 'true' (here True)"),
    ("identity", SETTINGS | {"learning_rate": True}, "`learning_rate` True (here 1.0)"),
    ("identity", SETTINGS | {"learning_rate": "1.0"}, "`learning_rate` '1.0' (here 1.0)"),
    ("identity", SETTINGS | {"max_steps": 8}, "`max_steps` 8 (here 9)"),
    ("identity", SETTINGS | {"train_dataset": None}, "`train_dataset` None (here '4 documents')"),
    ("identity", SETTINGS | {"more\x1b[31m": 1}, "`more\u241b[31m` 1 (here None)"),
    ("identity", SETTINGS | {"eval_dataset": None}, "the field `evaluations` of run/metadata must be empty in a run"),
    ("checksums", None, "the field `checksums` of run/metadata must be 'SHA256SUMS', got None"),
    ("checksums", "MD5SUMS", "must be 'SHA256SUMS', got 'MD5SUMS'"),
    ("other", 1, "run/metadata has the unknown field 'other'"),
]


@pytest.mark.parametrize("sealed", [False, True], ids=["older", "sealed"])
@pytest.mark.parametrize(("field", "value", "rule"), FIELDS)
def test_no_field_of_a_wrong_type_or_range_is_used(
    field: str, value: Any, rule: str, sealed: bool, copies: Path
) -> None:
    edit(copies / "3", lambda record: record.update({field: value}), sealed=sealed)
    said = refusal(copies / "3")
    assert rule in said
    assert f"'{copies / '3'}'" in said
    assert said.isprintable()
    assert len(said) < 1000


@pytest.mark.parametrize("sealed", [False, True], ids=["older", "sealed"])
@pytest.mark.parametrize("field", ["identity", "notes", "step", "evaluations"])
def test_a_field_that_is_missing_is_named(field: str, sealed: bool, copies: Path) -> None:
    edit(copies / "3", lambda record: record.pop(field) and None, sealed=sealed)
    assert f"run/metadata is without the fields ['{field}']" in refusal(copies / "3")


@pytest.mark.parametrize("sealed", [False, True], ids=["older", "sealed"])
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda text: text[:-1] + ', "step": 3}', "run/metadata is not valid JSON: the key 'step' occurs twice"),
        (lambda text: text.replace('"device"', '"remat"', 1), "the key 'remat' occurs twice"),
        (lambda text: text.replace('"packing"', '"learning_rate"', 1), "the key 'learning_rate' occurs twice"),
        (lambda text: text[:-1], "run/metadata is not valid JSON"),
        (lambda text: "", "run/metadata is not valid JSON"),
        (lambda text: "[]", "run/metadata must be a JSON object, got []"),
        (lambda text: "null", "run/metadata must be a JSON object, got None"),
        (lambda text: text[:-1] + ', "date": ' + 50_000 * "[" + 50_000 * "]" + "}", "run/metadata is"),
        (lambda text: text.replace('"step": 3', '"step": 3' + 5000 * "0"), "run/metadata is not valid JSON"),
        (lambda text: text + 2**24 * " ", "run/metadata has"),
    ],
)
def test_a_record_that_is_no_record_is_refused(change: Callable, rule: str, sealed: bool, copies: Path) -> None:
    edit(copies / "3", lambda record: change(json.dumps(record)), sealed=sealed)
    assert rule in refusal(copies / "3")


def rewrite(path: Path, **changes: np.ndarray | None) -> None:
    """Writes a checkpoint anew with other arrays, and with checksums that fit them."""
    state = small_state(3)
    arrays = {name: np.asarray(leaf) for name, leaf in checkpoint.arrays_by_name(state).items()}
    arrays = arrays | {"losses": np.full(3, 0.5)} | {name.replace("__", "."): x for name, x in changes.items()}
    about = json.loads((path / "run" / "metadata").read_text())
    shutil.rmtree(path)
    checkpoint._write(path, {name: array for name, array in arrays.items() if array is not None}, about)


A = np.full((3, 5), 3.0, np.float32)


@pytest.mark.parametrize("older", [False, True], ids=["sealed", "older"])
@pytest.mark.parametrize(
    "changes",
    [
        {"trainable__a": np.where(np.eye(3, 5) == 1, np.nan, A)},
        {"trainable__a": np.where(np.eye(3, 5) == 1, np.inf, A)},
        {"optimizer__mu": np.array([1, 2, -np.inf, 4], np.float32)},
        {"losses": np.array([0.5, 0.5, np.nan])},
        {"losses": np.full(2, 0.5)},
        {"losses": np.full(4, 0.5)},
        {"step": np.int32(2)},
        {"trainable__a": A[:2]},
        {"trainable__a": None},
        {"trainable__b": A},
    ],
    ids=str,
)
def test_arrays_that_no_run_can_continue_from_are_refused(changes: dict, older: bool, copies: Path) -> None:
    rewrite(copies / "3", **changes)
    if older:
        edit(copies / "3", lambda record: None, sealed=False)
    assert "`resume_from_checkpoint` must be " in refusal(copies / "3")


# --- Falling back -----------------------------------------------------------------------------------------------------


def test_a_run_falls_back_to_the_checkpoint_before_aloud(copies: Path, capsys: pytest.CaptureFixture) -> None:
    paths = [copies / step for step in "321"]
    flip(largest(paths[0]), 99)
    path, state = load(*paths)
    assert path == paths[1]
    require_equal(state, small_state(2))
    said = capsys.readouterr().err
    assert f"the checkpoint {paths[0]} is damaged, so it is not used: state/" in said
    assert f"the one before, {paths[1]}, is whole: the run resumes from it and repeats step 3\n" in said
    (paths[1] / "run" / "metadata").unlink()
    path, state = load(*paths)
    assert path == paths[2]
    require_equal(state, small_state(1))
    said = capsys.readouterr().err
    assert said.count("is damaged, so it is not used: ") == 2
    assert "the run resumes from it and repeats steps 2 to 3\n" in said


@pytest.mark.parametrize(
    "change",
    [
        lambda path: shutil.rmtree(path / "state"),
        lambda path: shutil.rmtree(path / "run"),
        lambda path: (shutil.rmtree(path), path.mkdir()),
        lambda path: (shutil.rmtree(path), path.touch()),
        lambda path: (shutil.rmtree(path), os.mkfifo(path)),
        lambda path: (shutil.rmtree(path), path.symlink_to("nowhere")),
        lambda path: (path / CHECKSUMS).unlink(),
        lambda path: edit(path, lambda record: record.update(step=2), sealed=True),
        lambda path: rewrite(path, trainable__a=np.full((3, 5), np.nan, np.float32)),
        # As older versions wrote them:
        lambda path: (edit(path, lambda record: None, sealed=False), shutil.rmtree(path / "state" / "d")),
        lambda path: (edit(path, lambda record: None, sealed=False), empty(path / "state" / "manifest.ocdbt")),
    ],
)
def test_a_run_falls_back_whatever_the_damage_is(change: Callable, copies: Path) -> None:
    change(copies / "3")
    found = find_checkpoints(TrainConfig(output_dir=str(copies.parent), resume_from_checkpoint="latest"))
    assert found == [copies / step for step in "321"]
    assert load(*found)[0] == copies / "2"
    named = find_checkpoints(TrainConfig(resume_from_checkpoint=str(copies.parent)))
    assert load(*named)[0] == copies / "2"


def test_a_run_without_a_whole_checkpoint_does_not_start_anew(copies: Path) -> None:
    for step in "123":
        flip(largest(copies / step), 99)
    said = refusal(*(copies / step for step in "321"))
    assert f"must lead to a whole checkpoint, got '{copies}', where all 3 are damaged: 3 (state/" in said
    assert "; 1 (state/" in said
    assert said.endswith("Put back a copy of one, or start a new run in another folder.")
    for step in "23":
        shutil.rmtree(copies / step)
    said = refusal(copies / "1")
    assert "There is no whole checkpoint before it: put back a copy, or start a new run in another folder." in said


def test_the_refusal_of_a_named_checkpoint_names_the_one_before(copies: Path) -> None:
    flip(largest(copies / "3"), 99)
    assert f"The one before it, '{copies / '2'}', is whole: resume from that." in refusal(copies / "3")
    # This advice can be followed: all that is newer is damaged.
    config = TrainConfig(output_dir=str(copies.parent), resume_from_checkpoint=str(copies / "2"))
    assert find_checkpoints(config) == [copies / "2"]
    with pytest.raises(InputError, match="unless `resume_from_checkpoint` is the newest checkpoint there"):
        find_checkpoints(dataclasses.replace(config, resume_from_checkpoint=str(copies / "1")))
    flip(largest(copies / "2"), 99)
    assert f"The one before it, '{copies / '1'}', is whole: resume from that." in refusal(copies / "3")


@pytest.mark.parametrize("error", [ValueError("no such codec"), MemoryError("no room")], ids=repr)
def test_a_whole_checkpoint_that_orbax_cannot_read_is_no_damage(
    error: Exception, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, wanted: dict) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_restore", fail)
    said = refusal(*(copies / step for step in "321"))
    assert f"`resume_from_checkpoint` must be readable, got '{copies / '3'}', which may be whole: {error}." in said


def test_another_run_is_refused_and_not_taken_for_damage(copies: Path) -> None:
    with pytest.raises(InputError, match=r"must be a checkpoint of the same run, got '.*/3' with `packing` True"):
        load(*(copies / step for step in "321"), identity=SETTINGS | {"packing": False})


def test_checkpoints_of_older_versions_are_read_and_said_to_have_no_checksums(
    copies: Path, capsys: pytest.CaptureFixture
) -> None:
    edit(copies / "3", lambda record: record.pop("date") and None, sealed=False)
    path, state = load(copies / "3")
    require_equal(state, small_state(3))
    said = capsys.readouterr().err
    assert said.count(f"the checkpoint {path} has no checksums, because an earlier version of jaxpack wrote it") == 1


@pytest.fixture
def resumed(copies: Path) -> Iterator[Checkpoints]:
    """Yields the checkpoints of a run that resumed from step 2, because that of step 3 is damaged."""
    flip(largest(copies / "3"), 99)
    checkpoints = Checkpoints(str(copies.parent), 2, SETTINGS, NOTES, DAY)
    checkpoints.set_aside(after=2)
    yield checkpoints
    checkpoints.close()


def test_a_damaged_checkpoint_makes_way_and_is_kept(
    resumed: Checkpoints, saved: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = resumed.folder
    assert steps_in(folder) == [1, 2]
    resumed.save(3, small_state(3), Progress(3 * [0.5]))
    assert resumed.wait()
    assert steps_in(folder) == [2, 3]
    require_equal(load(folder / "3")[1], small_state(3))
    assert largest(folder / "3.damaged-1").stat().st_size == largest(saved / "3").stat().st_size
    flip(largest(folder / "3"), 99)
    resumed.set_aside(after=2)
    assert f"the damaged checkpoint {folder}/3 is now {folder}/3.damaged-2" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"2", "3.damaged-1", "3.damaged-2"}


def test_no_checkpoint_is_deleted_for_one_that_could_not_be_written(
    resumed: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    for step in (3, 4, 5):
        resumed.save(step, small_state(step), Progress(step * [0.5]))
        assert not resumed.wait()
        assert {path.name for path in resumed.folder.iterdir()} == {"1", "2", "3.damaged-1"}
    monkeypatch.undo()
    resumed.save(6, small_state(6), Progress(6 * [0.5]))
    assert resumed.wait()
    assert steps_in(resumed.folder) == [2, 6]


def test_a_damaged_checkpoint_that_cannot_be_renamed_is_not_kept_for_a_whole_one(
    copies: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rename = Path.rename

    def denied(path: Path, target: Path) -> Path:
        if path.name == "3":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", denied)
    flip(largest(copies / "3"), 99)
    shutil.rmtree(copies / "2")
    checkpoints = Checkpoints(str(copies.parent), 1, SETTINGS, NOTES, DAY)
    checkpoints.set_aside(after=1)
    checkpoints.save(2, small_state(2), Progress([0.5, 0.5]))
    assert checkpoints.wait()
    assert steps_in(copies) == [2, 3]
    checkpoints.save(4, small_state(4), Progress(4 * [0.5]))
    assert checkpoints.wait()
    checkpoints.close()
    said = capsys.readouterr().err
    assert f"{copies / '3'} cannot be renamed to {copies / '3.damaged-1'}: Permission denied" in said
    assert "an older checkpoint could not be deleted: Permission denied" in said
    require_equal(load(copies / "4")[1], small_state(4))


def test_a_checkpoint_appears_with_its_checksums(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def write(folder: Path) -> None:
        seen.append(steps_in(copies))
        write_checksums(folder)

    monkeypatch.setattr(checkpoint, "write_checksums", write)
    checkpoints = Checkpoints(str(copies.parent), 9, SETTINGS, NOTES, DAY)
    checkpoints.save(4, small_state(4), Progress(4 * [0.5]))
    assert checkpoints.wait()
    checkpoints.close()
    assert seen == [[1, 2, 3]]
    assert check_folder(copies / "4")


@pytest.mark.parametrize("name", ["03", "\u0663", "3.damaged-1", "3.unfinished", "-3", "3 "])
def test_no_other_name_is_taken_for_a_step(name: str, copies: Path) -> None:
    (copies / "3").rename(copies / name)
    assert steps_in(copies) == [1, 2]


# --- Whole runs -------------------------------------------------------------------------------------------------------


def weights(training: Trainer) -> list[np.ndarray]:
    state = nnx.to_flat_state(nnx.state(training.model, nnx.Any(nnx.Param, Frozen)))
    return [np.asarray(leaf[...]) for _, leaf in state]


class Whole(NamedTuple):
    """Holds the folder, the losses and the weights of a run with a checkpoint after each of its four steps."""

    kind: str
    folder: Path
    losses: np.ndarray
    weights: list[np.ndarray]


@pytest.fixture(
    scope="module",
    params=["lora", pytest.param("head", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)],
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    training = trainer(request.param, output_dir=str(folder))
    losses = training.train().losses
    return Whole(request.param, folder, losses, weights(training))


def require_resumes(whole: Whole, folder: Path, step: int) -> None:
    """Requires that a run resumes from the checkpoint of a step, and ends as the undisturbed one."""
    training = trainer(whole.kind, output_dir=str(folder), resume_from_checkpoint="latest")
    result = training.train()
    assert training.checkpoint == folder / "checkpoints" / str(step)
    np.testing.assert_array_equal(result.losses, whole.losses)
    for found, expected in zip(weights(training), whole.weights, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert steps_in(folder / "checkpoints") == [1, 2, 3, 4]


def test_a_run_whose_last_checkpoints_are_damaged_ends_as_the_undisturbed_one(whole: Whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    flip(largest(folder / "checkpoints" / "4"), 12345)
    flip(folder / "checkpoints" / "3" / "run" / "metadata", 77)
    require_resumes(whole, folder, 2)
    require_resumes(whole, folder, 4)


def test_a_run_of_an_older_version_ends_as_the_undisturbed_one(whole: Whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "4")
    for step in "123":
        edit(folder / "checkpoints" / step, lambda record: record.pop("date") and None, sealed=False)
    require_resumes(whole, folder, 3)


def test_a_run_with_nothing_but_damaged_checkpoints_is_refused_before_the_first_step(
    whole: Whole, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    for step in "1234":
        flip(largest(folder / "checkpoints" / step), 999)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    training = trainer(whole.kind, output_dir=str(folder), resume_from_checkpoint="latest")
    with pytest.raises(InputError, match="where all 4 are damaged: 4 "):
        training.train()
    training = trainer(whole.kind, resume_from_checkpoint=str(folder / "checkpoints" / "3"))
    with pytest.raises(InputError, match="There is no whole checkpoint before it"):
        training.train()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for step in "1234":
        flip(folder / "checkpoints" / step / "run" / "metadata", 77)
    with pytest.raises(InputError, match="where all 4 are damaged: 4 "):
        trainer(whole.kind, output_dir=str(folder), resume_from_checkpoint="latest")
