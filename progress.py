"""Progress of long work: a bar with rate and ETA on a terminal, plain lines when piped."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

SECONDS_BETWEEN_PLAIN_LINES = 10.0
# Of tables where no terminal says how wide it is.
COLUMNS_WITHOUT_TERMINAL = 140


class Progress:
    """Count `total` units of work on stderr; use as a context manager.

    `enabled=False` (every process but the main one) prints nothing. `audio_seconds` given to `advance` adds the
    hours of audio to the display. One inside another shows its bar below the outer one's. `seconds_left` knows better
    than the rate when the work will be over, where not all of it is of one kind.
    """

    _display: ClassVar[RichProgress | None] = None

    def __init__(
        self, description: str, total: int, unit: str, enabled: bool = True, start: int = 0,
        seconds_left: Callable[[], float | None] | None = None,
    ) -> None:  # fmt: skip
        self.description, self.total, self.unit, self.enabled = description, total, unit, enabled
        self.start, self.audio_seconds = start, 0.0
        self.done: float = start
        self._started_at = self._last_line_at = time.monotonic()
        self._bar: RichProgress | None = None
        self._seconds_left = self._left_at_this_rate if seconds_left is None else seconds_left

    def __enter__(self) -> "Progress":
        self._started_at = self._last_line_at = time.monotonic()
        if self.enabled and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TextColumn("{task.fields[eta]}"),
            )
            self._is_outer = Progress._display is None
            if self._is_outer:
                Progress._display = RichProgress(*columns, console=Console(stderr=True))
                Progress._display.start()
            self._bar = Progress._display
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.done, status="", eta="")
        return self

    def expect(self, total: int) -> None:
        """The work has turned out to be of another size."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def advance(self, count: float = 1, audio_seconds: float = 0.0, note: str = "") -> None:
        """Add `count` finished units; `note` is shown behind the rate (a loss, a WER)."""
        self.done += count
        self.audio_seconds += audio_seconds
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, status=self._status(note), eta=self._eta())
        elif self.enabled and time.monotonic() - self._last_line_at >= SECONDS_BETWEEN_PLAIN_LINES:
            self._last_line_at = time.monotonic()
            say(self._line(note), sys.stderr)

    def print(self, text: str) -> bool:
        """Print a line above the bar on stdout; nothing on a disabled progress. False when nobody reads it."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return True
        return not self.enabled or say(text, sys.stdout)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is None:
            return
        if self._is_outer:
            self._bar.stop()
            Progress._display = None
        else:
            self._bar.remove_task(self._task)

    def _rate(self) -> float:
        return (self.done - self.start) / max(time.monotonic() - self._started_at, 1e-9)

    def _status(self, note: str) -> str:
        hours = f", {self.audio_seconds / 3600:.2f} h of audio" if self.audio_seconds else ""
        return f"{self._rate():.1f} {self.unit}/s{hours}{', ' + note if note else ''}"

    def _line(self, note: str) -> str:
        share = self.done / max(self.total, 1)
        return f"{self.description}: {self.done:.0f}/{self.total} ({share:.0%}), {self._status(note)}, {self._eta()}"

    def _left_at_this_rate(self) -> float:
        return (self.total - self.done) / max(self._rate(), 1e-9)

    def _eta(self) -> str:
        seconds = self._seconds_left()
        return "ETA unknown" if seconds is None else f"ETA {format_seconds(seconds)}"


def print_table(table: Table) -> None:
    """Print on stdout, as wide as the terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = COLUMNS_WITHOUT_TERMINAL
    with console.capture() as printed:  # rich would end the process where the reader is gone
        console.print(table)
    say(printed.get().removesuffix("\n"), sys.stdout)


def say(text: str, stream: TextIO) -> bool:
    """Print a line; a reader that is gone (`| tee` after Ctrl-C, `| head`) costs the line and not the run.

    Returns:
        Whether the line was written.
    """
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        return False
    return True


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
