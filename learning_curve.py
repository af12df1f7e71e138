"""What more data would bring: a power law through finished runs on growing shares of it.

    train.py ... --train_fraction 0.125 --output_dir runs/eighth      (and 0.25, 0.5, 1; better with two or three seeds)
    python learning_curve.py runs/eighth runs/quarter runs/half runs/all

Fits e(h) = a h^-b + c, the error rate e over the hours h of training audio (Hestness et al. 2017,
https://arxiv.org/abs/1712.00409, equation 1), by least squares of the relative errors. The floor c, which nothing but
many runs can tell from a small b, is there where Akaike's criterion for small samples asks for it: six runs at least.
Prints "twice the hours: about x times the WER" with an interval, and draws the curve.

The interval (95 %) is a parametric bootstrap: each rate is drawn again around the curve with the scatter of the runs
or with its own uncertainty, whichever is larger. It takes for granted that the law holds beyond the largest run.

R runs.
"""

from errors import UsageError, exit_status

# isort: split

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from atomic import write_atomically
from config import LearningCurveConfig, parse_arguments

MIN_AMOUNTS = 3
# Of the exponent b: measured ones lie between 0.07 and 0.5 for speech, language and images (Hestness et al., table 1).
EXPONENTS = (0.01, 3.0)
EXPONENT_STEPS = 300
BOOTSTRAPS = 2_000
# A rate ten times as high.
MAX_LOG_NOISE = 2.3
NORMAL_95 = 1.96
# Settings in which the runs of one curve may differ.
FREE_SETTINGS = {
    *("output_dir", "train_fraction", "train_rest", "max_train_samples", "seed", "prune_list", "prune_fraction"),
    *("per_device_eval_batch_size", "max_batch_seconds", "dataloader_num_workers", "report_to", "max_hours"),
}
METRICS = {"test_wer": "test_wer", "eval_wer": "best_eval_wer"}


@dataclass(frozen=True)
class Point:
    """A run: hours of training audio, its error rate, and that rate's relative standard error (0 if unknown)."""

    name: str
    hours: float
    rate: float
    relative_error: float


@dataclass(frozen=True)
class Curve:
    """e(h) = scale * h^-exponent + floor, with h in hours."""

    scale: float
    exponent: float
    floor: float

    def at(self, hours: np.ndarray | float) -> np.ndarray | float:
        """The error rate after training on so many hours."""
        return self.scale * np.asarray(hours, float) ** -self.exponent + self.floor


@dataclass(frozen=True)
class Prediction:
    """The error rate at more hours than any run had, as a rate and as a share of the curve's at the largest run.

    Each is (value, low, high); the limits hold 95 % of the bootstrap.
    """

    hours: float
    rate: tuple[float, float, float]
    factor: tuple[float, float, float]


def main() -> None:
    """The command."""
    config = parse_arguments(LearningCurveConfig, sys.argv[1:], __doc__)
    metric, points, notes = read_points(list(map(Path, config.runs)), config.metric)
    hours, rates = (np.array([getattr(one, name) for one in points]) for name in ("hours", "rate"))
    curve = fit(hours, rates)
    prediction = predict(points, curve, config.times_hours, np.random.default_rng(config.seed))
    print("\n".join(describe(metric, points, curve, prediction, config.times_hours) + notes), flush=True)
    draw(Path(config.output), metric, points, curve, prediction)
    print(f"written to {config.output}", flush=True)


def read_points(runs: list[Path], metric: str) -> tuple[str, list[Point], list[str]]:
    """The metric, the runs by hours, and what is to be said about them.

    Raises:
        UsageError: a run that is not finished, or does not say its hours or its rate; too few amounts of data; rates
            that a curve cannot be laid through.
    """
    results = {run: _read(run / "train_results.json", json.loads) for run in runs}
    if metric == "auto":
        metric = "test_wer" if all("test_wer" in found for found in results.values()) else "eval_wer"
    points = sorted((_point(run, found, METRICS[metric]) for run, found in results.items()), key=lambda one: one.hours)
    _check(points)
    return metric, points, _notes(runs, points)


def _read(path: Path, parse: Callable[[str], dict]) -> dict:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): name run directories of finished runs") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path} is damaged: leave the run out, or end it again with --resume_from_checkpoint"
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: leave the run out, or end it again with --resume_from_checkpoint")
    return found


def _point(run: Path, results: dict[str, object], name: str) -> Point:
    for needed, remedy in (
        ("train_hours", "an older train.py wrote it: train again"),
        (name, "choose another --metric"),
    ):
        if not isinstance(results.get(needed), float | int):
            raise UsageError(f"{run}/train_results.json has no {needed}: {remedy}, or leave the run out")
    rate, low, high = results[name], results.get(f"{name}_low"), results.get(f"{name}_high")
    relative = (high - low) / (2 * NORMAL_95 * rate) if low is not None and high is not None and rate > 0 else 0.0
    return Point(str(run), float(results["train_hours"]), float(rate), relative)


def _check(points: list[Point]) -> None:
    amounts = {one.hours for one in points}
    if len(amounts) < MIN_AMOUNTS:
        raise UsageError(
            f"{len(points)} runs with {len(amounts)} different amounts of data, at least {MIN_AMOUNTS} are needed: "
            "train on other shares too (--train_fraction)"
        )
    for one in points:
        if not (one.rate > 0 and one.hours > 0):
            raise UsageError(f"{one.name} has an error rate of {one.rate:.2%} after {one.hours:g} h: leave it out")
    slope = np.polyfit(np.log([one.hours for one in points]), np.log([one.rate for one in points]), 1)[0]
    if slope >= 0:
        listed = ", ".join(f"{one.rate:.2%} after {one.hours:.3g} h" for one in points)
        raise UsageError(
            f"the error rate does not fall with the hours ({listed}), so that nothing can be predicted: train each run "
            "until its dev WER stops falling, and with more seeds"
        )


def _notes(runs: list[Path], points: list[Point]) -> list[str]:
    """Where a run is worse than one with less data, and in which settings they differ."""
    notes, best = [], points[0]
    for one in points[1:]:
        if one.rate > best.rate and one.hours > best.hours:
            notes.append(
                f"not falling: {one.name} with {one.hours:.3g} h has {one.rate:.2%}, {best.name} with "
                f"{best.hours:.3g} h had {best.rate:.2%}"
            )
        best = min(best, one, key=lambda point: point.rate)
    configs = [_read(run / "config.yaml", yaml.safe_load) for run in runs]
    names = sorted(set().union(*configs) - FREE_SETTINGS)
    if differing := [name for name in names if any(one.get(name) != configs[0].get(name) for one in configs)]:
        notes.append(f"the runs differ in {', '.join(differing)} too: the curve is of all that together")
    return notes


def fit(hours_R: np.ndarray, rates_R: np.ndarray) -> Curve:
    """The curve that is nearest in relative terms, with a floor where Akaike's criterion prefers it."""
    plain, floored = fit_form(hours_R, rates_R, False), fit_form(hours_R, rates_R, True)
    return min((plain, 3), (floored, 4), key=lambda one: _aicc(hours_R, rates_R, *one))[0]


def fit_form(hours_R: np.ndarray, rates_R: np.ndarray, has_floor: bool) -> Curve:
    """Least squares of (curve - rate) / rate, with or without a floor."""
    low, high = EXPONENTS
    for _ in range(3):  # The best exponent of a grid, then of finer ones around it.
        exponents_E = np.geomspace(low, high, EXPONENT_STEPS)
        scale_1, exponent_1, floor_1 = _fit_many(hours_R, rates_R[None], exponents_E, has_floor)
        step = exponents_E[1] / exponents_E[0]
        low, high = max(exponent_1[0] / step, EXPONENTS[0]), min(exponent_1[0] * step, EXPONENTS[1])
    return Curve(float(scale_1[0]), float(exponent_1[0]), float(floor_1[0]))


def _fit_many(
    hours_R: np.ndarray, rates_DR: np.ndarray, exponents_E: np.ndarray, has_floor: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, exponent and floor for each of D sets of rates, [D] each: the best of the exponents.

    For an exponent the law is linear in scale and floor: two normal equations. Neither may be below 0.
    """
    power_ER, weight_DR = hours_R ** -exponents_E[:, None], 1 / rates_DR
    squares_ED, mixed_ED = power_ER**2 @ (weight_DR**2).T, power_ER @ (weight_DR**2).T
    sum_ED, weights_D, squared_D = power_ER @ weight_DR.T, weight_DR.sum(1), (weight_DR**2).sum(1)
    scale_ED, floor_ED = sum_ED / squares_ED, np.zeros_like(sum_ED)
    if has_floor:
        determinant_ED = np.maximum(squares_ED * squared_D - mixed_ED**2, 1e-300)
        scale = (sum_ED * squared_D - weights_D * mixed_ED) / determinant_ED
        floor = (squares_ED * weights_D - mixed_ED * sum_ED) / determinant_ED
        allowed = (scale > 0) & (floor > 0)
        scale_ED, floor_ED = np.where(allowed, scale, scale_ED), np.where(allowed, floor, floor_ED)
    best_D = np.argmax(scale_ED * sum_ED + floor_ED * weights_D, axis=0)  # R less this are the squares that are left
    sets = np.arange(len(rates_DR))
    return scale_ED[best_D, sets], exponents_E[best_D], floor_ED[best_D, sets]


def _squares(hours_R: np.ndarray, rates_R: np.ndarray, curve: Curve) -> float:
    return float((((curve.at(hours_R) - rates_R) / rates_R) ** 2).sum())


def _aicc(hours_R: np.ndarray, rates_R: np.ndarray, curve: Curve, parameters: int) -> float:
    """Akaike's criterion for small samples (Hurvich and Tsai 1989), the scatter counted among the parameters."""
    runs = len(rates_R)
    if runs - parameters - 1 <= 0:
        return math.inf if parameters > 3 else -math.inf
    fitted = runs * math.log(max(_squares(hours_R, rates_R, curve), 1e-12) / runs)
    return fitted + 2 * parameters * runs / (runs - parameters - 1)


def predict(points: list[Point], curve: Curve, times_hours: float, rng: np.random.Generator) -> Prediction:
    """The rate at `times_hours` times the hours of the largest run, with its limits from a parametric bootstrap."""
    hours, rates = (np.array([getattr(one, name) for one in points]) for name in ("hours", "rate"))
    has_floor = curve.floor > 0
    degrees = max(1, len(points) - 2 - has_floor)
    scatter = math.sqrt(_squares(hours, rates, curve) / degrees)
    own = np.array([one.relative_error for one in points])
    expected, target = curve.at(hours), times_hours * hours[-1]
    # The scatter is known from few runs, and has Student's tails; a rate's own error is known from many utterances.
    size = (BOOTSTRAPS, len(points))
    noise_DR = np.where(scatter > own, scatter * rng.standard_t(degrees, size), own * rng.standard_normal(size))
    # A draw of such tails may lie beyond all rates.
    rates_DR = expected * np.exp(np.clip(noise_DR, -MAX_LOG_NOISE, MAX_LOG_NOISE))
    exponents_E = np.geomspace(*EXPONENTS, EXPONENT_STEPS)
    scale_D, exponent_D, floor_D = _fit_many(hours, rates_DR, exponents_E, has_floor)
    there_D, here_D = (scale_D * at**-exponent_D + floor_D for at in (target, hours[-1]))
    drawn = np.stack([there_D, there_D / here_D], 1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    rate = float(curve.at(target))
    factor = rate / float(curve.at(hours[-1]))
    return Prediction(target, (rate, float(low[0]), float(high[0])), (factor, float(low[1]), float(high[1])))


def describe(metric: str, points: list[Point], curve: Curve, prediction: Prediction, times_hours: float) -> list[str]:
    """The runs, the curve, and what it says."""
    rows = [f"  {one.hours:8.3f} h  {one.rate:>7.2%}  curve {curve.at(one.hours):>7.2%}  {one.name}" for one in points]
    floor = f" + {curve.floor:.2%}" if curve.floor else ""
    factor, rate = prediction.factor, prediction.rate
    times = "twice" if times_hours == 2 else f"{times_hours:g} times"
    lines = [
        f"{metric} over the hours of training audio:",
        *rows,
        f"e(h) = {curve.scale:.2%} * h^-{curve.exponent:.3f}{floor}",
        f"{times} the hours: about {factor[0]:.2f} x WER [{factor[1]:.2f}, {factor[2]:.2f}], that is {rate[0]:.2%} "
        f"[{rate[1]:.2%}, {rate[2]:.2%}] at {prediction.hours:.3g} h",
    ]
    if not curve.floor:
        lines.append("no floor can be told from these runs: where there is one, more hours bring less than this")
    return lines


def draw(path: Path, metric: str, points: list[Point], curve: Curve, prediction: Prediction) -> None:
    """Runs, curve and prediction on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    hours = np.geomspace(points[0].hours, prediction.hours, 100)
    axes.plot(hours, 100 * curve.at(hours), color="#4477aa", label="a h^-b + c" if curve.floor else "a h^-b")
    axes.plot([one.hours for one in points], [100 * one.rate for one in points], "o", color="#222222", label="runs")
    rate, low, high = (100 * value for value in prediction.rate)
    limits = [[max(0.0, rate - low)], [max(0.0, high - rate)]]
    axes.errorbar([prediction.hours], [rate], limits, fmt="s", color="#cc3311", capsize=4, label="prediction, 95 %")
    axes.set(xscale="log", yscale="log", xlabel="hours of training audio", ylabel=f"{metric}, %")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): name another --output") from error


if __name__ == "__main__":
    sys.exit(exit_status(main))
