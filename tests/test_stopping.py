"""Requests to stop: what is noted, what a second Ctrl-C does, and the time that a stop may take."""

import os
import signal
import time

import pytest

import stopping
from errors import Stopped
from stopping import StopSignals


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)  # fmt: skip
def test_a_signal_is_noted_and_its_handler_given_back(
    number: signal.Signals, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    with StopSignals(None, 0.0) as stop:
        assert stop.requested == 0
        os.kill(os.getpid(), number)
        assert stop.requested == number
        stop.check()  # Nothing, before all ranks agree.
        stop.agreed = stop.requested
        with pytest.raises(Stopped, match=number.name) as stopped:
            stop.check()
        assert stopped.value.status == status
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before
    assert capfd.readouterr().err.count("finishing the update") == 1


def test_hours_are_over() -> None:
    with StopSignals(2.0, time.monotonic() - 7199) as stop:
        assert stop.requested == 0
    with StopSignals(2.0, time.monotonic() - 7201) as stop:
        stop.agreed = stop.requested
        with pytest.raises(Stopped, match="--max_hours are over") as stopped:
            stop.check()
    assert stopped.value.status == 143


def test_a_second_ctrl_c_stops_at_once_and_the_launchers_copy_of_the_first_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with StopSignals(None, 0.0) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGINT
        monkeypatch.setattr(stopping, "SECONDS_TO_SECOND_INTERRUPT", -1)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 7)])
def test_what_takes_too_long_is_left_where_it_is(
    number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler's early warning has no deadline."""
    monkeypatch.setattr(stopping, "SECONDS_TO_STOP", 0.2)
    pid = os.fork()
    if not pid:
        with StopSignals(None, 0.0):
            os.kill(os.getpid(), number)
            time.sleep(1.0)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
