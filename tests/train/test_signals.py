"""Tests that the first signal is only noted, so that the run ends in order."""

import signal

import pytest

from jaxpack.train.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_the_second_acts_as_ever(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with StopSignal() as stop:
            assert not stop.asked
            signal.raise_signal(number)
            assert stop.asked
            assert acted == []
            signal.raise_signal(number)
            assert acted == [number]
        signal.raise_signal(number)
        assert len(acted) == 2
        signal.signal(number, signal.SIG_IGN)
        with StopSignal() as stop:
            signal.raise_signal(number)
            assert not stop.asked
    finally:
        signal.signal(number, before)
