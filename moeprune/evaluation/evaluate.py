"""How good, how large and how costly a model is, alone and against the full model."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from moeprune import __version__
from moeprune.calibration.sums import wide_dtype
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.evaluation.forgetting import forgetting
from moeprune.evaluation.intervals import mcnemar, paired_difference, wilson
from moeprune.evaluation.latency import check_batch_sizes, measure_latency
from moeprune.evaluation.results import Difference, Environment, Evaluation, ModelFigures, Outcomes
from moeprune.layers.observation import Observation
from moeprune.models.model import Model, dataset_for, private_copy
from moeprune.models.results import ModelCost
from moeprune.models.runtime import Runtime


@dataclass(frozen=True)
class Predictions:
    """What a model says of every sample, on the CPU.

    labels, predicted: (samples) int64. in_top5: (samples) bool. loss: mean cross-entropy in nats.
    running: experts that ran in a layer, in the mean, where the layer's plan does not fix it.
    """

    labels: Tensor
    predicted: Tensor
    in_top5: Tensor
    loss: float
    running: dict[str, float] = field(default_factory=dict)

    @property
    def correct(self) -> Tensor:
        """Whether each sample is predicted right (samples) bool."""
        return self.predicted == self.labels


def predict(
    models: Sequence[Model], data: Dataset, runtime: Runtime = Runtime(), what: str = "eval"
) -> list[Predictions]:
    """Predictions of each model, from one pass over labelled data.

    Raises:
        MoepruneError: the data has no labels, or a model computes NaN or no logits for an image.
    """
    for model in models:
        require_labelled_images(model, data, "eval")
    device = runtime.torch_device
    models = [private_copy(model).to(device) for model in models]
    labels: list[Tensor] = []
    predicted: list[list[Tensor]] = [[] for _ in models]
    in_top5: list[list[Tensor]] = [[] for _ in models]
    losses = torch.zeros(len(models), device=device, dtype=wide_dtype(device))
    counts = [_count_running(model) for model in models]
    for inputs, batch_labels in runtime.batches(data, what):
        assert batch_labels is not None
        targets = batch_labels.to(device)
        labels.append(batch_labels)
        for index, model in enumerate(models):
            logits = runtime.forward(model, inputs).float()
            predicted[index].append(logits.argmax(1))
            top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
            in_top5[index].append((top5 == targets[:, None]).any(1))
            losses[index] += F.cross_entropy(logits, targets, reduction="sum")
    if not losses.isfinite().all():
        raise MoepruneError(
            f"a model computes NaN or infinite logits on `{data.spec}`", "try `--dtype float32`"
        )
    samples = torch.cat(labels)
    return [
        Predictions(
            samples, torch.cat(p).cpu(), torch.cat(t).cpu(), float(loss) / len(samples),
            {name: float(sum(parts)) / len(samples) for name, parts in count.items()},
        )
        for p, t, loss, count in zip(predicted, in_top5, losses.tolist(), counts, strict=True)
    ]  # fmt: skip


def _count_running(model: Model) -> dict[str, list[Tensor]]:
    """Where layers will note how many experts ran for a batch, if their plans do not fix it."""
    counts: dict[str, list[Tensor]] = {}
    for name, layer in model.moe_layers.items():
        if layer.plan is not None and layer.plan.mass is not None:
            counts[name] = []

            def observe(observation: Observation, seen: list[Tensor] = counts[name]) -> None:
                assert observation.chosen is not None
                n = observation.mass.shape[1]
                seen.append((observation.chosen < n).sum())

            layer.observer = observe
    return counts


def evaluate(
    model: Model,
    data: Dataset | str,
    baseline: Model | None = None,
    runtime: Runtime = Runtime(),
    latency_batches: Sequence[int] | None = None,
) -> Evaluation:
    """Evaluate a model on labelled data, and compare it with a baseline on the same inputs.

    Args:
        latency_batches: batch sizes at which latency is measured too; None: it is not.

    Returns:
        The evaluation, without gates.

    Raises:
        MoepruneError: data that does not fit or has no labels, or a batch size below 1.
    """
    check_batch_sizes(latency_batches or ())
    data = dataset_for(model, data, split="test")
    if baseline is not None and baseline.input_format != model.input_format:
        raise MoepruneError(
            f"the baseline takes {baseline.input_format.in_words}, the model {model.input_format.in_words}",
            "give the checkpoint that the model was pruned from",
        )
    models = [model] if baseline is None else [model, baseline]
    predictions = predict(models, data, runtime)
    described = [describe(*pair) for pair in zip(models, predictions, strict=True)]
    difference, forgotten = None, None
    if baseline is not None:
        difference = compare(described[0], described[1], predictions[0], predictions[1])
        forgotten = forgetting(predictions[0].labels, predictions[0].predicted, predictions[1].predicted)
        indices = data.indices  # with a limit, some samples of the data alone
        lost, won = ([indices[place] for place in flips] for flips in (forgotten.lost, forgotten.won))
        forgotten = msgspec.structs.replace(forgotten, lost=lost, won=won)
    latency = None
    if latency_batches is not None:
        latency = measure_latency(model, data, baseline, latency_batches, runtime)
    return Evaluation(
        checkpoint=None,
        baseline=None,
        data=data.info,
        model=described[0],
        baseline_model=described[1] if baseline is not None else None,
        difference=difference,
        forgetting=forgotten,
        latency=latency,
        gates=[],
        passed=True,
        environment=environment(runtime),
    )


def describe(model: Model, predictions: Predictions) -> ModelFigures:
    """Return accuracy, size and cost of a model."""
    correct, samples = int(predictions.correct.sum()), len(predictions.labels)
    return ModelFigures(
        accuracy=correct / samples,
        accuracy_ci95=wilson(correct, samples),
        top5_accuracy=float(predictions.in_top5.double().mean()),
        loss=predictions.loss,
        **msgspec.structs.asdict(model.cost(predictions.running)),
    )


def require_labelled_images(model: Model, data: Dataset, who: str) -> None:
    """Raise a MoepruneError unless the model gives logits for an image and the data has labels.

    Args:
        who: needs both.
    """
    config = model.config
    if config.num_classes == 0:
        raise MoepruneError(
            "the model has no head: it gives features, not logits", "there is nothing to evaluate"
        )
    if config.outputs_per_input > 1:
        raise MoepruneError(
            f"the model gives logits for each of its {config.outputs_per_input} tokens, not for an image"
            " (`pooling` none)",
            f"analyze and prune work on it; {who} needs a model that pools",
        )
    if not data.has_labels:
        raise MoepruneError(
            f"`{data.spec}` has no labels, {who} needs them", "add an array `labels` with each sample's class"
        )


def compare(
    model: ModelCost, baseline: ModelCost, predictions: Predictions, reference: Predictions
) -> Difference:
    """Compare a model with the baseline on the same inputs."""
    outcomes = paired_outcomes(predictions, reference)
    return Difference(
        accuracy_drop=outcomes.drop,
        accuracy_drop_ci95=paired_difference(*msgspec.structs.astuple(outcomes)),
        flops_reduction=_reduction(*(side.flops_per_input.total for side in (baseline, model))),
        size_reduction=_reduction(baseline.bytes, model.bytes),
        agreement=float((predictions.predicted == reference.predicted).double().mean()),
        mcnemar_p=mcnemar(outcomes.lost, outcomes.won),
        outcomes=outcomes,
    )


def paired_outcomes(predictions: Predictions, reference: Predictions) -> Outcomes:
    """Count the inputs that both predict right, only the reference, only the first, and neither."""
    right, reference_right = predictions.correct, reference.correct
    return Outcomes(
        both=int((right & reference_right).sum()),
        lost=int((~right & reference_right).sum()),
        won=int((right & ~reference_right).sum()),
        neither=int((~right & ~reference_right).sum()),
    )


def _reduction(full: float, remaining: float) -> float:
    return (full - remaining) / full  # exact where it can be: a gate of 0.1 passes at 900 of 1000


def environment(runtime: Runtime) -> Environment:
    """Return versions and settings that figures may depend on."""
    device = runtime.torch_device
    return Environment(
        moeprune=__version__,
        torch=str(torch.__version__),
        python=platform.python_version(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=runtime.dtype,
        batch_size=runtime.batch_size,
    )
