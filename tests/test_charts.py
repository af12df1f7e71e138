"""Scales hold their values, points are the log's, and bars have the lengths of their rates."""

import random
import re

import pytest

from charts import (
    MAX_POINTS,
    PANELS,
    Panel,
    Scale,
    Series,
    bar_limit,
    draw_panel,
    interval_bar,
    panel_data,
    with_limits,
)


@pytest.mark.parametrize(
    ("values", "starts_at_zero", "is_log", "ticks"),
    [
        ([0.3, 0.9], True, False, (0, 0.25, 0.5, 0.75, 1)),
        ([2.0, 8.9], True, False, (0, 2.5, 5, 7.5, 10)),
        ([1e-4, 1e-3], True, False, (0, 2.5e-4, 5e-4, 7.5e-4, 1e-3)),
        ([5e-14], True, False, (0, 2e-14, 4e-14, 6e-14)),
        ([0.0], True, False, (0, 1)),
        ([-0.2, 0.2], True, False, (-0.2, -0.1, 0, 0.1, 0.2)),
        ([1.5, 40], False, True, (1, 2, 5, 10, 20, 50)),
        ([0.012, 9.0], False, True, (0.01, 0.1, 1, 10)),
        ([3.0, 3.0], False, True, (2, 5)),
        ([5.0], False, True, (5, 10)),
    ],
)
def test_ticks_are_round_and_hold_the_values(
    values: list[float], starts_at_zero: bool, is_log: bool, ticks: tuple[float, ...]
) -> None:
    assert Scale.of(values, starts_at_zero, is_log).ticks == pytest.approx(ticks)


def test_every_value_has_a_place_between_0_and_1() -> None:
    generator = random.Random(1)
    for _ in range(500):
        values = [10 ** generator.uniform(-8, 5) for _ in range(generator.randint(1, 9))]
        for is_log in (False, True):
            scale = Scale.of(values, starts_at_zero=not is_log, is_log=is_log)
            places = [scale.place(value) for value in [*values, *scale.ticks]]
            assert -1e-9 <= min(places) < max(places) <= 1 + 1e-9
            assert 2 <= len(scale.ticks) <= 20
            assert (scale.place(scale.low), scale.place(scale.high)) == (0, pytest.approx(1))


@pytest.mark.parametrize(
    ("last", "ticks"), [(1, (0, 1)), (3, (0, 1, 2, 3)), (480, (0, 200, 400)), (70, (0, 20, 40, 60)), (0, (0, 1))]
)
def test_steps_have_whole_ticks_and_end_at_the_last(last: int, ticks: tuple[int, ...]) -> None:
    scale = Scale.of_steps([{"step": last}])
    assert (scale.high, scale.ticks) == (max(last, 1), ticks)


def test_points_are_the_rows_that_have_the_column() -> None:
    panel = Panel("WER", "", (Series("wer", "WER", "low", "high"), Series("loss", "loss")))
    log = [{"step": 1, "loss": 3.0}, {"step": 2, "wer": 0.5, "low": 0.4, "high": 0.7}, {"step": 3, "wer": 0.25}]
    assert panel.points(log) == [
        [{"step": 2, "value": 0.5, "low": 0.4, "high": 0.7}, {"step": 3, "value": 0.25}],
        [{"step": 1, "value": 3.0}],
    ]
    assert panel_data(panel, log) == {
        "percent": False,
        "last": 3,
        "curves": [
            {"name": "WER", "points": [[2, 0.5, 0.4, 0.7], [3, 0.25, None, None]]},
            {"name": "loss", "points": [[1, 3.0, None, None]]},
        ],
    }


def test_a_long_log_is_drawn_as_means() -> None:
    panel = Panel("Loss", "", (Series("loss", "loss"),))
    log = [{"step": step, "loss": float(step)} for step in range(1, 10 * MAX_POINTS + 1)]
    (points,) = panel.points(log)
    assert len(points) == MAX_POINTS
    assert points[0] == {"step": 10, "value": 5.5}
    assert points[-1] == {"step": 10 * MAX_POINTS, "value": 10 * MAX_POINTS - 4.5}
    assert len(draw_panel(panel, log, 0)) < 30_000


def test_a_curve_is_drawn_where_its_values_are() -> None:
    panel = Panel("Loss", "", (Series("loss", "loss", "low", "high"),))
    drawn = draw_panel(panel, [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 1.0, "low": 0.0, "high": 2.0}], 7)
    # 1000 across and down: step 1 of 2 is half-way, 4 is the top of the scale.
    assert re.search(r'class="line s0" d="M500,0 1000,750"', drawn)
    assert re.search(r'class="band s0" d="M1000,500 1000,1000Z"', drawn)
    assert 'data-panel="7"' in drawn


def test_a_panel_without_values_says_so() -> None:
    for panel in PANELS:
        assert "no value yet" in draw_panel(panel, [{"step": 1, "epoch": 0.1}], 0)
        assert panel_data(panel, [])["last"] == 1


@pytest.mark.parametrize(
    ("rate", "low", "high", "limit", "widths"),
    [
        (0.25, 0.125, 0.5, 0.5, ["width:50.0%", "left:25.0%", "width:75.0%"]),
        (1.5, None, None, 1.0, ["width:100.0%"]),
        (0.0, 0.0, 0.1, 0.2, ["width:0.0%", "left:0.0%", "width:50.0%"]),
    ],
)
def test_bars(rate: float, low: float | None, high: float | None, limit: float, widths: list[str]) -> None:
    assert re.findall(r"(?:width|left):[\d.]+%", interval_bar(rate, low, high, limit)) == widths


def test_a_table_of_bars_holds_all_rates() -> None:
    assert bar_limit([0.11, None, 0.42, 0.0]) == 0.6
    assert bar_limit([0.0, None]) == 1.0
    assert with_limits(0.1234, 0.1, 0.2) == "12.34\u00a0% [10.00,\u00a020.00]"
    assert with_limits(0.1234, None, None) == "12.34\u00a0%"
