"""How often each signal finds the experts that are best for an input.

    python tests/benchmarks/oracle.py

Trains the single-layer model with n = 4, 8 and 12 experts that share 512 hidden units (n = 12: 504), and for
every image of the test split tries all subsets of n/8, n/4 and n/2 experts. Prints figures for each signal:
means over 3 seeds, and their minimum and maximum. About three minutes on two cores.

A layer is pruned to k experts for each input, without compensation, while all others stay dense. Expert j
adds R_j = sum over p of C_jp·f_jp (m,d) to the layer's output: the output of a subset is the sum of its R_j,
and the rest of the model turns that into logits. The best subset is the one with the largest margin, the
logit of the true class less the largest other: it is right if any is.

Axes: b inputs, m tokens, d width, n experts, p slots per expert, s subsets, S all subsets of k experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

import moeprune
from moeprune.calibration.analysis import Analysis
from moeprune.calibration.passes import observe_layers
from moeprune.calibration.statistics import LayerStatistics
from moeprune.data.datasets import Dataset
from moeprune.layers.experts import top_k
from moeprune.layers.observation import Observation
from moeprune.models.model import private_copy
from moeprune.models.runtime import Runtime
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import experts_to_keep

EXPERTS = (4, 8, 12)
SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))
SIGNALS = ("combine", "deviation", "gram", "random", "mean_token", "output", "greedy", "exhaustive")
"""`random` draws a set for each input; `mean_token` is the mass for the mean of an input's tokens; `output`,
an upper reference, the mass of each slot times the norm of its output. `greedy` knows the label: it adds the
expert that makes the margin largest, again and again. `exhaustive` is the best of all subsets."""
FIGURES = ("accuracy", "true_class_logit", "margin", "found_best", "as_right", "percentile")
"""Means over inputs. `found_best`: the subset is as good as the best. `as_right`: it is right, or none is.
`percentile`: the share of all subsets that are no better."""
RIGHT, MARGIN = 0, 2

Judge = Callable[[Tensor], Tensor]
"""Verdicts (s,3) on outputs of a layer (s,m,d): whether right, the true class's logit, and its margin."""


def compare_signals(
    model: SoftMoEViT, analysis: Analysis, data: Dataset, runtime: Runtime
) -> dict[str, list[dict[str, Any]]]:
    """Return, for each layer of an unpruned model, a row of FIGURES for each k and signal; data: labelled."""
    model = private_copy(model).to(runtime.torch_device)
    contests = {name: _Contest(model, name, analysis.layers[name], runtime) for name in model.moe_layers}
    for inputs, labels in runtime.batches(data, "oracle"):
        assert labels is not None
        seen: dict[str, Observation] = {}
        observe_layers(model, list(contests), seen.__setitem__, inputs, runtime)
        for name, contest in contests.items():
            contest.add(inputs, labels.to(inputs.device), seen[name])
    return {name: contest.rows(data.samples) for name, contest in contests.items()}


def all_subsets(num_experts: int, k: int) -> Tensor:
    """Return masks of all sets of k experts (S,n), in the order of their indices."""
    return masks_of(torch.tensor(list(combinations(range(num_experts), k))), num_experts)


def masks_of(experts: Tensor, num_experts: int) -> Tensor:
    """Return sets of experts given by their indices (s,k) as masks (s,n) bool."""
    masks = torch.zeros(len(experts), num_experts, dtype=torch.bool, device=experts.device)
    return masks.scatter_(1, experts, True)


def greedy_order(added: Tensor, count: int, judge: Judge) -> Tensor:
    """Return the experts (count) that forward selection adds one after the other, by R (n,m,d)."""
    left, order = list(range(len(added))), []
    output = torch.zeros_like(added[0])
    for _ in range(count):
        order.append(left.pop(int(judge(output + added[left])[:, MARGIN].argmax())))
        output = output + added[order[-1]]
    return torch.tensor(order, device=added.device)


def among_all(verdicts: Tensor, masks: Tensor, all_masks: Tensor) -> Tensor:
    """Return the FIGURES of subsets, and in the last row those of the best subset of their size (s+1,6).

    Args:
        verdicts: on all subsets of the size (S,3).
        masks: the subsets (s,n). all_masks: in the order of the verdicts (S,n).
    """
    margins = verdicts[:, MARGIN]
    places = (masks[:, None] == all_masks).all(2).int().argmax(1)
    own = verdicts[torch.cat([places, margins.argmax(0, keepdim=True)])]
    found_best = own[:, MARGIN] >= margins.amax()
    as_right = own[:, RIGHT] >= verdicts[:, RIGHT].amax()
    percentile = (margins <= own[:, MARGIN, None]).to(own).mean(1)
    return torch.cat([own, torch.stack([found_best, as_right, percentile], dim=1).to(own)], dim=1)


class _Contest:
    """The subsets of one layer's experts that the signals choose, and sums of their FIGURES."""

    def __init__(self, model: SoftMoEViT, name: str, statistics: LayerStatistics, runtime: Runtime):
        self.layer, self.runtime, self.statistics = model.moe_layers[name], runtime, statistics
        self.rest = private_copy(model)
        self.given = _Given()
        self.rest.set_submodule(name, self.given)
        n = statistics.num_experts
        ks = sorted({experts_to_keep(share, n, "") for share in SHARES})
        self.all_masks = {k: all_subsets(n, k).to(runtime.torch_device) for k in ks}
        self.generator = torch.Generator().manual_seed(0)
        self.totals: dict[tuple[int, str], Tensor] = {}

    def add(self, inputs: Tensor, labels: Tensor, observation: Observation) -> None:
        """Add inputs (b,c,H,W) with their classes (b), and what the dense layer computed for them."""
        chosen = self._choose(observation)
        weights = observation.weights
        contributions = torch.einsum("bmep,bepo->bemo", weights, observation.term_outputs.to(weights.dtype))
        for i, added in enumerate(contributions):
            judge = partial(self._judge, inputs[i], labels[i])
            order = greedy_order(added, max(self.all_masks), judge)
            for k, all_masks in self.all_masks.items():
                experts = {signal: of_inputs[i] for signal, of_inputs in chosen[k].items()}
                experts["greedy"] = order[:k]
                masks = masks_of(torch.stack(list(experts.values())), len(added))
                outputs = (all_masks.to(added) @ added.flatten(1)).unflatten(1, added.shape[1:])
                figures = among_all(judge(outputs), masks, all_masks)
                for signal, row in zip((*experts, "exhaustive"), figures, strict=True):
                    self.totals[k, signal] = self.totals.get((k, signal), 0) + row

    def _choose(self, observation: Observation) -> dict[int, dict[str, Tensor]]:
        """Return for each k the experts that the signals without labels choose for inputs: indices (b,k)."""
        mass, slot_mass = observation.mass, observation.weights.sum(1)  # (b,n), (b,n,p)
        of_mean: dict[str, Observation] = {}
        mean = observation.tokens.mean(1, keepdim=True)
        observe_layers(self.layer, [""], of_mean.__setitem__, mean, self.runtime)
        scores = {
            "combine": mass,
            "deviation": mass * self.statistics.deviation.to(mass.device),
            "random": torch.rand(mass.shape, generator=self.generator).to(mass.device),
            "mean_token": of_mean[""].mass,
            "output": (slot_mass * observation.term_outputs.to(slot_mass).norm(dim=3)).sum(2),
        }
        chosen = {k: {signal: top_k(of, k) for signal, of in scores.items()} for k in self.all_masks}
        for k, of_signal in chosen.items():
            kept = torch.tensor(self.statistics.best_kept(k, "none"), device=mass.device)
            of_signal["gram"] = kept.expand(len(mass), -1)
        return chosen

    def _judge(self, image: Tensor, label: Tensor, outputs: Tensor) -> Tensor:
        verdicts = []
        for part in outputs.split(self.runtime.batch_size):
            self.given.output = part  # added to what precedes the layer, which runs once for all
            logits = self.runtime.forward(self.rest, image[None]).double()
            true_class = label.expand(len(part), 1)
            logit = logits.gather(1, true_class)
            others = logits.scatter(1, true_class, -torch.inf).amax(1, keepdim=True)
            right = logits.argmax(1, keepdim=True) == true_class
            verdicts.append(torch.cat([right, logit, logit - others], dim=1))
        return torch.cat(verdicts)

    def rows(self, samples: int) -> list[dict[str, Any]]:
        """Return the means of FIGURES over so many samples."""
        means = {key: (self.totals[key] / samples).tolist() for key in product(self.all_masks, SIGNALS)}
        return [
            {"k": k, "signal": signal, **dict(zip(FIGURES, figures, strict=True))}
            for (k, signal), figures in means.items()
        ]


class _Given(nn.Module):
    """Stands for a Soft MoE layer whose output is given."""

    output: Tensor  # (s,m,d)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, whatever the tokens x are."""
        return self.output.to(x.dtype)


def main() -> None:
    """Print a table for each number of experts."""
    from common import RUNTIME, SEEDS, test_set

    from moeprune.demo.train import single_layer_recipe, train

    for num_experts in EXPERTS:
        runs, full, without = [], [], []
        for seed in SEEDS:
            model = train(single_layer_recipe(num_experts), seed)
            data = test_set(model)
            analysis = moeprune.analyze(model, "digits:calibration", RUNTIME)
            [rows] = compare_signals(model, analysis, data, RUNTIME).values()
            runs.append(rows)
            dropped = moeprune.prune(model, analysis, keep=0, signal="random", compensate="none")
            full.append(moeprune.evaluate(model, data, runtime=RUNTIME).model.accuracy)
            without.append(moeprune.evaluate(dropped, data, runtime=RUNTIME).model.accuracy)
        of_all, of_none = (" / ".join(f"{100 * value:.1f}" for value in values) for values in (full, without))
        print(f"n = {num_experts}: accuracy of {of_all} % with all experts, {of_none} % with none")
        figures = [figure for figure in FIGURES if figure not in ("true_class_logit", "margin")]
        print(f"{'k':>3} {'signal':10}", *(f"{figure:>21}" for figure in figures))
        for rows in zip(*runs, strict=True):
            cells = []
            for figure in figures:
                values = [100 * row[figure] for row in rows]
                cells.append(f"{statistics.fmean(values):7.1f} ({min(values):4.1f}-{max(values):5.1f})")
            print(f"{rows[0]['k']:3} {rows[0]['signal']:10}", *cells, flush=True)
        print()


if __name__ == "__main__":
    main()
