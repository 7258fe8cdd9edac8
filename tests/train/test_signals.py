"""Tests that the first signal is only noted, so that the run ends in order, and answered at once."""

import asyncio
import hashlib
import os
import signal
import threading
import time

import pytest

from jaxpack.train.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_the_second_acts_as_ever(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with StopSignal() as stop:
            assert not stop.received
            signal.raise_signal(number)
            assert stop.received == number
            assert acted == []
            signal.raise_signal(number)
            assert acted == [number]
        signal.raise_signal(number)
        assert len(acted) == 2
        signal.signal(number, signal.SIG_IGN)
        with StopSignal() as stop:
            signal.raise_signal(number)
            assert not stop.received
    finally:
        signal.signal(number, before)


def wait_as_for_a_device() -> None:
    """Waits in C, without the lock of the interpreter, for about a second, whatever signals come."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)


def send(*delays: float) -> None:
    """Sends signals to this process after these seconds."""
    for delay in delays:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_the_answer_does_not_wait_for_the_main_thread():
    answers, threads = [], threading.active_count()
    with StopSignal(lambda number: answers.append((number, time.monotonic()))) as stop:
        send(0.1)
        begin = time.monotonic()
        wait_as_for_a_device()
        end = time.monotonic()
        assert stop.received == signal.SIGINT
    ((number, answered),) = answers
    assert number == signal.SIGINT
    assert answered - begin < 0.5 * (end - begin)
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_a_second_signal_counts_although_the_first_still_waits():
    answers = []
    send(0.1, 0.3)
    with pytest.raises(KeyboardInterrupt), StopSignal(answers.append):
        wait_as_for_a_device()
    assert answers == [signal.SIGINT]


def test_other_signals_are_not_answered():
    answers, came = [], []
    before = signal.signal(signal.SIGUSR1, lambda *_: came.append(1))
    try:
        with StopSignal(answers.append) as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGUSR1)
        assert (answers, came, stop.received) == ([], [1, 1, 1], 0)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_loop_that_listens_to_signals_itself_goes_on_listening():
    async def run() -> tuple[int, list[int]]:
        heard = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set)
        answers = []
        with StopSignal(answers.append) as stop:
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGUSR1)
        await asyncio.wait_for(heard.wait(), 10)
        return stop.received, answers

    assert asyncio.run(run()) == (signal.SIGINT, [])


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGINT)

    def enter() -> None:
        with StopSignal():
            assert signal.getsignal(signal.SIGINT) is before

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert signal.set_wakeup_fd(-1) == -1
