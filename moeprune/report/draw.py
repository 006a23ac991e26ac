"""Panels of figures as SVG, and heat maps as images in HTML: no scripts, and nothing from elsewhere.

Colours are names of classes (`c0`, `c1`, …), so that the page's style has them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from moeprune.report.document import Interval
from moeprune.report.figure import Axis, Bars, Figure, HeatMap, Panel, Plot, Series, Stacks
from moeprune.report.markup import escape
from moeprune.report.png import data_uri, png

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 42, 40
COLORS = 8
MOST_CELLS = 256
"""Rows and columns that a heat map draws; of more, neighbours are averaged."""
ROW_NAMES = 32
LEVELS = 64
HEAT, MARK = (217, 72, 15), (28, 126, 214)
STAR = "0,-7 1.7,-2.3 6.7,-2.2 2.7,0.9 4.1,5.7 0,2.8 -4.1,5.7 -2.7,0.9 -6.7,-2.2 -1.7,-2.3"


def figure(drawn: Figure) -> str:
    """A figure as HTML: its panels beside or below each other, a legend and the caption."""
    legend = "".join(_entry(*entry) for entry in dict.fromkeys(_entries(drawn.panels)))
    parts = [
        f'<div class="panels" role="img" aria-label="{escape(drawn.description)}">'
        f"{''.join(_panel(panel) for panel in drawn.panels)}</div>",
        f'<ul class="legend">{legend}</ul>' if legend else "",
        f"<figcaption>{escape(drawn.caption)}</figcaption>" if drawn.caption else "",
    ]
    return f"<figure>{''.join(parts)}</figure>"


def interval(cell: Interval) -> str:
    """A small drawing of an interval around zero, which is in its middle."""
    low, value, high = (
        _number(60 + 56 * part / (cell.reach or 1)) for part in (cell.low, cell.value, cell.high)
    )
    kind = "less" if cell.value < 0 else "more" if cell.value > 0 else "same"
    return (
        f'<svg class="interval {kind}" viewBox="0 0 120 14" aria-hidden="true">'
        f'<path class="axis" d="M60 0V14"/><path class="bar" d="M60 7H{value}"/>'
        f'<path class="ends" d="M{low} 7H{high}M{low} 4V10M{high} 4V10"/></svg>'
    )


def _panel(panel: Panel) -> str:
    if isinstance(panel, HeatMap):
        return _heat_map(panel)
    height = HEIGHT
    if isinstance(panel, Plot):
        content = _plot(panel)
    elif isinstance(panel, Bars):
        content = _bars(panel)
    else:
        content, height = _stacks(panel), 26 + 44 * len(panel.rows)
    title = f'<text class="title" x="4" y="14">{escape(panel.title)}</text>'
    return f'<svg class="panel" viewBox="0 0 {WIDTH} {height}">{title}{content}</svg>'


def _entries(panels: Iterable[Panel]) -> Iterator[tuple[str, int | None, str]]:
    """Shape, colour and name of what a legend explains."""
    for panel in panels:
        if isinstance(panel, Plot):
            yield from ((series.shape, series.color, series.name) for series in panel.series)
        elif isinstance(panel, Stacks):
            yield from (("bar", color, name) for color, name in enumerate(panel.parts))
        elif isinstance(panel, Bars) and panel.marked is not None:
            yield from (("bar", 0, panel.names[0]), ("bar", None, panel.names[1]))


def _entry(shape: str, color: int | None, name: str) -> str:
    drawn = {
        "line": '<path class="line" d="M0 7H18"/>',
        "dashes": '<path class="dashes" d="M0 7H18"/>',
        "dots": f'<path class="thin" d="M0 7H18"/>{_dot(9, 7)}',
        "points": _dot(9, 7),
        "crosses": _cross(9, 7),
        "star": _star(9, 7),
        "bar": '<path class="area" d="M2 2h14v10h-14z"/>',
    }[shape]
    swatch = f'<svg class="{_color(color)}" viewBox="0 0 18 14" aria-hidden="true">{drawn}</svg>'
    return f"<li>{swatch}{escape(name)}</li>"


def _plot(panel: Plot) -> str:
    points = [point for series in panel.series for point in series.points]
    frame = _Frame(panel.x, panel.y, [x for x, _ in points], [y for _, y in points])
    return frame.axes() + frame.mark(panel.mark) + "".join(_series(series, frame) for series in panel.series)


def _series(series: Series, frame: _Frame) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in series.points]
    line = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in places)
    if series.shape in ("line", "dashes"):
        drawn = f'<path class="{series.shape}" d="{line}"/>'
    else:
        shape = {"dots": _dot, "points": _dot, "crosses": _cross, "star": _star}[series.shape]
        notes = series.notes or [""] * len(places)
        drawn = f'<path class="thin" d="{line}"/>' if series.shape == "dots" and len(places) > 1 else ""
        drawn += "".join(shape(*place, note) for place, note in zip(places, notes, strict=True))
    return f'<g class="{_color(series.color)}">{drawn}</g>'


def _bars(panel: Bars) -> str:
    n = len(panel.heights)
    frame = _Frame(panel.x, panel.y, [0, n], [0, *panel.heights])
    gap = 0.2 if n <= 130 else 0.0
    paths = {True: "", False: ""}
    for index, height in enumerate(panel.heights):
        left, right, top = frame.x(index + gap / 2), frame.x(index + 1 - gap / 2), frame.y(height)
        paths[panel.marked is None or index in panel.marked] += (
            f"M{_number(left)} {_number(frame.y(0))}V{_number(top)}H{_number(right)}V{_number(frame.y(0))}z"
        )
    bars = "".join(
        f'<path class="area {_color(0 if marked else None)}" d="{path}"/>'
        for marked, path in paths.items()
        if path
    )
    level = ""
    if panel.level is not None:
        y = frame.y(panel.level[0])
        level = (
            f'<path class="dashes" d="M{LEFT} {_number(y)}H{WIDTH - RIGHT}"/>'
            f'<text class="end" x="{WIDTH - RIGHT}" y="{_number(y - 4)}">{escape(panel.level[1])}</text>'
        )
    return frame.axes() + bars + level


def _stacks(panel: Stacks) -> str:
    longest = max(sum(values) for _, _, values in panel.rows) or 1
    drawn = []
    for index, (name, size, values) in enumerate(panel.rows):
        y, x = 26 + 44 * index, 4.0
        drawn.append(f'<text x="4" y="{y + 10}">{escape(name)}</text>')
        drawn.append(f'<text class="end" x="{WIDTH - 4}" y="{y + 10}">{escape(size)}</text>')
        for color, value in enumerate(values):
            width = (WIDTH - 8) * value / longest
            path = f"M{_number(x)} {y + 15}h{_number(width)}v18H{_number(x)}z"
            drawn.append(f'<path class="area {_color(color)}" d="{path}"/>')
            x += width
    return "".join(drawn)


class _Frame:
    """The place of values in a panel."""

    def __init__(self, x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]):
        self.names = x, y
        self.bounds = [_bounds(axis, values) for axis, values in ((x, xs), (y, ys))]

    def x(self, value: float) -> float:
        """From the left."""
        low, high = self.bounds[0]
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """From the top."""
        low, high = self.bounds[1]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def axes(self) -> str:
        """Grid lines, numbers and labels."""
        x, y = self.names
        bottom = HEIGHT - BOTTOM
        drawn = [f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>']
        for value, text in _ticks(*self.bounds[0], x.unit):
            place = self.x(value)
            drawn.append(f'<path class="grid" d="M{_number(place)} {TOP}V{bottom}"/>')
            drawn.append(f'<text class="middle" x="{_number(place)}" y="{bottom + 15}">{text}</text>')
        for value, text in _ticks(*self.bounds[1], y.unit):
            place = self.y(value)
            drawn.append(f'<path class="grid" d="M{LEFT} {_number(place)}H{WIDTH - RIGHT}"/>')
            drawn.append(f'<text class="end" x="{LEFT - 5}" y="{_number(place + 4)}">{text}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        drawn.append(f'<text class="middle" x="{_number(middle)}" y="{HEIGHT - 6}">{escape(x.label)}</text>')
        return "".join(drawn) + f'<text class="faint" x="4" y="{TOP - 9}">{escape(y.label)}</text>'

    def mark(self, mark: tuple[float, str] | None) -> str:
        """A vertical line, and what is there."""
        if mark is None:
            return ""
        place = self.x(mark[0])
        is_left = place < (LEFT + WIDTH - RIGHT) / 2
        return (
            f'<path class="mark" d="M{_number(place)} {TOP}V{HEIGHT - BOTTOM}"/>'
            f'<text class="{"start" if is_left else "end"}" x="{_number(place + (5 if is_left else -5))}"'
            f' y="{HEIGHT - BOTTOM - 8}">{escape(mark[1])}</text>'
        )


def _bounds(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if high <= low:
        low, high = low - 0.01, low + 0.01
    room = 0.04 * (high - low)
    return low - (room if axis.low is None else 0), high + (room if axis.high is None else 0)


def _ticks(low: float, high: float, unit: str) -> Iterator[tuple[float, str]]:
    """A handful of round numbers within the bounds, and how they are written."""
    scale = 100 if unit == "%" else 1
    rough = (high - low) * scale / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if rough <= step * power * 1.0001)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    for number in range(math.ceil(low * scale / step - 1e-9), math.floor(high * scale / step + 1e-9) + 1):
        text = f"{number * step:.{digits}f}"
        yield number * step / scale, f"{text} %" if unit == "%" else text + unit


def _heat_map(panel: HeatMap) -> str:
    """An image of one pixel for each cell, stretched by the page, with names beside and marks above it."""
    values = _averaged([_averaged(row) for row in panel.values])
    most = max(max(row) for row in values)
    shades = [bytes(round((LEVELS - 1) * math.sqrt(value / (most or 1))) for value in row) for row in values]
    image = data_uri(png(shades, [(*HEAT, round(255 * level / (LEVELS - 1))) for level in range(LEVELS)]))
    marks = ""
    if panel.marked:
        flags = [float(index in panel.marked) for index in range(len(panel.values[0]))]
        strip = bytes(share > 0 for share in _averaged(flags))
        address = data_uri(png([strip], [(*MARK, 0), (*MARK, 255)]))
        marks = f'<img class="marks" src="{address}" alt=""/>'
    every = -(-len(panel.rows) // ROW_NAMES)
    names = "".join(
        f'<span style="top:{_number(100 * (index + 0.5) / len(panel.rows))}%">{escape(name)}</span>'
        for index, name in enumerate(panel.rows)
        if index % every == 0
    )
    height = len(values) * max(2, min(22, 480 // len(values)))
    scale = f"0 to {100 * most:.2g} %, in the middle {25 * most:.2g} %"
    key = f'<span class="key"><i class="heat"></i>{scale}</span>'
    if panel.marked:
        key += f'<span class="key"><i class="marked"></i>{escape(panel.marks)}</span>'
    if max(len(panel.values), len(panel.values[0])) > MOST_CELLS:
        key += f'<span class="key">neighbours averaged to {len(values[0])} × {len(values)} cells</span>'
    return (
        f'<div class="map"><p class="title">{escape(panel.title)}</p><p class="y">{escape(panel.y)}</p>'
        f'<div class="names" style="height:{height}px">{names}</div>'
        f'<div class="cells">{marks}<img style="height:{height}px" src="{image}" alt=""/></div>'
        f'<p class="x">{escape(panel.x)}</p><p class="keys">{key}</p></div>'
    )


def _averaged(values: Sequence) -> list:
    """At most MOST_CELLS values, or rows of them: neighbours are averaged."""
    if len(values) <= MOST_CELLS:
        return list(values)
    edges = [index * len(values) // MOST_CELLS for index in range(MOST_CELLS + 1)]
    return [_mean(values[low:high]) for low, high in pairwise(edges)]


def _mean(parts: Sequence) -> float | list[float]:
    if isinstance(parts[0], list):
        return [sum(column) / len(parts) for column in zip(*parts, strict=True)]
    return sum(parts) / len(parts)


def _color(color: int | None) -> str:
    return "ink" if color is None else f"c{color % COLORS}"


def _dot(x: float, y: float, note: str = "") -> str:
    return f'<circle cx="{_number(x)}" cy="{_number(y)}" r="3.2">{_note(note)}</circle>'


def _cross(x: float, y: float, note: str = "") -> str:
    return f'<path class="cross" d="M{_number(x - 4)} {_number(y - 4)}l8 8m0 -8l-8 8">{_note(note)}</path>'


def _star(x: float, y: float, note: str = "") -> str:
    return (
        f'<polygon transform="translate({_number(x)} {_number(y)})" points="{STAR}">{_note(note)}</polygon>'
    )


def _note(note: str) -> str:
    return f"<title>{escape(note)}</title>" if note else ""


def _number(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")
