"""Code that never ends is ended, and other alarms go off when they should."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from pipeline.tensors.time_limit import time_limit


class TooLong(Exception):
    pass


def test_what_takes_too_long_is_ended() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TooLong), time_limit(0.05, TooLong()):
        sum(0 for _ in iter(int, 1))
    assert signal.getsignal(signal.SIGALRM) is before


def test_what_ends_in_time_is_left_alone() -> None:
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)  # pytest has a timer of its own
    try:
        with time_limit(60, TooLong()):
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)


def test_an_alarm_that_was_set_before_goes_off() -> None:
    heard = threading.Event()
    previous = signal.signal(signal.SIGALRM, lambda *_: heard.set())
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(TooLong), time_limit(0.02, TooLong()):
            time.sleep(10)
        assert not heard.is_set()
        assert heard.wait(10)
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


def test_a_thread_is_not_limited() -> None:
    ended = threading.Event()

    def work() -> None:
        with time_limit(0.01, TooLong()):
            time.sleep(0.05)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended.is_set()
