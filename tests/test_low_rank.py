"""Low-rank maps in place of dropped experts, against the formulas and reduced-rank regressions by NumPy."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import moeprune
from moeprune.calibration.sums import half_of
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.plan import LOW_RANK, LayerPlan
from moeprune.pruning import low_rank as low_rank_module
from moeprune.pruning.compensation import fit
from moeprune.pruning.low_rank import (
    RIDGES,
    Moments,
    decided_ranks,
    fit_low_rank,
    leading_directions,
    reduced_rank,
    set_maps,
)  # fmt: skip
from tests.reference import reference_combine, reference_layer, reference_router, reference_slot_input
from tests.test_calibration import layer_inputs_and_outputs
from tests.test_compensation import LAST, behind_a_pruned_layer, model_and_data, output_error
from tests.test_cost import counted
from tests.test_soft_moe import (
    SHAPES,
    N,
    affine_of,
    dense_layer,
    expected_sets,
    inputs,
    observe,
    ragged_sets,
    relative_error,
    router,
    surrogates,
    with_random_affine,
)  # fmt: skip

CPU = moeprune.Runtime("cpu")
RANK, KEPT, DROPPED = 2, (1, 3), [0, 2, 4]


def plan_of(scope="static", k=2, n=5, rank=RANK, compensation="low-rank", **options) -> LayerPlan:
    kept = (1, 3)[:k] if scope == "static" else None
    return LayerPlan(scope, k, n, "combine", compensation, kept, rank=rank, **options)


# --- the layer
def random_maps(layer) -> tuple[Tensor, Tensor]:
    """Random maps in a layer's buffers; the same as A (n,d,r) and B (n,r,o) by the experts' index in the dense layer,
    with zeros beyond an expert's rank."""
    generator, plan = torch.Generator().manual_seed(11), layer.plan
    for buffer in (layer.low_rank_in, layer.low_rank_out):
        buffer.copy_(torch.randn(buffer.shape, generator=generator) / 2)
    experts = plan.dropped if plan.scope == "static" else range(N)
    ranks = dict(zip(experts, plan.ranks or [plan.rank] * len(experts), strict=True))
    into = layer.low_rank_in.new_zeros(N, layer.low_rank_in.shape[1], max(ranks.values()))
    out_of = layer.low_rank_in.new_zeros(N, max(ranks.values()), layer.low_rank_out.shape[1])
    row = 0
    for j in sorted(experts, key=lambda j: (-ranks[j], j)):
        rows = slice(row, row + ranks[j])
        into[j, :, : ranks[j]], out_of[j, : ranks[j]] = layer.low_rank_in[rows].mT, layer.low_rank_out[rows]
        row = rows.stop
    assert row == len(layer.low_rank_in) == len(layer.low_rank_out)
    return into, out_of


@pytest.mark.parametrize("compensation", LOW_RANK)
@pytest.mark.parametrize("scope", ["static", "ranks", "input", "batch", "mass"])
@pytest.mark.parametrize("settings", [*SHAPES, {"expert": "geglu", "out_dim": 7, "p": 2}], ids=str)
def test_pruned_layer_equals_the_formulas(settings, scope, compensation):
    dense = dense_layer(**settings)
    x, u = inputs(dtype=dense.phi.dtype), surrogates(dense.phi.shape[2], dense.fc2_bias.shape[1])
    if scope == "mass":
        plan, kept = plan_of("input", N, mass=0.6, compensation=compensation), ragged_sets(dense, x, 0.6)
    elif scope == "ranks":
        plan, kept = plan_of(ranks=(1, 0, 3), compensation=compensation), [KEPT] * len(x)
    else:
        chosen = expected_sets(dense, x, scope, 2)
        plan, kept = plan_of(scope, compensation=compensation), [KEPT] * len(x) if scope == "static" else chosen
    layer = prune_layer(dense, plan, Calibrated(None, u))
    if layer.plan.has_affine:
        with_random_affine(layer)
    maps = random_maps(layer)
    assert layer.plan.columns == {"static": (1, 3, 0, 2, 4), "ranks": (1, 3, 4, 0, 2)}.get(scope, layer.plan.columns)
    expected = reference_layer(
        x, dense.state_dict(), *router(dense), kept, compensation, u, low_rank=maps,
        affine=affine_of(layer) if layer.plan.has_affine else None,
    )  # fmt: skip
    assert relative_error(layer(x), expected) < (1e-10 if x.dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("scope", ["static", "input", "batch"])
def test_padding_changes_nothing_for_real_tokens(scope):
    layer = with_random_affine(prune_layer(dense_layer(), plan_of(scope), Calibrated(None, surrogates())))
    random_maps(layer)
    x, mask = inputs(b=2), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    seen = observe(layer, x, mask)
    if scope != "batch":
        assert relative_error(layer(x, mask)[:1], layer(x[:1])) < 1e-12
        assert relative_error(layer(x, mask)[1:, :4], layer(x[1:, :4])) < 1e-12
    assert not seen.output[1, 4:].any()


@pytest.mark.parametrize("scope", ["static", "input", "batch"])
def test_bfloat16_autocast_stays_near_float32(scope):
    layer = with_random_affine(
        prune_layer(dense_layer(dtype=torch.float32), plan_of(scope), Calibrated(None, surrogates()))
    )
    random_maps(layer)
    x = inputs(dtype=torch.float32)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-5 < relative_error(layer(x), exact) < 0.03


CONFIGS = [
    SoftMoEConfig(12, 5, 2, 6),
    SoftMoEConfig(12, 5, 1, 6, expert="geglu", out_dim=7),
    SoftMoEConfig(12, 5, 2, None, expert="linear", out_dim=9),
]


@pytest.mark.parametrize("compensation", LOW_RANK)
@pytest.mark.parametrize("scope", ["static", "input", "batch"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.expert}-{config.out_dim}")
def test_shapes_and_flops(config, scope, compensation):
    for k in (0, 1, 2, 5):
        kept = tuple(range(k)) if scope == "static" else None
        for ranks in (None, *([(4, 0, 1, 1, 0)[k:], (0,) * (5 - k)] if scope == "static" and k < 5 else [])):
            plan = LayerPlan(scope, k, 5, "combine", compensation, kept, rank=4, ranks=ranks)
            layer = SoftMoE(config, plan)
            assert config.shapes(plan) == {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
            assert counted(layer, torch.randn(2, 9, 12)) == 2 * config.flops(9, plan).total, plan
    assert config.part("low_rank_in") == config.part("low_rank_out") == "compensation"


@pytest.mark.parametrize("tokens", [13, 16])
def test_flops_of_dynamic_slots_count_padded_tokens(tokens):
    config = SoftMoEConfig(8, 4, 4, 6, router_norm="none", dynamic_slots=True)
    plan = LayerPlan("input", 2, 4, "combine", "low-rank", rank=2)
    assert counted(SoftMoE(config, plan), torch.randn(2, tokens, 8)) == 2 * config.flops(tokens, plan).total


@pytest.mark.parametrize("rank", [0.25, 0.5, 1])
def test_a_mean_rank_below_one_spends_few_directions_in_all(rank, tmp_path):
    full, data = model_and_data(tmp_path, samples=60)
    pruned = moeprune.prune(full, keep=1, compensate="low-rank-lstsq", rank=rank, data=data, runtime=CPU)
    moeprune.save(pruned, tmp_path / "pruned.safetensors")
    loaded = moeprune.load(tmp_path / "pruned.safetensors")
    assert loaded.plan == pruned.plan
    for layer in loaded.moe_layers.values():
        assert (layer.plan.rank, sum(layer.plan.ranks)) == (rank, 4 * rank)
        assert len(layer.low_rank_in) == 4 * rank
        expected = SoftMoE(layer.config, layer.plan.replace(ranks=None))
        assert expected.low_rank_in.shape == layer.low_rank_in.shape  # what a budget counts on


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scope": "input"}, "`rank` is 0.5, expected a whole number; a share goes with"),
        ({"compensation": "affine"}, "`rank` is 0.5, expected a whole number; a share goes with"),
        ({"rank": 3, "ranks": (1, 2)}, "`ranks` has 2 numbers, expected 3: one for each map"),
        ({"rank": 3, "compensation": "affine", "ranks": (1, 2, 1)}, "`ranks` go with compensation `low-rank`"),
        ({"rank": 3, "scope": "input", "ranks": (1, 2, 1, 1, 1)}, "`ranks` differ or are 0"),
    ],
)
def test_ranks_that_do_not_fit_a_plan_are_refused(fields, said):
    with pytest.raises(moeprune.MoepruneError) as error:
        plan_of(**({"rank": 0.5} | fields))
    assert said in error.value.message


def test_a_rank_above_the_number_of_directions_is_refused(tmp_path):
    full, data = model_and_data(tmp_path, samples=10)
    with pytest.raises(moeprune.MoepruneError, match="has 12 directions, the plan has rank 13"):
        moeprune.prune(full, keep=2, compensate="low-rank", rank=13, data=data, runtime=CPU)


@pytest.mark.parametrize("scope", ["static", "input", "batch"])
def test_saved_and_loaded_it_computes_the_same(scope, tmp_path):
    full, data = model_and_data(tmp_path, samples=30)
    pruned = moeprune.prune(full, keep=2, scope=scope, compensate="low-rank", rank=3, data=data, runtime=CPU)
    moeprune.save(pruned, tmp_path / "pruned.safetensors")
    loaded = moeprune.load(tmp_path / "pruned.safetensors")
    x = next(data.batches(8))[0]
    assert torch.equal(loaded(x), pruned(x))
    assert loaded.plan == pruned.plan
    for layer in loaded.moe_layers.values():
        assert layer.plan.rank == 3
        assert len(layer.plan.ranks) == (3 if scope == "static" else 5)
        assert sum(layer.plan.ranks) <= 3 * len(layer.plan.ranks)
        assert layer.low_rank_in.shape == layer.low_rank_out.shape == (sum(layer.plan.ranks), 12)


# --- the fit
def with_affine_experts(layer: SoftMoE, rank: int) -> None:
    """Make linear experts of a rank, in place."""
    generator = torch.Generator().manual_seed(7)
    n, out, d = layer.fc2_weight.shape
    parts = torch.randn(n, out, rank, generator=generator), torch.randn(n, rank, d, generator=generator)
    layer.fc2_weight.copy_(parts[0] @ parts[1] / d**0.5)


def with_maps(stage, plan: LayerPlan):
    """The layer of a stage with the maps that are fitted to a plan, and nothing else."""
    plan, maps, _ = fit_low_rank(stage, plan)
    layer = prune_layer(stage.layer, plan, Calibrated(None, torch.zeros(5, 2, 12)))
    set_maps(layer, maps)
    return layer


@pytest.mark.parametrize("rank", [1, 3])
def test_experts_that_are_affine_of_the_rank_are_reproduced(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(low_rank_module, "RIDGES", (1e-6,))
    full, data = model_and_data(tmp_path, "linear")
    with_affine_experts(full.moe_layers[LAST], rank)
    with behind_a_pruned_layer(full, data) as (stage, model):
        layer = with_maps(stage, plan_of(rank=rank))
        x = layer_inputs_and_outputs(model, LAST, data)[0]
    assert layer.plan.ranks == (rank,) * 3
    assert relative_error(layer(x), full.moe_layers[LAST](x)) < 3e-5


def test_where_rounding_makes_sums_indefinite_the_map_is_left_out():
    s = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(5))
    square = s.square().sum((1, 2))
    moments = Moments(torch.full((2,), 50.0), s.sum(1), s.sum(1), s.mT @ s, s.mT @ s, square).centred()
    moments.power[0, 0, 0] = -1.0
    into, out_of, _ = reduced_rank(moments, 1e-6, 6)
    maps = into @ out_of
    assert not maps[0].any()
    assert relative_error(maps[1], torch.eye(6)) < 1e-4


def slots_of(layer, x: Tensor, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (b,p,d) of an expert's slots, and the squares of their combine weights summed over tokens (b,p)."""
    tensors = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    taken, weights = [], []
    for one in x.double():
        logits, tokens = reference_router(one, tensors, *router(layer))
        combine = reference_combine(logits, range(logits.shape[1]))
        taken.append(torch.stack([reference_slot_input(logits[:, j, q], tokens) for q in range(logits.shape[2])]))
        weights.append(combine[:, j].square().sum(0))
    return torch.stack(taken).numpy(), torch.stack(weights).numpy()


def direct_map(s: np.ndarray, f: np.ndarray, w: np.ndarray, ridge: float, rank: int) -> tuple[np.ndarray, ...]:
    """M (d,o) of a rank and c (o) for f ≈ s·M + c: a weighted ridge, projected by the SVD of what it fits; and the
    squares of the singular values of that."""
    mean_s, mean_f = w @ s / w.sum(), w @ f / w.sum()
    root = np.sqrt(w)[:, None]
    S, F = root * (s - mean_s), root * (f - mean_f)
    strength = ridge * np.square(S).sum() / S.shape[1]
    rows = np.vstack([S, np.sqrt(strength) * np.eye(S.shape[1])])
    X = np.linalg.lstsq(rows, np.vstack([F, np.zeros((S.shape[1], F.shape[1]))]), rcond=None)[0]
    _, values, V = np.linalg.svd(S @ X)
    M = X @ V[:rank].T @ V[:rank]
    return M, mean_f - mean_s @ M, np.square(values)


@pytest.mark.parametrize("scope", ["static", "input"])
@pytest.mark.parametrize("kind", ["mlp", "geglu"])
def test_maps_are_weighted_reduced_rank_regressions_of_the_experts_outputs(kind, scope, tmp_path):
    """Of all ridges the one whose maps of one half have the least error on the other is taken for all; of all ranks
    with the same mean those that leave the least."""
    full, data = model_and_data(tmp_path, kind, samples=60)
    with behind_a_pruned_layer(full, data) as (stage, model):
        layer = with_maps(stage, plan_of(scope))
        x = layer_inputs_and_outputs(model, LAST, data)[0]
    dense, is_second = full.moe_layers[LAST], half_of(0, 60).numpy() == 1
    experts = DROPPED if scope == "static" else range(5)
    outputs = observe(dense, x).term_outputs.double().numpy()
    slots = {j: (*slots_of(dense, x, j), outputs[:, j]) for j in experts}
    errors = []
    for ridge in RIDGES:
        error = 0.0
        for fitted in (is_second, ~is_second):
            for s, w, f in slots.values():
                s_f_w = s[fitted].reshape(-1, 12), f[fitted].reshape(-1, 12), w[fitted].ravel()
                M, c, _ = direct_map(*s_f_w, ridge, RANK)
                error += (w[~fitted] * np.square(f[~fitted] - s[~fitted] @ M - c).sum(-1)).sum()
        errors.append(error)
    ridge = RIDGES[int(np.argmin(errors))]
    direct = [(s.reshape(-1, 12), f.reshape(-1, 12), w.ravel(), ridge) for s, w, f in slots.values()]
    ranks = (RANK,) * 5
    if scope == "static":
        energies = [direct_map(*one, 12)[2] for one in direct]
        possible = [each for each in product(range(7), repeat=3) if sum(each) <= RANK * 3 and 5 not in each]
        ranks = max(possible, key=lambda each: sum(e[:r].sum() for e, r in zip(energies, each, strict=True)))
    assert layer.plan.ranks == ranks
    order = sorted(range(len(ranks)), key=lambda place: -ranks[place])
    constants = dict(zip(order, layer.surrogate[-len(ranks) :].double().numpy(), strict=True))
    rows = dict(zip(order, np.cumsum([ranks[place] for place in order]), strict=True))
    for place, (one, (s, _, f)) in enumerate(zip(direct, slots.values(), strict=True)):
        M, c, _ = direct_map(*one, ranks[place])
        some = slice(rows[place] - ranks[place], rows[place])
        found = (layer.low_rank_in[some].mT @ layer.low_rank_out[some]).double().numpy()
        np.testing.assert_allclose(s @ found + constants[place], s @ M + c, rtol=1e-3, atol=2e-4 * np.abs(f).max())


@pytest.mark.parametrize("scope", ["static", "input"])
@pytest.mark.parametrize("energy", [0.3, 0.6, 0.8])
def test_the_energy_decides_the_ranks(energy, scope, tmp_path, monkeypatch):
    """As few directions as hold this share of the squares of all maps' outputs, by the SVD of what maps fit."""
    monkeypatch.setattr(low_rank_module, "choose_ridge", lambda *_: (1e-2, 0.0))
    full, data = model_and_data(tmp_path, samples=60)
    with behind_a_pruned_layer(full, data) as (stage, model):
        layer, _ = fit(
            stage, plan_of(scope, rank=None, energy=energy), Calibrated(torch.ones(5), torch.zeros(5, 2, 12)), 4
        )
        x = layer_inputs_and_outputs(model, LAST, data)[0]
    squares, outputs = [], observe(full.moe_layers[LAST], x).term_outputs.double().numpy()
    most = full.moe_layers[LAST].config.expert_width // 2
    for j in DROPPED if scope == "static" else range(5):
        s, w = slots_of(full.moe_layers[LAST], x, j)
        squares.append(direct_map(s.reshape(-1, 12), outputs[:, j].reshape(-1, 12), w.ravel(), 1e-2, 12)[2][:most])
    squares = np.stack(squares)
    if scope == "input":
        squares = squares.sum(0, keepdims=True)
    best = np.sort(squares.ravel())[::-1]
    count = np.argmax(best.cumsum() >= energy * best.sum()) + 1
    ranks = tuple((squares >= best[count - 1]).sum(1))
    assert layer.plan.ranks == (ranks if scope == "static" else ranks * 5)
    assert (layer.plan.rank, layer.plan.energy) == (math.ceil(np.mean(layer.plan.ranks)), None)


def test_no_other_map_of_the_rank_is_nearer():
    generator = torch.Generator().manual_seed(3)
    s, f = (torch.randn(80, size, generator=generator, dtype=torch.float64) for size in (6, 5))
    s, f = s - s.mean(0), f + s[:, :5] - (f + s[:, :5]).mean(0)
    ones = torch.tensor([80.0], dtype=torch.float64)
    power, cross = s.mT @ s, s.mT @ f
    moments = Moments(ones, s.mean(0)[None], f.mean(0)[None], power[None], cross[None], f.square().sum()[None])
    into, out_of, _ = reduced_rank(moments, 1e-12, 2)
    least = float((f - s @ into[0] @ out_of[0]).square().sum())
    for _ in range(50):
        A, B = (part + 0.05 * torch.randn(part.shape, generator=generator).double() for part in (into[0], out_of[0]))
        assert float((f - s @ A @ B).square().sum()) > least


@pytest.mark.parametrize(("width", "rank"), [(20, 4), (80, 4), (200, 8)])
def test_leading_directions_are_those_of_an_eigendecomposition(width, rank):
    """By iteration where matrices are wide: what lies in the directions is what counts, not the vectors."""
    generator = torch.Generator().manual_seed(width)
    roots = torch.randn(3, width, width, generator=generator, dtype=torch.float64) * 0.8 ** torch.arange(width)
    matrices = roots @ roots.mT
    found = leading_directions(matrices, rank)
    assert found.shape == (3, width, rank)
    torch.testing.assert_close(found.mT @ found, torch.eye(rank).double().expand(3, -1, -1))
    held = (found.mT @ matrices @ found).diagonal(dim1=1, dim2=2).sum(1)
    best = torch.linalg.eigvalsh(matrices)[:, -rank:].sum(1)
    torch.testing.assert_close(held, best, rtol=1e-4, atol=0)


def test_an_expert_without_any_weight_gets_finite_maps():
    empty = Moments(
        *(torch.zeros(shape, dtype=torch.float64) for shape in ((2,), (2, 4), (2, 3), (2, 4, 4), (2, 4, 3), (2,)))
    )
    into, out_of, energies = reduced_rank(empty.centred(), 1e-3, 2)
    assert energies.isfinite().all()
    assert into.isfinite().all()
    assert out_of.isfinite().all()


def test_one_input_is_fitted(tmp_path):
    full, data = model_and_data(tmp_path, samples=1)
    pruned = moeprune.prune(full, keep=2, compensate="low-rank", rank=2, data=data, runtime=CPU)
    x, _ = next(data.batches(1))
    assert pruned(x).isfinite().all()


def test_maps_do_not_depend_on_the_number_of_experts_fitted_at_once(tmp_path, monkeypatch):
    full, data = model_and_data(tmp_path, samples=40)
    layers = []
    for chunk in (16, 5, 5):
        monkeypatch.setattr(low_rank_module, "CHOOSING", chunk)
        choice = {"keep": 2, "scope": "input", "compensate": "low-rank", "rank": 2}
        layers.append(moeprune.prune(full, **choice, data=data, runtime=CPU).moe_layers[LAST])
    for name, tensor in layers[0].state_dict().items():
        torch.testing.assert_close(layers[1].state_dict()[name], tensor)


@pytest.mark.slow
def test_a_higher_rank_leaves_less_error_and_beats_affine(single):
    full = moeprune.load(single)
    data = moeprune.open_data("digits:calibration", full.input_format, limit=400)
    errors = []
    for choice in ({"compensate": "affine"}, *({"compensate": "low-rank", "rank": rank} for rank in (1, 2, 4))):
        pruned = moeprune.prune(full, keep="1/32", signal="combine", **choice, data=data, runtime=CPU)
        errors.append(output_error(pruned, full, "blocks.0.soft_moe", data))
    assert errors[1] < 0.1 * errors[0]
    assert max(errors[2:]) < 1.01 * errors[1]  # few directions hold nearly everything here


def test_without_kept_experts_maps_do_all():
    dense = dense_layer()
    layer = prune_layer(dense, plan_of(k=0), Calibrated(None, surrogates()))
    maps = random_maps(layer)
    x = inputs()
    expected = reference_layer(x, dense.state_dict(), *router(dense), [()] * 4, "low-rank", surrogates(), low_rank=maps)
    assert relative_error(layer(x), expected) < 1e-10


def test_ranks_are_few_different_ones_and_no_direction_without_energy_is_taken():
    """Steps of the ladder by the energy of their directions, as many as the mean rank allows."""
    generator = torch.Generator().manual_seed(2)
    energies = torch.rand(40, 48, generator=generator, dtype=torch.float64) * 10.0 ** -torch.arange(40)[:, None]
    energies = energies.sort(dim=1, descending=True).values
    plan = LayerPlan("static", 0, 40, "combine", "low-rank", (), rank=12)
    ranks = decided_ranks(plan, energies)
    assert set(ranks) <= {0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48}
    assert ranks == tuple(sorted(ranks, reverse=True))
    assert 0 < sum(ranks) < 12 * 40  # the others hold less than a millionth
    assert not any(ranks[8:])
    few = decided_ranks(plan.replace(rank=1), energies)
    assert sum(few) <= 40
    assert few[0] >= few[1]
