import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

import moeprune
from moeprune.calibration.ridge import GAIN_KEPT, LAMBDAS, Equations, solve_held_out
from moeprune.layers.experts import combine_mass
from moeprune.layers.observation import Observation
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LayerPlan
from moeprune.pruning import compensation as compensation_module
from moeprune.pruning.compensation import Stream, gather, refit_kept, regress, regress_static
from tests.reference import observe_layers, replace
from tests.test_calibration import layer_inputs_and_outputs, two_layer_model, write_inputs

CPU = moeprune.Runtime(device="cpu")
FIRST, LAST = "blocks.0.soft_moe", "blocks.1.soft_moe"


def halves(regressors: np.ndarray, targets: np.ndarray) -> list[Equations]:
    """The normal equations of the even and of the odd rows."""
    rows = [(torch.from_numpy(regressors[half::2]), torch.from_numpy(targets[half::2])) for half in (0, 1)]
    return [Equations(R.mT @ R, R.mT @ T) for R, T in rows]


def column_scale(R: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(R, axis=0)
    return np.maximum(norms, 0.01 * norms.max())


def direct_ridge(R: np.ndarray, T: np.ndarray, ridge: float, scale: np.ndarray) -> np.ndarray:
    """argmin over V of |T - R·V|² + ridge·|scale·V|², by least squares on the rows themselves."""
    rows = np.vstack([R / scale, np.sqrt(ridge) * np.eye(R.shape[1])])
    goals = np.vstack([T, np.zeros((R.shape[1], T.shape[1]))])
    return np.linalg.lstsq(rows, goals, rcond=None)[0] / scale[:, None]


def problem(rows: int, slots: int, dim: int, noise: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Regressors of very different strength, coefficients, and noisy targets."""
    rng = np.random.default_rng(seed)
    R = rng.normal(size=(rows, slots)) * 10.0 ** rng.uniform(-1, 1, size=slots)
    V = rng.normal(size=(slots, dim))
    return R, V, R @ V + noise * rng.normal(size=(rows, dim))


def test_noiseless_linear_targets_are_met_but_for_what_a_stronger_ridge_may_cost():
    R, _, T = problem(rows=200, slots=8, dim=3, noise=0)
    missed = np.square(R @ solve_held_out(*halves(R, T)).numpy() - T).sum() / np.square(T).sum()
    assert missed < 1.5 * (1 - GAIN_KEPT)


def test_noise_is_not_fitted():
    R, _, _ = problem(rows=100, slots=30, dim=5, noise=0)
    T = np.random.default_rng(1).normal(size=(100, 5))
    fitted = R @ solve_held_out(*halves(R, T)).numpy()
    overfitted = R @ np.linalg.lstsq(R, T, rcond=None)[0]
    assert np.linalg.norm(overfitted) > 0.4 * np.linalg.norm(T)
    assert np.linalg.norm(fitted) < 0.02 * np.linalg.norm(T)


def test_nothing_is_added_where_every_ridge_does_harm():
    """What one half says of the targets is the opposite of what the other says, and stronger."""
    R = np.repeat(problem(rows=50, slots=6, dim=2, noise=0)[0], 2, axis=0)
    T = R @ np.ones((6, 2)) * np.tile([1.0, -0.5], 50)[:, None]
    assert torch.equal(solve_held_out(*halves(R, T)), torch.zeros(6, 2, dtype=torch.float64))


@pytest.mark.parametrize("noise", [6.0, 10.0, 14.0])
def test_ridge_and_its_strength_equal_those_of_a_direct_solution(noise):
    R, _, T = problem(rows=80, slots=30, dim=4, noise=noise)
    scale = column_scale(R)
    gains = []
    for ridge in LAMBDAS:
        error = 0.0
        for half in (0, 1):
            V = direct_ridge(R[half::2], T[half::2], ridge / 2, scale)
            error += np.square(T[1 - half :: 2] - R[1 - half :: 2] @ V).sum()
        gains.append(np.square(T).sum() - error)
    enough = GAIN_KEPT * max(gains)
    strongest = max(ridge for ridge, gain in zip(LAMBDAS, gains, strict=True) if gain >= enough)
    assert LAMBDAS[0] < strongest < LAMBDAS[-1]
    assert max(gains) > 0
    expected = direct_ridge(R, T, strongest, scale)
    np.testing.assert_allclose(solve_held_out(*halves(R, T)).numpy(), expected, rtol=1e-7, atol=1e-9)


def test_slot_without_any_weight_gets_nothing_and_changes_nothing():
    R, _, T = problem(rows=100, slots=6, dim=3, noise=1)
    found = solve_held_out(*halves(np.insert(R, 2, 0.0, axis=1), T)).numpy()
    assert not found[2].any()
    np.testing.assert_allclose(np.delete(found, 2, axis=0), solve_held_out(*halves(R, T)).numpy(), rtol=1e-9)


def test_only_slots_that_did_not_run_for_their_input_are_regressors():
    C = torch.rand(2, 3, 4, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    tokens = torch.zeros(2, 3, 5)
    chosen = torch.tensor([[0, 2], [1, 3]])
    observation = Observation(C, combine_mass(C), tokens, tokens, None, chosen, tokens)
    expected = C.clone()
    expected[0, :, [0, 2]] = 0
    expected[1, :, [1, 3]] = 0
    assert torch.equal(observation.regressors("lstsq"), expected.flatten(2))
    assert torch.equal(dataclasses.replace(observation, chosen=None).regressors("lstsq"), C.flatten(2))


@pytest.fixture(scope="module")
def calibrated(single):
    model = moeprune.load(single)
    data = moeprune.open_data("digits:calibration", model.input_format, limit=200)
    return model, data, moeprune.analyze(model, data, CPU)


def observed(model, name, data) -> Observation:
    """One layer's observations of all inputs."""
    seen: list[Observation] = []
    for inputs, _ in data.batches(64):
        observe_layers(model, [name], lambda _, observation: seen.append(observation), inputs, CPU)
    parts = {
        field.name: torch.cat([getattr(one, field.name) for one in seen])
        for field in dataclasses.fields(seen[0])
        if isinstance(getattr(seen[0], field.name), Tensor)
    }
    return dataclasses.replace(seen[0], **parts)


def output_error(pruned: SoftMoEViT, full: SoftMoEViT, name: str, data) -> float:
    """Mean squared change of a layer's output, as a share of the output's own square."""
    found, expected = (layer_inputs_and_outputs(model, name, data)[1].double() for model in (pruned, full))
    return float((found - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("scope", ["static", "input", "batch"])
def test_each_compensation_leaves_less_error_than_the_one_before(scope, calibrated):
    model, data, analysis = calibrated
    errors = {}
    for compensate in ("none", "mean", "lstsq", "affine", *(("refit",) if scope == "static" else ())):
        choice = {"keep": "1/16", "scope": scope, "compensate": compensate}
        pruned = moeprune.prune(model, analysis, **choice, data=data, runtime=CPU)
        errors[compensate] = output_error(pruned, model, FIRST, data)
    assert errors["affine"] < errors["lstsq"] < errors["mean"] < errors["none"]
    assert errors.get("refit", 0) <= errors["affine"]


@pytest.mark.parametrize("compensate", ["none", "mean", "lstsq", "affine"])
def test_the_set_that_the_gram_matrix_chooses_leaves_less_error(compensate, calibrated):
    model, data, _ = calibrated
    errors = []
    for signal in ("gram", "combine", "deviation"):
        choice = {"keep": "1/16", "signal": signal, "compensate": compensate}
        pruned = moeprune.prune(model, **choice, data=data, runtime=CPU)
        errors.append(output_error(pruned, model, FIRST, data))
    assert errors[0] < min(errors[1:])


def test_lstsq_repairs_what_earlier_pruned_layers_broke(vit):
    model = moeprune.load(vit)
    data = moeprune.open_data("pairs:calibration", model.input_format, limit=300)
    last, runtime = list(model.moe_layers)[-1], moeprune.Runtime(device="cpu", batch_size=150)
    errors = []
    for compensate in ("mean", "lstsq"):
        pruned = moeprune.prune(model, keep="1/8", compensate=compensate, data=data, runtime=runtime)
        errors.append(output_error(pruned, model, last, data))
    assert errors[1] < errors[0]


def behind_a_pruned_layer(tmp_path, scope=None, kind="mlp") -> tuple[SoftMoEViT, SoftMoEViT, object]:
    """An unpruned model; the same behind a pruned first layer, the last one dense or, in a scope, pruned
    with surrogates of zero; and their data.
    """
    full = two_layer_model(kind=kind)
    data = moeprune.open_data(write_inputs(tmp_path / "a.npz", None, samples=90), full.input_format)
    pruned = moeprune.prune(full, keep=1, scope=scope or "static", compensate="mean", data=data, runtime=CPU)
    if scope is None:
        pruned.set_submodule(LAST, full.get_submodule(LAST))
    else:
        pruned.get_submodule(LAST).surrogate.zero_()
    assert output_error(pruned, full, FIRST, data) > 1e-4
    return full, pruned, data


def corrected(scope, compensation, full, pruned, data, runtime) -> Tensor:
    """The correction of the last layer; with scope static experts 1 and 3 are kept."""
    stream = Stream(pruned, full, LAST, data, runtime)
    if scope == "input":
        return regress(stream, compensation)[0]
    moments, sums = gather(stream, compensation)
    no_means = replace(moments, term_mean=torch.zeros_like(moments.term_mean))  # so that there is much to correct
    return regress_static(no_means, sums, LayerPlan("static", 2, 5, "combine", compensation, (1, 3)))[0]


def rows_and_kinds(seen: Observation, weights: Tensor, compensation: str) -> tuple[np.ndarray, list[int]]:
    """The regressors, and how many there are of each kind."""
    columns = [weights.flatten(2)]
    if compensation == "affine":
        mean = seen.tokens.mean(1, keepdim=True).expand_as(seen.tokens)
        columns += [seen.tokens, mean, torch.ones_like(mean[..., :1])]
    return torch.cat(columns, 2).flatten(0, 1).double().numpy(), [part.shape[2] for part in columns]


def nearest_ridge(R: np.ndarray, T: np.ndarray, kinds: list[int], correction: Tensor) -> float:
    """How far a correction is from the nearest ridge regression with one of the LAMBDAS."""
    scale = np.concatenate([column_scale(part) for part in np.split(R, np.cumsum(kinds)[:-1], axis=1)])
    ridges = [direct_ridge(R, T, ridge, scale) for ridge in LAMBDAS]
    V = correction.double().numpy()
    assert np.linalg.norm(R @ V) > 0.1 * np.linalg.norm(T)
    return min(np.linalg.norm(R @ (ridge - V)) / np.linalg.norm(R @ ridge) for ridge in ridges)


@pytest.mark.parametrize("compensation", ["lstsq", "affine"])
@pytest.mark.parametrize("scope", ["static", "input"])
def test_correction_is_a_ridge_from_the_pruned_model_to_the_unpruned_outputs(scope, compensation, tmp_path):
    """The layer before it is pruned too: the targets hold what that one broke."""
    full, pruned, data = behind_a_pruned_layer(tmp_path, None if scope == "static" else scope)
    correction = corrected(scope, compensation, full, pruned, data, CPU)
    before, target = observed(pruned, LAST, data), observed(full, LAST, data).output
    missing, weights = target - before.output, before.weights.clone()
    if scope == "static":
        dropped = torch.einsum("bmnp,bnpd->bmnd", weights, before.term_outputs)[:, :, [0, 2, 4]].sum(2)
        missing, weights = missing + dropped, weights[:, :, [1, 3, 0, 2, 4]]
    else:
        for i, experts in enumerate(before.chosen.tolist()):
            weights[i, :, experts] = 0
    R, kinds = rows_and_kinds(before, weights, compensation)
    assert nearest_ridge(R, missing.flatten(0, 1).double().numpy(), kinds, correction) < 1e-4


@pytest.mark.parametrize("kind", ["mlp", "geglu", "linear"])
def test_refit_is_a_ridge_on_what_the_last_linears_of_kept_experts_take(kind, tmp_path):
    full, pruned, data = behind_a_pruned_layer(tmp_path, kind=kind)
    plan = LayerPlan("static", 2, 5, "combine", "refit", (1, 3))
    layer = prune_layer(full.get_submodule(LAST), plan, Calibrated(None, torch.zeros(5, 2, 12)))
    pruned.set_submodule(LAST, layer)
    before, target = observed(pruned, LAST, data), observed(full, LAST, data).output
    weight = layer.fc2_weight.clone()
    hidden = before.slot_inputs  # the plain way to what the last linear takes
    if kind != "linear":
        hidden = torch.einsum("bkpd,kdh->bkph", hidden, layer.fc1_weight) + layer.fc1_bias[:, None]
        halves = hidden.chunk(2, -1) if kind == "geglu" else (1, hidden)
        hidden = halves[0] * torch.nn.functional.gelu(halves[1])
    of_experts = torch.einsum("bmkp,bkph->bmkh", before.weights[:, :, :2], hidden).flatten(2)
    R, kinds = rows_and_kinds(before, before.weights, "affine")
    R = np.concatenate([of_experts.flatten(0, 1).double().numpy(), R], axis=1)
    T = (target - before.output).flatten(0, 1).double().numpy()
    refit_kept(Stream(pruned, full, LAST, data, CPU))
    change = (layer.fc2_weight - weight).mT.flatten(0, 1)
    affine = [layer.affine_token, layer.affine_mean, layer.affine_bias[None]]
    correction = torch.cat([change, layer.surrogate.flatten(0, 1), *affine])
    assert nearest_ridge(R, T, [of_experts.shape[2], *kinds], correction) < 1e-4
    assert output_error(pruned, full, LAST, data) < 0.5 * float((T**2).sum() / (target**2).sum())


def test_a_refit_that_is_too_large_is_refused_before_any_pass(calibrated, monkeypatch):
    model, data, _ = calibrated
    monkeypatch.setattr(compensation_module, "MAX_REGRESSORS", 300)
    message = r"would take 449 regressors: 64 experts of width 4 are kept; at most 300 are possible"
    with pytest.raises(moeprune.MoepruneError, match=message):
        moeprune.prune(model, keep=64, compensate="refit", data=data, runtime=CPU)


@pytest.mark.parametrize("scope", ["static", "input"])
def test_correction_does_not_depend_on_the_batch_size(scope, tmp_path):
    full, pruned, data = behind_a_pruned_layer(tmp_path, None if scope == "static" else scope)
    runtimes = (moeprune.Runtime("cpu", batch_size=size) for size in (1, 64))
    first, second = (corrected(scope, "affine", full, pruned, data, runtime) for runtime in runtimes)
    assert float((first - second).norm() / second.norm()) < 1e-3


def test_surrogates_of_a_layer_are_its_means_behind_the_pruned_layers_before_it(tmp_path):
    full = two_layer_model()
    data = moeprune.open_data(write_inputs(tmp_path / "a.npz", None), full.input_format)
    pruned = moeprune.prune(full, keep=1, scope="input", compensate="mean", data=data, runtime=CPU)
    means = {}
    for what, first in (("pruned", pruned.blocks[0].soft_moe), ("full", full.blocks[0].soft_moe)):
        model = two_layer_model()  # its last layer is dense
        model.set_submodule(FIRST, first)
        seen = observed(model, LAST, data)
        weight = seen.weights.double().sum(1)[..., None]
        means[what] = (weight * seen.term_outputs).sum(0) / weight.sum(0)
    found = pruned.blocks[1].soft_moe.surrogate.double()
    torch.testing.assert_close(found, means["pruned"], rtol=1e-5, atol=1e-6)
    assert float((found - means["full"]).abs().max()) > 1e-3


def test_scope_input_corrects_only_dropped_columns(calibrated):
    """With one set for all inputs (signal random) the surrogates of the kept experts stay the means."""
    model, data, analysis = calibrated
    choice = {"keep": 96, "scope": "input", "signal": "random", "compensate": "lstsq"}
    pruned = moeprune.prune(model, analysis, **choice, data=data, runtime=CPU)
    [(name, layer)] = pruned.moe_layers.items()
    chosen = observed(pruned, name, data).chosen
    kept = chosen[0].tolist()
    assert (chosen == chosen[0]).all()
    mean = analysis.layers[name].term_mean
    assert torch.equal(layer.surrogate[kept], mean[kept])
    dropped = sorted(set(range(128)) - set(kept))
    assert ((layer.surrogate - mean)[dropped].abs().amax((1, 2)) > 0).all()


def test_static_lstsq_may_correct_kept_slots_and_mean_does_not(calibrated):
    model, data, analysis = calibrated
    for compensate, corrects in (("mean", False), ("lstsq", True)):
        pruned = moeprune.prune(model, analysis, keep=8, compensate=compensate, data=data, runtime=CPU)
        [layer] = pruned.moe_layers.values()
        assert bool(layer.surrogate[:8].any()) == corrects


def test_lstsq_reads_the_data_of_the_analysis_where_none_is_given(calibrated):
    model, data, analysis = calibrated
    given = moeprune.prune(model, analysis, keep=8, compensate="lstsq", data=data, runtime=CPU)
    found = moeprune.prune(model, analysis, keep=8, compensate="lstsq", runtime=CPU)
    for name, tensor in given.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


def test_lstsq_refuses_other_data_than_that_of_the_analysis(calibrated):
    model, _, analysis = calibrated
    other = moeprune.open_data("digits:calibration", model.input_format, limit=64)
    with pytest.raises(moeprune.MoepruneError, match="not the data of the analysis"):
        moeprune.prune(model, analysis, keep=8, compensate="lstsq", data=other, runtime=CPU)
