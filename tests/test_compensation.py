"""Compensations that regressions on data find, against regressions on the rows themselves."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

import moeprune
from moeprune.calibration import walk as walk_module
from moeprune.calibration.sums import half_of
from moeprune.calibration.walk import Stage, Walk
from moeprune.layers.experts import combine_mass
from moeprune.layers.observation import Observation
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.model import private_copy
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LOW_RANK, LayerPlan
from moeprune.pruning import compensation as compensation_module
from moeprune.pruning.compensation import fit, regress
from tests.reference import observe_layers
from tests.test_calibration import layer_inputs_and_outputs, two_layer_model, write_inputs
from tests.test_ridge import direct_ridge, scale_of_kinds
from tests.test_sums import rows_of

CPU = moeprune.Runtime(device="cpu")
FIRST, LAST = "blocks.0.soft_moe", "blocks.1.soft_moe"
STATIC = ("lstsq", "affine", "refit", "renorm-refit", "linear")
WAYS = [*(("static", name, "mlp") for name in STATIC), ("input", "lstsq", "mlp"), ("input", "affine", "mlp"),
        *((scope, name, kind) for scope, name in (("static", "refit"), ("static", "renorm-refit"))
          for kind in ("geglu", "linear"))]  # fmt: skip


def test_only_slots_that_did_not_run_for_their_input_are_regressors():
    C = torch.rand(2, 3, 4, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    tokens = torch.zeros(2, 3, 5)
    chosen = torch.tensor([[0, 2], [1, 3]])
    observation = Observation(C, combine_mass(C), tokens, tokens, None, chosen, tokens)
    expected = C.clone()
    expected[0, :, [0, 2]] = 0
    expected[1, :, [1, 3]] = 0
    assert torch.equal(observation.term_weights(), expected.flatten(2))
    assert torch.equal(dataclasses.replace(observation, chosen=None).term_weights(), C.flatten(2))


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


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("scope", ["static", "input", "batch"])
def test_each_compensation_leaves_less_error_than_the_one_before(scope, calibrated):
    model, data, analysis = calibrated
    others = ("refit", "renorm", "renorm-refit", "linear") if scope == "static" else ()
    errors = {}
    for compensate in ("none", "mean", "lstsq", "affine", *LOW_RANK, *others):
        choice = {"keep": "1/16", "scope": scope, "signal": "combine", "compensate": compensate}
        if compensate == "linear":
            choice = {"plan": {FIRST: LayerPlan("static", 0, 128, "combine", "linear")}}
        pruned = moeprune.prune(model, analysis, **choice, data=data, runtime=CPU)
        errors[compensate] = output_error(pruned, model, FIRST, data)
    assert (
        errors["low-rank"]
        < errors["low-rank-lstsq"]
        < errors["affine"]
        < errors["lstsq"]
        < errors["mean"]
        < errors["none"]
    )
    if scope == "static":
        assert errors["refit"] <= errors["affine"] < errors["linear"] < errors["none"]
        assert errors["renorm-refit"] < errors["renorm"]


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("compensate", ["none", "mean", "lstsq", "affine"])
def test_the_set_that_the_gram_matrix_chooses_leaves_less_error(compensate, calibrated):
    model, data, _ = calibrated
    errors = []
    for signal in ("gram", "combine", "deviation"):
        choice = {"keep": "1/16", "signal": signal, "compensate": compensate}
        pruned = moeprune.prune(model, **choice, data=data, runtime=CPU)
        errors.append(output_error(pruned, model, FIRST, data))
    assert errors[0] < min(errors[1:])


@pytest.mark.slow
def test_lstsq_repairs_what_earlier_pruned_layers_broke(vit):
    model = moeprune.load(vit)
    data = moeprune.open_data("pairs:calibration", model.input_format, limit=300)
    runtime, errors = moeprune.Runtime(device="cpu", batch_size=150), []
    images = torch.cat([inputs for inputs, _ in data.batches(150)])
    for compensate in ("mean", "lstsq"):
        choice = {"keep": "1/8", "signal": "combine", "compensate": compensate}
        pruned = moeprune.prune(model, **choice, data=data, runtime=runtime)
        errors.append(float((pruned(images) - model(images)).norm()))
    assert errors[1] < errors[0]


# --- against the rows
def model_and_data(tmp_path, kind="mlp", samples=90) -> tuple[SoftMoEViT, object]:
    full = two_layer_model(kind=kind)
    return full, moeprune.open_data(write_inputs(tmp_path / "a.npz", None, samples), full.input_format)


@contextmanager
def behind_a_pruned_layer(full, data, runtime=CPU) -> Iterator[tuple[Stage, SoftMoEViT]]:
    """The last layer behind a first one of one expert, and the model that this layer is in."""
    models = private_copy(full), private_copy(full)
    with Walk(*models, data, runtime) as walk:
        first = walk.reach(FIRST)
        plan = LayerPlan("static", 1, 5, "combine", "mean", (1,))
        models[1].set_submodule(FIRST, prune_layer(first.layer, plan, Calibrated(None, first.moments.term_mean)))
        yield walk.reach(LAST, with_stream=True), models[1]


def block_outputs(model, data) -> Tensor:
    """What the last block gives, to whose stream the last layer adds."""
    seen: list[Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda _, args, output: seen.append(output))
    for inputs, _ in data.batches(64):
        model(inputs)
    handle.remove()
    return torch.cat(seen).double()


def plan_of(scope: str, compensation: str) -> LayerPlan:
    k = 0 if compensation == "linear" else 2
    kept = None if scope == "input" else (1, 3)[:k]
    return LayerPlan(scope, k, 5, "combine", compensation, kept, rank=2 if compensation in LOW_RANK else None)


def by_half(part: Tensor) -> list[np.ndarray]:
    """Rows (b,m,…) of either half of the inputs, flat."""
    is_second = half_of(0, len(part)) == 1
    return [part[which].flatten(0, 1).numpy() for which in (~is_second, is_second)]


MEANS = Calibrated(None, torch.zeros(5, 2, 12))  # none, so that there is much to correct


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(("scope", "compensation", "kind"), WAYS)
def test_a_fit_is_a_ridge_on_the_rows_from_the_pruned_model_to_the_unpruned_stream(scope, compensation, kind, tmp_path):
    """The layer before it is pruned too: the targets hold what that one broke, in this layer's input and beside it."""
    full, data = model_and_data(tmp_path, kind)
    plan = plan_of(scope, compensation)
    with behind_a_pruned_layer(full, data) as (stage, model):
        layer = prune_layer(stage.layer, plan, MEANS)
        found, _ = regress(stage, layer)
        fitted, quality = fit(stage, plan, MEANS, tokens=4)
        x, dense = layer_inputs_and_outputs(model, LAST, data)
        output = layer_inputs_and_outputs(full, LAST, data)[1].double()
        target = block_outputs(full, data) - (block_outputs(model, data) - dense)
    seen = []
    layer.observer = seen.append
    before = layer(x).double()
    chosen = None if scope == "static" else seen[0].chosen.tolist()
    rows, missing, own = rows_of(layer, x, chosen=chosen), target - before, output - before
    R, T, kinds = rows.flatten(0, 1).numpy(), missing.flatten(0, 1).numpy(), [*layer.regressor_kinds().values()]
    ridges, scale = found.ridges.numpy(), scale_of_kinds(R, kinds)
    expected = R @ direct_ridge(R, T, ridges, scale)
    assert np.linalg.norm(expected) > 0.1 * np.linalg.norm(T)
    assert np.linalg.norm(R @ found.solution.numpy() - expected) < 1e-4 * np.linalg.norm(expected)
    added = (fitted(x).double() - before).flatten(0, 1).numpy()
    assert np.linalg.norm(added - expected) < 1e-4 * np.linalg.norm(expected)
    halves = [*zip(by_half(rows), by_half(missing), by_half(own), strict=True)]
    fits = [direct_ridge(r, t, ridges / 2, scale) for r, t, _ in halves]
    for error, order in ((quality.fitted_error, fits), (quality.held_out_error, fits[::-1])):
        errors = sum(np.square(t - r @ V).sum() for (r, _, t), V in zip(halves, order, strict=True))
        assert error == pytest.approx(errors / float(output.square().sum()), rel=1e-4)
    assert (quality.samples, quality.regressors) == (90, R.shape[1])


def test_lambdas_are_for_hidden_units_biases_terms_and_what_depends_on_tokens(tmp_path):
    full, data = model_and_data(tmp_path)
    groups = {}
    with behind_a_pruned_layer(full, data) as (stage, _):
        for compensation in ("refit", "renorm-refit", "affine", "lstsq", "linear"):
            layer = prune_layer(stage.layer, plan_of("static", compensation), MEANS)
            parts = regress(stage, layer)[0].ridges.split([*layer.regressor_kinds().values()])
            groups[compensation] = {kind: part.unique().tolist()
                                    for kind, part in zip(layer.regressor_kinds(), parts, strict=True)}  # fmt: skip
    for kinds in groups.values():
        assert all(len(ridges) == 1 for ridges in kinds.values())
        assert kinds.get("token") == kinds.get("mean") == kinds.get("one")
    assert groups["refit"].keys() == {"hidden", "terms", "token", "mean", "one"}
    assert groups["renorm-refit"].keys() == {"hidden", "bias"}


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("compensation", [*STATIC, *LOW_RANK, "input"])
def test_a_fit_does_not_depend_on_the_batch_size(compensation, tmp_path):
    full, data = model_and_data(tmp_path, samples=40)
    plan, outputs = plan_of("input", "affine") if compensation == "input" else plan_of("static", compensation), []
    for size in (1, 17, 64):
        with behind_a_pruned_layer(full, data, moeprune.Runtime("cpu", batch_size=size)) as (stage, model):
            layer, _ = fit(stage, plan, MEANS, tokens=4)
            x = layer_inputs_and_outputs(model, LAST, data)[0]
            outputs.append(layer(x))
            count = len(stage.halts)
        assert count == {1: 40, 17: 3, 64: 1}[size]
    assert float((outputs[0] - outputs[2]).norm() / outputs[2].norm()) < 1e-3
    assert float((outputs[1] - outputs[2]).norm() / outputs[2].norm()) < 1e-3


@pytest.mark.parametrize("kind", ["mlp", "geglu", "linear"])
def test_refit_leaves_less_than_half_of_the_error_and_with_the_stream_less_of_what_that_lacks(
    kind, tmp_path, monkeypatch
):
    full, data = model_and_data(tmp_path, kind, samples=400)
    layers, errors, lacking = [], [], []
    for has_stream in (True, False):
        with behind_a_pruned_layer(full, data) as (stage, model):
            assert stage.has_stream == has_stream
            layers.append(fit(stage, plan_of("static", "refit"), MEANS, tokens=4)[0])
        monkeypatch.setattr(walk_module, "factor_of_stream", lambda *_: None)
    for layer in (prune_layer(stage.layer, plan_of("static", "refit"), MEANS), *layers):
        model.set_submodule(LAST, layer)
        errors.append(output_error(model, full, LAST, data))
        lacking.append(float((block_outputs(model, data) - block_outputs(full, data)).square().sum()))
    assert errors[2] < 0.5 * errors[0]
    assert lacking[1] < 0.9 * lacking[2] < 0.9 * lacking[0]


@pytest.mark.parametrize(("compensate", "regressors"), [("refit", 449), ("renorm-refit", 320)])
def test_a_refit_that_is_too_large_is_refused_before_any_pass(compensate, regressors, calibrated, monkeypatch):
    model, data, _ = calibrated
    monkeypatch.setattr(compensation_module, "MAX_REGRESSORS", 200)
    message = rf"would take {regressors} regressors: 64 experts of width 4 are kept; at most 200 are possible"
    with pytest.raises(moeprune.MoepruneError, match=message):
        moeprune.prune(model, keep=64, compensate=compensate, data=data, runtime=CPU)


def test_surrogates_of_a_layer_are_its_means_behind_the_pruned_layers_before_it(tmp_path):
    full, data = model_and_data(tmp_path, samples=23)
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
