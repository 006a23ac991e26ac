"""Subsets of experts that signals pick, against the best one: brute force and pruned models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import moeprune
from moeprune.data.datasets import Dataset, from_tensors
from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from moeprune.models.adopted import adopt
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.runtime import Runtime
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LayerPlan
from tests.benchmarks import oracle_subsets as oracle
from tests.reference import reference_combine, reference_router, reference_slot_output

CPU = Runtime("cpu", batch_size=5)
SAMPLES, CLASSES = 12, 3


class Small(NamedTuple):
    """A model in float64 of two Soft MoE layers, and labelled inputs."""

    model: SoftMoEViT
    data: Dataset
    analysis: moeprune.calibration.analysis.Analysis
    found: dict


def in_memory(inputs: Tensor, labels: Tensor | None, classes: int = CLASSES) -> Dataset:
    return from_tensors("memory", inputs, labels, classes)


@pytest.fixture(scope="module")
def small() -> Small:
    """One layer with a residual around it, one without."""
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
    data = in_memory(inputs, torch.arange(SAMPLES) % CLASSES)
    analysis = moeprune.analyze(model, data, CPU)
    return Small(model, data, analysis, oracle.compare_signals(model, analysis, data, runtime=CPU))


def samples(data: Dataset) -> Iterator[tuple[Tensor, int]]:
    for inputs, labels in data.batches(1):
        yield inputs.double(), int(labels)


def with_experts(model: SoftMoEViT, name: str, kept: tuple[int, ...]) -> SoftMoEViT:
    """The model in which all other experts of a layer give zero."""
    masked = copy.deepcopy(model)
    layer = masked.moe_layers[name]
    for j in range(layer.config.num_experts):
        if j not in kept:
            layer.fc2_weight[j] = 0
            layer.fc2_bias[j] = 0
    return masked


def tokens_of(model: SoftMoEViT, name: str, image: Tensor) -> Tensor:
    """What a layer takes for one image (m,d)."""
    seen = []
    hook = model.moe_layers[name].register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    model(image)
    hook.remove()
    return seen[0]


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


def means(outcomes: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(float(outcome[key]) for outcome in outcomes) / len(outcomes) for key in outcomes[0]}


def by_brute_force(small: Small, name: str) -> dict[tuple[int, str], dict[str, float]]:
    """The rows of a layer, with every subset run as a model of its own."""
    statistics = small.analysis.layers[name]
    n = statistics.num_experts
    subsets = [kept for k in range(n + 1) for kept in combinations(range(n), k)]
    models = {kept: with_experts(small.model, name, kept) for kept in subsets}
    layer = small.model.moe_layers[name]
    outcomes: dict[tuple[int, str], list[dict[str, float]]] = {}
    for image, label in samples(small.data):
        logits = {kept: model(image)[0] for kept, model in models.items()}
        score = {kept: margin(of_kept, label) for kept, of_kept in logits.items()}
        tokens = tokens_of(small.model, name, image)
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
                outcome = {
                    "accuracy": is_right[kept],
                    "true_class_logit": logits[kept][label],
                    "margin": score[kept],
                    "found_best": kept == picks["exhaustive"],
                    "as_right": is_right[kept] or not any(is_right.values()),
                    "percentile": sum(score[other] <= score[kept] for other in of_size) / len(of_size),
                }
                outcomes.setdefault((k, signal), []).append(outcome)
    return {key: means(of_key) for key, of_key in outcomes.items()}


@pytest.mark.parametrize("name", ["blocks.0.soft_moe", "blocks.1.soft_moe"])
def test_rows_are_what_running_every_subset_as_a_model_gives(small, name):
    layer = small.found["layers"][name]
    expected = by_brute_force(small, name)
    rows = {(row.pop("k"), row.pop("signal")): row for row in copy.deepcopy(layer["rows"])}
    assert {key for key in rows if key[1] != "random"} == set(expected)
    for key, row in expected.items():
        assert rows[key] == pytest.approx(row, abs=1e-9), key
    assert layer["reference"] == "exhaustive"
    most = max(k for k, _ in expected)
    distinct = {row["margin"] for (k, _), row in expected.items() if k == most}
    assert len(distinct) > 4  # signals differ, or all this says little
    right = sum(
        int(with_experts(small.model, name, ())(image).argmax()) == label
        for image, label in samples(small.data)
    )
    assert layer["accuracy_without_experts"] == right / SAMPLES


def test_contributions_sum_to_the_output_on_padding_too(small):
    layer = copy.deepcopy(small.model.moe_layers["blocks.0.soft_moe"])
    seen = []
    layer.observer = seen.append
    tokens = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    output = layer(tokens, mask)
    for i in range(2):
        added = oracle.contributions(seen[0], i)
        torch.testing.assert_close(added.sum(0), output[i], rtol=0, atol=1e-12)


def test_a_subset_as_good_as_the_best_is_the_best():
    """Of two subsets that predict alike, which one comes first is chance."""
    verdicts = torch.tensor([[0, 1.0, -2.0], [1, 3.0, -0.5], [1, 2.0, -0.5]], dtype=torch.float64)
    masks = oracle.all_subsets(3, 1)
    found = oracle.among_all(verdicts, masks, masks)
    assert found[:, 3].tolist() == [0, 1, 1, 1]
    assert found[:, 4].tolist() == [0, 1, 1, 1]
    assert found[:, 5].tolist() == pytest.approx([1 / 3, 1, 1, 1])


@pytest.mark.parametrize("limit", [12, 0])
def test_no_subset_is_better_than_the_best_of_all(small, monkeypatch, limit):
    monkeypatch.setattr(oracle, "EXHAUSTIVE_EXPERTS", limit)
    found = oracle.compare_signals(small.model, small.analysis, small.data, runtime=CPU)
    for name, layer in found["layers"].items():
        best = {
            row["k"]: row["margin"]
            for row in small.found["layers"][name]["rows"]
            if row["signal"] == "exhaustive"
        }
        assert all(row["margin"] <= best[row["k"]] + 1e-9 for row in layer["rows"])
        assert layer["reference"] == ("exhaustive" if limit else "greedy")


def test_without_all_subsets_the_others_are_compared_with_greedy(small, monkeypatch):
    monkeypatch.setattr(oracle, "EXHAUSTIVE_EXPERTS", 0)
    found = oracle.compare_signals(small.model, small.analysis, small.data, runtime=CPU)
    for name, layer in found["layers"].items():
        complete = {(row["k"], row["signal"]): row for row in small.found["layers"][name]["rows"]}
        ks = sorted({row["k"] for row in layer["rows"]})
        assert [row["k"] for row in layer["rows"] if row["signal"] == "greedy"] == ks[:1]
        for row in layer["rows"]:
            same = complete[row["k"], row["signal"]]
            for figure in ("accuracy", "true_class_logit", "margin"):
                assert row[figure] == pytest.approx(same[figure], abs=1e-9)
            assert row["percentile"] is None
            assert (row["as_right"] is None) == (row["k"] != ks[0])
            if row["k"] == 1:  # greedy search for one expert tries all
                assert row["found_best"] == same["found_best"]
                assert row["as_right"] == same["as_right"]


def test_batches_leave_no_trace(small):
    other = oracle.compare_signals(small.model, small.analysis, small.data, runtime=Runtime("cpu"))
    assert other["data"] == small.found["data"]
    for name, layer in other["layers"].items():
        for row, before in zip(layer["rows"], small.found["layers"][name]["rows"], strict=True):
            assert row == pytest.approx(before, abs=1e-9)


# --- against pruned models ---------------------------------------------------------------------


def assert_row_is_of_model(row, model, data):
    inputs, labels = (torch.cat(parts) for parts in zip(*data.batches(64), strict=True))
    logits = model(inputs.to(next(model.parameters()).dtype))
    assert row["accuracy"] == float((logits.argmax(1) == labels).double().mean())
    of_class = logits.gather(1, labels[:, None])
    assert row["true_class_logit"] == pytest.approx(float(of_class.mean()), abs=1e-5)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    assert row["margin"] == pytest.approx(float((of_class - others).mean()), abs=1e-5)


def assert_rows_of_signal_are_of_pruned_models(model, data, found, name, analysis):
    for row in found["layers"][name]["rows"]:
        if row["signal"] not in ("combine", "deviation"):
            continue
        n = found["layers"][name]["experts"]
        plan = {name: LayerPlan("input", row["k"], n, row["signal"], "none")}
        pruned = moeprune.prune(model, analysis, plan=plan, one_shot=True)
        assert_row_is_of_model(row, pruned, data)


def test_the_papers_row_is_its_pruned_model_on_digits(single, single_analysis):
    model, analysis = moeprune.load(single), moeprune.load_analysis(single_analysis)
    data = moeprune.open_data("digits:test", model.input_format).sample(60)
    found = oracle.compare_signals(model, analysis, data)
    assert_rows_of_signal_are_of_pruned_models(model, data, found, "blocks.0.soft_moe", analysis)
    [layer] = found["layers"].values()
    row = {row["signal"]: row for row in layer["rows"] if row["k"] == 16}
    assert row["greedy"]["accuracy"] == 1
    by_margin = sorted(("greedy", "combine", "gram", "random"), key=lambda signal: -row[signal]["margin"])
    assert by_margin == ["greedy", "combine", "gram", "random"]
    assert row["combine"]["accuracy"] > 0.9 > row["mean_token"]["accuracy"] > row["random"]["accuracy"]
    assert found["accuracy"] == moeprune.evaluate(model, data).model.accuracy


def test_layers_are_pruned_one_at_a_time(vit, vit_analysis):
    model, analysis = moeprune.load(vit), moeprune.load_analysis(vit_analysis)
    data = moeprune.open_data("pairs:test", model.input_format).sample(3)
    found = oracle.compare_signals(model, analysis, data)
    assert list(found["layers"]) == [f"blocks.{i}.soft_moe" for i in (1, 2, 3)]
    for name in found["layers"]:
        assert_rows_of_signal_are_of_pruned_models(model, data, found, name, analysis)


def all_experts_lose_nothing(model, data, monkeypatch) -> dict:
    """Assert that subsets of all experts give what the unpruned model does."""
    monkeypatch.setattr(oracle, "SHARES", (Fraction(1),))
    found = oracle.compare_signals(model, moeprune.analyze(model, data, CPU), data, runtime=CPU)
    for layer in found["layers"].values():
        for row in layer["rows"]:
            assert row["k"] == layer["experts"]
            assert row["accuracy"] == found["accuracy"]
            assert_row_is_of_model(row, model, data)
            assert (row["found_best"], row["as_right"], row["percentile"]) == (1, 1, 1)
    return found


def test_all_experts_are_the_unpruned_model(small, monkeypatch):
    all_experts_lose_nothing(small.model, small.data, monkeypatch)


@pytest.mark.parametrize("factory", ["tower", "dynamic"])
@pytest.mark.parametrize("num_experts", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_layers_in_models_of_other_libraries(monkeypatch, factory, num_experts):
    """Images, tokens with padding, single tokens, and slots made of the input itself."""
    pytest.importorskip("soft_moe_pytorch")
    others = pytest.importorskip("tests.test_adopted")
    build: Callable = getattr(others, factory)
    model = adopt(others.randomized(build(num_experts=num_experts)), others.SHAPE)
    found = all_experts_lose_nothing(model, others.dataset(), monkeypatch)
    signals = {row["signal"] for layer in found["layers"].values() for row in layer["rows"]}
    left_out = set(oracle.SIGNALS) - signals
    assert left_out == ({"gram", "mean_token"} if factory == "dynamic" else set())
    monkeypatch.undo()
    data = others.dataset()
    analysis = moeprune.analyze(model, data)
    found = oracle.compare_signals(model, analysis, data)
    for name in found["layers"]:
        assert_rows_of_signal_are_of_pruned_models(model, data, found, name, analysis)


# --- what cannot be compared -------------------------------------------------------------------


def test_layers_that_depend_on_the_batch_are_refused(small):
    pytest.importorskip("soft_mixture_of_experts")
    others = pytest.importorskip("tests.test_adopted")
    source = "soft-mixture-of-experts==0.1.0"
    model = adopt(others.randomized(others.encoder()), others.SHAPE, source=source)
    with pytest.raises(MoepruneError, match="dispatch softmax over the batch"):
        oracle.compare_signals(model, small.analysis, others.dataset(), runtime=CPU)


def test_what_lacks_labels_or_is_anothers_or_pruned_is_refused(small):
    unlabelled = in_memory(torch.zeros(2, 1, 4, 8), None)
    with pytest.raises(MoepruneError, match="no labels, the oracle needs them"):
        oracle.compare_signals(small.model, small.analysis, unlabelled, runtime=CPU)
    other = with_experts(small.model, "blocks.0.soft_moe", (0,))
    with pytest.raises(MoepruneError, match="analysis was made for another checkpoint"):
        oracle.compare_signals(other, small.analysis, small.data, runtime=CPU)
    pruned = moeprune.prune(small.model, keep=1, scope="input")
    with pytest.raises(MoepruneError, match="already pruned"):
        oracle.compare_signals(pruned, small.analysis, small.data, runtime=CPU)


# --- the command -------------------------------------------------------------------------------
