from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

import moeprune
from moeprune.calibration.selection import best_kept
from moeprune.calibration.statistics import LayerStatistics
from moeprune.demo.train import initialize
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LayerPlan
from tests.reference import observe_layers, replace

CPU = moeprune.Runtime(device="cpu")
MODELS = ("single", "two_layers")
FIELDS = [field.name for field in fields(LayerStatistics)]


def two_layer_model(num_experts: int = 5, kind: str = "mlp") -> SoftMoEViT:
    """Random weights; two Soft MoE layers of 2 slots an expert, the second behind attention."""
    hidden_dim = None if kind == "linear" else 6
    soft_moe = SoftMoEConfig(12, num_experts, slots_per_expert=2, hidden_dim=hidden_dim, expert=kind)
    blocks = (
        BlockConfig(attention=False, soft_moe=soft_moe, residual=False),
        BlockConfig(soft_moe=replace(soft_moe, router_norm="rms", dispatch_input="raw")),
    )
    model = SoftMoEViT(ViTConfig((8, 8), (4, 4), 1, 7, dim=12, num_heads=3, blocks=blocks))
    initialize(model, 4.0, 0.1, torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()


def write_inputs(path, labels: list[int] | None, samples: int = 23) -> str:
    arrays = {"inputs": np.random.default_rng(0).normal(size=(samples, 1, 8, 8)).astype(np.float32)}
    if labels is not None:
        arrays["labels"] = np.array(labels)
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def cases(single, tmp_path_factory) -> dict:
    """By model: the model and its calibration data, 60 and 23 samples."""
    single = moeprune.load(single)
    random = two_layer_model()
    path = write_inputs(tmp_path_factory.mktemp("data") / "a.npz", [(0, 2, 5)[i % 3] for i in range(23)])
    return {
        "single": (single, moeprune.open_data("digits:calibration", single.input_format, limit=60)),
        "two_layers": (random, moeprune.open_data(path, random.input_format)),
    }


@pytest.fixture(scope="module")
def analyses(cases) -> dict:
    return {name: moeprune.analyze(model, data, CPU) for name, (model, data) in cases.items()}


@pytest.fixture(scope="module")
def observations(cases) -> dict:
    """By model and layer: C (m,n,p) and f (n,p,d) of each input, run alone; and the labels."""
    return {name: observed_one_by_one(*case) for name, case in cases.items()}


def observed_one_by_one(model, data) -> tuple[dict[str, list], list[int]]:
    seen: dict[str, list] = {name: [] for name in model.moe_layers}
    labels = []

    def observe(name, observation):
        parts = (observation.weights, observation.term_outputs)
        seen[name].append(tuple(part[0].double().numpy() for part in parts))

    for inputs, label in data.batches(1):
        observe_layers(model, list(seen), observe, inputs, CPU)
        labels.append(int(label))
    return seen, labels


def brute_force(samples: list, labels: list[int]) -> dict[str, np.ndarray]:
    """The statistics of one layer as their definitions say, in float64."""
    C, f = (np.stack(parts) for parts in zip(*samples, strict=True))  # (b,m,n,p), (b,n,p,d)
    count, m, n, _ = C.shape
    masses = C.sum((1, 3)) / m
    rank_frequency, kept_mass, experts_for_mass = np.zeros((n, n)), np.zeros(n), np.zeros(3)
    for mass in masses:
        order = sorted(range(n), key=lambda j: (-mass[j], j))
        rank_frequency[range(n), order] += 1 / count
        running = np.cumsum(mass[order])
        kept_mass += running / count
        needed = [1 + int(np.argmax(running >= level * mass.sum())) for level in (0.5, 0.9, 0.99)]
        experts_for_mass += np.array(needed) / count
    weight = C.sum(1)  # (b,n,p)
    slot_mean = (weight[..., None] * f).sum(0) / weight.sum(0)[..., None]
    variance = (weight * np.square(f - slot_mean).sum(3)).sum((0, 2)) / weight.sum((0, 2))

    def terms(f: np.ndarray) -> np.ndarray:  # what each expert adds to the output (n,b,m,d)
        return np.einsum("bmnp,bnpd->nbmd", C, f)

    def gram(terms: np.ndarray) -> np.ndarray:
        return terms.reshape(n, -1) @ terms.reshape(n, -1).T / count

    y = terms(f).sum(0)
    class_mass = np.zeros((max(labels) + 1, n))
    for label in set(labels):
        class_mass[label] = masses[[i for i, found in enumerate(labels) if found == label]].mean(0)
    return {
        "mean_mass": masses.mean(0), "max_mass": masses.max(0), "rank_frequency": rank_frequency,
        "kept_mass": kept_mass, "experts_for_mass": experts_for_mass, "class_mass": class_mass,
        "term_mean": slot_mean, "deviation": np.sqrt(variance), "gram": gram(terms(f)),
        "gram_renorm": gram(terms(f) - C.sum(3).transpose(2, 0, 1)[..., None] * y),
        "gram_mean": gram(terms(f - slot_mean)),
    }  # fmt: skip


def assert_equal_statistics(found: Tensor, wanted: np.ndarray, field: str, samples: list, tolerance: float):
    """Ranks that differ by rounding alone may differ: a swap of two neighbours changes four cells."""
    assert found.shape == wanted.shape
    if field != "rank_frequency":
        atol = tolerance * np.abs(wanted).max(initial=0)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=atol)
        return
    ranked = [np.sort(C.sum((0, 2)))[::-1] for C, _ in samples]
    ties = sum(int((mass[:-1] - mass[1:] < 1e-5 * mass[:-1]).sum()) for mass in ranked)
    assert np.abs(found.numpy() - wanted).sum() < 4 * ties / len(samples) + 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_their_definitions(name, analyses, observations):
    seen, labels = observations[name]
    assert list(analyses[name].layers) == list(seen)
    for layer, statistics in analyses[name].layers.items():
        for field, expected in brute_force(seen[layer], labels).items():
            found = getattr(statistics, field)
            assert found.dtype == torch.float32
            assert_equal_statistics(found, expected, field, seen[layer], 1e-5)


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("name", MODELS)
def test_statistics_do_not_depend_on_the_batch_size(name, batch_size, cases, analyses, observations):
    model, data = cases[name]
    again = moeprune.analyze(model, data, moeprune.Runtime(device="cpu", batch_size=batch_size))
    for layer, statistics in analyses[name].layers.items():
        for field in FIELDS:
            found, wanted = getattr(again.layers[layer], field), getattr(statistics, field).numpy()
            assert_equal_statistics(found, wanted, field, observations[name][0][layer], 1e-5)


def test_gram_matrix_of_a_batch_in_parts_is_the_same(monkeypatch, cases, analyses):
    monkeypatch.setattr("moeprune.layers.observation.WORKSPACE", 1000)  # 5 inputs of 10 slots at once
    parts = moeprune.analyze(*cases["two_layers"], CPU)
    for layer, statistics in analyses["two_layers"].layers.items():
        torch.testing.assert_close(parts.layers[layer].gram, statistics.gram, rtol=1e-5, atol=1e-6)


def test_an_analysis_whose_passes_start_anew_for_each_layer_is_the_same(monkeypatch, cases, analyses):
    monkeypatch.setattr("moeprune.calibration.walk.HELD", 0)
    parts = moeprune.analyze(*cases["two_layers"], CPU)
    for layer, statistics in analyses["two_layers"].layers.items():
        for field in FIELDS:
            torch.testing.assert_close(getattr(parts.layers[layer], field), getattr(statistics, field))


def layer_inputs_and_outputs(model, layer, data) -> tuple[Tensor, Tensor]:
    seen = []
    handle = model.moe_layers[layer].register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        for inputs, _ in data.batches(64):
            model(inputs)
    handle.remove()
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


@pytest.mark.parametrize("compensation", ["none", "mean"])
@pytest.mark.parametrize("dropped_share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", MODELS)
def test_gram_matrix_tells_the_error_of_every_static_plan(name, dropped_share, compensation, cases, analyses):
    """E|Y - Y'|² when the set Z is dropped is the sum of G over Z×Z."""
    model, data = cases[name]
    for seed, (layer, statistics) in enumerate(analyses[name].layers.items()):
        dense, n = model.moe_layers[layer], statistics.num_experts
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        k = n - max(1, int(dropped_share * n))
        plan = LayerPlan("static", k, n, "combine", compensation, tuple(sorted(order[:k])))
        dropped = list(plan.dropped)
        x, y = layer_inputs_and_outputs(model, layer, data)
        pruned = prune_layer(dense, plan, Calibrated(None, statistics.term_mean))
        error = (y - pruned(x)).double().square().sum((1, 2)).mean()
        predicted = statistics.gram_under(compensation).double()[dropped][:, dropped].sum()
        assert float(predicted) == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("compensation", ["lstsq", "affine"])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_regression_cannot_express_is_less_than_what_means_leave(name, compensation, analyses):
    for statistics in analyses[name].layers.values():
        lost, under_mean = statistics.gram_under(compensation).double(), statistics.gram_mean.double()
        assert float(torch.linalg.eigvalsh(lost)[0]) > -1e-5 * float(lost.diagonal().sum())
        if name == "single":  # the other has random weights and 23 inputs
            assert float(lost.sum()) < 0.6 * float(under_mean.sum())


@pytest.mark.parametrize("name", MODELS)
def test_sensitivity_is_the_divergence_over_the_error_of_a_probe(name, cases, analyses):
    model, data = cases[name]
    for layer, statistics in analyses[name].layers.items():
        n = statistics.num_experts
        plan = LayerPlan("static", n // 8, n, "gram", "mean", best_kept(statistics.gram_mean, n, n // 8))
        probe = moeprune.prune(model, analyses[name], plan={layer: plan}, one_shot=True, runtime=CPU)
        divergence, count = 0.0, 0
        _, y = layer_inputs_and_outputs(model, layer, data)
        _, changed = layer_inputs_and_outputs(probe, layer, data)
        error = float((y - changed).double().square().sum((1, 2)).mean())
        for inputs, _ in data.batches(64):
            full, other = (m(inputs).double().softmax(1) for m in (model, probe))
            divergence += float((full * (full / other).log()).sum())
            count += len(inputs)
        assert float(statistics.sensitivity) == pytest.approx(divergence / count / error, rel=1e-3)


def test_router_that_tells_no_experts_apart_gives_uniform_masses_and_ranks_by_index(cases):
    model = two_layer_model(num_experts=8)
    for layer in model.moe_layers.values():
        layer.phi.zero_()  # each mass is exactly 1/8
    for statistics in moeprune.analyze(model, cases["two_layers"][1], CPU).layers.values():
        assert torch.equal(statistics.mean_mass, torch.full((8,), 0.125))
        assert torch.equal(statistics.max_mass, torch.full((8,), 0.125))
        assert torch.equal(statistics.rank_frequency, torch.eye(8))
        assert statistics.experts_for_mass.tolist() == [4, 8, 8]


def test_without_labels_there_is_no_class_mass_and_the_rest_is_the_same(tmp_path, cases, analyses):
    model, _ = cases["two_layers"]
    unlabelled = moeprune.analyze(model, write_inputs(tmp_path / "b.npz", None), CPU)
    for layer, statistics in analyses["two_layers"].layers.items():
        without = unlabelled.layers[layer]
        assert without.class_mass.shape == (0, 5)
        for field in set(FIELDS) - {"class_mass"}:
            assert torch.equal(getattr(without, field), getattr(statistics, field))


@pytest.mark.parametrize("name", MODELS)
def test_analysis_file_round_trips(name, tmp_path, analyses):
    moeprune.save_analysis(analyses[name], tmp_path / "a.safetensors")
    loaded = moeprune.load_analysis(tmp_path / "a.safetensors")
    assert loaded.origin == analyses[name].origin
    assert list(loaded.layers) == list(analyses[name].layers)
    for layer, statistics in analyses[name].layers.items():
        for field in FIELDS:
            assert torch.equal(getattr(loaded.layers[layer], field), getattr(statistics, field))


def test_analysis_refuses_a_pruned_model(cases, analyses):
    model, data = cases["single"]
    pruned = moeprune.prune(model, analyses["single"], keep=4)
    with pytest.raises(moeprune.MoepruneError, match="already pruned"):
        moeprune.analyze(pruned, data, CPU)


def test_nan_in_a_layer_is_an_error_that_names_it(cases):
    model, data = two_layer_model(), cases["two_layers"][1]
    model.blocks[1].soft_moe.fc1_bias[3] = torch.nan
    with pytest.raises(moeprune.MoepruneError, match=r"blocks\.1\.soft_moe.*NaN"):
        moeprune.analyze(model, data, CPU)


def test_logits_of_the_single_layer_model_are_a_sum_over_experts(cases, observations):
    """Without residual, with one slot per expert and mean pooling: b + sum over j of s_j/m · W·f_j."""
    model, data = cases["single"]
    weight, bias = model.head.weight.double().numpy(), model.head.bias.double().numpy()
    logits = np.concatenate([model(inputs).double().numpy() for inputs, _ in data.batches(64)])
    [samples] = observations["single"][0].values()
    for row, (C, f) in zip(logits, samples, strict=True):
        assert C.shape[2] == 1
        summed = bias + sum(C[:, j, 0].sum() / len(C) * (weight @ f[j, 0]) for j in range(C.shape[1]))
        np.testing.assert_allclose(row, summed, rtol=1e-5, atol=1e-5 * np.abs(row).max())


def test_statistics_are_taken_outside_of_autocast(single):
    """Else the products of the Gram matrix would be rounded to bfloat16."""
    model = moeprune.load(single)
    inputs, _ = next(moeprune.open_data("digits", model.input_format).batches(4))
    [name] = model.moe_layers
    seen = []

    def observe(_, observation):
        seen.append((observation.term_outputs.dtype, (observation.output.float() @ torch.eye(32)).dtype))

    observe_layers(model, [name], observe, inputs, moeprune.Runtime(device="cpu", dtype="bf16"))
    assert seen == [(torch.bfloat16, torch.float32)]
