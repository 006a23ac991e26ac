"""scikit-learn's digits, and pairs of them: real images that need no download."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from moeprune.errors import MoepruneError

SPLITS = ("train", "calibration", "test")
PAIRS_OF_SPLIT = 2000


def digits(split: str) -> tuple[Tensor, Tensor]:
    """One split of scikit-learn's digits: pixels (n,1,8,8) in 0…1 and labels (n,).

    Stratified and fixed: of every ten images of a class, in the order of the data set, five are for
    training, two for calibration and three for testing.

    Raises:
        MoepruneError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MoepruneError(
            "the data sets `digits` and `pairs` need scikit-learn", "install it, or moeprune's extra `demo`"
        ) from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    place_in_class = torch.empty_like(labels)
    for digit in range(10):
        place_in_class[labels == digit] = torch.arange(int((labels == digit).sum()))
    tenth = place_in_class % 10
    part = {"train": tenth < 5, "calibration": (tenth >= 5) & (tenth < 7), "test": tenth >= 7}[split]
    return images[part], labels[part]


def pairs(split: str) -> tuple[Tensor, Tensor]:
    """2,000 pairs of digits of one split side by side: pixels (2000,1,8,16), labels 10·left + right.

    Every class has 20 pairs; which images they are made of is drawn with a fixed seed.
    """
    images, labels = digits(split)
    by_digit = [(labels == digit).nonzero().flatten().tolist() for digit in range(10)]
    generator = random.Random(SPLITS.index(split))
    classes = [i % 100 for i in range(PAIRS_OF_SPLIT)]
    halves = []
    for shown in ([c // 10 for c in classes], [c % 10 for c in classes]):
        halves.append(images[[by_digit[s][int(generator.random() * len(by_digit[s]))] for s in shown]])
    return torch.cat(halves, dim=3), torch.tensor(classes)
