"""scikit-learn's digits, and pairs of them: real images that need no download."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from moeprune.errors import MoepruneError

SPLITS = {"train": (0, 5), "calibration": (5, 7), "test": (7, 10)}
"""The places from and to, of every ten images of a class in the order of the data set."""
PAIRS_OF_SPLIT = 2000


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return one split of scikit-learn's digits, stratified and fixed: pixels (n,1,8,8) in 0…1 and labels (n,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        hint = "install it, or moeprune's extra `demo`"
        raise MoepruneError("the data sets `digits` and `pairs` need scikit-learn", hint) from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    place_in_class = (labels == labels[:, None]).tril(-1).sum(1)
    start, end = SPLITS[split]
    part = (place_in_class % 10 >= start) & (place_in_class % 10 < end)
    return images[part], labels[part]


def pairs(split: str) -> tuple[Tensor, Tensor]:
    """2,000 pairs of digits of one split side by side: pixels (2000,1,8,16), labels 10·left + right.

    Every class has 20 pairs; which images they are made of is drawn with a fixed seed.
    """
    images, labels = digits(split)
    by_digit = [images[labels == digit] for digit in range(10)]
    generator = random.Random(list(SPLITS).index(split))

    def draw(digits: Tensor) -> Tensor:
        shown = (by_digit[digit] for digit in digits.tolist())
        return torch.stack([each[int(generator.random() * len(each))] for each in shown])

    classes = torch.arange(PAIRS_OF_SPLIT) % 100
    return torch.cat([draw(classes // 10), draw(classes % 10)], dim=3), classes
