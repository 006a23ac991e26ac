"""Loss, agreement and divergence of language models, token by token, and their intervals over sequences.

Axes: b sequences of a batch, s tokens of a sequence, V tokens of the vocabulary, n sequences of the data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from moeprune.calibration.changes import divergence
from moeprune.calibration.sums import wide_dtype
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.evaluation.gates import Evidence, of_mean
from moeprune.evaluation.intervals import mean_at_most
from moeprune.evaluation.language_results import LanguageDifference, LanguageEvaluation, LanguageFigures, LanguageGroup
from moeprune.evaluation.results import Interval
from moeprune.evaluation.usage import UsageObserver
from moeprune.layers.interface import Usage
from moeprune.models.model import Model, private_copy
from moeprune.models.results import ModelCost
from moeprune.models.runtime import Runtime, fitting, rows_at_once

LARGEST = 700.0  # exponent that a float holds
SIDE = 0.975  # confidence of either side of an interval of 95 %
FIGURES = ("loss", "accuracy", "agreement", "kl")


@dataclass(frozen=True)
class Predictions:
    """Means over the predicted tokens of each sequence by FIGURES (n,), on the CPU in float64.

    agreement, kl: with the last of the models that ran, of which they are 1 and 0. length: tokens of a sequence. usage:
    of experts, where plans do not fix it.
    """

    means: Mapping[str, Tensor]
    length: int
    usage: dict[str, Usage]


def predict(
    models: Sequence[Model], data: Dataset, runtime: Runtime, watch: Callable[[Sequence[Model]], None] | None = None
) -> list[Predictions]:
    """Return what each model predicts, from one pass over data; raise a MoepruneError for NaN or infinite logits.

    watch: called with the copies that are run, before they are.
    """
    device, length = runtime.torch_device, 0
    copies = [private_copy(model).to(device) for model in models]
    usage = [UsageObserver(model) for model in copies]
    sums: list[list[Tensor]] = [[] for _ in models]
    if watch is not None:
        watch(copies)
    for inputs, _ in runtime.batches(data, "eval"):
        length = inputs.shape[1]
        for ids in fitting(inputs, models[0]):
            logits = [_logits(model, ids, runtime) for model in copies]
            for parts, of_batch in zip(sums, _sums(logits, ids), strict=True):
                parts.append(of_batch)
    found = []
    for parts, observed in zip(sums, usage, strict=True):
        means = torch.cat(parts, 1).cpu().double() / (length - 1)
        if not means.isfinite().all():
            raise MoepruneError(f"a model computes NaN or infinite logits on `{data.spec}`", "try `--dtype float32`")
        found.append(Predictions(dict(zip(FIGURES, means, strict=True)), length, observed.result(data.samples)))
    return found


def _logits(model: Model, ids: Tensor, runtime: Runtime) -> Tensor:
    logits = runtime.forward(model, ids)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        found = f"the model gives {list(logits.shape)} for token ids {list(ids.shape)}"
        raise MoepruneError(f"{found}, expected logits {[*ids.shape, 'V']}", "give a model that returns its logits")
    return logits


def _sums(logits: Sequence[Tensor], ids: Tensor) -> list[Tensor]:
    """Return the sums of FIGURES over the predicted tokens of each sequence (4,b) for each model's logits (b,s,V)."""
    wide, step, targets = wide_dtype(ids.device), rows_at_once(logits[-1]), ids.roll(-1, 1).flatten()
    of_rows: list[list[Tensor]] = [[] for _ in logits]
    for wanted, *parts in zip(targets.split(step), *(each.flatten(0, 1).split(step) for each in logits), strict=True):
        expected = parts[-1].log_softmax(-1, dtype=wide)
        best = expected.argmax(-1)
        for of_model, part in zip(of_rows, parts, strict=True):
            found = expected if part is parts[-1] else part.log_softmax(-1, dtype=wide)
            predicted = found.argmax(-1)
            losses = -found.gather(-1, wanted[:, None])[:, 0]
            of_model.append(torch.stack([losses, predicted == wanted, predicted == best, divergence(found, expected)]))
    return [torch.cat(of_model, 1).unflatten(1, ids.shape)[:, :, :-1].sum(2) for of_model in of_rows]


def measure(
    model: Model, baseline: Model | None, data: Dataset, runtime: Runtime, watch: Callable[[Sequence[Model]], None]
) -> tuple[type[LanguageEvaluation], dict[str, Any], Callable[[str], Evidence | None]]:
    """Return the type of the result, the fields about predictions, and the evidence for figures of the difference."""
    models = [model] if baseline is None else [model, baseline]
    found = Comparison(model, baseline, data, predict(models, data, runtime, watch))
    return LanguageEvaluation, found.fields, found.evidence


class Comparison:
    """Figures of a language model on some data, alone or beside the baseline."""

    def __init__(self, model: Model, baseline: Model | None, data: Dataset, predictions: Sequence[Predictions]):
        self.own, self.full = predictions[0], predictions[-1] if baseline is not None else None
        texts, places = data.source.texts, list(data.indices)
        self.bytes = None if texts is None else torch.from_numpy(texts.bytes[places])
        self.group = None if texts is None or not texts.groups else torch.from_numpy(texts.group[places])
        self.names = () if texts is None else texts.groups
        self.model = self._figures(model, self.own)
        self.baseline_model = None if baseline is None or self.full is None else self._figures(baseline, self.full)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a LanguageEvaluation that are known."""
        return {
            "sequence_length": self.own.length,
            "model": self.model,
            "baseline_model": self.baseline_model,
            "difference": self._difference(),
            "groups": self._groups(),
        }

    def evidence(self, figure: str) -> Evidence | None:
        """Return the evidence for a figure of the difference; None if it is exact."""
        if figure in ("loss_increase", "perplexity_ratio"):
            return of_mean(*_moments(self._increase()), math.exp if figure == "perplexity_ratio" else float)
        if figure == "kl":
            return of_mean(*_moments(self.own.means["kl"]))
        if figure == "agreement":
            return of_mean(*_moments(-self.own.means["agreement"]), lambda bound: max(0.0, -bound), is_lower=True)
        return None

    def _increase(self) -> Tensor:
        assert self.full is not None
        return self.own.means["loss"] - self.full.means["loss"]

    def _figures(self, model: Model, predictions: Predictions) -> LanguageFigures:
        loss, accuracy = predictions.means["loss"], predictions.means["accuracy"]
        cost: ModelCost = model.cost(predictions.usage)
        return LanguageFigures(
            loss=float(loss.mean()),
            loss_ci95=_interval(loss),
            perplexity=_exp(float(loss.mean())),
            perplexity_ci95=_of_both(_exp, _interval(loss)),
            bits_per_byte=self._bits(loss, self.bytes),
            accuracy=float(accuracy.mean()),
            accuracy_ci95=_of_both(_share, _interval(accuracy)),
            **msgspec.structs.asdict(cost),
        )

    def _bits(self, loss: Tensor, lengths: Tensor | None) -> float | None:
        """Return the bits that a byte of text costs, of sequences with these losses and bytes."""
        total = 0 if lengths is None else int(lengths.sum())
        return float(loss.sum()) * (self.own.length - 1) / math.log(2) / total if total else None

    def _difference(self) -> LanguageDifference | None:
        full, model = self.baseline_model, self.model
        if full is None or self.full is None:
            return None
        increase, means = self._increase(), self.own.means
        drop = self.full.means["accuracy"] - means["accuracy"]
        flops, full_flops = model.flops_per_input.total, full.flops_per_input.total
        return LanguageDifference(
            loss_increase=float(increase.mean()),
            loss_increase_ci95=_interval(increase),
            perplexity_ratio=_exp(float(increase.mean())),
            perplexity_ratio_ci95=_of_both(_exp, _interval(increase)),
            accuracy_drop=float(drop.mean()),
            accuracy_drop_ci95=_interval(drop),
            agreement=float(means["agreement"].mean()),
            agreement_ci95=_of_both(_share, _interval(means["agreement"])),
            kl=float(means["kl"].mean()),
            kl_ci95=_of_both(lambda bound: max(0.0, bound), _interval(means["kl"])),
            flops_reduction=(full_flops - flops) / full_flops,
            size_reduction=(full.bytes - model.bytes) / full.bytes,
        )

    def _groups(self) -> list[LanguageGroup]:
        if self.group is None:
            return []
        found = [self._of_group(name, self.group == place) for place, name in enumerate(self.names)]
        present = [group for group in found if group is not None]
        return sorted(present, key=lambda group: -(group.loss if self.full is None else group.loss_increase or 0.0))

    def _of_group(self, name: str, where: Tensor) -> LanguageGroup | None:
        """Return the figures of the sequences of a group; None if no sequence is of it."""
        if not where.any():
            return None
        loss = self.own.means["loss"][where]
        means = {figure: float(self.own.means[figure][where].mean()) for figure in FIGURES}
        increase = None if self.full is None else self._increase()[where]
        return LanguageGroup(
            name=name,
            samples=len(loss),
            loss=means["loss"],
            loss_ci95=_interval(loss),
            perplexity=_exp(means["loss"]),
            bits_per_byte=self._bits(loss, None if self.bytes is None else self.bytes[where]),
            accuracy=means["accuracy"],
            baseline_loss=None if self.full is None else float(self.full.means["loss"][where].mean()),
            loss_increase=None if increase is None else float(increase.mean()),
            loss_increase_ci95=None if increase is None else _interval(increase),
            agreement=None if self.full is None else means["agreement"],
            kl=None if self.full is None else means["kl"],
        )


def _exp(value: float) -> float:
    return math.exp(min(value, LARGEST))


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def _moments(values: Tensor) -> tuple[int, float, float]:
    """Return the number of sequences, their mean and their standard deviation."""
    return len(values), float(values.mean()), float(values.std()) if len(values) > 1 else 0.0


def _interval(values: Tensor) -> Interval | None:
    """Return Student's interval of a mean over sequences; None of one."""
    count, mean, deviation = _moments(values)
    if count < 2:
        return None
    return -mean_at_most(count, -mean, deviation, SIDE), mean_at_most(count, mean, deviation, SIDE)


def _of_both(function: Callable[[float], float], interval: Interval | None) -> Interval | None:
    return None if interval is None else (function(interval[0]), function(interval[1]))
