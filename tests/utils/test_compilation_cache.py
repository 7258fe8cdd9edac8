"""Compiled programs are kept in the right folder and found again, unless others can have changed them."""

import math
import os
import random
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxpack.utils.compilation_cache import ProgramCache, default_folder, size_of

SETTINGS = [
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
]


def lowered(factor: float) -> jax.stages.Lowered:
    """Lowers a new program, so that no compilation of it is in memory."""
    return jax.jit(lambda x: jnp.tanh(x) * factor).lower(jax.ShapeDtypeStruct((8,), jnp.float32))


def kept(folder: Path | str) -> set[str]:
    return {str(path) for path in Path(folder).rglob("*-cache")}


@pytest.fixture
def own_folder(tmp_path: Path) -> Iterator[Path]:
    """Sets JAX's compilation cache as a user would, and yields its folder."""
    folder = tmp_path / "own"
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_a_program_is_found_by_the_next_cache_of_the_same_folder_and_by_no_other(tmp_path: Path):
    found = []
    for name in ("a", "a", "b"):
        cache = ProgramCache(str(tmp_path / name))
        with cache.in_use():
            program = cache.compile(lowered(3.0))
            cache.compile(lowered(4.0))
        assert float(program(jnp.ones(8))[0]) == pytest.approx(3 * math.tanh(1))
        found.append(cache.found)
    assert found == [0, 2, 0]


def test_what_is_compiled_around_it_is_not_kept_and_jax_is_set_as_before(tmp_path: Path):
    before = [getattr(jax.config, name) for name in SETTINGS]
    cache = ProgramCache(str(tmp_path))
    lowered(5.0).compile()

    def interrupted() -> None:
        with cache.in_use():
            lowered(6.0).compile()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(kept(tmp_path)) == 1
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    lowered(7.0).compile()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    assert len(kept(tmp_path)) == 1
    assert [getattr(jax.config, name) for name in SETTINGS] == before


def test_caches_in_use_by_several_threads_leave_jax_set_as_before(tmp_path: Path):
    before = [getattr(jax.config, name) for name in SETTINGS]
    both = threading.Barrier(2)

    def compile_in(folder: Path, factor: float) -> None:
        both.wait()
        with ProgramCache(str(folder)).in_use():
            lowered(factor).compile()

    folders = tmp_path / "a", tmp_path / "b"
    threads = [threading.Thread(target=compile_in, args=(folder, 8.0 + i)) for i, folder in enumerate(folders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(kept(folder)) for folder in folders] == [1, 1]
    assert [getattr(jax.config, name) for name in SETTINGS] == before


def test_a_cache_beside_another_thread_s_is_in_the_user_s_folder(tmp_path: Path):
    caches: list[ProgramCache] = []
    thread = threading.Thread(target=lambda: caches.append(ProgramCache("auto")))
    with ProgramCache(str(tmp_path)).in_use():
        thread.start()
        thread.join(timeout=0.2)
    thread.join()
    assert caches[0].folder == str(default_folder())


def test_the_folder_that_jax_is_set_to_comes_before_the_default(own_folder: Path):
    cache = ProgramCache("auto")
    assert cache.folder == str(own_folder)
    before = kept(default_folder())
    with cache.in_use():
        cache.compile(lowered(8.0))
    lowered(9.0).compile()  # JAX still uses its own folder afterwards
    assert len(kept(own_folder)) == 2
    assert kept(default_folder()) == before


def test_a_folder_that_is_named_comes_before_the_one_that_jax_is_set_to(own_folder: Path, tmp_path: Path):
    lowered(10.0).compile()
    cache = ProgramCache(str(tmp_path / "named"))
    with cache.in_use():
        cache.compile(lowered(11.0))
    lowered(12.0).compile()
    assert (len(kept(own_folder)), len(kept(tmp_path / "named"))) == (2, 1)


def test_none_keeps_nothing(own_folder: Path):
    cache = ProgramCache("none")
    with cache.in_use():
        cache.compile(lowered(13.0))
    assert kept(own_folder) == set()


def test_by_default_programs_are_kept_in_the_cache_home(
    cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert ProgramCache("auto").folder == str(cache_home / "jaxpack" / "programs")
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/path"):  # the XDG specification says to ignore these
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_folder() == tmp_path / ".cache" / "jaxpack" / "programs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ProgramCache("auto").folder == str(tmp_path / ".cache" / "jaxpack" / "programs")
    assert default_folder().stat().st_mode & 0o077 == 0  # programs there are run: only the owner may write


def test_a_folder_that_cannot_be_written_to_is_a_warning_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").touch()
    cache = ProgramCache(str(tmp_path / "file" / "programs"))
    assert cache.folder is None
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert f"cannot be kept in {tmp_path}/file/programs: Not a directory" in shown
    with cache.in_use():
        cache.compile(lowered(14.0))
    assert cache.found == 0


# Programs of others, and damaged ones.


def compiled(folder: Path, factor: float) -> int:
    """Compiles a program with a cache in a folder, checks its result, and returns how many programs were found."""
    cache = ProgramCache(str(folder))
    with cache.in_use():
        program = cache.compile(lowered(factor))
    assert float(program(jnp.ones(8))[0]) == pytest.approx(factor * math.tanh(1))
    return cache.found


def cut(file: Path) -> None:
    os.truncate(file, 100)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def garbage(file: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(5000))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def garbage_within(file: Path) -> None:
    """Is a good archive of a bad program."""
    file.write_bytes(zlib.compress(b"\0\0\0\1" + bytes(100)))


@pytest.mark.parametrize("has_checksum", [True, False])
@pytest.mark.parametrize("damage", [cut, empty, garbage, flip, garbage_within])
def test_cases_a_damaged_program_is_replaced_with_one_sentence(
    damage: Callable[[Path], None], has_checksum: bool, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert compiled(tmp_path, 15.0) == 0
    (file,) = map(Path, kept(tmp_path))
    damage(file)
    if not has_checksum:  # as in a folder of JAX's own, or after a kill
        (checksum,) = tmp_path.glob("*.crc32")
        checksum.unlink()
    capsys.readouterr()
    assert compiled(tmp_path, 15.0) == 0
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "damaged" in shown
    assert "compiled again" in shown
    if damage is garbage_within and not has_checksum:  # JAX finds out when it has loaded it, and then writes nothing
        assert compiled(tmp_path, 15.0) == 0
    assert compiled(tmp_path, 15.0) == 1  # the new one is good
    assert capsys.readouterr().err == ""


def test_cases_a_damaged_program_costs_no_other_program(tmp_path: Path):
    for factor in (20.0, 21.0):
        assert compiled(tmp_path, factor) == 0
    files = sorted(map(Path, kept(tmp_path)))
    garbage_within(files[0])
    files[0].with_name(files[0].name + ".crc32").unlink()
    assert compiled(tmp_path, 20.0) + compiled(tmp_path, 21.0) == 1
    assert compiled(tmp_path, 20.0) + compiled(tmp_path, 21.0) == 1
    assert compiled(tmp_path, 20.0) + compiled(tmp_path, 21.0) == 2


def test_cases_other_warnings_of_a_compilation_are_still_shown(tmp_path: Path):
    class Lowered:
        def compile(self) -> str:
            warnings.warn("of the user's own function", UserWarning, stacklevel=1)
            return "program"

    cache = ProgramCache(str(tmp_path))
    with cache.in_use(), pytest.warns(UserWarning, match="of the user's own function"):
        assert cache.compile(Lowered()) == "program"


def test_cases_a_thread_that_compiles_leaves_warnings_and_hits_of_other_threads_alone(tmp_path: Path):
    is_compiling, may_end = threading.Event(), threading.Event()

    class Lowered:
        def compile(self) -> str:
            is_compiling.set()
            may_end.wait(timeout=60)
            return "program"

    cache = ProgramCache(str(tmp_path))
    thread = threading.Thread(target=cache.compile, args=(Lowered(),))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread.start()
        is_compiling.wait(timeout=60)
        read_error = "Error reading persistent compilation cache entry for 'jit_mine': it is damaged"
        warnings.warn(read_error, UserWarning, stacklevel=1)
        jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
        within = list(caught)
        may_end.set()
        thread.join()
    assert [str(warning.message) for warning in within] == [read_error]
    assert cache.found == 0


def by_another_user(path: Path) -> None:
    os.chown(path, 12345, 12345, follow_symlinks=False)


def writable_by_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def writable_by_a_group(path: Path) -> None:
    os.chown(path, os.geteuid(), 12345)
    path.chmod(path.stat().st_mode | 0o020)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")


@as_root
@pytest.mark.parametrize("change", [by_another_user, writable_by_all, writable_by_a_group, linked, piped])
def test_cases_a_program_that_others_can_have_written_is_not_run(
    change: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert compiled(tmp_path, 16.0) == 0
    (file,) = map(Path, kept(tmp_path))
    change(file)
    capsys.readouterr()
    assert compiled(tmp_path, 16.0) == 0
    shown = capsys.readouterr().err
    assert shown == (
        f"compiled programs that others could have written are deleted from {tmp_path}, and compiled again: 1\n"
    )
    assert compiled(tmp_path, 16.0) == 1


@as_root
@pytest.mark.parametrize("change", [by_another_user, writable_by_all, writable_by_a_group])
@pytest.mark.parametrize("which", ["programs", "."])
def test_cases_a_folder_that_others_can_write_to_is_not_used(
    which: str, change: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "mine" / "programs"
    assert compiled(folder, 17.0) == 0
    assert folder.parent.stat().st_mode & 0o077 == 0
    change(folder.parent / which)
    capsys.readouterr()
    assert compiled(folder, 17.0) == 0
    shown = capsys.readouterr().err
    assert shown.startswith(f"compiled programs cannot be kept in {folder}: ")
    assert shown.endswith("; each run compiles them again\n")
    assert shown.count("\n") == 1
    assert len(kept(folder)) == 1


@as_root
def test_a_folder_within_one_that_others_can_write_to_is_used_if_they_cannot_rename_it(tmp_path: Path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    for found in (0, 1):
        assert compiled(tmp_path / "tmp" / "programs", 18.0) == found


def test_cases_the_folder_that_jax_is_set_to_is_checked_too(own_folder: Path, capsys: pytest.CaptureFixture):
    lowered(19.0).compile()
    own_folder.chmod(0o777)
    cache = ProgramCache("auto")
    assert cache.folder is None
    assert "others can write to it" in capsys.readouterr().err
    with cache.in_use():
        cache.compile(lowered(19.0))
    assert cache.found == 0


def test_cases_a_link_to_a_folder_is_followed_once(tmp_path: Path):
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("disk")
    assert ProgramCache(str(tmp_path / "link")).folder == str(tmp_path / "disk")


def test_the_size_of_a_folder_is_that_of_all_files_in_it(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    for name, size in (("a", 3), ("inner/b", 40)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert size_of(str(tmp_path)) == 43
