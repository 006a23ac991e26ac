"""Outputs of several models on the same inputs: one after the other, or, where they read their weights from disk when
they run, all through one layer before any goes on to the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TypeVar

from torch import Tensor

from moeprune.calibration.passes import Pass, Sequence, Start, to_file
from moeprune.data.datasets import Dataset
from moeprune.models.model import Model
from moeprune.models.runtime import Runtime, fitting

K = TypeVar("K")
HELD = 1 << 30  # bytes between layers that are kept in memory, and not in files


def run_paired(
    models: Mapping[K, Model], full: Model, data: Dataset, runtime: Runtime, what: str
) -> Iterator[tuple[K, Tensor, Tensor]]:
    """Yield what `Runtime.run_paired` does; of models that read their weights, each is read once a batch."""
    if not full.reads_weights:
        yield from runtime.run_paired(models, full, data, what)
        return
    by_place = dict(enumerate((full, *models.values())))
    for batch, _ in runtime.batches(data, what):
        for inputs in fitting(batch, full):
            outputs = run_together(by_place, inputs, runtime)
            _, expected = next(outputs)
            expected = expected.float()
            for key, (_, found) in zip(models, outputs, strict=True):
                yield key, found.float(), expected


def run_together(models: Mapping[K, Model], inputs: Tensor, runtime: Runtime) -> Iterator[tuple[K, Tensor]]:
    """Yield the output of each model; all run a layer of their sequence before one of them runs the next."""
    with contextlib.ExitStack() as files:
        sequences = [files.enter_context(contextlib.closing(Sequence(model))) for model in models.values()]
        starts = dict[K, Start | None].fromkeys(models)
        for place in range(1, len(sequences[0].layers)):
            for key, model in models.items():
                each = Pass(partial(runtime.forward, model, inputs), inputs.device, starts[key])
                each.run_before(place)
                if each.entered is None or each.entered[0] != place or not all(part.can_start for part in sequences):
                    starts = dict.fromkeys(models)
                    break
                taken = each.entered[1]
                is_large = taken.nbytes * len(models) > HELD
                starts[key] = Start(place, to_file(taken, files) if is_large else taken)
            else:
                continue
            break
        for key, model in models.items():
            yield key, Pass(partial(runtime.forward, model, inputs), inputs.device, starts[key]).run()
