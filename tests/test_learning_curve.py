"""learning_curve.py: known curves are found again, with limits that hold, and what is no curve is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import run_command

import learning_curve
from learning_curve import Curve, Point, fit, fit_form, predict

HOURS = np.geomspace(0.25, 8, 6)


@pytest.mark.parametrize("exponent", [0.07, 0.3, 0.9])
@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_a_power_law_without_noise_is_found_exactly(scale: float, exponent: float) -> None:
    curve = fit_form(HOURS, Curve(scale, exponent, 0.0).at(HOURS), has_floor=False)
    assert (curve.scale, curve.exponent) == pytest.approx((scale, exponent), rel=1e-3)
    assert curve.floor == 0


@pytest.mark.parametrize(("scale", "exponent", "floor"), [(0.2, 0.5, 0.05), (0.1, 0.8, 0.2), (0.3, 0.3, 0.02)])
def test_a_floor_without_noise_is_found_exactly(scale: float, exponent: float, floor: float) -> None:
    hours = np.geomspace(0.02, 20, 8)
    curve = fit(hours, Curve(scale, exponent, floor).at(hours))
    assert (curve.scale, curve.exponent, curve.floor) == pytest.approx((scale, exponent, floor), rel=1e-2)


def test_noise_moves_the_exponent_as_far_as_theory_says() -> None:
    """Of a straight line in logarithms the slope's standard error is sigma / sqrt(sum of (x - mean)^2)."""
    rng, sigma, true = np.random.default_rng(0), 0.03, Curve(0.3, 0.35, 0.0)
    rates = [true.at(HOURS) * np.exp(sigma * rng.standard_normal(6)) for _ in range(300)]
    errors = np.array([fit_form(HOURS, one, False).exponent - true.exponent for one in rates])
    logarithms = np.log(HOURS)
    expected = sigma / np.sqrt(((logarithms - logarithms.mean()) ** 2).sum())
    # A standard deviation from 300 is known to 1 / sqrt(600), a mean to 1 / sqrt(300): four of each.
    assert errors.std() == pytest.approx(expected, rel=4 / np.sqrt(600))
    assert abs(errors.mean()) < 4 * expected / np.sqrt(300) + sigma**2


def test_no_floor_is_read_into_few_or_straight_runs() -> None:
    few = np.array([0.25, 0.5, 1.0, 2.0, 4.0])
    assert fit(few, Curve(0.2, 0.8, 0.1).at(few)).floor == 0, "five runs cannot carry three parameters and a scatter"
    rng = np.random.default_rng(1)
    curves = [fit(HOURS, Curve(0.3, 0.3, 0.0).at(HOURS) * np.exp(0.02 * rng.standard_normal(6))) for _ in range(100)]
    assert sum(one.floor > 0 for one in curves) <= 10


def test_limits_of_the_prediction_hold_the_truth_as_often_as_they_say() -> None:
    """95 % of 200: fewer than 180 would come once in 1,500 times."""
    rng, true, sigma = np.random.default_rng(2), Curve(0.3, 0.35, 0.0), 0.04
    held = 0
    for _ in range(200):
        rates = true.at(HOURS) * np.exp(sigma * rng.standard_normal(6))
        points = [Point("", hours, rate, 0.0) for hours, rate in zip(HOURS, rates, strict=True)]
        _, low, high = predict(points, fit_form(HOURS, rates, False), 2, rng).factor
        held += low <= 2**-0.35 <= high
    assert held >= 180


def test_an_uncertain_rate_widens_the_limits_though_the_curve_is_straight() -> None:
    true = Curve(0.3, 0.35, 0.0)
    widths = []
    for relative_error in (0.0, 0.05, 0.1):
        points = [Point("", hours, float(true.at(hours)), relative_error) for hours in HOURS]
        found = predict(points, true, 2, np.random.default_rng(0))
        assert found.factor[0] == pytest.approx(2**-0.35)
        assert found.hours == 16
        widths.append(found.factor[2] - found.factor[1])
    assert widths[0] < 1e-2 < widths[1]
    assert widths[2] == pytest.approx(2 * widths[1], rel=0.15)


# --- The command ---------------------------------------------------------------------------------------------------


def write_run(folder: Path, hours: float, rate: float, **config: object) -> Path:
    folder.mkdir()
    results = {"train_hours": hours, "test_wer": rate, "test_wer_low": rate * 0.98, "test_wer_high": rate * 1.02}
    (folder / "train_results.json").write_text(json.dumps(results | {"best_eval_wer": rate / 2}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"max_steps": 400, "train_fraction": hours} | config))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / f"run_{hours}", hours, 0.2 * hours**-0.5) for hours in (0.5, 1.0, 2.0, 4.0)]


def test_the_command_says_what_twice_the_hours_bring(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plot = tmp_path / "plots" / "curve.png"
    # In any order: the curve is one of the hours.
    assert run_command(learning_curve.main, "learning_curve.py", *reversed(runs), "--output", plot) == 0
    said = capsys.readouterr().out
    assert "test_wer over the hours" in said
    assert "h^-0.500" in said
    assert "twice the hours: about 0.71 x WER [0.7" in said
    assert "7.07% [" in said
    assert "at 8 h" in said
    assert "no floor can be told" in said
    assert "differ" not in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run_command(learning_curve.main, "x", *runs, "--metric", "eval_wer", "--output", plot) == 0
    assert "eval_wer over the hours" in capsys.readouterr().out


def test_runs_that_differ_in_more_than_their_data_are_named(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = write_run(tmp_path / "other", 8.0, 0.12, max_steps=100, seed=3)
    assert run_command(learning_curve.main, "x", *runs, other, "--output", tmp_path / "c.png") == 0
    said = capsys.readouterr().out
    assert "the runs differ in max_steps too" in said
    assert f"not falling: {other} with 8 h has 12.00%" in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({2: (0.5, 0.2), 3: (1.0, 0.2)}, "4 runs with 2 different amounts of data, at least 3 are needed"),
        ({0: (0.5, 0.1), 1: (1.0, 0.1), 3: (4.0, 0.2)}, "does not fall with the hours (10.00% after 0.5 h"),
        ({1: (1.0, 0.0)}, "has an error rate of 0.00% after 1 h"),
    ],
)
def test_what_is_no_curve_is_refused(
    changed: dict[int, tuple[float, float]], said: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for place, (hours, rate) in changed.items():
        (runs[place] / "train_results.json").write_text(json.dumps({"train_hours": hours, "test_wer": rate}))
    assert run_command(learning_curve.main, "x", *runs, "--output", tmp_path / "c.png") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"test_wer": 0.1}', "has no train_hours: an older train.py wrote it"),
        ('{"train_hours": 1.0}', "has no best_eval_wer: choose another --metric"),
    ],
)
def test_runs_that_cannot_be_read_are_named(
    content: str | None, said: str, runs: list[Path], capsys: pytest.CaptureFixture
) -> None:
    (runs[1] / "train_results.json").unlink()
    if content is not None:
        (runs[1] / "train_results.json").write_text(content)
    assert run_command(learning_curve.main, "x", *runs) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(runs[1]) in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "name the run directories"),
        (["a", "--times_hours", "1"], "--times_hours is 1, it must be above 1"),
        (["a", "--output", "c.txt"], "it must end with .png, .svg or .pdf"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert run_command(learning_curve.main, "x", *flags) == 2
    assert said in capsys.readouterr().err
