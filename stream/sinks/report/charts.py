"""Small plots as inline SVG: they take the page's colours, light or dark, and need no script.

Every plot is drawn in its own units on a canvas of fixed size; CSS classes name what a line is, not its colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stream.sinks.report.markup import Child, Html, tag

LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 50.0, 18.0, 8.0, 32.0
"""Room for the labels of ticks."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values, what its ticks are called, and what it shows. `low` lies left or at the bottom."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    label: str = ""
    scale: Callable[[float], float] = float

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at `low` and 1 at `high`; outside it is not clipped."""
        low, high = self.scale(self.low), self.scale(self.high)
        return 0.5 if high == low else (self.scale(value) - low) / (high - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """A plot's area, from values to pixels; y grows upwards in values."""

    x: Axis
    y: Axis
    width_px: float = 480.0
    height_px: float = 200.0

    def at(self, point: Point) -> Point:
        """Return the pixel of a point, kept within the plot's area."""
        x, y = (min(1.0, max(0.0, axis.place(v))) for axis, v in zip((self.x, self.y), point, strict=True))
        return (
            LEFT_PX + x * (self.width_px - LEFT_PX - RIGHT_PX),
            self.height_px - BOTTOM_PX - y * (self.height_px - TOP_PX - BOTTOM_PX),
        )

    def line(self, points: Iterable[Point], class_: str) -> Html:
        """Draw a line through the points."""
        return tag("polyline", points=_pairs(map(self.at, points)), class_=f"line {class_}")

    def area(self, lower: Sequence[Point], upper: Sequence[Point], class_: str) -> Html:
        """Draw the area between two lines."""
        outline = [*map(self.at, lower), *map(self.at, reversed(upper))]
        return tag("polygon", points=_pairs(outline), class_=f"area {class_}")

    def dot(self, point: Point, class_: str, title: str, radius_px: float = 2.2) -> Html:
        """Draw a dot that tells its title when it is pointed at."""
        x, y = self.at(point)
        return tag("circle", tag("title", title), cx=x, cy=y, r=radius_px, class_=f"dot {class_}")

    def edge_mark(self, point: Point, class_: str, title: str) -> Html:
        """Draw a triangle at the edge beyond which a value lies."""
        x, y = self.at(point)
        up = -1.0 if self.y.place(point[1]) > 0.5 else 1.0
        corners = [(x - 4.0, y - up * 3.0), (x + 4.0, y - up * 3.0), (x, y + up * 4.0)]
        return tag("polygon", tag("title", title), points=_pairs(corners), class_=f"dot {class_}")

    def vertical(self, x: float, class_: str, label: str = "") -> Html:
        """Draw a line from bottom to top, its label at the top."""
        left, bottom = self.at((x, self.y.low))
        _, top = self.at((x, self.y.high))
        is_right = self.x.place(x) > 0.75
        text = tag(
            "text",
            label,
            x=left + (-4.0 if is_right else 4.0),
            y=top + 10.0,
            text_anchor="end" if is_right else "start",
            class_="tick",
        )
        stroke = tag("line", x1=left, x2=left, y1=bottom, y2=top, class_=f"line {class_}")
        return tag("g", stroke, text if label else None)

    def horizontal(self, y: float, class_: str, label: str = "") -> Html:
        """Draw a line from left to right, its label at the left end."""
        left, height = self.at((self.x.low, y))
        right, _ = self.at((self.x.high, y))
        text = tag("text", label, x=left + 4.0, y=height - 4.0, class_="tick")
        stroke = tag("line", x1=left, x2=right, y1=height, y2=height, class_=f"line {class_}")
        return tag("g", stroke, text if label else None)

    def bar(self, x_low: float, x_high: float, value: float, class_: str, title: str) -> Html:
        """Draw a bar from the bottom to a value."""
        left, top = self.at((x_low, value))
        right, bottom = self.at((x_high, self.y.low))
        return tag(
            "rect",
            tag("title", title),
            x=left,
            y=top,
            width=max(right - left - 0.6, 0.4),
            height=max(bottom - top, 0.0),
            class_=f"bar {class_}",
        )

    def label(self, point: Point, text: str) -> Html:
        """Write beside a point, on its other side near the right edge."""
        x, y = self.at(point)
        is_right = self.x.place(point[0]) > 0.8
        anchor = "end" if is_right else "start"
        return tag(
            "text", text, x=x + (-6.0 if is_right else 6.0), y=y - 5.0, text_anchor=anchor, class_="tick"
        )

    def draw(self, *marks: Child, title: str) -> Html:
        """Return the plot: grid, ticks, marks, frame."""
        x_grid = [self._x_tick(value, text) for value, text in self.x.ticks]
        y_grid = [self._y_tick(value, text) for value, text in self.y.ticks]
        middle = 0.5 * (LEFT_PX + self.width_px - RIGHT_PX)
        caption = tag(
            "text", self.x.label, x=middle, y=self.height_px - 4.0, text_anchor="middle", class_="tick"
        )
        turned = f"translate(11 {(self.height_px - BOTTOM_PX + TOP_PX) / 2:.0f}) rotate(-90)"
        side = tag("text", self.y.label, transform=turned, text_anchor="middle", class_="tick")
        return tag(
            "svg",
            tag("title", title),
            x_grid,
            y_grid,
            marks,
            caption if self.x.label else None,
            side if self.y.label else None,
            viewBox=f"0 0 {self.width_px:g} {self.height_px:g}",
            role="img",
            class_="plot",
        )

    def _x_tick(self, value: float, text: str) -> Html:
        x, bottom = self.at((value, self.y.low))
        _, top = self.at((value, self.y.high))
        stroke = tag("line", x1=x, x2=x, y1=bottom, y2=top, class_="grid")
        return tag("g", stroke, tag("text", text, x=x, y=bottom + 13.0, text_anchor="middle", class_="tick"))

    def _y_tick(self, value: float, text: str) -> Html:
        left, y = self.at((self.x.low, value))
        right, _ = self.at((self.x.high, value))
        stroke = tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid")
        return tag("g", stroke, tag("text", text, x=left - 5.0, y=y + 3.5, text_anchor="end", class_="tick"))


def linear_axis(low: float, high: float, label: str = "", *, n_ticks: int = 4) -> Axis:
    """Return an axis from `low` to `high` with round ticks."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        half = 0.05 * (max(abs(low), abs(high)) or 1.0)
        low, high = low - half, high + half
    step = _round_step((high - low) / n_ticks)
    first = math.ceil(low / step - 1e-9)
    values = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(low=low, high=high, ticks=[(v, f"{v:,.{decimals}f}") for v in values], label=label)


def log_axis(low: float, high: float, label: str = "") -> Axis:
    """Return a logarithmic axis of positive numbers, with ticks at 1, 2, 5 times powers of ten."""
    if high <= low:
        low, high = low / 1.5, high * 1.5
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [m * 10.0**e for e in decades for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(values) > 7:
        values = [v for v in values if math.log10(v) % 1.0 < 1e-9]
    return Axis(low=low, high=high, ticks=[(v, f"{v:,.0f}") for v in values], label=label, scale=math.log)


def resolution_axis(k_max: float, label: str = "resolution / Å") -> Axis:
    """Return an axis over the frequency in 1/Å from 0 to `k_max`, its ticks in Å."""
    ticks = [(k_max * i / 5, f"{5 / (k_max * i):.1f}") for i in range(1, 6)]
    return Axis(low=0.0, high=k_max, ticks=ticks, label=label)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * (1.0 - 1e-9))


def _pairs(points: Iterable[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
