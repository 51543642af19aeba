"""A signal lets the step in hand finish; a second Ctrl-C does not wait, unless it is the first one sent on."""

import signal

import pytest

from gr.train import stopping
from gr.train.stopping import REPEATED_S, StopSignal

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def clock(monkeypatch):
    """What time it is: a list of one number of seconds."""
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def connected():
    """A lost connection ends this process, as it does without nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first", NUMBERS)
def test_the_first_signal_is_remembered_and_a_later_interrupt_ends_at_once(clock, connected, first):
    before = [signal.getsignal(number) for number in NUMBERS]
    with StopSignal() as stop:
        assert not stop.received
        signal.raise_signal(first)
        assert stop.received == first
        clock[0] += 0.9 * REPEATED_S
        signal.raise_signal(signal.SIGINT)  # torchrun sends the terminal's Ctrl-C on
        clock[0] += 0.2 * REPEATED_S
        signal.raise_signal(signal.SIGTERM)  # nobody is more than asked to stop
        assert stop.received == first
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_program_under_nohup_stays_deaf_to_a_lost_connection():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
