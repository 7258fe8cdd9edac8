"""A file is the old one or the new one, and nothing between."""

import errno
import os
from pathlib import Path

import pytest

from jaxpack.errors import InputError
from jaxpack.files import replace_file


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
