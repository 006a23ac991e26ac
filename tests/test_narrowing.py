"""Compensation in few directions, against the formulas, and on the command line."""

import json

import pytest
import torch

import moeprune
from moeprune.plan import NARROWED
from tests.reference import observe_layers, reference_layer, reference_mass

CPU = moeprune.Runtime("cpu", batch_size=64)
LAYER = "blocks.0.soft_moe"
WAYS = [*(("static", way) for way in NARROWED), ("input", "lstsq"), ("input", "affine")]


@pytest.fixture(scope="module")
def pruned(single):
    """For each way a model with its compensation in full and one in the directions of an energy of 0.9."""
    full = moeprune.load(single)
    data = moeprune.open_data("digits:calibration", full.input_format, limit=150)
    analysis = moeprune.analyze(full, data, CPU)

    def prune(scope, compensate, energy):
        choice = {"keep": "1/16", "scope": scope, "signal": "combine", "compensate": compensate, "energy": energy}
        return moeprune.prune(full, analysis, **choice, data=data, runtime=CPU)

    return data, {way: (prune(*way, None), prune(*way, 0.9)) for way in WAYS}


def layer_of(model):
    return model.moe_layers[LAYER]


def added(layer) -> torch.Tensor:
    parts = [layer.surrogate.flatten(0, 1)]
    if layer.plan.has_affine:
        parts += [layer.affine_token, layer.affine_mean, layer.affine_bias[None]]
    return torch.cat(parts).double()


def regressors(seen, has_affine: bool) -> torch.Tensor:
    """What is multiplied by the rows of `added`; terms that ran for their input have no weights."""
    weights = seen.weights.clone()
    for of_input, experts in zip(weights, () if seen.chosen is None else seen.chosen.tolist(), strict=False):
        of_input[:, experts] = 0
    mean = seen.tokens.mean(1, keepdim=True).expand_as(seen.tokens)
    of_tokens = [seen.tokens, mean, torch.ones_like(mean[..., :1])]
    return torch.cat([weights.flatten(2), *(of_tokens if has_affine else ())], 2)


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_the_rank_is_the_least_that_holds_the_energy_and_no_other_of_that_rank_is_nearer(way, pruned):
    data, models = pruned
    full, narrow = (layer_of(model) for model in models[way])
    seen = []
    for inputs, _ in data.batches(50):
        observe_layers(models[way][0], [LAYER], lambda _, one: seen.append(one), inputs, CPU)
    z = torch.cat([regressors(one, full.plan.has_affine) for one in seen]).flatten(0, 1).double()
    given = z @ added(full)
    singular = torch.linalg.svdvals(given)
    left = (given - z @ added(narrow) @ narrow.basis.double()).square().sum()
    rank = narrow.plan.rank
    assert narrow.basis.shape == (rank, 32)
    assert left == pytest.approx(float(singular[rank:].square().sum()), rel=1e-3)
    assert singular[:rank].square().sum() >= 0.9 * singular.square().sum()
    assert singular[: rank - 1].square().sum() < 0.9 * singular.square().sum()


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_layer_with_few_directions_computes_their_product(way, pruned, single):
    layer = layer_of(pruned[1][way][1])
    dense = dict(layer_of(moeprune.load(single)).named_parameters())
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    if way[0] == "static":
        kept = [layer.plan.kept] * 2
        for name in ("fc2_weight", "fc2_bias"):  # refit changes them
            dense[name] = dense[name].clone()
            dense[name][list(layer.plan.kept)] = getattr(layer, name)
        place = torch.tensor(layer.plan.columns).argsort()
    else:
        masses = reference_mass(x, dense, "l2", layer.config.dispatch_input)
        kept = [sorted(range(128), key=lambda j, mass=mass: -mass[j])[: layer.plan.k] for mass in masses]
        place = torch.arange(128)
    stand_ins = (layer.surrogate.double() @ layer.basis.double())[place]
    affine = {}
    if layer.plan.has_affine:
        affine = {f"affine_{part}": getattr(layer, f"affine_{part}").double() @ layer.basis.double()
                  for part in ("token", "mean", "bias")}  # fmt: skip
    expected = reference_layer(
        x, dense, "l2", layer.config.dispatch_input, kept, "affine", stand_ins, way[0] == "static", affine
    )
    assert (layer(x).double() - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_few_directions_cost_less_and_change_little(way, pruned):
    data, models = pruned
    full, narrow = (moeprune.evaluate(model, data, runtime=CPU).model for model in models[way])
    for figure in ("flops_per_input", "bytes_by_part"):
        assert getattr(narrow, figure).compensation < getattr(full, figure).compensation
        assert getattr(narrow, figure).experts == getattr(full, figure).experts
    assert narrow.accuracy > full.accuracy - 0.05


def test_where_the_products_are_no_cheaper_all_directions_stay(single):
    full = moeprune.load(single)
    data = moeprune.open_data("digits:calibration", full.input_format, limit=60)
    found, expected = (
        moeprune.prune(full, keep="1/2", compensate="lstsq", energy=energy, data=data, runtime=CPU)
        for energy in (1 - 1e-9, None)
    )
    assert layer_of(found).plan == layer_of(expected).plan
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


@pytest.mark.slow
def test_few_directions_on_the_command_line(vit, vit_analysis, run, run_json, tmp_path):
    path, again, plan = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "plan.json"))
    call = f"prune {vit} --analysis {vit_analysis}"
    found = run_json(f"{call} --keep 4 --compensate affine --energy 0.9 -o {path} --save-plan {plan}")
    for layer in found["plan"].values():
        assert 1 <= layer["rank"] < 64
        assert layer["energy"] is None
    run_json(f"{call} --plan {plan} -o {again}")
    assert again.read_bytes() == path.read_bytes()
    assert run_json("eval", path, "--data", "pairs", "--limit", 100)["model"]["accuracy"] > 0.8
    assert "directions" in run("inspect", path).stdout
    text = json.loads(plan.read_text())
    text["plan"]["blocks.1.soft_moe"]["rank"] = 65
    plan.write_text(json.dumps(text))
    result = run(f"{call} --plan {plan} -o {again} --force")
    assert result.code == 2
    assert "has 64 directions of output, the plan has rank 65" in result.stderr
