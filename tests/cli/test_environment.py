"""Tests what the commands set in their environment."""

import os

import pytest

from jaxpack import cli
from jaxpack.constants import MEMORY_FRACTION, PINNED_LIMIT

NAME, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {NAME: str(MEMORY_FRACTION)}),
        ({NAME: "0.5"}, {NAME: "0.5"}),
        ({OLD: "0.5"}, {OLD: "0.5"}),  # jax refuses both together
    ],
    ids=["unset", "set", "set by its old name"],
)
def test_a_command_takes_most_of_the_memory_unless_the_user_says_how_much(given, expected, monkeypatch):
    # Set and deleted, so that pytest restores what the command sets.
    for name in (NAME, OLD):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["jaxpack", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert {name: os.environ[name] for name in (NAME, OLD) if name in os.environ} == expected


@pytest.mark.parametrize(
    ("free", "given", "expected"),
    [(200, "", "160"), (200, "90", "90"), (70, "", ""), (None, "", "")],
    ids=["much is free", "set", "less than XLA pins anyway", "not known"],
)
def test_a_command_lets_xla_pin_most_of_the_free_host_memory(free, given, expected, monkeypatch):
    monkeypatch.setattr(cli, "available_host_bytes", lambda: free and free * 2**30)
    monkeypatch.setenv(PINNED_LIMIT, given)
    monkeypatch.setenv(NAME, "0.5")
    monkeypatch.setattr("sys.argv", ["jaxpack", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ[PINNED_LIMIT] == expected
