"""What a check found: one line of the preflight's screen and of preflight.json."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "warning", "refused"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name, which no other finding of a report has: coverage train, alignment, audio clipping, shared
            speakers, memory training, ranks, disk.
        result: what was measured, for a person.
        verdict: `refused` stops the run, `warning` is shown, `ok` is as it should be.
        remedy: what the user can do; never empty unless the verdict is `ok`.
        facts: the figures behind `result`, as JSON values for preflight.json.
    """

    check: str
    result: str
    verdict: Verdict = "ok"
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.remedy or self.verdict == "ok", f"{self.check}: {self.verdict} without a remedy"


def worst_verdict(findings: Iterable[Finding]) -> Verdict:
    """`refused` if any is, else `warning` if any is, else `ok`."""
    verdicts = {finding.verdict for finding in findings}
    return next((verdict for verdict in ("refused", "warning") if verdict in verdicts), "ok")


def some_of(names: Sequence[str], limit: int, where: str = "") -> str:
    """The first so many names, and how many more there are; `where` says in which file all of them are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more{where}" if more > 0 else "")


def percent(share: float) -> str:
    """A share with two digits that count: 0.013 %, 4.2 %, 31 %."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
