"""Results made by hand: what an evaluation or a sweep would report."""

from moeprune.data.spec import DataInfo
from moeprune.evaluation.results import Difference, Environment, Evaluation, ModelFigures, Outcomes
from moeprune.models.results import BytesByPart, FlopsByPart, ModelCost
from moeprune.pruning.results import SweepRow

ENVIRONMENT = Environment(moeprune="0", torch="2", python="3", device="cpu", dtype="float32", batch_size=64)


def cost(size: int = 1000) -> ModelCost:
    """A model of so many bytes, and as many FLOPs."""
    parts = {"experts": size, "routing": 0, "compensation": 0, "other": 0}
    return ModelCost(
        parameters=size // 4, bytes=size, bytes_by_part=BytesByPart(**parts),
        flops_per_input=FlopsByPart(total=size, **parts), experts_per_input=8,
    )  # fmt: skip


def figures(accuracy: float) -> ModelFigures:
    """A model of this accuracy."""
    own = cost()
    return ModelFigures(
        accuracy=accuracy, accuracy_ci95=(0, 1), top5_accuracy=1, loss=0.1,
        **{name: getattr(own, name) for name in own.__struct_fields__},
    )  # fmt: skip


def difference(outcomes: Outcomes, size: float = 0.5, flops: float = 0.75) -> Difference:
    """A model that lost and won these inputs and keeps these shares."""
    samples = outcomes.both + outcomes.lost + outcomes.won + outcomes.neither
    return Difference(
        accuracy_drop=(outcomes.lost - outcomes.won) / samples, accuracy_drop_ci95=(-1, 1),
        flops_reduction=1 - flops, size_reduction=1 - size, agreement=(samples - outcomes.lost) / samples,
        mcnemar_p=1, outcomes=outcomes,
    )  # fmt: skip


def evaluation(right: int, lost: int, samples: int = 100) -> Evaluation:
    """Of a model that predicts so many samples right, and lost so many of the full one's."""
    return Evaluation(
        checkpoint=None, baseline=None, data=DataInfo(spec="data", samples=samples, fingerprint="f"),
        model=figures(right / samples), baseline_model=figures((right + lost) / samples),
        difference=difference(Outcomes(both=right, lost=lost, won=0, neither=samples - right - lost)),
        forgetting=None, shift={}, latency=None, gates=[], passed=True, environment=ENVIRONMENT,
    )  # fmt: skip


def row(
    accuracy: float, size: float, flops: float, label: str | None = "static by gram, affine", keep: str = "1/8"
) -> SweepRow:
    """A row of a sweep; without a label that of the full model."""
    changes = difference(Outcomes(both=1, lost=0, won=0, neither=0), size, flops)
    scope = None if label is None else "static"
    return SweepRow(
        label=label, keep=keep, scope=scope, signal=scope and "combine", compensate=scope and "mean", rank=None,
        accuracy=accuracy, accuracy_sd=None, retained=accuracy, agreement=1, draws=1,
        model=figures(accuracy), difference=changes, latency=None, on_frontier=None,
    )  # fmt: skip
