"""A source of samples that are read in batches, whatever kind of file they come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
Batch = tuple[Tensor, Tensor | None]
"""Inputs (b,c,H,W) in float32 and labels (b,) in int64, or None."""
Read = Callable[[Iterable[Sequence[int]]], Iterator[Batch]]


@dataclass(frozen=True)
class Source:
    """Samples that can be read in batches.

    samples: how many there are.
    has_labels: batches have labels; never for a model without classes.
    read: reads a batch for each sequence of indices; all indices ascend.
    files: that the samples are read from.
    """

    samples: int
    has_labels: bool
    read: Read
    files: Sequence[Path] = ()


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield each item after the next has been taken from the iterable, so that tasks overlap."""
    iterator = iter(items)
    held = list(itertools.islice(iterator, 1))
    for item in iterator:
        held.append(item)
        yield held.pop(0)
    yield from held
