"""What can be drawn in a report: values, not how they look."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """What stands along an axis.

    unit: `%` shows shares as percent; any other stands behind the numbers. low, high: where it starts and
    ends; None: where the values do.
    """

    label: str
    unit: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    shape: `line`, `dashes`, `dots` (joined by a thin line), `points`, `crosses` or `star`. color: a number,
    which stands for one colour in all panels; None is that of the text. notes: what is said of each point, if
    anything.
    """

    name: str
    points: Sequence[tuple[float, float]]
    shape: str
    color: int | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Plot:
    """Series over two axes; mark: a place on the x axis, and what is there."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class Bars:
    """A bar for each height, side by side, and a line at the level.

    marked: places that stand out; None: all bars are alike. names: of the marked ones and the others.
    """

    title: str
    x: Axis
    y: Axis
    heights: Sequence[float]
    marked: Collection[int] | None = None
    names: tuple[str, str] = ("marked", "others")
    level: tuple[float, str] | None = None


@dataclass(frozen=True)
class Stacks:
    """What wholes consist of, one bar below the other on one scale.

    rows: what each is called, its size in words, and the values of its parts. parts: their names.
    """

    title: str
    rows: Sequence[tuple[str, str, Sequence[float]]]
    parts: Sequence[str]


@dataclass(frozen=True)
class HeatMap:
    """Values of 0 and more, in rows from top to bottom.

    rows: their names. marked: places of columns that stand out. marks: what is said of them.
    """

    title: str
    x: str
    y: str
    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    marked: Collection[int] = ()
    marks: str = ""


Panel = Plot | Bars | Stacks | HeatMap


@dataclass(frozen=True)
class Figure:
    """Panels side by side.

    description: what is to be seen, for those who do not see it. caption: how to read it.
    """

    panels: Sequence[Panel]
    description: str
    caption: str = ""
