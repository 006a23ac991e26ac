"""Outputs of several models on the same inputs. What they have in common with the full one runs once; where they read
their weights from disk when they run, all run one layer before any goes on to the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor

from moeprune.calibration import passes
from moeprune.calibration.passes import Pass, Start, to_file
from moeprune.data.datasets import Dataset
from moeprune.models.model import Model
from moeprune.models.runtime import Runtime, fitting

K = TypeVar("K")
HELD = 1 << 30  # bytes between layers that are kept in memory, and not in files


def run_paired(
    models: Mapping[K, Model], full: Model, data: Dataset, runtime: Runtime, what: str
) -> Iterator[tuple[K, Tensor, Tensor]]:
    """Yield for each batch, or part of one, and model its key, its output and the full model's, in float32.

    models: copies of the full one, with pruned layers. what: the progress bar's title.
    """
    run = run_by_layers if full.reads_weights else run_behind
    for batch, _ in runtime.batches(data, what):
        for inputs in fitting(batch, full):
            outputs = run([full, *models.values()], inputs, runtime)
            expected = next(outputs).float()
            for key, found in zip(models, outputs, strict=True):
                yield key, found.float(), expected


def run_behind(models: Sequence[Model], inputs: Tensor, runtime: Runtime) -> Iterator[Tensor]:
    """Yield the output of each model; all but the first begin at their first layer that is pruned."""
    with contextlib.ExitStack() as files:
        sequences = [files.enter_context(contextlib.closing(passes.Sequence(model))) for model in models]
        places = [sequence.first_pruned() for sequence in sequences]
        kept: dict[int, Tensor] = {}  # what the first model's layers take

        def keep(place: int, taken: Tensor) -> None:
            if place in places:
                is_large = sum(each.nbytes for each in kept.values()) + taken.nbytes > HELD
                kept[place] = to_file(taken, files) if is_large else taken

        for model, place in zip(models, places, strict=True):
            start = Start(place, kept[place]) if place in kept and sequences[0].can_start else None
            each = Pass(partial(runtime.forward, model, inputs), inputs.device, start)
            each.see = keep if model is models[0] else None
            yield each.run()


def run_by_layers(models: Sequence[Model], inputs: Tensor, runtime: Runtime) -> Iterator[Tensor]:
    """Yield the output of each model; all run a layer of their sequence before one of them runs the next."""
    with contextlib.ExitStack() as files:
        sequences = [files.enter_context(contextlib.closing(passes.Sequence(model))) for model in models]
        starts: list[Start | None] = [None] * len(models)
        for place in range(1, len(sequences[0].layers)):
            for index, model in enumerate(models):
                each = Pass(partial(runtime.forward, model, inputs), inputs.device, starts[index])
                each.run_before(place)
                if each.entered is None or each.entered[0] != place or not all(part.can_start for part in sequences):
                    starts = [None] * len(models)
                    break
                taken = each.entered[1]
                is_large = taken.nbytes * len(models) > HELD
                starts[index] = Start(place, to_file(taken, files) if is_large else taken)
            else:
                continue
            break
        for start, model in zip(starts, models, strict=True):
            yield Pass(partial(runtime.forward, model, inputs), inputs.device, start).run()
