"""Changes that an average hides: of every class, inputs that flip, and classes that collapse."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from moeprune.evaluation.intervals import paired_difference, simultaneous_quantile
from moeprune.evaluation.results import ClassChange, Forgetting, Outcomes

LEVEL = 0.95
KNOWN = 0.5
"""Accuracy of the full model in a class at or above which the class is considered known."""
HIDES = 5
"""The average hides a drop of at least this many times its own."""


def outcome_masks(right: Tensor, full: Tensor) -> dict[str, Tensor]:
    """Return the inputs with each of the Outcomes, from those that either model predicts right, (samples) bool."""
    return {"both": full & right, "lost": full & ~right, "won": ~full & right, "neither": ~full & ~right}


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
    masks = outcome_masks(predicted == labels, reference == labels)
    average = (int(masks["lost"].sum()) - int(masks["won"].sum())) / len(labels)
    size = int(labels.max()) + 1
    counts = torch.stack([labels[mask].bincount(minlength=size) for mask in masks.values()], dim=1)
    present = counts.sum(1).nonzero().flatten().tolist()
    strict = simultaneous_quantile(LEVEL, len(present))
    classes, collapsed = [], []
    for c in present:
        outcomes = Outcomes(**dict(zip(masks, counts[c].tolist(), strict=True)))
        accuracy = (outcomes.both + outcomes.won) / outcomes.samples
        full = (outcomes.both + outcomes.lost) / outcomes.samples
        classes.append(
            ClassChange(
                index=c,
                samples=outcomes.samples,
                accuracy=accuracy,
                baseline_accuracy=full,
                accuracy_drop=full - accuracy,
                accuracy_drop_ci95=paired_difference(*outcomes.cells),
            )
        )
        is_lost = full >= KNOWN and accuracy <= full / 2 and full - accuracy >= HIDES * average
        if is_lost and paired_difference(*outcomes.cells, strict)[0] > average:
            collapsed.append(c)
    places = range(len(labels)) if indices is None else indices
    return Forgetting(
        classes=sorted(classes, key=lambda change: (-change.accuracy_drop, change.index)),
        lost=list(compress(places, masks["lost"].tolist())),
        won=list(compress(places, masks["won"].tolist())),
        collapsed=collapsed,
    )
