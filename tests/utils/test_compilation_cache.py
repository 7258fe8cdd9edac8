"""Compiled programs are kept in the right folder and found again, and a user's own compilations are left alone."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator
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


def test_a_damaged_file_is_a_warning(tmp_path: Path):
    for expected in (contextlib.nullcontext(), pytest.warns(UserWarning, match="Error reading")):
        cache = ProgramCache(str(tmp_path))
        with cache.in_use(), expected:
            assert cache.compile(lowered(15.0))(jnp.ones(8)).shape == (8,)
        assert cache.found == 0
        (file,) = kept(tmp_path)
        os.truncate(file, 100)


def test_the_size_of_a_folder_is_that_of_all_files_in_it(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    for name, size in (("a", 3), ("inner/b", 40)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert size_of(str(tmp_path)) == 43
