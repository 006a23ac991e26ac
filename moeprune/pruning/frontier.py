"""The trade-off of accuracy and cost: a few ways to prune, beside the paper's rule and random experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

from moeprune.plan import is_possible
from moeprune.pruning.results import OnFrontier, SweepRow
from moeprune.pruning.sweep import Variant

KEEPS = tuple(Fraction(1, 2**power) for power in range(6, 0, -1))
METHODS = {
    ("static", "gram", "affine"): "static by gram, affine",
    ("static", "gram", "mean"): "static by gram, mean",
    ("input", "deviation", "affine"): "input by deviation, affine",
    ("input", "combine", "mean"): "input by combine, mean",
    ("input", "combine", "none"): "the paper's rule: input, none",
    ("static", "combine", "none"): "static by combine, none",
    ("static", "combine", "merge"): "static by combine, merge",
    ("static", "random", "none"): "random experts: static, none",
}
COSTS = ("size", "flops")


def variants(keeps: Sequence[Fraction | int], scopes: Sequence[str]) -> Iterator[tuple[str, Variant]]:
    """What to measure, with a label: each method at each share, and without any expert.

    Args:
        keeps: shares or numbers of experts.
        scopes: in which the model can be pruned.
    """
    for (scope, signal, compensate), label in METHODS.items():
        if scope not in scopes or not is_possible(scope, signal, compensate):
            continue
        if scope == "static" and signal != "random" and compensate != "merge":
            yield label, Variant(0, scope, signal, compensate)
        for keep in keeps:
            yield label, Variant(keep, scope, signal, compensate)


def cost(row: SweepRow, which: str) -> float:
    """Return a row's `size` or `flops` as a share of the full model's."""
    return 1.0 - float(getattr(row.difference, f"{which}_reduction"))


def on_frontier(rows: Iterable[SweepRow]) -> list[OnFrontier]:
    """For each row and each of COSTS: whether no other row is as accurate at less cost, or more accurate at
    no more.
    """
    rows = list(rows)

    def is_best(row: SweepRow, which: str) -> bool:
        own = (cost(row, which), -row.accuracy)
        others = ((cost(other, which), -other.accuracy) for other in rows)
        return not any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in others)

    return [OnFrontier(**{which: is_best(row, which) for which in COSTS}) for row in rows]
