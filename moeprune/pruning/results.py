"""Results of pruning and of a sweep; no torch."""

from moeprune.data.spec import DataInfo
from moeprune.evaluation.results import Difference, Environment, Interval, Latency, ModelFigures
from moeprune.models.folders.form import Form
from moeprune.models.results import ModelCost
from moeprune.plan import LayerPlan, Rank
from moeprune.records import Report, Result


class TriedPlan(Result, frozen=True):
    """One plan of a search; k: experts by layer. size, flops: shares of the full model's."""

    compensate: str
    rank: Rank | None
    k: dict[str, int]
    size: float
    flops: float
    accuracy_drop: float


class Confirmation(Result, frozen=True):
    """The accuracy drop of the chosen plan on samples that were not searched.

    plans: those that could have been measured there; the interval and the bound hold for all of them at once.
    bound: one-sided upper bound of the drop at the confidence that was asked for; both None without one.
    """

    samples: int
    plans: int
    accuracy_drop: float
    accuracy_drop_ci95: Interval
    mcnemar_p: float
    confidence: float | None
    bound: float | None


class Search(Result, frozen=True):
    """A search for the smallest model within an accuracy drop."""

    max_accuracy_drop: float
    tried: list[TriedPlan]
    confirmed: Confirmation


OVERFITTED = 3.0
SAME = 0.01  # difference of the distances of candidates, with its standard error, that does not count
NEGLIGIBLE = 0.01  # of the square of a layer's output


class FitQuality(Result, frozen=True):
    """How well the compensation of a layer is fitted.

    samples: of the calibration data. rows: their tokens. regressors: what is fitted for each output. fitted_error,
    held_out_error: squared errors of the layer's output as shares of its square in the full model, of fits to one half
    of the samples: on that half, and on the other. The gap between them tells whether more samples would help.
    """

    samples: int
    rows: int
    regressors: int
    fitted_error: float
    held_out_error: float

    @property
    def is_overfitted(self) -> bool:
        """True if the error on the other half is OVERFITTED times as large, and is not negligible."""
        return self.held_out_error > max(OVERFITTED * self.fitted_error, NEGLIGIBLE)


class PlanFile(Result, frozen=True, tag_field="schema_version", tag=1):
    """A file of `--plan` and `--save-plan`; see moeprune.pruning.plan_file for its defaults."""

    plan: dict[str, LayerPlan]


class Candidate(Result, frozen=True):
    """One way to prune that was compared with others, on held-out calibration inputs.

    k: experts by layer. rank: of `low-rank`. width: hidden units of each expert by layer; None for all. size, flops:
    shares of the full model's. distance: of the predictions from the full model's, mean total variation (0 to 1);
    without a head, the change of the features as a share of their square. samples: held out. layers: that were pruned
    for the comparison.
    """

    scope: str
    signal: str
    compensate: str
    rank: Rank | None
    k: dict[str, int]
    width: dict[str, int] | None
    size: float
    flops: float
    distance: float
    samples: int
    layers: int
    is_chosen: bool


class Repeats(Result, frozen=True):
    """The spread of models pruned on random halves of the calibration data, as large as that of the data itself.

    samples: of each half. held_out: inputs, none of them in a half, that they are compared on. distance, agreement: of
    the predictions with the full model's, one for each draw, see Candidate; agreement None without a head.
    """

    samples: int
    held_out: int
    distance: list[float]
    agreement: list[float] | None


class Pruned(Report, frozen=True):
    """The result of `prune`.

    checkpoint, saved_plan: files written, or None. keep: a share such as `1/8`, `1.0` for all experts, or a number
    such as `1`; None with a budget or a plan. model: None without a checkpoint. search: None without
    `--max-accuracy-drop`. candidates: what was compared, if there was a choice. fits: of each layer whose
    compensation is fitted. repeats: None without `--repeat`. form: of the folder of a language model; None of others. A
    `drop-in` folder is loaded as the full one, one of `custom-code` with moeprune and `trust_remote_code=True`.
    """

    checkpoint: str | None
    saved_plan: str | None
    keep: str | None
    plan: dict[str, LayerPlan]
    model: ModelCost | None
    full_model: ModelCost
    search: Search | None
    candidates: list[Candidate]
    fits: dict[str, FitQuality]
    repeats: Repeats | None
    form: Form | None


class OnFrontier(Result, frozen=True):
    """Whether no other row is as accurate at less cost, or more accurate at no more."""

    size: bool
    flops: bool


class SweepRow(Result, frozen=True):
    """One way to prune and its evaluation; scope, signal, compensate and rank are None for the full model.

    Of `auto` they are what was chosen.
    keep: a share such as `1/8`, `1.0` for all, or a number of experts such as `16`; `0` for none.
    accuracy, agreement: means over the draws. accuracy_sd: over the draws, None for one draw.
    retained: accuracy as a share of the full model's. model, difference, latency: of the last draw.
    """

    label: str | None
    keep: str
    scope: str | None
    signal: str | None
    compensate: str | None
    rank: Rank | None
    accuracy: float
    accuracy_sd: float | None
    retained: float | None
    agreement: float
    draws: int
    model: ModelFigures
    difference: Difference
    latency: Latency | None
    on_frontier: OnFrontier | None

    @property
    def size(self) -> float:
        """The remaining share of the full model's bytes."""
        return 1 - self.difference.size_reduction

    @property
    def flops(self) -> float:
        """The remaining share of the full model's FLOPs."""
        return 1 - self.difference.flops_reduction

    @property
    def speedup(self) -> float:
        """The speed-up at the first batch size; 1 for the full model."""
        return (self.latency and self.latency.batches[0].speedup) or 1.0


class Sweep(Report, frozen=True):
    """Many ways to prune one model; the first row is the full model. plot: the file drawn, or None."""

    checkpoint: str
    data: DataInfo
    rows: list[SweepRow]
    plot: str | None
    environment: Environment


class LanguageSweepRow(Result, frozen=True):
    """One way to prune a language model and its evaluation; options, signal and compensate are None for the full model.

    options: of `prune`. keep: share or number of experts. width: share of the hidden units of each; None for all.
    loss: nats per token. loss_increase, agreement, kl: to the full model, see LanguageDifference; means over the draws.
    loss_increase_sd: over the draws, None for one draw. size, flops: shares of the full model's.
    """

    options: str | None
    keep: str
    width: str | None
    signal: str | None
    compensate: str | None
    loss: float
    loss_increase: float
    loss_increase_sd: float | None
    agreement: float
    kl: float
    size: float
    flops: float
    draws: int


class LanguageSweep(Report, frozen=True):
    """Many ways to prune one language model; the first row is the full model. sequence_length: in tokens."""

    checkpoint: str
    data: DataInfo
    sequence_length: int
    rows: list[LanguageSweepRow]
    environment: Environment
