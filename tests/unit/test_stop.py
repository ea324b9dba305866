"""StopRequest: the first signal is recorded, a second soon after is ignored, and so are those of nohup."""

import signal
from collections.abc import Iterator
from signal import raise_signal
from types import SimpleNamespace

import pytest

from base.machine import STOP_SIGNALS
from model.parallel import ranks
from model.parallel.ranks import StopRequest


class Killed(Exception):
    """Stands for a signal's default action, which would end the tests."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test sets, and an exception instead of the end of the process."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: now.seconds))

    def killed(number: int) -> None:
        assert signal.getsignal(number) == signal.SIG_DFL
        raise Killed(number)

    monkeypatch.setattr(signal, "raise_signal", killed)
    return now


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_asks_for_a_save(number: signal.Signals) -> None:
    stop = StopRequest()
    assert not stop.requested
    raise_signal(number)
    assert stop.requested


def test_the_first_signal_says_what_happens(capfd: pytest.CaptureFixture[str]) -> None:
    for say in (False, True):
        StopRequest(say)
        raise_signal(signal.SIGINT)
        raise_signal(signal.SIGINT)
        printed = capfd.readouterr().err
        assert printed.count("then the run is saved; another Ctrl-C, after 5 s, ends it unsaved") == say


@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_a_second_signal_kills_but_not_at_once(second: signal.Signals, clock: SimpleNamespace) -> None:
    stop = StopRequest()
    raise_signal(signal.SIGTERM)
    for seconds in (0, 2, 3):  # since the one before
        clock.seconds += seconds
        raise_signal(second)
    assert stop.requested
    clock.seconds += 0.01
    with pytest.raises(Killed):
        raise_signal(second)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_what_was_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    stop = StopRequest()
    raise_signal(number)
    assert signal.getsignal(number) == signal.SIG_IGN and not stop.requested
    for other in set(STOP_SIGNALS) - {number}:
        raise_signal(other)
        assert stop.requested
