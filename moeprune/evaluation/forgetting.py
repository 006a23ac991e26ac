"""Changes that an average hides: of every class, inputs that flip, and classes that collapse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeprune.evaluation.intervals import paired_difference, simultaneous_quantile
from moeprune.evaluation.results import ClassChange, Forgetting

LEVEL = 0.95
KNOWN = 0.5
"""Accuracy of the full model in a class at or above which the class is considered known."""
HIDES = 5
"""The average hides a drop of at least this many times its own."""


def forgetting(
    labels: Tensor, predicted: Tensor, reference: Tensor, indices: Sequence[int] | None = None
) -> Forgetting:
    """Compare predictions with those of the full model, class by class and input by input.

    A class has collapsed if its accuracy is at least KNOWN in the full model and at most half of that in the
    pruned one, and if its drop is at least HIDES times the average drop, with an interval (simultaneous over
    all classes) above the average.

    Args:
        labels: (samples) int64.
        predicted, reference: classes predicted by the pruned and by the full model, (samples) int64.
        indices: names of the samples in `lost` and `won`; None: their places.
    """
    right, full_right = predicted == labels, reference == labels
    lost, won = full_right & ~right, right & ~full_right
    average = (int(lost.sum()) - int(won.sum())) / len(labels)
    size = int(labels.max()) + 1
    cells = [torch.bincount(labels[mask], minlength=size) for mask in (right & full_right, lost, won)]
    totals = torch.bincount(labels).tolist()
    present = [c for c in range(size) if totals[c]]
    strict = simultaneous_quantile(LEVEL, len(present))
    classes, collapsed = [], []
    for c in present:
        total, (both, only_full, only_pruned) = totals[c], (int(cell[c]) for cell in cells)
        table = both, only_full, only_pruned, total - both - only_full - only_pruned
        accuracy, full = (both + only_pruned) / total, (both + only_full) / total
        classes.append(
            ClassChange(
                index=c,
                samples=total,
                accuracy=accuracy,
                baseline_accuracy=full,
                accuracy_drop=full - accuracy,
                accuracy_drop_ci95=paired_difference(*table),
            )
        )
        is_lost = full >= KNOWN and accuracy <= full / 2
        if is_lost and full - accuracy >= HIDES * average and paired_difference(*table, strict)[0] > average:
            collapsed.append(c)
    places = range(len(labels)) if indices is None else indices
    return Forgetting(
        classes=sorted(classes, key=lambda change: (-change.accuracy_drop, change.index)),
        lost=[places[place] for place in lost.nonzero().flatten().tolist()],
        won=[places[place] for place in won.nonzero().flatten().tolist()],
        collapsed=collapsed,
    )
