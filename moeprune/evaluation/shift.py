"""Compare the error of each pruned layer on the evaluated data with the one that calibration predicted.

The error of an input is the squared change of the layer's output from the full model's, as a share of the mean square
of that output. Where the evaluated data is like the calibration data, its mean is about the error that was measured on
the held-out half of that data.
"""

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.evaluation.results import LayerShift
from moeprune.layers.observation import Observation
from moeprune.models.model import Model
from moeprune.records import from_json

logger = logging.getLogger(__name__)
STANDARD_ERRORS = 3.0  # beyond which sampling does not explain a difference
LARGER = 1.25  # and by which factor the error is larger
LEAST = 1e-3  # share of the output's square, below which an error is none


def predicted_errors(model: Model) -> dict[str, tuple[float, int]]:
    """Return for each layer with a recorded fit the error on held-out calibration data, and its samples."""
    recorded = model.details.provenance.get("fits", {})
    try:
        fits: dict[str, dict[str, float]] = from_json(recorded, dict[str, dict[str, float]], "fits")
        found = {name: (fit["held_out_error"], int(fit["samples"])) for name, fit in fits.items()}
    except (MoepruneError, KeyError):
        return {}
    return {name: fit for name, fit in found.items() if name in model.moe_layers}


class ShiftObserver:
    """Sums up the errors of the layers of a pruned model whose fits are recorded.

    pruned, full: the copies that are run, on one batch after the other, the pruned one first.
    """

    def __init__(self, model: Model, pruned: Model, full: Model):
        self.predicted = predicted_errors(model)
        recorded = model.details.provenance.get("mean_mass")
        self.recorded: Mapping[str, Any] = recorded if isinstance(recorded, dict) else {}
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in self.predicted}  # of a layer's runs in a pass
        self.errors: dict[str, list[Tensor]] = {name: [] for name in self.predicted}
        self.squares: dict[str, list[Tensor]] = {name: [] for name in self.predicted}
        self.mass: dict[str, Tensor] = {}
        for name in self.predicted:
            for which, see in ((pruned, self.see_pruned), (full, self.see_full)):
                layer = which.moe_layers[name]
                layer.observer = partial(_both, layer.observer, partial(see, name))

    def see_pruned(self, name: str, seen: Observation) -> None:
        """Keep what a pruned layer gives."""
        self.outputs[name].append(seen.output)

    def see_full(self, name: str, seen: Observation) -> None:
        """Compare it with what the full layer gives."""
        expected = seen.output.float()
        change = self.outputs[name].pop(0).float() - expected
        inputs = len(seen.mass)
        self.errors[name].append(change.square().reshape(inputs, -1).sum(1).cpu().double())
        self.squares[name].append(expected.square().reshape(inputs, -1).sum(1).cpu().double())
        self.mass[name] = self.mass.get(name, 0) + seen.mass.cpu().double().sum(0)

    def result(self) -> dict[str, LayerShift]:
        """Return the comparison for each layer; log a warning if the data is not like the calibration data."""
        found = {}
        for name, (predicted, samples) in self.predicted.items():
            errors = torch.cat(self.errors[name]) / torch.cat(self.squares[name]).mean().clamp_min(1e-30)
            count, error = len(errors), float(errors.mean())
            noise = float(errors.std(correction=0)) * math.sqrt(1 / count + 1 / max(samples, 1))
            found[name] = LayerShift(
                predicted_error=predicted,
                error=error,
                standard_error=noise,
                mass_moved=_moved(self.recorded.get(name), self.mass[name] / count),
                is_shifted=error > max(LARGER * predicted, LEAST) and error - predicted > STANDARD_ERRORS * noise,
            )
        if shifted := {name: shift for name, shift in found.items() if shift.is_shifted}:
            name, worst = max(shifted.items(), key=lambda each: each[1].error / max(each[1].predicted_error, 1e-30))
            logger.warning(
                f"the data is not like the calibration data: in {len(shifted)} of {len(found)} layers the error is"
                f" larger than calibration predicted, in `{name}` {100 * worst.error:.3g} % of the output's square"
                f" instead of {100 * worst.predicted_error:.3g} %; calibrate on data like this"
            )
        return found


def _both(first: Any, second: Any, seen: Observation) -> None:
    for observer in filter(None, (first, second)):
        observer(seen)


def _moved(recorded: Any, mean_mass: Tensor) -> float | None:
    """Return the share of the combine mass that other experts have than in calibration; None if that is not known."""
    try:
        before = torch.tensor(recorded, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return None
    return float((before - mean_mass).abs().sum() / 2) if before.shape == mean_mass.shape else None
