"""Where the time of a run goes, and when it will be over."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
# Columns of the log. `save` is checkpoints and model/; what is in none of them is the start of the run.
PHASES = ("data", "compute", "communication", "evaluation", "save")
PHASE_COLUMNS = tuple(f"{phase}_seconds" for phase in PHASES)


class Clock:
    """Divides the time of the first process, as its host sees it, among phases; one inside another stops the outer.

    A GPU works while its host goes on: what it still has to do counts where the host waits for it, mostly as compute.

    Attributes:
        seconds: of each phase since the last row of the log.
        spent: of each phase by this process.
    """

    def __init__(self, pending: list[float]) -> None:
        """Args: pending seconds of the phases, in their order; a resumed run goes on from there."""
        self.seconds = dict(zip(PHASES, pending, strict=True))
        self.spent = dict.fromkeys(PHASES, 0.0)
        self._phase: str | None = None
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block belongs to this phase."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time until each is there belongs to `data`."""
        iterator = iter(items)
        while True:
            with self.phase("data"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def read(self) -> list[float]:
        """Seconds of each phase up to now."""
        self._switch(self._phase)
        return list(self.seconds.values())

    def clear(self) -> None:
        """Begin the next row of the log."""
        self._switch(self._phase)
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def _switch(self, phase: str | None) -> None:
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
            self.spent[self._phase] += now - self._since
        self._phase, self._since = phase, now


@dataclass
class Work:
    """What this process has done, or what a run still has to do.

    Attributes:
        updates: of the model.
        eval_seconds: of audio that is scored.
        saves: checkpoints.
    """

    updates: int = 0
    eval_seconds: float = 0.0
    saves: int = 0


def seconds_left(done: Work, left: Work, spent: Mapping[str, float], evaluation_cost: float) -> float | None:
    """Until the end of a run, at the pace of this process; None before its first update.

    Args:
        done: by this process.
        left: for it to do.
        spent: seconds of each phase in this process.
        evaluation_cost: updates that a second of audio in an evaluation is worth, until one was timed.
    """
    if not done.updates:
        return None
    per_update = (spent["data"] + spent["compute"] + spent["communication"]) / done.updates
    timed = done.eval_seconds > 0
    per_eval_second = spent["evaluation"] / done.eval_seconds if timed else evaluation_cost * per_update
    per_save = spent["save"] / max(done.saves, 1)
    return left.updates * per_update + left.eval_seconds * per_eval_second + left.saves * per_save


def describe_cost(cost: Mapping[str, float]) -> str:
    """One line for the screen.

    Args:
        cost: `audio_hours_per_hour`, `padding_fraction`, PHASE_COLUMNS and `elapsed_seconds` of a run.
    """
    elapsed = max(cost["elapsed_seconds"], 1e-9)
    seconds = dict(zip(PHASES, (cost[name] for name in PHASE_COLUMNS), strict=True))
    seconds["start and checks"] = max(elapsed - sum(seconds.values()), 0.0)
    shares = ", ".join(f"{name} {value / elapsed:.1%}" for name, value in seconds.items())
    speed, padding = cost["audio_hours_per_hour"], cost["padding_fraction"]
    return f"{speed:.2f} hours of audio per hour, {padding:.1%} padding; of the time: {shares}"
