"""Samples that Python code hands over: tensors, arrays, data sets and loaders of torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data import Dataset as TorchDataset

from moeprune.data.arrays import checked_labels, converter
from moeprune.data.sources import Batches, Source
from moeprune.data.tokens import AnyFormat
from moeprune.errors import MoepruneError, user_code

Array: TypeAlias = "Tensor | np.ndarray"
Samples: TypeAlias = "Array | tuple[Array, Array] | TorchDataset | DataLoader"
"""Inputs; inputs and labels; or a data set of torch, or a loader, of either."""
HINT = (
    "give inputs (n, channels, height, width), or a pair of inputs and labels, or token ids (n, s): tensors, arrays, or"
    " a data set or DataLoader of torch that gives them"
)


def open_samples(samples: Samples, form: AnyFormat) -> tuple[str, Source]:
    """Return a name such as `<DataLoader of CIFAR10>`, which no file has, and the source of samples.

    A data set is read in the order of its indices, in batches of moeprune's own. Of a loader that are the samples that
    its sampler draws, whatever their order; its workers and its `collate_fn` are used. What can only be iterated is
    read into memory, once.

    Raises a MoepruneError if they do not fit the model, or reading them raises anything.
    """
    name = type(samples).__name__
    if isinstance(samples, DataLoader):
        name = f"{name} of {type(samples.dataset).__name__}"
    elif isinstance(samples, tuple | list) and len(samples):
        name = type(samples[0]).__name__
    name = f"<{name}>"
    if not isinstance(samples, DataLoader | TorchDataset):
        return name, _of_arrays(name, *_pair(samples, name), form)
    loader = samples if isinstance(samples, DataLoader) else DataLoader(samples, batch_size=64)
    with user_code(f"reading `{name}` fails", HINT), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # samplers and loaders draw the same each time, and leave the caller's numbers alone
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            batches = [_pair(batch, name) for batch in loader]
        else:
            return name, _of_dataset(name, loader, sorted(map(int, chain.from_iterable(loader.batch_sampler))), form)
    if not batches:
        raise MoepruneError(f"no samples in `{name}`", HINT)
    known = [labels for _, labels in batches if labels is not None]
    labels = torch.cat(known) if len(known) == len(batches) else None
    return name, _of_arrays(name, torch.cat([inputs for inputs, _ in batches]), labels, form)


def _of_arrays(name: str, inputs: Tensor, labels: Tensor | None, form: AnyFormat) -> Source:
    to_inputs = converter(name, tuple(inputs.shape), form)

    def read(batches: Batches) -> Iterator[Tensor]:
        return (to_inputs(inputs[list(indices)]) for indices in batches)

    labels = checked_labels(name, labels, len(inputs)) if labels is not None and form.classes else None
    return Source(len(inputs), labels, read, is_pixels=inputs.dtype == torch.uint8)


def _of_dataset(name: str, loader: DataLoader, indices: Sequence[int], form: AnyFormat) -> Source:
    if not indices:
        raise MoepruneError(f"no samples in `{name}`", HINT)

    def load(batches: Iterable[Sequence[int]], workers: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        parts = [[indices[place] for place in places] for places in batches]
        again = DataLoader(
            loader.dataset, batch_sampler=parts, collate_fn=loader.collate_fn or default_collate,
            num_workers=workers, worker_init_fn=loader.worker_init_fn, timeout=loader.timeout if workers else 0,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            generator=torch.Generator().manual_seed(0),  # workers draw the same in each pass, and nobody else's numbers
        )  # fmt: skip
        read = None
        for part in parts:
            with user_code(f"reading `{name}` fails", HINT):
                read = iter(again) if read is None else read
                inputs, labels = _pair(next(read), name)
            if len(inputs) != len(part):
                raise MoepruneError(f"`{name}` gives {len(inputs)} inputs for {len(part)} samples", HINT)
            yield inputs, labels

    [(inputs, labels)] = load([[0]], 0)
    shape, has_labels = (len(indices), *inputs.shape[1:]), labels is not None and form.classes > 0
    to_inputs, found = converter(name, shape, form), torch.full((len(indices),), -1)

    def read(batches: Batches) -> Iterator[Tensor]:
        batches = list(batches)
        for places, (inputs, labels) in zip(batches, load(batches, loader.num_workers), strict=True):
            if inputs.shape[1:] != shape[1:]:
                raise form.misfit(name, tuple(inputs.shape))
            if has_labels:
                if labels is None:
                    raise MoepruneError(f"some samples of `{name}` have labels, others none", HINT)
                found[list(places)] = checked_labels(name, labels, len(places))  # before the inputs are handed over
            yield to_inputs(inputs)

    return Source(len(indices), found if has_labels else None, read, is_pixels=inputs.dtype == torch.uint8)


def _pair(batch: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return the inputs and labels of a batch, on the CPU."""
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    if not (1 <= len(parts) <= 2 and all(isinstance(part, Tensor | np.ndarray) for part in parts)):
        found = ", ".join(type(part).__name__ for part in parts)
        raise MoepruneError(f"`{name}` gives {type(batch).__name__} of {found or 'nothing'}", HINT)
    try:
        inputs, *labels = (torch.as_tensor(part).detach().cpu() for part in parts)
    except (TypeError, ValueError) as error:
        raise MoepruneError(f"`{name}` gives no numbers ({error})", HINT) from None
    return inputs, labels[0] if labels else None
