"""Passes over data: observe layers of a model, accumulate what they show, compare outputs of models.

Axes: b inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moeprune.calibration.statistics import LayerMoments, MomentsAccumulator
from moeprune.calibration.sums import wide_dtype
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError, StopForward
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import Observation
from moeprune.models.model import Model
from moeprune.models.runtime import Runtime

K = TypeVar("K")
A = TypeVar("A", bound=MomentsAccumulator)
Observer = Callable[[str, Observation], None]


def measure(
    model: Model, names: Sequence[str], data: Dataset, runtime: Runtime, what: str, accumulator: Callable[[MoELayer], A]
) -> dict[str, A]:
    """Return what the named dense layers compute, accumulated over the data in one pass up to the last of them.

    model: a private copy; it is moved to the runtime's device. what: the progress bar's title. accumulator:
    makes one for a layer.
    """
    model.to(runtime.torch_device)
    accumulators = {name: accumulator(model.moe_layers[name]) for name in names}
    for inputs, labels in runtime.batches(data, what):

        def observe(name: str, observation: Observation, labels: Tensor | None = labels) -> None:
            accumulators[name].add(observation, labels)

        observe_layers(model, names, observe, inputs, runtime)
    return accumulators


def require_finite(layers: Mapping[str, LayerMoments], data: Dataset) -> None:
    """Raise a MoepruneError that names a layer with NaN or infinite statistics."""
    for name, layer in layers.items():
        if not all(getattr(layer, field.name).isfinite().all() for field in fields(layer)):
            raise MoepruneError(
                f"layer `{name}` computes NaN or infinite numbers on `{data.spec}`",
                "check the checkpoint and the scale of the inputs, or use `--dtype float32`",
            )


class Change(NamedTuple):
    """The mean change of a model's predictions from the full one's (scalars).

    divergence: in nats; without a head, the change of the features as a share of their square. agreement: share of
    equal predictions, None without a head.
    """

    divergence: Tensor
    agreement: Tensor | None


def changes(models: Mapping[K, Model], full: Model, data: Dataset, runtime: Runtime, what: str) -> dict[K, Change]:
    """Return the mean change of each model's predictions from the full one's.

    models, full: private copies on the runtime's device. what: the progress bar's title.
    """
    wide = wide_dtype(runtime.torch_device)  # else rounding makes small divergences negative
    totals = {key: torch.zeros(2, dtype=torch.float64) for key in models}
    has_head = full.input_format.classes > 0
    for key, found, expected in runtime.run_paired(models, full, data, what):
        same = found.argmax(-1) == expected.argmax(-1)
        if has_head:
            found, expected = found.log_softmax(-1, dtype=wide), expected.log_softmax(-1, dtype=wide)
            change = (expected.exp() * (expected - found)).sum(-1).clamp_min(0)
        else:
            change = (found - expected).square().sum(-1) / expected.square().sum(-1).clamp_min(1e-12)
        for place, values in enumerate((change, same)):
            totals[key][place] += values.reshape(len(values), -1).to(change.dtype).mean(1).sum().cpu()
    return {
        key: Change(total[0] / data.samples, total[1] / data.samples if has_head else None)
        for key, total in totals.items()
    }


def observe_layers(model: nn.Module, names: Sequence[str], observe: Observer, inputs: Tensor, runtime: Runtime) -> None:
    """Run the model on inputs as far as the named layers and hand each one's name and observation over."""
    waiting = set(names)
    layers: dict[str, MoELayer] = {name: model.get_submodule(name) for name in names}  # type: ignore[misc]

    def seen(name: str, observation: Observation) -> None:
        if len(observation.mass) != len(inputs):
            raise MoepruneError(f"layer `{name}` sees {len(observation.mass)} inputs where the model has {len(inputs)}")
        observe(name, observation)
        waiting.discard(name)
        if not waiting:
            raise StopForward

    try:
        for name, layer in layers.items():
            layer.observer = partial(seen, name)
        with suppress(StopForward):
            runtime.forward(model, inputs)
    finally:
        for layer in layers.values():
            layer.observer = None
