"""Tests that JSON of somebody else is read in bounded time and memory, and that nothing in it can be read two ways."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from jaxpack.errors import InputError
from jaxpack.utils.json_file import parse_json, read_json

REFUSED = {
    "a key twice": (b'{"r": 8, "lora_alpha": 16, "r": 64}', "the key 'r' occurs twice in one object"),
    "a key twice within": (b'{"a": [{"b": 1, "b": 1}]}', "the key 'b' occurs twice in one object"),
    "a key twice in other spelling": (b'{"a": 1, "\\u0061": 2}', "the key 'a' occurs twice in one object"),
    "a control character in a key": (b'{"\\u001b[31m": 1, "\\u001b[31m": 2}', r"the key '\x1b[31m' occurs twice"),
    "NaN": (b'{"a": NaN}', "it has the number NaN, which is not finite"),
    "infinity": (b'{"a": [-Infinity]}', "it has the number -Infinity, which is not finite"),
    "a number that becomes infinite": (b'{"rope_theta": 1e999}', "it has the number 1e999, which is not finite"),
    "lists within lists": (b"[" * 100_000, "it is nested too deeply"),
    "objects within objects": (b'{"a":' * 100_000, "it is nested too deeply"),
    "a number of many digits": (b'{"a": ' + b"9" * 10_000 + b"}", "Exceeds the limit (4300 digits) for integer string"),
    "nothing": (b"", "Expecting value"),
    "no UTF-8": (b'{"a": "\xff"}', "'utf-8' codec can't decode byte"),
    "too many bytes": (b'{"a": "' + b"x" * 2000 + b'"}', "it has more than 1,000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cases_json_that_is_refused(name: str, tmp_path: Path):
    content, why = REFUSED[name]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    limit = 1000 if "bytes" in name else 1 << 20
    with pytest.raises(InputError) as refused:
        read_json(path, max_bytes=limit)
    assert str(refused.value).startswith(f"{path} must be a JSON file, got one that cannot be read: {why}")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("content", ["[]", "7", "null", '"text"'])
def test_cases_json_that_is_no_object(content: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="must hold a JSON object, got "):
        read_json(tmp_path / "config.json")


def test_equal_keys_in_different_objects_are_read(tmp_path: Path):
    content = {"a": {"b": 1.5, "c": [1e30, -1e-400, True, None]}, "b": {"a": {"a": {"a": 1}}}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "config.json") == content


def test_cases_a_file_of_gigabytes_is_not_read(tmp_path: Path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 100 << 30)  # a sparse file
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="it has more than 16,777,216 bytes"):
            read_json(path)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "device", "absent"])
def test_cases_only_a_regular_file_is_opened(kind: str, tmp_path: Path):
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.symlink_to("nowhere" if kind == "link" else "/dev/zero")
    with pytest.raises(InputError, match=f"{path} must be a (regular|JSON) file, got "):
        read_json(path)


def test_numbers_that_are_not_finite_can_be_allowed():
    assert parse_json('{"a": Infinity}', finite=False) == {"a": float("inf")}
    with pytest.raises(ValueError, match="occurs twice"):
        parse_json('{"a": 1, "a": 1}', finite=False)
