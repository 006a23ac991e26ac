"""Subsets of experts that signals pick, against the best one: brute force and pruned models."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

import moeprune
from moeprune.calibration.analysis import Analysis
from moeprune.data.datasets import Dataset, from_tensors
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from tests.benchmarks import oracle
from tests.reference import observe_layers, reference_combine, reference_router, reference_slot_output

CPU = moeprune.Runtime("cpu", batch_size=5)
SAMPLES, CLASSES = 8, 3


@pytest.fixture(scope="module")
def small() -> tuple[SoftMoEViT, Dataset, Analysis]:
    """A model in float64 of two Soft MoE layers, one with a residual around it; labelled inputs."""
    generator = torch.Generator().manual_seed(5)
    blocks = tuple(
        BlockConfig(soft_moe=SoftMoEConfig(8, n, slots_per_expert=p, hidden_dim=6), residual=residual)
        for n, p, residual in ((5, 2, True), (6, 1, False))
    )
    config = ViTConfig((4, 8), (2, 2), 1, CLASSES, dim=8, num_heads=2, blocks=blocks)
    model = SoftMoEViT(config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if name.endswith("scale"):
            parameter.fill_(1)
        elif name.endswith("fc2_weight"):  # experts that say less than others
            parameter.mul_(torch.linspace(2, 0.2, len(parameter))[:, None, None])
    inputs = torch.randn(SAMPLES, 1, 4, 8, generator=generator)
    data = from_tensors("memory", inputs, torch.arange(SAMPLES) % CLASSES, CLASSES)
    return model, data, moeprune.analyze(model, data, CPU)


def with_experts(model: SoftMoEViT, name: str, kept: tuple[int, ...]) -> SoftMoEViT:
    """The model in which all other experts of a layer give zero."""
    masked = copy.deepcopy(model)
    layer = masked.moe_layers[name]
    dropped = [j for j in range(layer.config.num_experts) if j not in kept]
    layer.fc2_weight[dropped] = layer.fc2_bias[dropped] = 0
    return masked


def scores_of(signal: str, tokens: Tensor, layer: SoftMoE, deviation: Tensor) -> list[float]:
    """The score of each expert for one input, by the signal's definition."""
    config, tensors = layer.config, dict(layer.named_parameters())
    n, p = tensors["phi"].shape[1:]
    seen = tokens.mean(0, keepdim=True) if signal == "mean_token" else tokens
    logits, dispatched = reference_router(seen, tensors, config.router_norm, config.dispatch_input)
    combine = reference_combine(logits, range(n))
    scores = []
    for j in range(n):
        weights = [1.0] * p
        if signal == "deviation":
            weights = [float(deviation[j])] * p
        elif signal == "output":
            slots = (reference_slot_output(logits[:, j, q], dispatched, tensors, j) for q in range(p))
            weights = [float(slot.norm()) for slot in slots]
        scores.append(sum(float(combine[:, j, q].sum()) * weights[q] for q in range(p)))
    return scores


def margin(logits: Tensor, label: int) -> float:
    return float(logits[label] - max(logit for index, logit in enumerate(logits) if index != label))


def by_brute_force(model, data, analysis, name: str) -> dict[tuple[int, str], dict[str, float]]:
    """The rows of a layer, with every subset run as a model of its own."""
    statistics = analysis.layers[name]
    n = statistics.num_experts
    subsets = [kept for k in range(n + 1) for kept in combinations(range(n), k)]
    models = {kept: with_experts(model, name, kept) for kept in subsets}
    layer = model.moe_layers[name]
    outcomes: dict[tuple[int, str], list[list[float]]] = {}
    for inputs, labels in data.batches(1):
        image, label = inputs.double(), int(labels)
        logits = {kept: masked(image)[0] for kept, masked in models.items()}
        score = {kept: margin(of_kept, label) for kept, of_kept in logits.items()}
        seen = {}
        observe_layers(model, [name], seen.__setitem__, image, CPU)
        [tokens] = seen[name].tokens
        for k in sorted({max(1, int(share * n + 0.5)) for share in (1 / 8, 1 / 4, 1 / 2)}):
            of_size = [kept for kept in subsets if len(kept) == k]
            picks = {
                signal: max(of_size, key=lambda kept, of=scores: sum(of[j] for j in kept))
                for signal in ("combine", "deviation", "mean_token", "output")
                if (scores := scores_of(signal, tokens, layer, statistics.deviation))
            }
            picks["exhaustive"] = max(of_size, key=score.__getitem__)
            picks["greedy"] = ()
            for _ in range(k):
                longer = [tuple(sorted({*picks["greedy"], j})) for j in range(n) if j not in picks["greedy"]]
                picks["greedy"] = max(longer, key=score.__getitem__)
            gram = statistics.gram.double()
            lost = {kept: [j for j in range(n) if j not in kept] for kept in of_size}
            picks["gram"] = min(of_size, key=lambda kept, of=lost: float(gram[of[kept]][:, of[kept]].sum()))
            is_right = {kept: int(logits[kept].argmax()) == label for kept in of_size}
            for signal, kept in picks.items():
                as_good = [score[other] <= score[kept] for other in of_size]
                as_right = is_right[kept] or not any(is_right.values())
                best = kept == picks["exhaustive"]
                figures = [is_right[kept], logits[kept][label], score[kept], best, as_right, np.mean(as_good)]
                outcomes.setdefault((k, signal), []).append([float(figure) for figure in figures])
    return {key: dict(zip(oracle.FIGURES, np.mean(of_key, 0), strict=True)) for key, of_key in outcomes.items()}


@pytest.mark.parametrize("name", ["blocks.0.soft_moe", "blocks.1.soft_moe"])
def test_rows_are_what_running_every_subset_as_a_model_gives(small, name):
    model, data, analysis = small
    expected = by_brute_force(model, data, analysis, name)
    rows = {(row["k"], row["signal"]): row for row in oracle.compare_signals(model, analysis, data, CPU)[name]}
    assert {key for key in rows if key[1] != "random"} == set(expected)
    for key, row in expected.items():
        assert {figure: rows[key][figure] for figure in row} == pytest.approx(row, abs=1e-9), key
    most = max(k for k, _ in expected)
    distinct = {row["margin"] for (k, _), row in expected.items() if k == most}
    assert len(distinct) > 4  # signals differ, or all this says little
    best = {k: rows[k, "exhaustive"]["margin"] for k, _ in rows}
    assert all(row["margin"] <= best[k] + 1e-9 for (k, _), row in rows.items())


def test_a_subset_as_good_as_the_best_is_the_best():
    """Of two subsets that predict alike, which one comes first is chance."""
    verdicts = {(0,): (0, 1.0, -2.0), (1,): (1, 3.0, -0.5), (2,): (1, 2.0, -0.5)}
    found = [oracle.figures_of(kept, verdicts)[3:] for kept in verdicts]
    assert found == [[False, False, pytest.approx(1 / 3)], [True, True, 1], [True, True, 1]]
