"""Running statistics of an MoE layer: sums over inputs that do not grow with their number.

Axes: b inputs, n experts, p terms per expert, o width of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune.calibration.results import LayerSummary
from moeprune.calibration.selection import best_kept, drop_order
from moeprune.calibration.sums import Contributions, halves, lost_gram, wide_dtype
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import Observation
from moeprune.layers.scores import rank

MASS_LEVELS = (0.5, 0.9, 0.99)
INFORMATIVE_MASS = 0.45
"""Mass of the best n/8 experts at or above which the signal `combine` is considered informative: on the
digits the paper's rule kept 97 % of the accuracy and more above it, 44 to 84 % below it
(tests/benchmarks/sharpness.py)."""

AXES = {
    "mean_mass": "n", "term_mean": "npo", "deviation": "n", "max_mass": "n", "rank_frequency": "nn",
    "kept_mass": "n", "experts_for_mass": "l", "class_mass": "cn", "sensitivity": "",
    **dict.fromkeys(("gram", "gram_renorm", "gram_mean", "gram_lstsq", "gram_affine"), "nn"),
}  # fmt: skip
"""The axes of each statistic of a layer; l: MASS_LEVELS, c: classes."""


@dataclass(frozen=True)
class LayerMoments:
    """What pruning needs of a layer: the means of its experts over calibration inputs, in float32 on the CPU.

    mean_mass: mean mass of each expert (n).
    term_mean: mu, the mean output of each term, weighted by its weights (n,p,o).
    deviation: sigma, the root mean square of |f - mu| with the same weights (n).
    """

    mean_mass: Tensor
    term_mean: Tensor
    deviation: Tensor

    @property
    def num_experts(self) -> int:
        """The number of experts, n."""
        return len(self.mean_mass)


@dataclass(frozen=True)
class LayerStatistics(LayerMoments):
    """The moments, and what reports and planning need as well.

    max_mass: the largest mass of each expert over inputs (n).
    rank_frequency: row r, column j: share of inputs whose r-th best expert is j (n,n).
    kept_mass: entry k-1: mean mass of the best k experts of an input (n).
    experts_for_mass: mean number of an input's experts that hold each of MASS_LEVELS (3).
    class_mass: mean mass of each expert over the inputs of a class (classes,n); no rows without labels.
    gram: G_jl = E <R_j, R_l> (n,n), where R_j is what expert j adds: the expected squared error of the
        layer's output when the set Z is dropped is exactly the sum of G over Z×Z.
    gram_renorm, gram_mean, gram_lstsq, gram_affine: the same for what is lost under a compensation
        (n,n). For `renorm` that is C_j·(f_j - Y), the error but for the division by the kept mass of each
        token; for `lstsq` and `affine` what a regression on one half of the inputs leaves on the other.
    sensitivity: divergence of the model's predictions in nats for each unit of squared error in the layer's
        output (scalar), measured with this layer alone pruned.
    """

    max_mass: Tensor
    rank_frequency: Tensor
    kept_mass: Tensor
    experts_for_mass: Tensor
    class_mass: Tensor
    gram: Tensor
    gram_renorm: Tensor
    gram_mean: Tensor
    gram_lstsq: Tensor
    gram_affine: Tensor
    sensitivity: Tensor

    def gram_under(self, compensation: str) -> Tensor:
        """Return a Gram matrix (n,n) of what is lost: `affine` stands for `refit`, `mean` for `merge`."""
        compensation = {"refit": "affine", "merge": "mean"}.get(compensation, compensation)
        return self.gram if compensation == "none" else getattr(self, f"gram_{compensation}")

    def best_kept(self, k: int, compensation: str) -> tuple[int, ...]:
        """Return the k experts to keep for all inputs, by the error that they leave."""
        return best_kept(self.gram_under(compensation), self.num_experts, k, self._mass(compensation))

    def errors(self, compensation: str) -> list[float]:
        """Return the least error of the layer's output found with n, n-1, … 0 experts kept (n + 1)."""
        return drop_order(self.gram_under(compensation), self.num_experts, self._mass(compensation))[1]

    def _mass(self, compensation: str) -> Tensor | None:
        return self.mean_mass if compensation == "renorm" else None

    def top_k_frequency(self, k: int) -> Tensor:
        """Return how often each expert is among the best k of an input: shares (n)."""
        return self.rank_frequency[:k].sum(0)


class MomentsAccumulator:
    """Sums up the moments of a dense layer."""

    def __init__(self, layer: MoELayer):
        n, p, d = layer.term_shape
        self.device = layer.fc2_weight.device
        self.dtype = wide_dtype(self.device)
        self.samples = 0
        self.mass = self._zeros(n)
        self.weights = self._zeros(n, p)
        self.weighted_outputs = self._zeros(n, p, d)
        self.weighted_squares = self._zeros(n, p)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def add(self, observation: Observation, labels: Tensor | None) -> None:
        """Add the inputs of one forward pass."""
        self.samples += len(observation.mass)
        self.mass += observation.mass.sum(0, dtype=self.dtype)
        weights, outputs, squares = observation.term_sums(self.dtype)
        self.weights += weights
        self.weighted_outputs += outputs
        self.weighted_squares += squares

    def moments(self) -> dict[str, Tensor]:
        """Return the fields of LayerMoments."""
        # A term without any weight (it underflowed) has no mean; zero is as good as any.
        weights = self.weights.clamp_min(torch.finfo(self.dtype).tiny)
        term_mean = self.weighted_outputs / weights[..., None]
        spread = self.weighted_squares - self.weights * term_mean.square().sum(-1)
        variance = spread.sum(1).clamp_min(0) / weights.sum(1)
        return {"mean_mass": self.mass / self.samples, "term_mean": term_mean, "deviation": variance.sqrt()}

    def result(self) -> LayerMoments:
        """Return the moments of all inputs so far."""
        return LayerMoments(**_on_cpu(self.moments()))


class StatisticsAccumulator(MomentsAccumulator):
    """Sums up all statistics of a layer."""

    def __init__(self, layer: MoELayer):
        super().__init__(layer)
        n = layer.config.num_experts
        self.max_mass = self._zeros(n)
        self.rank_counts = torch.zeros(n * n, device=self.device, dtype=torch.int64)
        self.kept_mass = self._zeros(n)
        self.experts_for_mass = self._zeros(len(MASS_LEVELS))
        self.class_mass = self._zeros(0, n)
        self.class_samples = torch.zeros(0, device=self.device, dtype=torch.int64)
        self.gram_renorm = self._zeros(n, n)
        self.halves = Contributions(layer, "affine"), Contributions(layer, "affine")

    def add(self, observation: Observation, labels: Tensor | None) -> None:
        """Add the inputs of one forward pass, and their classes (b) if they have any."""
        super().add(observation, labels)
        mass = observation.mass.to(self.dtype)  # (b,n)
        self.max_mass = torch.maximum(self.max_mass, mass.amax(0))
        self._add_ranks(mass)
        if labels is not None:
            self._add_classes(mass, labels)
        self.gram_renorm += observation.renorm_gram(self.dtype)
        members = halves(self.samples - len(mass), len(mass))
        for contributions, index in zip(self.halves, members, strict=True):
            contributions.add(observation.select(index.to(mass.device)))

    def _add_ranks(self, mass: Tensor) -> None:
        n = mass.shape[1]
        order = rank(mass)
        cells = (torch.arange(n, device=mass.device) * n + order).flatten()
        self.rank_counts.scatter_add_(0, cells, torch.ones_like(cells))
        best = mass.gather(1, order).cumsum(1)  # of the best k, k = 1…n
        self.kept_mass += best.sum(0)
        for index, level in enumerate(MASS_LEVELS):
            missing = (best < level * best[:, -1:]).sum(1)
            self.experts_for_mass[index] += (missing + 1).sum()

    def _add_classes(self, mass: Tensor, labels: Tensor) -> None:
        new = int(labels.max()) + 1 - len(self.class_mass)
        if new > 0:
            self.class_mass = torch.cat([self.class_mass, self.class_mass.new_zeros(new, mass.shape[1])])
            self.class_samples = torch.cat([self.class_samples, self.class_samples.new_zeros(new)])
        labels = labels.to(mass.device)
        self.class_mass.index_add_(0, labels, mass)
        self.class_samples.index_add_(0, labels, torch.ones_like(labels))

    def result(self) -> LayerStatistics:
        """Return the statistics of all inputs so far."""
        n = len(self.mass)
        first, second = self.halves
        moments = self.moments()
        mean = moments["term_mean"].to("cpu", torch.float64)
        gram = (first.gram + second.gram)[:n, :n]
        sums = {
            "rank_frequency": self.rank_counts.view(n, n),
            "kept_mass": self.kept_mass,
            "experts_for_mass": self.experts_for_mass,
            "gram": gram,
            "gram_renorm": self.gram_renorm + gram,
        }
        for compensation in ("mean", "lstsq", "affine"):
            sums[f"gram_{compensation}"] = lost_gram(first, second, mean, compensation)[:n, :n]
        others = {
            "max_mass": self.max_mass,
            "sensitivity": self._zeros(),  # not known yet
            "class_mass": self.class_mass / self.class_samples.clamp_min(1)[:, None],
        }
        means = {name: total / self.samples for name, total in sums.items()}
        return LayerStatistics(**_on_cpu(moments | means | others))


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", torch.float32) for name, tensor in tensors.items()}


def summarize(statistics: LayerStatistics, scopes: tuple[str, ...]) -> LayerSummary:
    """Summarize a layer that can be pruned in some scopes, for a report.

    `informative` means a mass of INFORMATIVE_MASS and twice a uniform router's, or more.
    """
    n = statistics.num_experts
    eighth = max(1, n // 8)
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
        scopes=scopes,
    )
