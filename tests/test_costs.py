"""The cost of a run against sums by hand."""

import pytest

from costs import Cost, measure_cost, total_steps

# 2 updates of 8 utterances in 4 s, then 8 updates of 8 in 4 s: 10 updates in 8 s of updates, and the evaluations.
LOG = [
    {"step": 0, "epoch": 0.0, "eval_wer": 1.0, "eval_runtime": 3.0, "elapsed_seconds": 13.0},
    {
        "step": 2, "epoch": 0.5, "samples_per_second": 4.0, "audio_seconds_per_second": 10.0, "padding_fraction": 0.1,
        "elapsed_seconds": 17.0, "peak_memory_mb": 900.0,
    },
    {
        "step": 10, "epoch": 2.5, "samples_per_second": 16.0, "audio_seconds_per_second": 40.0,
        "padding_fraction": 0.05, "eval_wer": 0.5, "eval_runtime": 2.0, "elapsed_seconds": 23.0,
        "peak_memory_mb": 800.0,
    },
]  # fmt: skip


def test_of_an_unfinished_run() -> None:
    cost = measure_cost(LOG, {"num_train_epochs": 5.0, "max_steps": -1}, {})
    assert cost == Cost(
        step=10,
        total_steps=20,
        elapsed_seconds=23.0,
        audio_hours_per_hour=None,
        audio_rate=pytest.approx((10 * 4 + 40 * 4) / 8),
        utterance_rate=pytest.approx(80 / 8),
        padding_fraction=pytest.approx((2 * 0.1 + 8 * 0.05) / 10),
        evaluations=2,
        time_shares={"evaluating": pytest.approx(5 / 23), "updates, start, checks and saving": pytest.approx(18 / 23)},
        remaining_seconds=pytest.approx(10 * (23.0 - 13.0) / 10),
        peak_memory_mb=900.0,
    )


def test_a_finished_run_knows_its_updates_and_has_no_time_left() -> None:
    cost = measure_cost(LOG, {"max_steps": 10}, {"train_runtime": 8.0})
    assert cost.remaining_seconds is None
    assert cost.time_shares == pytest.approx(
        {"updates": 8 / 23, "evaluating": 5 / 23, "start, checks and saving": 10 / 23}
    )


DIVIDED = {"data_seconds": 1.0, "compute_seconds": 6.0, "evaluation_seconds": 2.5, "save_seconds": 0.5}


def test_a_log_that_divides_its_time_is_believed() -> None:
    cost = measure_cost([LOG[0], LOG[1] | DIVIDED, LOG[2] | DIVIDED], {}, {})
    expected = {"waiting for data": 2, "computing": 12, "evaluating": 5, "saving": 1, "start and checks": 3}
    assert cost.time_shares == pytest.approx({name: seconds / 23 for name, seconds in expected.items()})


def test_the_results_of_a_finished_run_know_its_end_too() -> None:
    results = {"data_seconds": 2.0, "compute_seconds": 12.0, "communication_seconds": 1.0, "evaluation_seconds": 9.0}
    results |= {"save_seconds": 3.0, "elapsed_seconds": 30.0, "audio_hours_per_hour": 7.5, "padding_fraction": 0.0625}
    cost = measure_cost([LOG[0], LOG[1] | DIVIDED, LOG[2] | DIVIDED], {}, results | {"train_runtime": 13.0})
    expected = {"waiting for data": 2, "computing": 12, "waiting for other processes": 1, "evaluating": 9, "saving": 3}
    assert cost.time_shares == pytest.approx(
        {name: seconds / 30 for name, seconds in (expected | {"start and checks": 3}).items()}
    )
    assert (cost.elapsed_seconds, cost.audio_hours_per_hour, cost.padding_fraction) == (30.0, 7.5, 0.0625)


def test_a_log_with_little_in_it() -> None:
    cost = measure_cost([{"step": 1, "epoch": 0.1}], {}, {})
    assert cost == Cost(1, None, None, None, None, None, None, 0, {}, None, None)


@pytest.mark.parametrize(
    ("row", "config", "expected"),
    [
        ({"step": 3, "epoch": 0.5}, {"max_steps": 100, "num_train_epochs": 3.0}, 100),
        ({"step": 3, "epoch": 0.5}, {"max_steps": -1, "num_train_epochs": 2.5}, 15),
        ({"step": 0, "epoch": 0.0}, {"max_steps": -1, "num_train_epochs": 2.5}, None),
        ({"step": 3, "epoch": 0.5}, {}, None),
        ({"step": 10, "epoch": 100.0}, {"num_train_epochs": 0.01}, 1),
    ],
)
def test_total_steps(row: dict, config: dict, expected: int | None) -> None:
    assert total_steps(row, config) == expected
