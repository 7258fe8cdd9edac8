"""Gives the tests of predictions a host with free memory, however much of it other programs take."""

import pytest


@pytest.fixture(autouse=True)
def host_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxpack.planning.choose.available_host_bytes", lambda: 256 * 2**30)
