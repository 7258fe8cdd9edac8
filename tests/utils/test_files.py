"""A folder appears whole or not at all; while a folder or file is replaced, the old or the new one is there."""

import errno
import itertools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxpack.errors import InputError
from jaxpack.utils.files import (
    from_home,
    held_folder,
    is_regular_file,
    kind_of,
    open_own_file,
    remove_leftovers,
    replace_file,
    replace_folder,
    require_data_file,
    require_free_folder,
    require_new_folder,
    require_regular_file,
    whole_file,
    whole_folder,
    write_new_file,
)


def write(path: Path) -> None:
    with whole_folder(path, "path") as folder:
        (folder / "file").write_text("whole")


@pytest.mark.parametrize("name", ["new", "deep/er/new", "x" * 250, "empty", "a/../new"])
def test_it_appears_with_what_was_written(name: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / name)
    assert [path.name for path in (tmp_path / name).resolve().iterdir()] == ["file"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_one_and_what_it_points_to_appears(exists: bool, tmp_path: Path):
    """A user may link to a folder on another disk."""
    target = tmp_path / "disk" / "folder"
    target.parent.mkdir()
    if exists:
        target.mkdir()
    (tmp_path / "link").symlink_to(target)
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (target / "file").read_text() == "whole"
    assert os.listdir(target.parent) == ["folder"]


def test_an_error_leaves_nothing(tmp_path: Path):
    (tmp_path / "empty").mkdir()

    def write_half(error: type[BaseException]) -> None:
        with whole_folder(tmp_path / "empty", "path") as folder:
            (folder / "file").write_text("half")
            raise error

    for error in (KeyError, KeyboardInterrupt, InputError):
        with pytest.raises(error):
            write_half(error)
    assert os.listdir(tmp_path) == ["empty"]
    assert os.listdir(tmp_path / "empty") == []


@pytest.mark.parametrize("name", ["x" * 300, "loop", "loop/below", "a\0b"])
def test_a_path_that_cannot_be_is_one_clear_error(name: str, tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="`output` must be a folder, got") as refused:
        require_free_folder(tmp_path / name, "output")
    assert len(str(refused.value)) < 400


def test_a_folder_that_may_not_be_looked_into_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Simulates the system's refusal, because root may look into any folder."""

    def denied(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(InputError, match=r"`output` must be a folder, got .*: Permission denied\."):
        require_free_folder(tmp_path / "new", "output")


def test_an_empty_folder_that_cannot_be_replaced_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for path in (Path(), Path("."), tmp_path):
        with pytest.raises(InputError, match=r"`merged` must be a folder that can be replaced.*the working folder"):
            require_new_folder(path, "merged")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    Path("disk").mkdir()
    with pytest.raises(InputError, match=r"`path` must be a folder that can be replaced.*disk', which is a mount"):
        write(tmp_path / "disk")
    require_free_folder(tmp_path / "disk", "output")  # other folders may appear in it
    write(tmp_path / "disk" / "merged")


class Killed(BaseException):
    pass


def write_two(folder: Path, text: str) -> None:
    with whole_folder(folder, "output") as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(text)


def test_a_folder_is_whole_wherever_its_replacement_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for number in itertools.count(1):  # killed before this call of `rename` or `rmtree`
        path = tmp_path / str(number) / "adapter"
        write_two(path, "old")
        mine = path.with_name("adapter.old")
        mine.mkdir()
        calls = itertools.count(1)

        def counted(function, number=number, calls=calls):
            def call(*args, **options):
                if next(calls) >= number:
                    raise Killed
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(Path.rename))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                replace_folder(lambda folder: write_two(folder, "new"), path)
                killed = False
            except Killed:
                killed = True
        remove_leftovers(path)
        assert sorted(path.parent.iterdir()) == [path, mine]
        (text,) = {(path / name).read_text() for name in ("a", "b")}
        ends.append(text)
        if not killed:
            break
    assert ends[0] == "old"
    assert ends[-1] == "new"
    assert len(ends) == 6


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deeper" / "file"
    for content in (b"old", b"older"):
        replace_file(path, content, "output")
        assert path.read_bytes() == content

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError) as refused:
        replace_file(path, b"new", "output")
    assert str(refused.value) == f"`output` must be writable, got '{path}': No space left on device."
    assert path.read_bytes() == b"older"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_held_by_one_at_a_time_and_left_as_it_was(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new"):
        there = folder.exists()
        for _ in range(2):
            with held_folder(folder, "output"):
                message = "`output` must not be in use, got .*, which another run uses"
                with pytest.raises(InputError, match=message), held_folder(folder, "output"):
                    pass
                assert folder.is_dir()
            assert folder.exists() == there
    with held_folder(tmp_path / "kept", "output"):
        (tmp_path / "kept" / "file").touch()
    assert (tmp_path / "kept" / "file").exists()


def test_a_process_that_is_killed_holds_no_folder(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from jaxpack.utils.files import held_folder\n"
        "with held_folder(Path(sys.argv[1]), 'output'): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(InputError), held_folder(tmp_path, "output"):
        pass
    process.kill()
    process.communicate()
    with held_folder(tmp_path, "output"):
        pass


def test_a_path_is_shown_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert from_home(tmp_path / "me/.cache/programs") == "~/.cache/programs"
    assert from_home(tmp_path / "memo") == str(tmp_path / "memo")


# A link that somebody left in the folder is never followed to a file elsewhere.


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    path.write_text("mine")
    return path


@pytest.mark.parametrize("exists", [True, False])
def test_cases_a_link_in_the_place_of_a_file_is_replaced(exists: bool, tmp_path: Path, victim: Path):
    target = victim if exists else victim.with_name("new")
    (tmp_path / "report.md").symlink_to(target)
    replace_file(tmp_path / "report.md", b"ours", "folder")
    assert not (tmp_path / "report.md").is_symlink()
    assert (tmp_path / "report.md").read_bytes() == b"ours"
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("exists", [True, False])
def test_cases_a_new_file_is_made_at_no_link(exists: bool, tmp_path: Path, victim: Path):
    target = victim if exists else victim.with_name("new")
    (tmp_path / "drawn.png").symlink_to(target)
    with pytest.raises(InputError, match="`picture` must be a new file"):
        write_new_file(tmp_path / "drawn.png", b"ours", "picture")
    assert os.listdir(tmp_path) == ["drawn.png", "elsewhere"] or len(os.listdir(tmp_path)) == 2
    assert os.listdir(victim.parent) == ["victim"]
    assert victim.read_text() == "mine"


def test_cases_a_new_file_never_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(path: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in ("linked", "written"):
        write_new_file(tmp_path / name, b"one", "output")
        with pytest.raises(InputError, match=r"`output` must be a new file, got .*, which exists"):
            write_new_file(tmp_path / name, b"two", "output")
        assert (tmp_path / name).read_bytes() == b"one"
        monkeypatch.setattr(Path, "hardlink_to", no_links)  # as on a file system without them
    assert sorted(os.listdir(tmp_path)) == ["linked", "written"]


def test_cases_temporary_names_cannot_be_predicted(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch):
    """The names that earlier versions used are links to a file elsewhere, and stay so."""
    names = (".report.md", ".adapter-new", ".adapter-old")
    for name in names:
        (tmp_path / name).symlink_to(victim)
    seen = set()

    def synced(number: int) -> None:
        seen.add(os.readlink(f"/proc/self/fd/{number}"))

    monkeypatch.setattr(os, "fsync", synced)
    for _ in range(2):
        replace_file(tmp_path / "report.md", b"ours", "folder")
        replace_folder(write, tmp_path / "adapter")
    assert len(seen) == 4
    assert all((tmp_path / name).is_symlink() for name in names)
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "adapter", "elsewhere", "report.md"])


@pytest.mark.parametrize("exists", [True, False])
def test_cases_a_link_in_the_place_of_a_folder_is_replaced(exists: bool, tmp_path: Path, victim: Path):
    (tmp_path / "adapter").symlink_to(victim.parent if exists else victim.with_name("new"))
    replace_folder(write, tmp_path / "adapter")
    assert not (tmp_path / "adapter").is_symlink()
    assert os.listdir(tmp_path / "adapter") == ["file"]
    assert os.listdir(victim.parent) == ["victim"]


@pytest.mark.parametrize("is_new", [True, False])
def test_cases_a_file_is_continued_through_no_link(is_new: bool, tmp_path: Path, victim: Path):
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match=r"(File exists|symbolic links)"):
        open_own_file(tmp_path / "metrics.jsonl", is_new=is_new)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):  # noqa: PT011 (it must not wait for a reader)
        open_own_file(tmp_path / "pipe", is_new=is_new)
    assert victim.read_text() == "mine"
    (tmp_path / "own").write_text("a")
    with open_own_file(tmp_path / "own", is_new=False) as file:
        file.write(b"b")
    assert (tmp_path / "own").read_text() == "ab"


def test_a_file_that_a_killed_process_left_is_removed_later(tmp_path: Path):
    for name in (".file-aaaa.partial", ".file-bbbb.partial", ".other-cccc.partial"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".file-aaaa.partial", (0, 0))
    replace_file(tmp_path / "file", b"", "output")
    assert sorted(os.listdir(tmp_path)) == [".file-bbbb.partial", ".other-cccc.partial", "file"]


# A pipe, a device or a link to nothing is told apart from a missing file, and is never opened.


def special(folder: Path) -> dict[str, Path]:
    paths = {name: folder / name for name in ("pipe", "socket", "folder", "link")}
    os.mkfifo(paths["pipe"])
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # the path of a socket must be short
        server.bind("socket")
    paths["folder"].mkdir()
    paths["link"].symlink_to("nowhere")
    return paths | {"device": Path("/dev/null")}


def test_cases_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = {"pipe": "a pipe", "socket": "a socket", "folder": "a folder", "link": "a link to nothing"}
    words["device"] = "a device"
    for name, path in special(tmp_path).items():
        assert kind_of(path) == words[name]
        with pytest.raises(InputError, match=f"must be a regular file, got {words[name]}"):
            is_regular_file(path)
        with pytest.raises(InputError, match=f"`data` must be an existing file, got .* which is {words[name]}"):
            require_regular_file(path, "data")
        if name != "pipe":
            with pytest.raises(InputError, match="`data` must be an existing file"):
                require_data_file(path, "data")
    require_data_file(tmp_path / "pipe", "data")
    (tmp_path / "file").touch()
    (tmp_path / "good").symlink_to("file")
    for name in ("file", "good"):  # the hub's cache is made of links to files
        assert is_regular_file(tmp_path / name)
        require_regular_file(tmp_path / name, "data")
    for absent in (tmp_path / "absent", tmp_path / "file" / "below"):
        assert kind_of(absent) is None
        assert not is_regular_file(absent)
        with pytest.raises(InputError, match=r"`data` must be an existing file, got .*(absent|below)'\."):
            require_data_file(absent, "data")
    for wrong in (tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(InputError, match="must be a path that can be read"):
            is_regular_file(wrong)


def write_in_parts(path: Path, content: bytes, then: Callable[[], None] = lambda: None) -> None:
    with whole_file(path, "output") as partial:
        partial.write_bytes(content)
        assert not path.exists()
        then()


def test_a_file_that_is_written_in_parts_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "model.bin"
    with pytest.raises(ZeroDivisionError):
        write_in_parts(path, b"half", lambda: print(1 / 0))
    assert list(tmp_path.iterdir()) == []
    write_in_parts(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert path.stat().st_mode & 0o077  # readable as the user's other files, unlike temporary ones
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_in_the_meantime_is_kept(tmp_path: Path):
    path, link = tmp_path / "model.bin", tmp_path / "link"
    with pytest.raises(InputError, match=r"`output` must be a new file, got .*, which exists"):
        write_in_parts(path, b"ours", lambda: path.write_text("theirs"))
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]
    link.symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="must be a new file in an existing folder"):
        write_in_parts(link, b"ours")
