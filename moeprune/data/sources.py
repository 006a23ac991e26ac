"""A source of samples that are read in batches, whatever kind of file they come from."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
Batches = Iterable[Sequence[int]]  # the indices of the samples of each batch, ascending


@dataclass(frozen=True)
class Texts:
    """What sequences of token ids are made of.

    bytes: UTF-8 bytes of the text of each sequence (n,), behind its first token, which no model predicts. groups: their
    names, if documents have groups. group: the place of each sequence's among these (n,). length: tokens of a sequence.
    """

    bytes: NDArray[np.int64]
    groups: tuple[str, ...]
    group: NDArray[np.int64]
    length: int


@dataclass(frozen=True)
class Source:
    """Samples that can be read in batches.

    labels: of all samples, int64; None for a model without classes. read: yields the inputs of each batch, (b,c,H,W) in
    float32 or token ids (b,s) in int64. files: that the samples are read from. is_pixels: inputs are normalised pixels.
    class_names: of folders, in the order of the labels. split: that the samples are, if the data has splits. better:
    the spec of the samples to calibrate on in place of these, if there is one. texts: None for token ids without text.
    """

    samples: int
    labels: Tensor | None
    read: Callable[[Batches], Iterator[Tensor]]
    files: Sequence[Path] = ()
    is_pixels: bool = False
    class_names: tuple[str, ...] = ()
    split: str = ""
    better: str = ""
    texts: Texts | None = None


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield each item after the next has been taken from the iterable, so that tasks overlap."""
    iterator = iter(items)
    held = list(itertools.islice(iterator, 1))
    for item in iterator:
        held.append(item)
        yield held.pop(0)
    yield from held
