"""Changes behind the average accuracy: every class, the inputs that flip, and classes that collapse.

An average hides a lost class: one of a hundred classes is one point of accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.evaluation.intervals import paired_difference, simultaneous_quantile
from moeprune.evaluation.results import ClassChange, Forgetting

LEVEL = 0.95
KNOWN = 0.5
"""Accuracy of the full model at or above which a class counts as known."""
HIDES = 5
"""Smallest ratio of a class's drop to the average drop that counts as hidden by the average."""


def forgetting(labels: Tensor, predicted: Tensor, reference: Tensor) -> Forgetting:
    """Compare predictions with those of the full model, class by class and input by input.

    Args:
        labels: (samples) int64.
        predicted, reference: classes predicted by the pruned and by the full model, (samples) int64.

    Returns:
        The changes; `lost` and `won` index the labels. `collapsed` classes have an accuracy of at least KNOWN
        in the full model, at most half of it in the pruned one, and a drop of at least HIDES times the
        average, whose interval (simultaneous over all classes) lies above the average.
    """
    right, reference_right = predicted == labels, reference == labels
    samples = len(labels)
    lost, won = reference_right & ~right, right & ~reference_right
    average = (int(lost.sum()) - int(won.sum())) / samples
    counts = [
        torch.bincount(labels[mask]) if mask is not None else torch.bincount(labels)
        for mask in (right & reference_right, lost, won, None)
    ]
    num_classes = len(counts[-1])
    both, only_full, only_pruned, total = (
        torch.nn.functional.pad(count, (0, num_classes - len(count))).tolist() for count in counts
    )
    present = [c for c in range(num_classes) if total[c]]
    strict = simultaneous_quantile(LEVEL, len(present))
    classes, collapsed = [], []
    for c in present:
        cells = both[c], only_full[c], only_pruned[c], total[c] - both[c] - only_full[c] - only_pruned[c]
        accuracy, full = (both[c] + only_pruned[c]) / total[c], (both[c] + only_full[c]) / total[c]
        classes.append(
            ClassChange(
                index=c,
                samples=total[c],
                accuracy=accuracy,
                baseline_accuracy=full,
                accuracy_drop=full - accuracy,
                accuracy_drop_ci95=paired_difference(*cells),
            )
        )
        is_lost = full >= KNOWN and accuracy <= full / 2
        if is_lost and full - accuracy >= HIDES * average and paired_difference(*cells, strict)[0] > average:
            collapsed.append(c)
    return Forgetting(
        classes=sorted(classes, key=lambda change: (-change.accuracy_drop, change.index)),
        lost=lost.nonzero().flatten().tolist(),
        won=won.nonzero().flatten().tolist(),
        collapsed=collapsed,
    )
