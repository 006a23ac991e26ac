"""Accuracy, size and cost of a model, alone and against the full model, on average and class by class."""

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from moeprune import __version__
from moeprune.calibration.sums import wide_dtype
from moeprune.data.datasets import Data, Dataset
from moeprune.data.leakage import warn_of_seen_samples
from moeprune.data.spec import DataSpec
from moeprune.data.tokens import TokenFormat
from moeprune.errors import MoepruneError
from moeprune.evaluation import language, results
from moeprune.evaluation.gates import GATES, check_kind, judge
from moeprune.evaluation.intervals import mcnemar, paired_difference, simultaneous_quantile, wilson
from moeprune.evaluation.language_results import LanguageEvaluation
from moeprune.evaluation.latency import measure_latency
from moeprune.evaluation.request import BatchSizes, EvalRequest
from moeprune.evaluation.shift import ShiftObserver, predicted_errors
from moeprune.evaluation.usage import UsageObserver
from moeprune.layers.interface import Usage
from moeprune.models.model import Model, calibration_of, dataset_for, fingerprint, private_copy, unpruned_fingerprint
from moeprune.models.opening import opened
from moeprune.models.request import ModelSpec
from moeprune.models.results import ModelCost
from moeprune.models.runtime import Runtime
from moeprune.records import from_json

logger = logging.getLogger(__name__)
LEVEL = 0.95
KNOWN = 0.5  # accuracy of the full model in a class at or above which the class is considered known
HIDES = 5  # the average hides a drop of at least this many times its own


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model for every sample, on the CPU.

    labels, predicted: (samples) int64. loss: mean cross-entropy in nats. usage: of experts, where plans do not fix it.
    """

    labels: Tensor
    predicted: Tensor
    top5_accuracy: float
    loss: float
    usage: dict[str, Usage]

    @property
    def correct(self) -> Tensor:
        """Samples predicted correctly, (samples) bool."""
        return self.predicted == self.labels


class _Tally:
    """Collects the predictions of one model, a batch at a time."""

    def __init__(self, model: Model, device: torch.device):
        self.model = private_copy(model).to(device)
        self.loss = torch.zeros((), device=device, dtype=wide_dtype(device))
        self.in_top5 = torch.zeros((), device=device, dtype=torch.int64)
        self.predicted: list[Tensor] = []
        self.usage = UsageObserver(self.model)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        self.predicted.append(logits.argmax(1))
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
        self.in_top5 += (top5 == targets[:, None]).sum()
        self.loss += F.cross_entropy(logits, targets, reduction="sum")

    def result(self, labels: Tensor) -> Predictions:
        count, predicted = len(labels), torch.cat(self.predicted).cpu()
        usage = self.usage.result(count)
        return Predictions(labels, predicted, int(self.in_top5) / count, float(self.loss) / count, usage)


def predict(
    models: Sequence[Model],
    data: Dataset,
    runtime: Runtime,
    what: str = "eval",
    watch: Callable[[Sequence[Model]], None] | None = None,
) -> list[Predictions]:
    """Return the predictions of each model, from one pass over data; raise a MoepruneError if it has no labels.

    watch: called with the copies that are run, before they are.
    """
    for model in models:
        _require_labelled(model, data)
    device = runtime.torch_device
    tallies = [_Tally(model, device) for model in models]
    if watch is not None:
        watch([tally.model for tally in tallies])
    labels: list[Tensor] = []
    for inputs, batch_labels in runtime.batches(data, what):
        assert batch_labels is not None
        labels.append(batch_labels)
        for tally in tallies:
            tally.add(runtime.forward(tally.model, inputs).float(), batch_labels.to(device))
    if not all(tally.loss.isfinite() for tally in tallies):
        raise MoepruneError(f"a model computes NaN or infinite logits on `{data.spec}`", "try `--dtype float32`")
    return [tally.result(torch.cat(labels)) for tally in tallies]


class Reference:
    """The full model on labelled data, with which pruned ones are compared."""

    def __init__(self, full: Model, data: Dataset, runtime: Runtime, what: str):
        self.data, self.runtime = data, runtime
        [self.predictions] = predict([full], data, runtime, what)
        self.figures = describe(full, self.predictions)

    @property
    def itself(self) -> tuple[results.ModelFigures, results.Difference]:
        """The figures of the full model, and no difference."""
        return self.figures, compare(self.figures, self.figures, self.predictions, self.predictions)

    def compare(self, model: Model, what: str = "eval") -> tuple[results.ModelFigures, results.Difference]:
        """Return the figures of a model, and its difference from the full one."""
        [predictions] = predict([model], self.data, self.runtime, what)
        figures = describe(model, predictions)
        return figures, compare(figures, self.figures, predictions, self.predictions)


def evaluate(
    model: Model | str | os.PathLike[str],
    data: Data,
    baseline: Model | str | os.PathLike[str] | None = None,
    runtime: Runtime = Runtime(),
    latency_batches: Sequence[int] | None = None,
    *,
    gates: Mapping[str, float] | None = None,
    confidence: float | None = None,
    device: str | None = None,
    batch_size: int | None = None,
) -> results.Evaluation | LanguageEvaluation:
    """Evaluate a model on labelled data or text, and compare it with a baseline on it, as `moeprune eval` does.

    Raises a MoepruneError if the data does not fit or has no labels, the baseline is pruned, or gates cannot be judged.

    Args:
        model, baseline: models of moeprune, or their files; the baseline is the full model.
        data: see moeprune.data.datasets and moeprune.data.samples; to group text, `open_data(…, by="field")`.
        latency_batches: batch sizes to measure latency at; None: latency is not measured.
        gates: limits by name, such as `{"max_accuracy_drop": 0.01}`; see EvalRequest.
        confidence: gates judge one-sided bounds at this level; None: values.
        device, batch_size: replace those of the runtime.
    """
    latency_batches = from_json(latency_batches, BatchSizes | None, "`latency_batches`")
    runtime = runtime.updated(device, batch_size)
    request = _request(gates or {}, confidence, baseline is not None, latency_batches is not None, runtime)
    paths = [os.fspath(each) if isinstance(each, str | os.PathLike) else None for each in (model, baseline)]
    offload = runtime.offload
    model, baseline = opened(model, offload), None if baseline is None else opened(baseline, offload)
    is_language = isinstance(model.input_format, TokenFormat)
    check_kind(request.limits, is_language)
    if baseline is not None:
        _require_baseline(baseline, model)
    data = dataset_for(model, data, split="test")
    if is_language and confidence is not None and data.samples < 2:
        raise MoepruneError(f"`{data.spec}` has one sequence, `--confidence` needs at least two", "give more text")
    observers = list[ShiftObserver]()

    def watch(copies: Sequence[Model]) -> None:
        if len(copies) > 1:
            observers.append(ShiftObserver(model, *copies))

    measure = language.measure if is_language else _measure_classes
    kind, fields, evidence = measure(model, baseline, data, runtime, watch)
    warn_of_seen_samples(data, calibration_of(model))
    latency = None
    if latency_batches is not None:
        latency = measure_latency(model, data, baseline, latency_batches, runtime)
    found = kind(
        checkpoint=paths[0],
        baseline=paths[1],
        data=data.info,
        shift=observers[0].result() if observers else {},
        latency=latency,
        gates=[],
        passed=True,
        environment=environment(runtime),
        **fields,
    )
    if isinstance(found, results.Evaluation) and baseline is not None:
        _warn_of_collapsed(found)
    judged = judge(found, request.limits, request.confidence, evidence)
    return msgspec.structs.replace(found, gates=judged, passed=all(gate.passed for gate in judged))


def _measure_classes(
    model: Model, baseline: Model | None, data: Dataset, runtime: Runtime, watch: Callable[[Sequence[Model]], None]
) -> tuple[type[results.Evaluation], dict[str, Any], None]:
    """Return the type of the result and the fields about predictions."""
    own, *full = predict([model] if baseline is None else [model, baseline], data, runtime, watch=watch)
    figures, of_baseline, difference, forgotten = describe(model, own), None, None, None
    if baseline is not None:
        of_baseline = describe(baseline, full[0])
        difference = compare(figures, of_baseline, own, full[0])
        forgotten = forgetting(own.labels, own.predicted, full[0].predicted, data.indices)
    fields = {"model": figures, "baseline_model": of_baseline, "difference": difference, "forgetting": forgotten}
    return results.Evaluation, fields, None


def _require_baseline(baseline: Model, model: Model) -> None:
    """Raise a MoepruneError if a model cannot be compared with a baseline; warn if it was pruned from another."""
    hint = "give the checkpoint that the model was pruned from"
    if baseline.plan:
        raise MoepruneError("`--baseline` is pruned, expected the full model", hint)
    if not baseline.input_format.agrees_with(model.input_format):
        message = f"the baseline takes {baseline.input_format.in_words}, the model {model.input_format.in_words}"
        raise MoepruneError(message, hint)
    planned = {*model.plan, *predicted_errors(model)}
    if others := sorted(planned - baseline.moe_layers.keys()):
        raise MoepruneError(f"the baseline has no MoE layer `{others[0]}`, which is pruned in the model", hint)
    if "pruned_from" in model.details.provenance and unpruned_fingerprint(model) != fingerprint(baseline):
        logger.warning("the model was not pruned from the baseline, but from another model")


def _request(
    gates: Mapping[str, float], confidence: float | None, has_baseline: bool, latency: bool, runtime: Runtime
) -> EvalRequest:
    """Return the request of limits by gate, which checks them; its files stand for what is in memory."""
    if unknown := [name for name in gates if name not in GATES]:
        raise MoepruneError(f"unknown gate `{unknown[0]}`", f"gates are {', '.join(GATES)}")
    full = ModelSpec(path=Path("baseline")) if has_baseline else None
    checked: dict[str, Any] = {**gates, "confidence": confidence, "latency": latency, "baseline": full}
    return EvalRequest(checkpoint=ModelSpec(path=Path("model")), data=DataSpec(spec="data"), runtime=runtime, **checked)


def _warn_of_collapsed(found: results.Evaluation) -> None:
    assert found.forgetting is not None
    assert found.difference is not None
    average = f"while the average accuracy changed by {-100 * found.difference.accuracy_drop + 0.0:+.2f} pt"
    for entry in found.forgetting.classes:
        if entry.index in found.forgetting.collapsed:
            accuracies = f"{100 * entry.baseline_accuracy:.1f} % → {100 * entry.accuracy:.1f} %"
            logger.warning(f"class {entry.index} collapsed: {accuracies} of its {entry.samples} samples, {average}")


def describe(model: Model, predictions: Predictions) -> results.ModelFigures:
    """Return accuracy, size and cost of a model."""
    correct, samples = int(predictions.correct.sum()), len(predictions.labels)
    return results.ModelFigures(
        accuracy=correct / samples,
        accuracy_ci95=wilson(correct, samples),
        top5_accuracy=predictions.top5_accuracy,
        loss=predictions.loss,
        **msgspec.structs.asdict(model.cost(predictions.usage)),
    )


def require_classes(model: Model) -> None:
    """Raise a MoepruneError if a model is no classifier of whole inputs."""
    if isinstance(model.input_format, TokenFormat):
        hint = "prune with `--keep` or `--max-size`, then judge it with `moeprune eval --max-loss-increase`"
        raise MoepruneError("language models have no accuracy of classes to go by", hint)
    if model.config.num_classes == 0:
        raise MoepruneError("the model has no head: it gives features, not logits", "there is nothing to evaluate")
    if (tokens := model.config.outputs_per_input) > 1:
        message = f"the model gives logits for each of its {tokens} tokens, not for an image (`pooling` none)"
        raise MoepruneError(message, "analyze and prune work on it; eval needs a model that pools")


def _require_labelled(model: Model, data: Dataset) -> None:
    require_classes(model)
    if not data.has_labels:
        hint = "add an array `labels` with each sample's class, or the file of labels beside that of images"
        raise MoepruneError(f"`{data.spec}` has no labels, eval needs them", hint)


def compare(
    model: ModelCost, baseline: ModelCost, predictions: Predictions, reference: Predictions
) -> results.Difference:
    """Compare a model with the baseline on the same inputs."""
    masks = outcome_masks(predictions.correct, reference.correct)
    outcomes = results.Outcomes(**{name: int(mask.sum()) for name, mask in masks.items()})
    flops, full_flops = model.flops_per_input.total, baseline.flops_per_input.total
    return results.Difference(
        accuracy_drop=outcomes.drop,
        accuracy_drop_ci95=paired_difference(*outcomes.cells),
        # Exact where they can be, unlike 1 - a ratio: a gate of 0.1 passes at 900 of 1000.
        flops_reduction=(full_flops - flops) / full_flops,
        size_reduction=(baseline.bytes - model.bytes) / baseline.bytes,
        agreement=float((predictions.predicted == reference.predicted).double().mean()),
        mcnemar_p=mcnemar(outcomes.lost, outcomes.won),
        outcomes=outcomes,
    )


def outcome_masks(right: Tensor, full: Tensor) -> dict[str, Tensor]:
    """Return the inputs with each of the Outcomes, from those that either model predicts right, (samples) bool."""
    return {"both": full & right, "lost": full & ~right, "won": ~full & right, "neither": ~full & ~right}


def forgetting(
    labels: Tensor, predicted: Tensor, reference: Tensor, indices: Sequence[int] | None = None
) -> results.Forgetting:
    """Compare predictions with those of the full model, class by class and input by input.

    A class has collapsed if its accuracy is at least KNOWN in the full model and at most half of that in the
    pruned one, and if its drop is at least HIDES times the average drop, with an interval (simultaneous over
    all classes) above the average.

    Args:
        labels: (samples) int64.
        predicted, reference: classes predicted by the pruned and by the full model, (samples) int64.
        indices: names of the samples in `lost` and `won`; None: their places.
    """
    masks = outcome_masks(predicted == labels, reference == labels)
    average = (int(masks["lost"].sum()) - int(masks["won"].sum())) / len(labels)
    size = int(labels.max()) + 1
    counts = torch.stack([labels[mask].bincount(minlength=size) for mask in masks.values()], dim=1)
    present = counts.sum(1).nonzero().flatten().tolist()
    strict = simultaneous_quantile(LEVEL, len(present))
    classes, collapsed = [], []
    for c in present:
        outcomes = results.Outcomes(**dict(zip(masks, counts[c].tolist(), strict=True)))
        accuracy = (outcomes.both + outcomes.won) / outcomes.samples
        full = (outcomes.both + outcomes.lost) / outcomes.samples
        classes.append(
            results.ClassChange(
                index=c,
                samples=outcomes.samples,
                accuracy=accuracy,
                baseline_accuracy=full,
                accuracy_drop=full - accuracy,
                accuracy_drop_ci95=paired_difference(*outcomes.cells),
            )
        )
        is_lost = full >= KNOWN and accuracy <= full / 2 and full - accuracy >= HIDES * average
        if is_lost and paired_difference(*outcomes.cells, strict)[0] > average:
            collapsed.append(c)
    places = range(len(labels)) if indices is None else indices
    return results.Forgetting(
        classes=sorted(classes, key=lambda change: (-change.accuracy_drop, change.index)),
        lost=list(compress(places, masks["lost"].tolist())),
        won=list(compress(places, masks["won"].tolist())),
        collapsed=collapsed,
    )


def environment(runtime: Runtime) -> results.Environment:
    """Return versions and settings that figures may depend on."""
    device = runtime.torch_device
    return results.Environment(
        moeprune=__version__,
        torch=str(torch.__version__),
        python=platform.python_version(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=runtime.dtype,
        batch_size=runtime.batch_size,
    )
