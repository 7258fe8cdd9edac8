"""A folder is the old one or the new one, whole, wherever a process is killed that replaces it."""

import itertools
import shutil
from pathlib import Path

import pytest

from jaxpack.files import remove_leftovers, replace_folder, whole_folder


class Killed(BaseException):
    pass


def write(folder: Path, text: str) -> None:
    with whole_folder(folder, "output") as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(text)


def test_a_folder_is_whole_wherever_its_replacement_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for number in itertools.count(1):  # of the call that it is killed before: to rename, or to delete a tree
        path = tmp_path / str(number) / "adapter"
        write(path, "old")
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
                replace_folder(lambda folder: write(folder, "new"), path)
                killed = False
            except Killed:
                killed = True
        remove_leftovers(path)
        assert sorted(path.parent.iterdir()) == [path, mine]
        (text,) = {(path / name).read_text() for name in ("a", "b")}
        ends.append(text)
        if not killed:
            break
    assert ends[0] == "old" and ends[-1] == "new" and len(ends) == 6
