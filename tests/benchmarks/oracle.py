"""How often each signal finds the experts that are best for an input.

    python tests/benchmarks/oracle.py

Trains the single-layer model with n = 4, 8 and 12 experts that share 512 hidden units (n = 12: 504), and for every
image of the test split tries all subsets of n/8, n/4 and n/2 experts. Prints figures for each signal: means over 3
seeds, and their minimum and maximum. About five minutes on two cores.

A layer is pruned to k experts for each input, without compensation, while all others stay dense. Expert j adds
R_j = sum over p of C_jp·f_jp (m,d) to the layer's output: the output of a subset is the sum of its R_j, and the rest of
the model turns that into logits. The best subset is the one with the largest margin, the logit of the true class less
the largest other: it is right if any is.

Axes: b inputs, m tokens, d width, n experts, p slots per expert, S subsets of at most n/2 experts.
"""

import statistics
from collections import defaultdict
from fractions import Fraction
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import moeprune
from moeprune.amounts import experts_to_keep
from moeprune.calibration.analysis import Analysis
from moeprune.calibration.statistics import LayerStatistics
from moeprune.data.datasets import Dataset
from moeprune.layers.experts import top_k
from moeprune.layers.observation import Observation
from moeprune.models.model import private_copy
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import Method, uniform_plan

EXPERTS = (4, 8, 12)
SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))
SIGNALS = ("combine", "deviation", "gram", "random", "mean_token", "output", "greedy", "exhaustive")
"""`random` draws a set for each input; `mean_token` is the mass for the mean of an input's tokens; `output`, an upper
reference, the mass of each slot times the norm of its output. `greedy` knows the label: it adds the expert that makes
the margin largest, again and again. `exhaustive` is the best of all subsets."""
FIGURES = ("accuracy", "true_class_logit", "margin", "found_best", "as_right", "percentile")
"""Means over inputs. `found_best`: the subset is as good as the best. `as_right`: it is right, or none is.
`percentile`: the share of all subsets that are no better."""

Experts = tuple[int, ...]
Verdict = tuple[float, float, float]
"""Whether a subset is right, the logit of the true class, and its margin."""


class Given(nn.Module):
    """Stands for a Soft MoE layer whose output (S,m,d) is given."""

    output: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.output.to(x.dtype)


def compare_signals(
    model: SoftMoEViT, analysis: Analysis, data: Dataset, runtime: moeprune.Runtime
) -> dict[str, list[dict[str, Any]]]:
    """A row of FIGURES for each layer of an unpruned model, each k and each signal; the data are labelled."""
    model = private_copy(model).to(runtime.torch_device)
    rests = {name: private_copy(model) for name in model.moe_layers}
    for name, rest in rests.items():
        rest.set_submodule(name, Given())
    sums = {name: defaultdict(lambda: np.zeros(len(FIGURES))) for name in rests}
    generator = torch.Generator().manual_seed(0)
    for inputs, labels in runtime.batches(data, "oracle"):
        seen = observed(model, list(rests), inputs, runtime)
        for name, rest in rests.items():
            statistics = analysis.layers[name]
            ks = sorted({experts_to_keep(share, statistics.num_experts, "") for share in SHARES})
            scores = scores_of(model.moe_layers[name], seen[name], statistics, generator, runtime)
            weights, outputs = seen[name].weights, seen[name].term_outputs
            for i, added in enumerate(torch.einsum("bmnp,bnpd->bnmd", weights, outputs.to(weights))):
                verdicts = judged(rest, rest.get_submodule(name), inputs[i], int(labels[i]), added, ks[-1], runtime)
                for k in ks:
                    of_k = {kept: verdict for kept, verdict in verdicts.items() if len(kept) == k}
                    picks = {signal: tuple(top_k(score[i], k).tolist()) for signal, score in scores.items()}
                    picks |= {"gram": statistics.best_kept(k, "none"), "greedy": greedy(verdicts, k)}
                    picks["exhaustive"] = max(of_k, key=lambda kept, of=of_k: of[kept][2])
                    for signal in SIGNALS:
                        sums[name][k, signal] += figures_of(picks[signal], of_k)
    return {
        name: [
            {"k": k, "signal": signal, **dict(zip(FIGURES, (total / data.samples).tolist(), strict=True))}
            for (k, signal), total in of_layer.items()
        ]
        for name, of_layer in sums.items()
    }


def observed(model: nn.Module, names: list[str], inputs: Tensor, runtime: moeprune.Runtime) -> dict[str, Observation]:
    """What named layers show on inputs."""
    seen: dict[str, Observation] = {}
    for name in names:
        model.get_submodule(name).observer = partial(seen.__setitem__, name)
    runtime.forward(model, inputs)
    for name in names:
        model.get_submodule(name).observer = None
    return seen


def scores_of(
    layer: nn.Module, seen: Observation, of: LayerStatistics, generator: torch.Generator, runtime: moeprune.Runtime
) -> dict[str, Tensor]:
    """The scores (b,n) by which the signals without labels choose experts for each input; `gram` has none."""
    of_mean = observed(layer, [""], seen.tokens.mean(1, keepdim=True), runtime)
    norms = seen.term_outputs.norm(dim=3)  # (b,n,p)
    return {
        "combine": seen.mass,
        "deviation": seen.mass * of.deviation.to(seen.mass.device),
        "random": torch.rand(seen.mass.shape, generator=generator),
        "mean_token": of_mean[""].mass,
        "output": (seen.weights.sum(1) * norms.to(seen.weights)).sum(2),
    }


def judged(
    rest: nn.Module, given: Given, image: Tensor, label: int, added: Tensor, largest: int, runtime: moeprune.Runtime
) -> dict[Experts, Verdict]:
    """The verdict on every subset of 1 to `largest` experts, which add R (n,m,d) to the output of a layer."""
    n = len(added)
    subsets = [kept for k in range(1, largest + 1) for kept in combinations(range(n), k)]
    masks = torch.zeros(len(subsets), n).to(added)
    for row, kept in zip(masks, subsets, strict=True):
        row[list(kept)] = 1
    logits = []
    for part in masks.split(runtime.batch_size):
        given.output = (part @ added.flatten(1)).unflatten(1, added.shape[1:])  # what precedes the layer runs once
        logits.append(runtime.forward(rest, image[None]).double())
    of_all = torch.cat(logits)  # (S,classes)
    logit = of_all[:, label]
    margin = logit - of_all.index_fill(1, torch.tensor(label, device=of_all.device), -torch.inf).amax(1)
    verdicts = torch.stack([of_all.argmax(1) == label, logit, margin], dim=1).tolist()
    return dict(zip(subsets, map(tuple, verdicts), strict=True))


def greedy(verdicts: dict[Experts, Verdict], k: int) -> Experts:
    """The k experts that forward selection by the margin adds, in ascending order."""
    kept: Experts = ()
    for size in range(1, k + 1):
        longer = [subset for subset in verdicts if len(subset) == size and set(kept) < set(subset)]
        kept = max(longer, key=lambda subset: verdicts[subset][2])
    return kept


def figures_of(kept: Experts, verdicts: dict[Experts, Verdict]) -> list[float]:
    """The FIGURES of a subset among all of its size, for one input."""
    right, logit, margin = verdicts[kept]
    margins = [other for _, _, other in verdicts.values()]
    as_right = right >= max(verdict[0] for verdict in verdicts.values())
    return [right, logit, margin, margin >= max(margins), as_right, sum(m <= margin for m in margins) / len(margins)]


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
            nothing = uniform_plan(model.config.moe_layers, 0, Method(signal="random"))
            dropped = moeprune.prune(model, analysis, plan=nothing)
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
