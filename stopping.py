"""A run that is asked to stop: by Ctrl-C, by a scheduler that wants the machine back, or by --max_hours.

The request is only noted where it arrives. The loop asks for it between updates and between the batches of an
evaluation, all ranks agree, and the run saves a checkpoint and ends.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import types

from errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# The launcher kills ranks that are still there 30 s after it has passed a signal on.
SECONDS_TO_STOP = 24
# The launcher passes a terminal's Ctrl-C on, which the ranks have had already: that is no second one.
SECONDS_TO_SECOND_INTERRUPT = 2
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopSignals:
    """Notes requests to stop while the block runs; a second Ctrl-C ends it at once by KeyboardInterrupt.

    Attributes:
        agreed: number of the signal that all ranks have agreed to stop for, 0 for none; set by the loop.
    """

    def __init__(
        self,
        max_hours: float | None,
        started_at: float,
        promise: str = "finishing the update, then saving a checkpoint",
        without: str = "without a new checkpoint, the last one is good",
    ) -> None:
        """A run that has not been asked to stop.

        Args:
            max_hours: since `started_at`, after which it stops by itself.
            started_at: a reading of time.monotonic().
            promise: what a request is answered with.
            without: how it ends where that takes too long.
        """
        self.agreed = 0
        self._promise, self._without = promise, without
        self._stops_at = None if max_hours is None else started_at + 3600 * max_hours
        self._signal, self._signalled_at = 0, 0.0
        self._deadline: threading.Timer | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._deadline is not None:
            self._deadline.cancel()

    @property
    def requested(self) -> int:
        """Number of the signal that this process has had, SIGALRM's when --max_hours are over, else 0."""
        if not self._signal and self._stops_at is not None and time.monotonic() >= self._stops_at:
            return int(signal.SIGALRM)
        return self._signal

    def check(self) -> None:
        """Raise what all ranks have agreed on.

        Raises:
            Stopped: they have.
        """
        if self.agreed:
            reason = "--max_hours are over" if self.agreed == signal.SIGALRM else signal.Signals(self.agreed).name
            raise Stopped(reason, 130 if self.agreed == signal.SIGINT else 143)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        now = time.monotonic()
        if self._signal:
            if number == signal.SIGINT and now - self._signalled_at > SECONDS_TO_SECOND_INTERRUPT:
                raise KeyboardInterrupt
            return
        self._signal, self._signalled_at = int(number), now
        _say(f"{signal.Signals(number).name}: {self._promise}")
        if number != signal.SIGUSR1:  # which schedulers send minutes ahead
            self._deadline = threading.Timer(SECONDS_TO_STOP, self._give_up)
            self._deadline.daemon = True
            self._deadline.start()

    def _give_up(self) -> None:
        """An update, evaluation or save that takes too long is left where it is: what lies on the disk is whole."""
        _say(f"not done within {SECONDS_TO_STOP} s: ending {self._without}")
        os._exit(130 if self._signal == signal.SIGINT else 143)


def ignore_stop_signals(_: int = 0) -> None:
    """For loading processes: a signal to the whole group must not take the loader from under an update."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to send this process a signal when its parent ends (Linux only)."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # It ended before the request was in place.
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """End with `accelerate launch`, which does not pass SIGTERM on (trap 26)."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        end_with_parent(signal.SIGTERM)


def end_loaders() -> None:
    """End loading processes that a failed run has left behind, before Python itself tries to.

    It would send them SIGTERM, which they do not hear, and wait for them for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise about the very deaths asked for
    for process in multiprocessing.active_children():
        process.kill()


def _say(message: str) -> None:
    # Not print: a handler may interrupt one.
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # `2>&1 | tee` ends at the same Ctrl-C: nobody reads, the save goes on
            os.write(sys.__stderr__.fileno(), f"\n{message}\n".encode())
