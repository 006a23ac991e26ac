"""How good the subset of experts is that each signal picks for an input, against the best that there is.

One layer at a time is pruned to k experts for each input, without compensation, and all others stay dense.
Expert j adds R_j = sum over p of C_jp·f_jp (m,o) to the layer's output, so that a subset gives the sum of
its R_j, and the rest of the model says how good that is. The best subset is the one with the largest
margin, the logit of the true class less the largest other: it is right if any is. The largest logit, or
probability, of the true class alone may be of a subset that is wrong where another is right.

Axes: b inputs, m tokens, o width of the output, n experts, p slots per expert, s subsets of the experts, c
candidates for what a layer gives for one input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeprune.calibration.analysis import Analysis, require_analysis_of
from moeprune.calibration.passes import observe_layers
from moeprune.calibration.statistics import LayerStatistics
from moeprune.calibration.sums import wide_dtype
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import require_labelled_images
from moeprune.layers.layer import MoELayer as SoftMoE
from moeprune.layers.observation import SlotObservation as Observation
from moeprune.layers.observation import mean_token
from moeprune.layers.scores import top_k
from moeprune.models.model import Model, dataset_for, fingerprint, private_copy, require_dense_layers
from moeprune.models.runtime import Runtime
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import experts_to_keep
from moeprune.records import to_json

SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))
EXHAUSTIVE_EXPERTS = 12
"""Experts of a layer up to which all of its subsets of k are tried: at most 66, 220 and 924 an input."""
SAMPLES = 256
"""Inputs that are compared by default."""
SIGNALS = ("combine", "deviation", "gram", "random", "mean_token", "output", "greedy", "exhaustive")
FIGURES = ("accuracy", "true_class_logit", "margin", "found_best", "as_right", "percentile")
RIGHT, MARGIN = 0, 2
"""Columns of a verdict: whether the prediction is right, the true class's logit, and its margin."""

Judge = Callable[[Iterable[Tensor]], Tensor]
"""Verdicts (c,3) on candidates (c,m,o), which come in parts."""


def compare_signals(
    model: Model,
    analysis: Analysis,
    data: Dataset | str,
    samples: int = SAMPLES,
    runtime: Runtime = Runtime(),
) -> dict[str, Any]:
    """How good the k experts are that each signal picks for an input, for k = n/8, n/4 and n/2.

    `combine` and `deviation` are the signals of scope `input`; `gram` is one set for all inputs, `random`
    another one for each; `mean_token` is the mass that the router gives to the mean of an input's tokens;
    `output`, an upper reference, the mass of each slot times the norm of its actual output. `greedy` sees
    the label: it adds the expert that makes the margin of the true class largest, again and again.
    `exhaustive` is the best of all subsets. Layers of more than EXHAUSTIVE_EXPERTS experts are without it,
    and have `greedy`, which tries about n²/8 subsets an input, for k = n/8 alone. Layers with dynamic slots
    are without `gram` and `mean_token`.

    Args:
        model: unpruned.
        analysis: of this model.
        data: labelled, or its spec.
        samples: to compare at most, drawn with a fixed seed.
        runtime: where and how models run; a pass takes as many candidates as the batch size.

    Returns:
        JSON values: `data`; `accuracy` of the unpruned model; and of each of its `layers` the `experts`,
        `accuracy_without_experts`, the `reference` (`exhaustive`, or `greedy` where there are too many
        subsets) and `rows` by `k` and `signal`, of means over inputs: `accuracy`, `true_class_logit`,
        `margin` (that logit less the largest other), `found_best` (how often the subset is the reference's,
        or as good as the best), `as_right` (how often it is right, or the reference, which may be the best
        of all, is not) and `percentile` (the share of all subsets that are no better). The last three are
        None where there is nothing to compare with.

    Raises:
        MoepruneError: the model is pruned, gives no logits for an image or depends on the batch, the
            analysis is another model's, the data has no labels, or logits are NaN or infinite.
    """
    model = private_copy(model)
    layers = require_dense_layers(model, "compare signals on the unpruned checkpoint")
    data = dataset_for(model, data, split="test")
    require_comparable(model, data)
    require_analysis_of(model.config.moe_layers, fingerprint(model), analysis)
    data = data.sample(samples)
    model.to(runtime.torch_device)
    contests = {name: _Contest(model, name, analysis.layers[name], runtime) for name in layers}
    right = torch.zeros((), dtype=torch.int64, device=runtime.torch_device)
    for inputs, labels in runtime.batches(data, "oracle"):
        assert labels is not None
        targets = labels.to(inputs.device)
        right += (runtime.forward(model, inputs).argmax(1) == targets).sum()
        observations: dict[str, Observation] = {}
        observe_layers(model, list(layers), observations.__setitem__, inputs, runtime)
        for name, contest in contests.items():
            contest.add(inputs, targets, observations[name])
    return {
        "data": to_json(data.info),
        "accuracy": int(right) / data.samples,
        "layers": {name: contest.result(data) for name, contest in contests.items()},
    }


def require_comparable(model: Model, data: Dataset) -> None:
    """Raise a MoepruneError where subsets of experts cannot be compared on the data."""
    require_labelled_images(model, data, "the oracle")
    for name, layer in model.config.moe_layers.items():
        if layer.dispatch_over == "batch":
            raise MoepruneError(
                f"layer `{name}` takes its dispatch softmax over the batch: how good a subset of experts is"
                " for one input depends on the other inputs",
                "leave the oracle out",
            )


def contributions(observation: Observation, i: int) -> Tensor:
    """R_j, what each expert of a dense layer adds to the output for input i: (n,m,o), float32 or better."""
    weights, mask = observation.weights[i], observation.mask  # (m,n,p)
    if mask is not None:  # padding, whose weights are shown as zero, has equal logits
        weights = weights.masked_fill(~mask[i][:, None, None], 1 / weights[0].numel())
    return torch.einsum("mnp,npo->nmo", weights, observation.slot_outputs[i].to(weights.dtype))


def all_subsets(num_experts: int, k: int) -> Tensor:
    """Masks of all sets of k experts (s,n), in the order of their indices."""
    return masks_of(torch.tensor(list(combinations(range(num_experts), k))), num_experts)


def masks_of(experts: Tensor, num_experts: int) -> Tensor:
    """Sets of experts by their indices (s,k) as masks (s,n) bool."""
    masks = torch.zeros(len(experts), num_experts, dtype=torch.bool, device=experts.device)
    return masks.scatter_(1, experts, True)


def greedy_order(added: Tensor, count: int, judge: Judge, batch_size: int) -> Tensor:
    """The experts (count) that forward selection adds one after the other, by the margin.

    Args:
        added: R (n,m,o).
        count: 1 to n.
        judge: of outputs.
        batch_size: of candidates.
    """
    left = torch.arange(len(added), device=added.device)
    output = torch.zeros_like(added[0])
    order = []
    for _ in range(count):
        verdicts = judge(output + added[part] for part in left.split(batch_size))
        best = verdicts[:, MARGIN].argmax(0, keepdim=True)
        order.append(left[best])
        output = output + added[order[-1]][0]
        others = torch.arange(len(left) - 1, device=left.device)
        left = left[others + (others >= best)]
    return torch.cat(order)


def among_all(verdicts: Tensor, masks: Tensor, all_masks: Tensor) -> Tensor:
    """The FIGURES of subsets among all of their size, and behind them those of the best one (s+1,6).

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
    return _figures(own, found_best, as_right, percentile)


def against_last(verdicts: Tensor, masks: Tensor) -> Tensor:
    """The FIGURES of subsets where the last of them is the reference (s,6), without percentiles.

    Args:
        verdicts: on the subsets (s,3). masks: the subsets (s,n).
    """
    found_best = (masks == masks[-1]).all(1)
    as_right = verdicts[:, RIGHT] >= verdicts[-1, RIGHT]
    return _figures(verdicts, found_best, as_right)


def _figures(verdicts: Tensor, *comparison: Tensor) -> Tensor:
    """The FIGURES (s,6) of verdicts (s,3) and as much of the comparison as there is, the rest NaN."""
    known = torch.cat([verdicts, *(figure.to(verdicts)[:, None] for figure in comparison)], dim=1)
    return F.pad(known, (0, len(FIGURES) - known.shape[1]), value=torch.nan)


class _Contest:
    """The subsets of one layer's experts that the signals pick, and how good they have been so far."""

    def __init__(self, model: Model, name: str, statistics: LayerStatistics, runtime: Runtime):
        n, device = statistics.num_experts, runtime.torch_device
        self.layer = model.moe_layers[name]
        self.rest = _Rest(model, name, runtime)
        self.runtime = runtime
        self.ks = sorted({experts_to_keep(share, n, name) for share in SHARES})
        self.deviation = statistics.deviation.to(device)
        self.of_gram = {k: torch.tensor([statistics.best_kept(k, "none")], device=device) for k in self.ks}
        self.ks_of_greedy = self.ks if n <= EXHAUSTIVE_EXPERTS else self.ks[:1]
        self.all_masks = {k: all_subsets(n, k).to(device) for k in self.ks if n <= EXHAUSTIVE_EXPERTS}
        self.generator = torch.Generator().manual_seed(0)  # of the signal `random`
        self.right_without = torch.zeros((), device=device)
        self.totals: dict[tuple[int, str], Tensor] = {}

    def add(self, inputs: Tensor, labels: Tensor, observation: Observation) -> None:
        """Add inputs (b,c,H,W) with their classes (b), and what the dense layer computed for them."""
        picked = self._pick(observation)
        for i in range(len(inputs)):
            added = contributions(observation, i)
            judge = partial(self.rest.judge, inputs[i], labels[i])
            self.right_without += judge([torch.zeros_like(added[:1])])[0, RIGHT]
            order = greedy_order(added, self.ks_of_greedy[-1], judge, self.runtime.batch_size)
            for k in self.ks:
                experts = {signal: of_inputs[i] for signal, of_inputs in picked[k].items()}
                if k in self.ks_of_greedy:
                    experts["greedy"] = order[:k]
                masks = masks_of(torch.stack(list(experts.values())), len(added))
                figures = self._figures(k, masks, added, judge)
                for signal, row in zip((*experts, "exhaustive"), figures, strict=False):
                    self.totals[k, signal] = self.totals.get((k, signal), torch.zeros_like(row)) + row

    def _pick(self, observation: Observation) -> dict[int, dict[str, Tensor]]:
        """For each k the experts that the signals without labels pick for inputs: indices (b,k)."""
        mass = observation.mass
        slot_mass = observation.weights.sum(1)  # (b,n,p)
        scores = {
            "combine": mass,
            "deviation": mass * self.deviation,
            "random": torch.rand(mass.shape, generator=self.generator).to(mass.device),
            "output": (slot_mass * observation.slot_outputs.to(slot_mass).norm(dim=3)).sum(2),
        }
        has_fixed_slots = not self.layer.config.dynamic_slots
        if has_fixed_slots:
            scores["mean_token"] = self._mass_of_mean_token(observation)
        picked = {k: {signal: top_k(rank, k) for signal, rank in scores.items()} for k in self.ks}
        if has_fixed_slots:
            for k, of_signal in picked.items():
                of_signal["gram"] = self.of_gram[k].expand(len(mass), -1)
        return picked

    def _mass_of_mean_token(self, observation: Observation) -> Tensor:
        """The mass (b,n) that the layer gives to its experts for the mean of each input's tokens."""
        seen: dict[str, Observation] = {}
        tokens = mean_token(observation.tokens, observation.mask)[:, None]
        observe_layers(self.layer, [""], seen.__setitem__, tokens, self.runtime)
        return seen[""].mass

    def _figures(self, k: int, masks: Tensor, added: Tensor, judge: Judge) -> Tensor:
        """The FIGURES of subsets of k experts (s,n) for an input, the last of them `greedy` if it is there:
        (s,6), or with the best of all (s+1,6).
        """
        tried = self.all_masks.get(k, masks)
        parts = tried.to(added).split(self.runtime.batch_size)
        verdicts = judge((part @ added.flatten(1)).unflatten(1, added.shape[1:]) for part in parts)
        if self.all_masks:
            return among_all(verdicts, masks, tried)
        return against_last(verdicts, masks) if k in self.ks_of_greedy else _figures(verdicts)

    def result(self, data: Dataset) -> dict[str, Any]:
        """Means over the samples of the data, as JSON values."""
        rows = []
        for k in self.ks:
            for signal in SIGNALS:
                if (k, signal) not in self.totals:
                    continue
                means = (self.totals[k, signal] / data.samples).tolist()
                if not all(map(math.isfinite, means[:3])):
                    raise MoepruneError(
                        f"the model computes NaN or infinite logits on `{data.spec}`", "try `--dtype float32`"
                    )
                figures = [None if math.isnan(mean) else mean for mean in means]
                rows.append({"k": k, "signal": signal, **dict(zip(FIGURES, figures, strict=True))})
        return {
            "experts": self.layer.config.num_experts,
            "accuracy_without_experts": float(self.right_without) / data.samples,
            "reference": "exhaustive" if self.all_masks else "greedy",
            "rows": rows,
        }


class _Rest:
    """A model but for one of its Soft MoE layers, whose output is given."""

    def __init__(self, model: Model, name: str, runtime: Runtime):
        self.model = private_copy(model)
        self.given = _Given(self.model.moe_layers[name])
        self.model.set_submodule(name, self.given)
        self.runtime = runtime
        # In our own architecture what is before the layer runs once for all candidates: what is behind it
        # adds to them, or takes them alone.
        self.broadcasts = isinstance(model, SoftMoEViT)

    def judge(self, image: Tensor, label: Tensor, outputs: Iterable[Tensor]) -> Tensor:
        """Verdicts (c,3) on what the layer may give for an image (c,H,W) with its label ().

        Args:
            outputs: in parts (c,m,o).
        """
        verdicts = []
        for part in outputs:
            self.given.output = part
            images = image.expand(1 if self.broadcasts else len(part), *image.shape)
            logits = self.runtime.forward(self.model, images).to(wide_dtype(image.device))
            true_class = label.expand(len(part), 1)
            logit = logits.gather(1, true_class)
            others = logits.scatter(1, true_class, -torch.inf).amax(1, keepdim=True)
            right = logits.argmax(1, keepdim=True) == true_class
            verdicts.append(torch.cat([right, logit, logit - others], dim=1))
        return torch.cat(verdicts)


class _Given(nn.Module):
    """In place of a Soft MoE layer: gives what it is told to."""

    output: Tensor  # (b,m,o)

    def __init__(self, layer: SoftMoE):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The output in the form of the tokens x, as SoftMoE.forward takes them."""
        output = self.output.to(x.dtype)
        if x.ndim == 2:
            return output[:, 0]
        if x.ndim == 3:
            return output[:, : x.shape[1]]
        return output[:, : x[0, 0].numel()].mT.unflatten(2, x.shape[2:])
