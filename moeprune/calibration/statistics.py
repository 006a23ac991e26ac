"""Statistics of an MoE layer: sums over inputs that do not grow with their number.

Axes: b inputs, n experts, p terms per expert, o width of the output.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeprune.calibration.results import Explained, LayerSummary, Probes
from moeprune.calibration.selection import best_kept, drop_order
from moeprune.calibration.sums import explained, lost_gram, wide_dtype
from moeprune.errors import MoepruneError
from moeprune.layers.experts import rank
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import Observation
from moeprune.plan import AFFINE

if TYPE_CHECKING:
    from moeprune.calibration.walk import Walk

MASS_LEVELS = (0.5, 0.9, 0.99)
INFORMATIVE_MASS = 0.45
"""Mass of the best n/8 experts at or above which the signal `combine` is considered informative: on the
digits the paper's rule kept 97 % of the accuracy and more above it, 44 to 84 % below it
(tests/benchmarks/sharpness.py)."""

AXES = {
    "mean_mass": "n", "term_mean": "npo", "deviation": "n", "frequency": "n", "reap": "n", "mone": "n", "max_mass": "n",
    "rank_frequency": "nn", "kept_mass": "n", "experts_for_mass": "l", "class_mass": "cn", "explained": "e",
    "sensitivity": "",
    **dict.fromkeys(("gram", "gram_renorm", "gram_mean", "gram_lstsq", "gram_affine"), "nn"),
}  # fmt: skip
"""The axes of each statistic of a layer; l: MASS_LEVELS, c: classes, e: 3."""


@dataclass(frozen=True)
class LayerMoments:
    """What pruning needs of a layer: the means of its experts over calibration inputs, in float32 on the CPU."""

    mean_mass: Tensor  # mean mass of each expert (n)
    term_mean: Tensor  # mu, the mean output of each term, weighted by its weights (n,p,o)
    deviation: Tensor  # sigma, the root mean square of |f - mu| with the same weights (n)
    frequency: Tensor  # share of the tokens that run each expert (n)
    reap: Tensor  # mean norm of what it adds to these (n)
    mone: Tensor  # frequency × variance of its output for these (n)

    @property
    def num_experts(self) -> int:
        """The number of experts, n."""
        return len(self.mean_mass)

    def scores(self, signal: str) -> Tensor:
        """Return the scores (n) of a signal that ranks experts one by one."""
        if signal == "deviation":
            return self.mean_mass * self.deviation
        return self.mean_mass if signal == "combine" else getattr(self, signal)


@dataclass(frozen=True)
class LayerStatistics(LayerMoments):
    """The moments, and what reports and planning need as well.

    A Gram matrix (n,n) holds G_jl = E <E_j, E_l>, with E_j what is lost with expert j: the expected squared error
    of the layer's output when the set Z is dropped is exactly the sum of G over Z×Z.
    """

    max_mass: Tensor  # the largest mass of each expert over inputs (n)
    rank_frequency: Tensor  # row r, column j: share of inputs whose r-th best expert is j (n,n)
    kept_mass: Tensor  # entry k-1: mean mass of the best k experts of an input (n)
    experts_for_mass: Tensor  # mean number of an input's experts that hold each of MASS_LEVELS (3)
    class_mass: Tensor  # mean mass of each expert over the inputs of a class (classes,n); no rows without labels
    gram: Tensor  # of what expert j adds, R_j
    gram_renorm: Tensor  # of C_j·(f_j - Y): the error but for the division by the kept mass of each token
    gram_mean: Tensor
    gram_lstsq: Tensor  # of what a regression on one half of the inputs leaves on the other
    gram_affine: Tensor  # likewise
    explained: Tensor  # shares of the output's variance, see `sums.explained` (3)
    sensitivity: Tensor  # divergence in nats for each unit of squared error in this layer's output alone (scalar)

    def gram_under(self, compensation: str) -> Tensor:
        """Return a Gram matrix (n,n) of what is lost, see `gram_of`."""
        compensation = gram_of(compensation)
        return self.gram if compensation == "none" else getattr(self, f"gram_{compensation}")

    def best_kept(self, k: int, compensation: str, groups: int = 1) -> tuple[int, ...]:
        """Return the k experts to keep for all inputs, by the error that they leave; groups: see `best_kept`."""
        return best_kept(self.gram_under(compensation), self.num_experts, k, self._mass(compensation), groups)

    def errors(self, compensation: str) -> list[float]:
        """Return the least error of the layer's output found with n, n-1, … 0 experts kept (n + 1)."""
        return drop_order(self.gram_under(compensation), self.num_experts, self._mass(compensation))[1]

    def _mass(self, compensation: str) -> Tensor | None:
        return self.mean_mass / self.mean_mass.sum() if compensation == "renorm" else None


def gram_of(compensation: str) -> str:
    """Return the compensation whose Gram matrix serves for choosing experts under another."""
    return {"merge": "mean", "renorm-refit": "affine", "low-rank-lstsq": "lstsq"}.get(
        compensation, "affine" if compensation in AFFINE else compensation
    )


class MomentsAccumulator:
    """Sums up the moments of a dense layer."""

    def __init__(self, layer: MoELayer):
        self.dtype = wide_dtype(layer.fc2_weight.device)
        self.samples = 0
        self.sums: defaultdict[str, Any] = defaultdict(int)  # tensors, once something has been added

    def add(self, observation: Observation) -> None:
        """Add the inputs of one forward pass."""
        self.samples += len(observation.mass)
        self.sums["mean_mass"] += observation.mass.sum(0, dtype=self.dtype)
        for name, total in zip(("weights", "outputs", "squares"), observation.term_sums(self.dtype), strict=True):
            self.sums[name] += total
        tokens = observation.weights.shape[:2].numel() if observation.mask is None else observation.mask.sum()
        names = "runs", "norms", "run_outputs", "run_squares"
        for name, total in zip(names, observation.run_sums(self.dtype), strict=True):
            self.sums[name] += total
        self.sums["tokens"] += tokens

    def result(self) -> LayerMoments:
        """Return the moments of all inputs so far."""
        # A term without any weight (it underflowed) has no mean; zero is as good as any.
        weights = self.sums["weights"].clamp_min(torch.finfo(self.dtype).tiny)
        mean = self.sums["outputs"] / weights[..., None]
        spread = self.sums["squares"] - self.sums["weights"] * mean.square().sum(-1)
        deviation = (spread.sum(1).clamp_min(0) / weights.sum(1)).sqrt()
        means = {"mean_mass": self.sums["mean_mass"] / self.samples, "term_mean": mean, "deviation": deviation}
        runs, tokens, each = self.sums["runs"], self.sums["tokens"], self.sums["runs"].clamp_min(1)
        around = self.sums["run_squares"] - self.sums["run_outputs"].square().sum(1) / each
        of_runs = {"frequency": runs / tokens, "reap": self.sums["norms"] / each, "mone": around.clamp_min(0) / tokens}
        return LayerMoments(**_on_cpu(means | of_runs))


class MassAccumulator:
    """Sums up how the mass of a dense layer is spread over its experts."""

    def __init__(self, layer: MoELayer):
        n, self.dtype = layer.config.num_experts, wide_dtype(layer.fc2_weight.device)
        self.samples = 0
        self.sums: defaultdict[str, Any] = defaultdict(int)
        self.max_mass = layer.fc2_weight.new_zeros(n, dtype=self.dtype)
        self.class_mass = self.max_mass.new_zeros(0, n)
        self.class_samples = self.max_mass.new_zeros(0, dtype=torch.int64)

    def add(self, observation: Observation, labels: Tensor | None) -> None:
        """Add the inputs of one forward pass, and their classes (b) if they have any."""
        mass = observation.mass.to(self.dtype)  # (b,n)
        self.samples += len(mass)
        self.max_mass = torch.maximum(self.max_mass, mass.amax(0))
        order, n = rank(mass), mass.shape[1]
        cells = torch.arange(n, device=mass.device) * n + order
        self.sums["rank_frequency"] += cells.flatten().bincount(minlength=n * n).view(n, n)
        best = mass.gather(1, order).cumsum(1)  # of the best k, k = 1…n
        self.sums["kept_mass"] += best.sum(0)
        needed = [(best < level * best[:, -1:]).sum() + len(best) for level in MASS_LEVELS]
        self.sums["experts_for_mass"] += torch.stack(needed).to(self.dtype)
        if labels is not None:
            new = max(0, int(labels.max()) + 1 - len(self.class_samples))
            labels = labels.to(mass.device)
            self.class_mass = F.pad(self.class_mass, (0, 0, 0, new)).index_add_(0, labels, mass)
            self.class_samples = F.pad(self.class_samples, (0, new)).index_add_(0, labels, torch.ones_like(labels))

    def result(self) -> dict[str, Tensor]:
        """Return the fields of LayerStatistics that are about mass."""
        means = {name: total / self.samples for name, total in self.sums.items()}
        class_mass = self.class_mass / self.class_samples.clamp_min(1)[:, None]
        return _on_cpu(means | {"max_mass": self.max_mass, "class_mass": class_mass})


def measure_layer(walk: Walk, name: str) -> LayerStatistics:
    """Return the statistics of the layer that a walk reaches next; its sensitivity is not known yet."""
    layer = walk.full.moe_layers[name].load()
    dtype, masses, moments = wide_dtype(layer.fc2_weight.device), MassAccumulator(layer), MomentsAccumulator(layer)
    grams: dict[str, Any] = defaultdict(int)

    def see(seen: Observation, labels: Tensor | None) -> None:
        masses.add(seen, labels)
        moments.add(seen)
        grams["gram"] += seen.gram(dtype)
        grams["gram_renorm"] += seen.renorm_gram(dtype)

    stage = walk.reach(name, see)
    stage.moments, samples = moments.result(), moments.samples
    n, sums = layer.config.num_experts, stage.contributions
    grams["gram_renorm"] = grams["gram_renorm"] + grams["gram"]
    for compensation in ("mean", "lstsq", "affine"):
        grams[f"gram_{compensation}"] = lost_gram(*sums, compensation)[:n, :n]
    found = _on_cpu({name: gram / samples for name, gram in grams.items()})
    others = {"explained": explained(*sums), "sensitivity": torch.zeros(())}
    return LayerStatistics(**vars(stage.moments), **masses.result(), **found, **others)


def require_finite(name: str, layer: LayerMoments) -> None:
    """Raise a MoepruneError that names a layer with NaN or infinite statistics."""
    if not all(getattr(layer, field.name).isfinite().all() for field in fields(layer)):
        raise MoepruneError(
            f"layer `{name}` computes NaN or infinite numbers on the calibration data",
            "check the checkpoint and the scale of the inputs, or use `--dtype float32`",
        )


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", torch.float32) for name, tensor in tensors.items()}


def summarize(statistics: LayerStatistics, scopes: tuple[str, ...], probes: Probes) -> LayerSummary:
    """Summarize a layer that can be pruned in some scopes, for a report.

    `informative` means a mass of INFORMATIVE_MASS and twice a uniform router's, or more.
    """
    n, eighth = statistics.num_experts, max(1, statistics.num_experts // 8)
    overall = statistics.mean_mass.double().sort(descending=True).values.cumsum(0)
    best_eighth_mass = float(statistics.kept_mass[eighth - 1])
    return LayerSummary(
        experts=n,
        best_eighth_mass=best_eighth_mass,
        static_eighth_mass=float(overall[eighth - 1]),
        uniform_mass=eighth / n,
        experts_for_mass_per_input=statistics.experts_for_mass.tolist(),
        experts_for_mass_overall=[int((overall < level * overall[-1]).sum()) + 1 for level in MASS_LEVELS],
        unused_experts=(statistics.max_mass < 0.1 / n).nonzero().flatten().tolist(),
        informative=best_eighth_mass >= max(INFORMATIVE_MASS, 2 * eighth / n),
        explained=Explained(*map(float, statistics.explained)),
        scopes=scopes,
        probes=probes,
    )
