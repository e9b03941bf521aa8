"""How a figure went over the exposures: one small plot each, outliers by name, at a size that does not grow.

Up to `MAX_DOTS` exposures every one is a dot. Beyond that neighbours are put together: the line is the median of
each group and the area goes from its least to its greatest value, so that nothing is hidden, only drawn as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from stream.sinks.report.charts import Canvas, Point, linear_axis
from stream.sinks.report.facts import ExposureFacts
from stream.sinks.report.markup import Html, join, number, tag

MAX_DOTS = 400
N_GROUPS = 240
N_NAMED = 5
OUTLIER_SD = 6.0
"""Robust standard deviations from the median; 4 to 8 make sense: normal values reach 4 once in 20,000 exposures, 6 never."""

_SHOWN_SD = 10.0
_MIN_FOR_OUTLIERS = 8
_SD_PER_MAD = 1.4826


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """A figure of an exposure, how it is shown, and in which direction it is worse."""

    title: str
    unit: str
    value: Callable[[ExposureFacts], float | None]
    decimals: int = 2
    is_high_bad: bool = True
    is_low_bad: bool = False
    scale: float = 1.0

    def of(self, exposure: ExposureFacts) -> float | None:
        """Return the figure in the unit that is shown."""
        value = self.value(exposure)
        return None if value is None else value * self.scale


TRENDS = (
    Trend(title="CTF fit to", unit="Å", value=lambda e: e.ctf_fit_angstrom, decimals=1),
    Trend(title="defocus", unit="µm", value=lambda e: e.defocus_angstrom, is_low_bad=True, scale=1e-4),
    Trend(title="astigmatism", unit="Å", value=lambda e: e.astigmatism_angstrom, decimals=0),
    Trend(title="total motion", unit="Å", value=lambda e: e.total_motion_angstrom, decimals=1),
    Trend(title="ice ratio", unit="", value=lambda e: e.ice_ratio, decimals=3),
    Trend(
        title="median score",
        unit="",
        value=lambda e: e.score_median,
        is_high_bad=False,
        is_low_bad=True,
    ),
    Trend(
        title="particles above τ",
        unit="",
        value=lambda e: float(e.n_above) if e.n_scored else None,
        decimals=0,
        is_high_bad=False,
        is_low_bad=True,
    ),
    Trend(title="landing to score", unit="s", value=lambda e: e.latency_s, decimals=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One exposure's value at its place in the order of arrival (from 1)."""

    place: int
    value: float
    exposure: ExposureFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, robust standard deviation (None: too few values, or all alike), and the values outside."""

    middle: float
    sd: float | None
    outliers: tuple[Sample, ...]


def find_spread(samples: Sequence[Sample], trend: Trend) -> Spread:
    """Return how the values lie; outliers are further than `OUTLIER_SD` out on a bad side, the worst first.

    The standard deviation is 1.4826 times the median distance from the median, or, where more than half of the
    values are equal, 1.2533 times the mean distance.
    """
    values = [s.value for s in samples]
    middle = median(values)
    distances = [abs(v - middle) for v in values]
    sd = _SD_PER_MAD * median(distances) or 1.2533 * sum(distances) / len(distances)
    if len(values) < _MIN_FOR_OUTLIERS or sd <= 1e-6 * abs(middle):
        return Spread(middle=middle, sd=None, outliers=())
    outside = [
        s
        for s in samples
        if (trend.is_high_bad and s.value - middle > OUTLIER_SD * sd)
        or (trend.is_low_bad and middle - s.value > OUTLIER_SD * sd)
    ]
    worst_first = sorted(outside, key=lambda s: -abs(s.value - middle))
    return Spread(middle=middle, sd=sd, outliers=tuple(worst_first))


def take_samples(exposures: Sequence[ExposureFacts], trend: Trend) -> list[Sample]:
    """Return the exposures of which the figure is known, in the order of arrival."""
    pairs = ((i, exposure, trend.of(exposure)) for i, exposure in enumerate(exposures, start=1))
    return [Sample(place=i, value=v, exposure=e) for i, e, v in pairs if v is not None]


def draw_trend(exposures: Sequence[ExposureFacts], trend: Trend) -> Html | None:
    """Return the plot with its caption, or None where nothing is known."""
    samples = take_samples(exposures, trend)
    if not samples:
        return None
    spread = find_spread(samples, trend)
    low, high = _find_range(samples, spread)
    unit = f" / {trend.unit}" if trend.unit else ""
    room = 0.05 * (high - low)
    canvas = Canvas(
        x=linear_axis(1, max(len(exposures), 2), "exposure, in the order of arrival", n_ticks=5),
        y=linear_axis(low - room, high + room, n_ticks=3),
        height_px=160.0,
    )
    named = spread.outliers[:N_NAMED]
    marks = _draw_dots(canvas, samples, trend) if len(samples) <= MAX_DOTS else _draw_groups(canvas, samples)
    flagged = [_draw_sample(canvas, s, trend, "outlier") for s in named]
    middle = canvas.horizontal(spread.middle, "middle")
    plot = canvas.draw(middle, marks, flagged, title=f"{trend.title}{unit} over the exposures")
    heading = tag("figcaption", tag("strong", trend.title), _describe(samples, spread, trend))
    return tag("figure", heading, plot, _name_outliers(spread, trend), class_="trend")


def describe_thinning(n_exposures: int) -> str:
    """Say how the plots draw this many exposures."""
    if n_exposures <= MAX_DOTS:
        return "Each dot is one exposure (grey: rejected); pointing at it shows its name."
    size = _group_size(n_exposures)
    return (
        f"Neighbouring exposures are drawn together, up to {size:,} in a group: the line is their median, the area "
        "goes from the least to the greatest value."
    )


def _find_range(samples: Sequence[Sample], spread: Spread) -> tuple[float, float]:
    """Return the values between which is drawn: what lies very far out is marked at the edge."""
    values = [s.value for s in samples]
    if spread.sd is None:
        return min(values), max(values)
    reach = _SHOWN_SD * spread.sd
    return max(min(values), spread.middle - reach), min(max(values), spread.middle + reach)


def _draw_dots(canvas: Canvas, samples: Sequence[Sample], trend: Trend) -> list[Html]:
    return [
        _draw_sample(canvas, s, trend, "rejected" if s.exposure.state == "rejected" else "a") for s in samples
    ]


def _draw_sample(canvas: Canvas, sample: Sample, trend: Trend, class_: str) -> Html:
    title = f"{sample.exposure.name}: {number(sample.value, trend.decimals)} {trend.unit}".strip()
    point = (float(sample.place), sample.value)
    is_inside = canvas.y.low <= sample.value <= canvas.y.high
    return canvas.dot(point, class_, title) if is_inside else canvas.edge_mark(point, class_, title)


def _draw_groups(canvas: Canvas, samples: Sequence[Sample]) -> Html:
    size = _group_size(len(samples))
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]
    places = [sum(s.place for s in group) / len(group) for group in groups]
    values = [[s.value for s in group] for group in groups]
    lower: list[Point] = [(x, min(v)) for x, v in zip(places, values, strict=True)]
    upper: list[Point] = [(x, max(v)) for x, v in zip(places, values, strict=True)]
    medians: list[Point] = [(x, median(v)) for x, v in zip(places, values, strict=True)]
    return join([canvas.area(lower, upper, "a"), canvas.line(medians, "a")])


def _group_size(n: int) -> int:
    return -(-n // N_GROUPS)


def _describe(samples: Sequence[Sample], spread: Spread, trend: Trend) -> str:
    values = [s.value for s in samples]
    shown = [number(v, trend.decimals) for v in (spread.middle, min(values), max(values))]
    unit = f" {trend.unit}" if trend.unit else ""
    return f" median {shown[0]}{unit}, {shown[1]} to {shown[2]}{unit} ({len(samples):,} exposures)"


def _name_outliers(spread: Spread, trend: Trend) -> Html | None:
    if not spread.outliers:
        return None
    named = spread.outliers[:N_NAMED]
    said = [f"{s.exposure.name} ({number(s.value, trend.decimals)})" for s in named]
    more = len(spread.outliers) - len(named)
    rest = f" and {more:,} more" if more else ""
    return tag("p", tag("strong", "outliers "), ", ".join(said), rest, class_="outliers")
