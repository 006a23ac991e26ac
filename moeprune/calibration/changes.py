"""How much the predictions of models differ from the full one's.

Axes: b inputs.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from moeprune.calibration.sums import wide_dtype
from moeprune.calibration.together import run_paired
from moeprune.data.datasets import Dataset
from moeprune.models.model import Model
from moeprune.models.runtime import Runtime, by_rows

K = TypeVar("K")


class Change(NamedTuple):
    """The mean change of a model's predictions from the full one's (scalars).

    divergence: in nats; without a head, the change of the features as a share of their square. agreement: share of
    equal predictions, None without a head.
    """

    divergence: Tensor
    agreement: Tensor | None


def divergence(found: Tensor, expected: Tensor) -> Tensor:
    """Return KL(expected ‖ found), in nats (…), of log-probabilities (…,c); what both exclude makes no difference."""
    gap = torch.where(expected.isneginf(), 0.0, expected - found)
    return (expected.exp() * gap).sum(-1).clamp_min(0)


def changes(models: Mapping[K, Model], full: Model, data: Dataset, runtime: Runtime, what: str) -> dict[K, Change]:
    """Return the mean change of each model's predictions from the full one's.

    models, full: private copies on the runtime's device. what: the progress bar's title.
    """
    wide = wide_dtype(runtime.torch_device)  # else rounding makes small divergences negative
    totals = {key: torch.zeros(2, dtype=torch.float64) for key in models}
    has_head = full.input_format.has_head

    def compare(found: Tensor, expected: Tensor) -> Tensor:
        same = found.argmax(-1) == expected.argmax(-1)
        if has_head:
            found, expected = found.log_softmax(-1, dtype=wide), expected.log_softmax(-1, dtype=wide)
            change = divergence(found, expected)
        else:
            change = (found - expected).square().sum(-1) / expected.square().sum(-1).clamp_min(1e-12)
        return torch.stack([change, same.to(change.dtype)], -1)

    for key, found, expected in run_paired(models, full, data, runtime, what):
        totals[key] += by_rows(compare, found, expected).reshape(len(found), -1, 2).mean(1).sum(0).cpu()
    return {
        key: Change(total[0] / data.samples, total[1] / data.samples if has_head else None)
        for key, total in totals.items()
    }
