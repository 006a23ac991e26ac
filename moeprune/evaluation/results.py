"""Results of an evaluation; no torch. Accuracies and their differences are fractions."""

from typing import Literal

import msgspec

from moeprune.data.spec import DataInfo
from moeprune.models.results import ModelCost
from moeprune.records import Report, Result

Interval = tuple[float, float]  # lower and upper bound


class ModelFigures(ModelCost, frozen=True):
    """Accuracy, size and cost of one model; loss: mean cross-entropy in nats."""

    accuracy: float
    accuracy_ci95: Interval
    top5_accuracy: float
    loss: float


class Outcomes(Result, frozen=True):
    """Inputs that both models predict right, only the baseline (`lost`), only the model (`won`), neither."""

    both: int
    lost: int
    won: int
    neither: int

    @property
    def cells(self) -> tuple[int, int, int, int]:
        """The four counts."""
        return self.both, self.lost, self.won, self.neither

    @property
    def samples(self) -> int:
        """The number of inputs."""
        return sum(self.cells)

    @property
    def drop(self) -> float:
        """The accuracy drop."""
        return (self.lost - self.won) / self.samples


class Difference(Result, frozen=True):
    """A model against the baseline on the same inputs.

    flops_reduction, size_reduction: saved share of the baseline's. agreement: share of equal predictions.
    mcnemar_p: two-sided p of McNemar's exact test.
    """

    accuracy_drop: float
    accuracy_drop_ci95: Interval
    flops_reduction: float
    size_reduction: float
    agreement: float
    mcnemar_p: float
    outcomes: Outcomes


class ClassChange(Result, frozen=True):
    """Accuracy on the samples of one class, of the model and of the baseline."""

    index: int = msgspec.field(name="class")
    samples: int
    accuracy: float
    baseline_accuracy: float
    accuracy_drop: float
    accuracy_drop_ci95: Interval


class Forgetting(Result, frozen=True):
    """Changes behind the average accuracy.

    classes: those with samples, the largest drop first. lost, won: indices of inputs that flip from right to
    wrong, and from wrong to right. collapsed: classes whose loss the average hides.
    """

    classes: list[ClassChange]
    lost: list[int]
    won: list[int]
    collapsed: list[int]


class BatchLatency(Result, frozen=True):
    """Seconds of a forward pass with one batch size: medians and quartiles of the repetitions.

    speedup: median over repetitions of baseline / model; speedups: all of them. Fields about a baseline are
    None without one.
    """

    batch_size: int
    repetitions: int
    speedup: float | None
    speedup_iqr: Interval | None
    model_seconds: float
    model_seconds_iqr: Interval
    baseline_seconds: float | None
    baseline_seconds_iqr: Interval | None
    speedups: list[float] | None


class Latency(Result, frozen=True):
    """Latency at several batch sizes; threads: of torch on the CPU."""

    threads: int
    batches: list[BatchLatency]


class GateResult(Result, frozen=True):
    """One limit and how the evaluation met it.

    reason: why it failed: `missed` (the value is beyond the limit), `undecided` (only its bound is).
    confidence, bound, samples: of the one-sided bound of the value, and the samples it rests on; None
    without confidence, and for exact figures. samples_needed: with which the bound of an undecided gate would
    keep the limit at the same rates; None if no number would do. For `min_speedup` samples are repetitions.
    """

    name: str
    limit: float
    value: float
    passed: bool
    reason: Literal["missed", "undecided"] | None
    confidence: float | None
    bound: float | None
    samples: int | None
    samples_needed: int | None


class LayerShift(Result, frozen=True):
    """The error of one pruned layer on the evaluated data beside the one that calibration predicted.

    predicted_error, error: mean squared change of the layer's output from the full model's, as a share of its square,
    on held-out calibration data and on this data. standard_error: of their difference, by sampling. mass_moved: share
    of the mean combine mass that lies on other experts than in calibration; None if that is not recorded. is_shifted:
    the error is larger than sampling explains.
    """

    predicted_error: float
    error: float
    standard_error: float
    mass_moved: float | None
    is_shifted: bool


class Environment(Result, frozen=True):
    """Versions and settings that figures may depend on."""

    moeprune: str
    torch: str
    python: str
    device: str
    dtype: str
    batch_size: int


class Evaluation(Report, frozen=True):
    """A model on labelled data, alone or against a baseline.

    checkpoint, baseline: their files; None for models in memory. baseline_model, difference, forgetting: None
    without a baseline. shift: of each layer whose fit is recorded, with a baseline. passed: whether all gates did.
    """

    checkpoint: str | None
    baseline: str | None
    data: DataInfo
    model: ModelFigures
    baseline_model: ModelFigures | None
    difference: Difference | None
    forgetting: Forgetting | None
    shift: dict[str, LayerShift]
    latency: Latency | None
    gates: list[GateResult]
    passed: bool
    environment: Environment
