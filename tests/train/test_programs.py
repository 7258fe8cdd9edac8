"""Tests that programs are compiled in their order in a thread, and that errors are raised where they are needed."""

import threading
from collections.abc import Callable
from typing import Any, cast

import jax
import pytest

from jaxpack.train.programs import Programs
from jaxpack.utils.compilation_cache import ProgramCache

OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4.55GiB")


class Fake:
    """Stands for a lowered program; compiling it calls a function."""

    def __init__(self, compile: Callable[[], object]):
        self.compile = compile


def programs_of(**functions: Callable[[], object]) -> Programs:
    programs = Programs(ProgramCache("none"))
    for name, function in functions.items():
        programs.add(name, cast(Any, Fake(function)))
    return programs


def failing(*errors: Exception | None) -> Callable[[], object]:
    """Returns a function that raises these errors in turn, and returns "compiled" for None."""
    left = list(errors)

    def compile() -> str:
        if (error := left.pop(0)) is not None:
            raise error
        return "compiled"

    return compile


def test_an_error_is_raised_for_its_own_program_only():
    programs = programs_of(good=lambda: "compiled", bad=failing(RuntimeError("no")), other=lambda: "compiled")
    assert programs.get("good") == programs.get("other") == "compiled"
    with pytest.raises(RuntimeError, match="no"):
        programs.get("bad")
    programs.close()
    assert (len(programs), programs.num_ready, programs.is_busy) == (3, 3, False)


def test_memory_that_ran_out_beside_steps_is_asked_for_once_more():
    programs = programs_of(
        once=failing(OUT_OF_MEMORY, None), twice=failing(OUT_OF_MEMORY, OUT_OF_MEMORY), before=failing(OUT_OF_MEMORY)
    )
    assert programs.get("once") == programs.get("once") == "compiled"
    for name, beside_steps in (("twice", True), ("before", False)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            programs.get(name, beside_steps=beside_steps)
    assert not programs.is_busy
    programs.close()


def test_the_end_waits_for_the_program_that_is_being_compiled_and_begins_no_other(monkeypatch, capsys):
    monkeypatch.setattr("jaxpack.train.programs._NOTICED", 0.01)
    begun, may_end = threading.Event(), threading.Event()
    compiled: list[str] = []

    def slow() -> None:
        begun.set()
        may_end.wait(timeout=60)
        compiled.append("slow")

    threads = threading.active_count()
    programs = programs_of(slow=slow, other=lambda: compiled.append("other"))
    begun.wait(timeout=60)
    threading.Timer(0.2, may_end.set).start()
    programs.close()
    assert compiled == ["slow"]
    assert "waiting for the end of a compilation" in capsys.readouterr().err
    programs.close()
    assert capsys.readouterr().err == ""
    assert threading.active_count() == threads


def test_only_a_noticeable_wait_beside_steps_is_told(monkeypatch, capsys):
    monkeypatch.setattr("jaxpack.train.programs._NOTICED", 0.01)
    for beside_steps in (True, False):
        may_end = threading.Event()
        programs = programs_of(**{"a step of 8 tokens": lambda may_end=may_end: may_end.wait(timeout=60)})
        threading.Timer(0.2, may_end.set).start()
        programs.get("a step of 8 tokens", beside_steps=beside_steps)
        programs.get("a step of 8 tokens")  # It is ready now.
        programs.close()
        told = capsys.readouterr().err
        assert told.count("waiting until the program for a step of 8 tokens is compiled") == int(beside_steps)
