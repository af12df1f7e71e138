"""What a run has cost and will cost, from the rows of its log."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clock import PHASES

Row = Mapping[str, Any]

# What the phases of a run's clock are.
MEANINGS = dict(
    zip(PHASES, ("waiting for data", "computing", "waiting for other processes", "evaluating", "saving"), strict=True)
)


@dataclass(frozen=True)
class Cost:
    """Figures of a run; None where the log does not say.

    Attributes:
        step: optimizer steps done.
        total_steps: of the whole run.
        elapsed_seconds: of the run, resumes and, once it is finished, the last scoring included.
        audio_hours_per_hour: trained on per hour of all that; None until the run is finished.
        audio_rate: seconds of audio that a second of updates trains on, mean over that time.
        utterance_rate: utterances per second of updates.
        padding_fraction: of what was computed; mean over updates until the run is finished.
        evaluations: how many.
        time_shares: share of `elapsed_seconds` by what it went into.
        remaining_seconds: at the pace so far, evaluations included; None for a finished run.
        peak_memory_mb: the highest.
    """

    step: int
    total_steps: int | None
    elapsed_seconds: float | None
    audio_hours_per_hour: float | None
    audio_rate: float | None
    utterance_rate: float | None
    padding_fraction: float | None
    evaluations: int
    time_shares: dict[str, float]
    remaining_seconds: float | None
    peak_memory_mb: float | None


def measure_cost(log: Sequence[Row], config: Row, results: Row) -> Cost:
    """Of a run.

    Args:
        log: rows of training_log.csv, at least one.
        config: config.yaml, or empty.
        results: train_results.json; empty for a run that has not finished.
    """
    last = log[-1]
    step, elapsed = int(last["step"]), results.get("elapsed_seconds", last.get("elapsed_seconds"))
    total = total_steps(last, config)
    updates = _updates_by_row(log)
    return Cost(
        step,
        total,
        elapsed,
        results.get("audio_hours_per_hour"),
        _rate("audio_seconds_per_second", updates),
        _rate("samples_per_second", updates),
        results.get("padding_fraction", _mean("padding_fraction", updates)),
        sum("eval_wer" in row for row in log),
        _time_shares(log, elapsed, results),
        None if results else _remaining_seconds(log, total),
        max((row["peak_memory_mb"] for row in log if "peak_memory_mb" in row), default=None),
    )


def total_steps(row: Row, config: Row) -> int | None:
    """Updates of the whole run, as train.py counts them; None where settings or a step of an epoch are missing."""
    if (config.get("max_steps") or -1) > 0:
        return int(config["max_steps"])
    if not config.get("num_train_epochs") or not row["epoch"]:
        return None
    return max(1, round(config["num_train_epochs"] * row["step"] / row["epoch"]))


def _updates_by_row(log: Sequence[Row]) -> list[tuple[Row, int]]:
    """Rows with the updates that each counts: a row of an evaluation before step 1 counts none."""
    steps = [0, *(int(row["step"]) for row in log)]
    return [(row, step - before) for row, before, step in zip(log, steps[:-1], steps[1:], strict=True) if step > before]


def _rate(name: str, updates: Sequence[tuple[Row, int]]) -> float | None:
    """Mean of a rate over the time of the updates, which each row's utterances per second tell up to a factor."""
    timed = [
        (row[name], count / row["samples_per_second"])
        for row, count in updates
        if row.get("samples_per_second") and name in row
    ]
    seconds = math.fsum(weight for _, weight in timed)
    return math.fsum(rate * weight for rate, weight in timed) / seconds if seconds else None


def _mean(name: str, updates: Sequence[tuple[Row, int]]) -> float | None:
    known = [(row[name], count) for row, count in updates if name in row]
    total = sum(count for _, count in known)
    return math.fsum(value * count for value, count in known) / total if total else None


def _time_shares(log: Sequence[Row], elapsed: float | None, results: Row) -> dict[str, float]:
    """Shares of the elapsed time: of the whole run where it is finished, else up to the last row.

    Logs of earlier versions do not divide their time: evaluations are known then, and updates once it is finished.
    """
    if not elapsed:
        return {}
    seconds = {}
    for phase, meaning in MEANINGS.items():
        column = f"{phase}_seconds"
        if column in results:
            seconds[meaning] = results[column]
        elif any(column in row for row in log):
            seconds[meaning] = math.fsum(row.get(column, 0.0) for row in log)
    rest = "start and checks"
    if not seconds:
        seconds[MEANINGS["evaluation"]] = math.fsum(row.get("eval_runtime", 0.0) for row in log)
        rest = "updates, start, checks and saving"
        if "train_runtime" in results:
            seconds["updates"], rest = results["train_runtime"], "start, checks and saving"
    seconds[rest] = max(elapsed - math.fsum(seconds.values()), 0.0)
    return {name: value / elapsed for name, value in seconds.items()}


def _remaining_seconds(log: Sequence[Row], total: int | None) -> float | None:
    """At the pace between the first row and the last, since what comes before the first is start-up."""
    timed = [row for row in log if "elapsed_seconds" in row]
    if total is None or len(timed) < 2:
        return None
    done = timed[-1]["step"] - timed[0]["step"]
    pace = (timed[-1]["elapsed_seconds"] - timed[0]["elapsed_seconds"]) / done if done else None
    return None if pace is None else max(total - timed[-1]["step"], 0) * pace
