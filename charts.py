"""Curves over steps and rates with their intervals, as SVG and HTML that scale with the page.

The drawing is stretched to the width of the page; lines keep their width, and labels are HTML, so that both are as
legible on a phone. The values under the pointer are shown by the page's script from `Panel.points`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markup import Markup, element

Row = Mapping[str, Any]

# Of the drawing's own coordinates, whatever its size on the screen.
SIZE = 1000
# More points than pixels show nothing more: a longer log is drawn as means of neighbouring rows.
MAX_POINTS = 800
# Points are marked while they are few enough to be told apart.
MAX_MARKED = 40
TICKS = 4


@dataclass(frozen=True)
class Series:
    """One curve: a column of the log, its name, and the columns of its limits where it has an interval."""

    column: str
    name: str
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True)
class Panel:
    """One drawing.

    Attributes:
        title: what it shows.
        unit: of the values.
        series: its curves.
        is_percent: show fractions as percent.
        is_log: a logarithmic scale, where all values are positive.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    is_percent: bool = False
    is_log: bool = False

    def points(self, log: Sequence[Row]) -> list[list[dict[str, float]]]:
        """Of each curve the step, the value and the limits of its points."""
        return [_thin(list(_points(log, one))) for one in self.series]


PANELS = (
    Panel("Loss", "CTC loss per label (nats)", (Series("train_loss", "training"), Series("eval_loss", "dev"))),
    Panel(
        "Word error rate", "dev, with 95 % interval",
        (Series("eval_wer", "WER", "eval_wer_low", "eval_wer_high"), Series("ema_eval_wer", "WER, averaged weights")),
        is_percent=True,
    ),
    Panel(
        "Character error rate", "dev, with 95 % interval",
        (Series("eval_cer", "CER", "eval_cer_low", "eval_cer_high"),), is_percent=True,
    ),
    Panel("Learning rate", "of the last step", (Series("learning_rate", "learning rate"),)),
    Panel("Gradient norm", "before clipping, logarithmic", (Series("grad_norm", "gradient norm"),), is_log=True),
    Panel("Throughput", "seconds of audio per second", (Series("audio_seconds_per_second", "audio"),)),
)  # fmt: skip


def draw_panel(panel: Panel, log: Sequence[Row], number: int) -> Markup:
    """A panel as a figure; `number` is its place among the page's panels, by which the script finds its points."""
    curves = panel.points(log)
    legend = [
        element("span", element("i", class_=f"swatch s{place}"), one.name, class_="key")
        for place, (one, points) in enumerate(zip(panel.series, curves, strict=True))
        if len(panel.series) > 1 and points
    ]
    heading = element("b", panel.title)
    caption = element("figcaption", heading, " ", element("span", panel.unit, class_="quiet"), legend)
    if not any(curves):
        return element("figure", caption, element("p", "no value yet", class_="empty"), class_="panel")
    x_scale = Scale.of_steps(log)
    heights = [value for points in curves for point in points for name, value in point.items() if name != "step"]
    y_scale = Scale.of(heights, starts_at_zero=not panel.is_log, is_log=panel.is_log and min(heights) > 0)
    plot = element(
        "div",
        element("div", _labels(y_scale, "bottom", panel.is_percent), class_="y", aria_hidden="true"),
        element("div", _draw(curves, x_scale, y_scale), element("div", class_="cursor", hidden=True), class_="canvas"),
        element("div", _labels(x_scale, "left", False), class_="x", aria_hidden="true"),
        element("div", "optimizer step", class_="x-title quiet", aria_hidden="true"),
        element("output", class_="tip", hidden=True),
        class_="plot", tabindex=0, role="group", data_panel=number,
        aria_label=f"{panel.title} over optimizer steps; left and right arrow keys read the values",
    )  # fmt: skip
    return element("figure", caption, plot, class_="panel")


def panel_data(panel: Panel, log: Sequence[Row]) -> dict[str, Any]:
    """What the script shows under the pointer: rounded, as the screen does."""
    curves = [
        {"name": one.name, "points": [[_round(point.get(key)) for key in ("step", "value", "low", "high")]
                                      for point in points]}
        for one, points in zip(panel.series, panel.points(log), strict=True)
    ]  # fmt: skip
    return {"percent": panel.is_percent, "last": Scale.of_steps(log).high, "curves": curves}


@dataclass(frozen=True)
class Scale:
    """Values to places from 0 to 1, with round limits and ticks.

    Attributes:
        low: value at 0.
        high: value at 1.
        ticks: values to label.
        is_log: of powers of ten.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    @classmethod
    def of(cls, values: Sequence[float], starts_at_zero: bool, is_log: bool = False) -> "Scale":
        """The scale that holds all of `values`, of which there is one at least."""
        low, high = min(values), max(values)
        if is_log:
            return cls._of_powers(low, high)
        low = min(low, 0.0) if starts_at_zero else low
        width = _round_width((high - low) / TICKS)
        first, last = math.floor(low / width + 1e-9), max(math.ceil(high / width - 1e-9), math.floor(low / width) + 1)
        ticks = tuple(float(f"{number * width:.12g}") for number in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)

    @classmethod
    def of_steps(cls, log: Sequence[Row]) -> "Scale":
        """From 0 to the last step of a log, the same for all of its panels; ticks are whole."""
        last = int(max([row["step"] for row in log], default=0)) or 1
        width = max(int(_round_width(last / TICKS)), 1)
        return cls(0, last, tuple(range(0, last + 1, width)))

    @classmethod
    def _of_powers(cls, low: float, high: float) -> "Scale":
        """Ticks at 1, 2 and 5 times powers of ten; at powers alone where these are many."""
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1,)):
            values = [float(f"{factor}e{power}") for power in powers for factor in factors]
            below = max(value for value in values if value <= low * (1 + 1e-9))
            above = min([value for value in values if value >= high and value > below] or [below * 10])
            ticks = tuple(value for value in values if below <= value <= above)
            if len(ticks) <= 2 * TICKS - 1:
                break
        return cls(below, above, ticks, is_log=True)

    def place(self, value: float) -> float:
        """From 0 at `low` to 1 at `high`."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def interval_bar(rate: float, low: float | None, high: float | None, limit: float) -> Markup:
    """A bar from 0 to `rate` with a line from `low` to `high`; `limit` is the rate at the full width."""

    def percent(value: float) -> float:
        return round(100 * min(max(value / limit, 0.0), 1.0), 2) if limit else 0.0

    parts = [element("i", class_="fill", style=f"width:{percent(rate)}%")]
    if low is not None and high is not None:
        left = percent(low)
        parts.append(element("i", class_="limits", style=f"left:{left}%;width:{round(percent(high) - left, 2)}%"))
    return element("div", parts, class_="bar", aria_hidden="true")


def bar_limit(rates: Sequence[float | None]) -> float:
    """The rate at the full width of a table's bars: a round one that holds all of `rates`."""
    known = [rate for rate in rates if rate]
    return Scale.of(known, starts_at_zero=True).high if known else 1.0


def percent(rate: float) -> str:
    """A fraction as percent, which no line end divides."""
    return f"{100 * rate:.2f}\u00a0%"


def with_limits(rate: float, low: float | None, high: float | None) -> str:
    """A fraction as percent, with its limits where they are known."""
    return percent(rate) if low is None or high is None else f"{percent(rate)} [{100 * low:.2f},\u00a0{100 * high:.2f}]"


def _points(log: Sequence[Row], one: Series) -> Sequence[dict[str, float]]:
    names = {"value": one.column, "low": one.low, "high": one.high}
    return [
        {"step": row["step"]} | {name: row[column] for name, column in names.items() if column in row}
        for row in log
        if one.column in row
    ]


def _thin(points: list[dict[str, float]]) -> list[dict[str, float]]:
    """Means of neighbours where there are more than MAX_POINTS; the step of each is its last one."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        {name: math.fsum(point.get(name, point["value"]) for point in group) / len(group) for name in group[0]}
        | {"step": group[-1]["step"]}
        for group in groups
    ]


def _draw(curves: Sequence[Sequence[Mapping[str, float]]], x_scale: Scale, y_scale: Scale) -> Markup:
    def x(point: Mapping[str, float]) -> str:
        return f"{SIZE * x_scale.place(point['step']):.4g}"

    def y(value: float) -> str:
        return f"{SIZE * (1 - y_scale.place(value)):.4g}"

    drawn: list[Markup] = []
    for tick in y_scale.ticks:
        drawn.append(element("line", class_="grid", x1=0, x2=SIZE, y1=y(tick), y2=y(tick)))
    for place, points in enumerate(curves):
        limited = [point for point in points if "low" in point and "high" in point]
        if limited:
            border = [f"{x(point)},{y(point['high'])}" for point in limited]
            border += [f"{x(point)},{y(point['low'])}" for point in reversed(limited)]
            drawn.append(element("path", class_=f"band s{place}", d=f"M{' '.join(border)}Z"))
        line = [f"{x(point)},{y(point['value'])}" for point in points]
        if line:
            drawn.append(element("path", class_=f"line s{place}", d=f"M{' '.join(line)}"))
        if len(line) <= MAX_MARKED:
            # A line without length and with round ends is a dot whatever the stretching.
            drawn.append(element("path", class_=f"dots s{place}", d="".join(f"M{point}h0" for point in line)))
    return element("svg", drawn, viewBox=f"0 0 {SIZE} {SIZE}", preserveAspectRatio="none", aria_hidden="true")


def _labels(scale: Scale, side: str, is_percent: bool) -> list[Markup]:
    return [
        element("span", _tick(tick, is_percent), style=f"{side}:{100 * scale.place(tick):.4g}%") for tick in scale.ticks
    ]


def _tick(value: float, is_percent: bool) -> str:
    if is_percent:
        return f"{100 * value:g} %"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.10g}"


def _round_width(width: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= width * (1 - 1e-9))


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
