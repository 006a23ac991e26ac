"""Options and results of `moeprune analyze`; no torch."""

from pathlib import Path
from typing import Annotated

from moeprune.data.spec import DataInfo, DataSpec
from moeprune.models.request import Checkpoint
from moeprune.models.runtime import Runtime
from moeprune.records import Report, Request, Result, option


class AnalyzeRequest(Request, frozen=True, kw_only=True):
    """An unpruned checkpoint, calibration data, and the file of the analysis."""

    checkpoint: Checkpoint
    data: Annotated[
        DataSpec,
        option("Calibration data: digits, pairs, a .npz, a .safetensors, a folder, a .txt, .jsonl or .parquet."),
    ]
    output: Annotated[Path, option("The analysis to write (.safetensors).", short=("-o",))]
    overwrite: bool = False
    runtime: Runtime = Runtime()


class Probe(Result, frozen=True):
    """How predictions change if only some experts run, without compensation.

    agreement: share of samples with the full model's prediction, None without a head. divergence: of the predictions
    from the full model's, mean in nats; without a head, the change of the features as a share of their square.
    """

    agreement: float | None
    divergence: float


class Probes(Result, frozen=True):
    """Probes of one layer, or of all at once: with no experts, and with the best 1/8 of each input."""

    samples: int
    no_experts: Probe
    best_eighth: Probe


class Explained(Result, frozen=True):
    """Shares of the variance of a layer's output over tokens that regressions explain on samples not fitted.

    linear: a linear map of the layer's input and of its mean token. router: the router, with a constant for each expert
    (and slot; of more than 512 of them, 512 mixtures). both: the two together; only the experts explain the rest.
    """

    linear: float
    router: float
    both: float


class LayerSummary(Result, frozen=True):
    """Distribution of one layer's combine mass over its experts.

    best_eighth_mass: mean mass of an input's best n/8 experts. static_eighth_mass: that of the n/8 experts
    that are best over all inputs. uniform_mass: that of n/8 experts under a uniform router.
    experts_for_mass_per_input, experts_for_mass_overall: experts that hold 50, 90 and 99 % of one input's
    mass (mean), and of the mass of all inputs. unused_experts: those that never hold a tenth of 1/n.
    informative: whether the mass is concentrated enough for the signal `combine`.
    explained: what explains the layer's output. scopes: in which the layer can be pruned. probes: with the other
    layers unpruned.
    """

    experts: int
    best_eighth_mass: float
    static_eighth_mass: float
    uniform_mass: float
    experts_for_mass_per_input: list[float]
    experts_for_mass_overall: list[int]
    unused_experts: list[int]
    informative: bool
    explained: Explained
    scopes: tuple[str, ...]
    probes: Probes


class AnalysisReport(Report, frozen=True):
    """Layers of a checkpoint on calibration data; analysis: the file written. probes: of all layers at once."""

    checkpoint: str
    analysis: str
    data: DataInfo
    layers: dict[str, LayerSummary]
    probes: Probes
