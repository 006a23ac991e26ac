"""Results of an evaluation of a language model; no torch.

A figure is a mean over all predicted tokens, those behind the first of each sequence. Its interval is Student's at 95 %
over the means of sequences, as tokens of one sequence are not independent; None for one sequence. Losses and
divergences are in nats per token.
"""

from moeprune.data.spec import DataInfo
from moeprune.evaluation.results import Environment, GateResult, Interval, Latency, LayerShift
from moeprune.models.results import ModelCost
from moeprune.records import Report, Result


class LanguageFigures(ModelCost, frozen=True):
    """Predictions, size and cost of one model.

    loss: mean cross-entropy. perplexity: its exponential. bits_per_byte: of the UTF-8 text, with what special tokens
    cost; None where the text is not known. accuracy: share of tokens that are predicted.
    """

    loss: float
    loss_ci95: Interval | None
    perplexity: float
    perplexity_ci95: Interval | None
    bits_per_byte: float | None
    accuracy: float
    accuracy_ci95: Interval | None


class LanguageDifference(Result, frozen=True):
    """A model against the baseline on the same tokens.

    agreement: share of tokens at which both predict the same one. kl: mean divergence of the model's predictions from
    the baseline's, KL(baseline ‖ model). flops_reduction, size_reduction: saved share of the baseline's.
    """

    loss_increase: float
    loss_increase_ci95: Interval | None
    perplexity_ratio: float
    perplexity_ratio_ci95: Interval | None
    accuracy_drop: float
    accuracy_drop_ci95: Interval | None
    agreement: float
    agreement_ci95: Interval | None
    kl: float
    kl_ci95: Interval | None
    flops_reduction: float
    size_reduction: float


class LanguageGroup(Result, frozen=True):
    """One group of sequences; fields about the baseline are None without one."""

    name: str
    samples: int
    loss: float
    loss_ci95: Interval | None
    perplexity: float
    bits_per_byte: float | None
    accuracy: float
    baseline_loss: float | None
    loss_increase: float | None
    loss_increase_ci95: Interval | None
    agreement: float | None
    kl: float | None


class LanguageEvaluation(Report, frozen=True):
    """A language model on sequences of tokens, alone or against a baseline.

    checkpoint, baseline: their files; None for models in memory. sequence_length: tokens of each sequence.
    baseline_model, difference: None without a baseline. groups: of `--by`, the largest loss increase (or loss) first.
    shift: of each layer whose fit is recorded, with a baseline. passed: whether all gates did.
    """

    checkpoint: str | None
    baseline: str | None
    data: DataInfo
    sequence_length: int
    model: LanguageFigures
    baseline_model: LanguageFigures | None
    difference: LanguageDifference | None
    groups: list[LanguageGroup]
    shift: dict[str, LayerShift]
    latency: Latency | None
    gates: list[GateResult]
    passed: bool
    environment: Environment
