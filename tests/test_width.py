"""Hidden units dropped by optimal brain surgeon, against brute force and least squares by NumPy."""

import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moeprune
from moeprune.calibration.sums import half_of
from moeprune.calibration.units import UnitMoments
from moeprune.demo.train import initialize
from moeprune.files.checkpoint import tensor_infos
from moeprune.layers.config import SoftMoEConfig, layer_from_json
from moeprune.layers.layer import new_layer
from moeprune.layers.soft_moe import SoftMoE
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.libraries.experts import resized
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LOW_RANK, LayerPlan
from moeprune.pruning import width as width_module
from moeprune.pruning.budgets import narrower_within
from moeprune.pruning.width import RIDGES, fewer_units, fit_units, units_left
from tests.reference import replace
from tests.test_calibration import layer_inputs_and_outputs, two_layer_model, write_inputs
from tests.test_compensation import FIRST, LAST, behind_a_pruned_layer, output_error
from tests.test_cost import counted
from tests.test_export import SHAPE, ours
from tests.test_sums import rows_of

CPU = moeprune.Runtime(device="cpu")
N, H, KEPT = 5, 6, (1, 3)
KINDS = [("mlp", True), ("mlp", False), ("geglu", True), ("geglu", False)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(kind: str = "mlp", bias: bool = True) -> SoftMoEViT:
    """Two Soft MoE layers of 5 experts with 6 hidden units."""
    blocks = [replace(block, soft_moe=replace(block.soft_moe, expert=kind, bias=bias))
              for block in two_layer_model().config.blocks]  # fmt: skip
    model = SoftMoEViT(two_layer_model().config.replace(blocks=tuple(blocks)))
    initialize(model, 4.0, 0.1, torch.Generator().manual_seed(0))
    for layer in model.moe_layers.values():
        for name in layer.config.expert_shapes(1):
            getattr(layer, name).data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.requires_grad_(False).eval()


@pytest.fixture
def data(tmp_path):
    return moeprune.open_data(write_inputs(tmp_path / "a.npz", None, 60), two_layer_model().input_format)


def files(tmp_path, kind="mlp") -> tuple[str, str]:
    """A model and its calibration data."""
    moeprune.save(model_of(kind), tmp_path / "full.safetensors")
    labels = [sample % 7 for sample in range(40)]
    return str(tmp_path / "full.safetensors"), write_inputs(tmp_path / "labelled.npz", labels, 40)


# --- which units are left
def least_error(H: np.ndarray, W: np.ndarray, left: list[int]) -> float:
    """tr Δ·H·Δᵀ of the best change Δ of W (o,h) that makes all units but these zero, by least squares."""
    root = np.linalg.cholesky(H).T
    dropped = [unit for unit in range(len(H)) if unit not in left]
    target = root[:, dropped] @ W[:, dropped].T
    if not left:
        return float(np.square(target).sum())
    solution = np.linalg.lstsq(root[:, left], target, rcond=None)[0]
    return float(np.square(target - root[:, left] @ solution).sum())


def left_by_brute_force(H: np.ndarray, W: np.ndarray, width: int) -> list[int]:
    left = [*range(len(H))]
    while len(left) > width:
        left.remove(min(left, key=lambda unit: least_error(H, W, [other for other in left if other != unit])))
    return left


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_each_unit_that_is_dropped_adds_the_least_error(ridge):
    roots, weight = drawn(4, 30, 7, seed=1) * torch.tensor([1.0, 3, 0.2, 1, 1, 0.5, 2]), drawn(4, 3, 7, seed=2)
    roots[:, :, 4] += roots[:, :, 0]  # units that others can stand in for
    power = roots.mT @ roots
    sets = [units_left(power, weight, width, ridge) for width in range(7, 0, -1)]
    assert sets[0].tolist() == [[*range(7)]] * 4
    for left in sets:
        for j, found in enumerate(left.tolist()):
            assert found == left_by_brute_force(
                (power[j] + ridge * torch.eye(7)).numpy(), weight[j].numpy(), len(found)
            )
    for larger, smaller in pairwise(sets):
        assert all(set(few) < set(many) for few, many in zip(smaller.tolist(), larger.tolist(), strict=True))


def test_units_that_are_never_active_go_first():
    roots = drawn(2, 30, 8)
    roots[:, :, [1, 2, 5]] = 0
    left = units_left(roots.mT @ roots, drawn(2, 3, 8, seed=1), 5, 1e-6)
    assert left.tolist() == [[0, 3, 4, 6, 7]] * 2


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-9, 0.3])
def test_weights_of_the_units_that_are_left_are_a_ridge_regression_towards_what_they_were(ridge, has_bias):
    z, s, W = drawn(50, 7, seed=3) + 1, drawn(50, 1, seed=4).abs(), drawn(3, 7, seed=5)
    rows = s * z
    moments = UnitMoments(*(part[None] for part in (rows.mT @ rows, (s * rows).sum(0), s.square().sum())))
    left, weight = fit_units(moments, W[None], 4, ridge, has_bias)
    left = left[0].tolist()
    R, S, W = rows.numpy(), s.numpy(), W.numpy()
    if has_bias:
        R = R - S * ((S * R).sum(0) / np.square(S).sum())
    strength = ridge * np.square(R).sum() / 7
    others = [unit for unit in range(7) if unit not in left]
    target = np.vstack([R[:, others] @ W[:, others].T, np.zeros((4, 3))])
    change = np.linalg.lstsq(np.vstack([R[:, left], strength**0.5 * np.eye(4)]), target, rcond=None)[0]
    np.testing.assert_allclose(weight[0].numpy(), W[:, left] + change.T, rtol=1e-6, atol=1e-8)
    if has_bias and ridge < 1e-6:  # so no other weights and bias are nearer to the expert's own output
        rows_left = np.hstack([rows.numpy()[:, left], S])
        output = rows.numpy() @ W.T
        best = rows_left @ np.linalg.lstsq(rows_left, output, rcond=None)[0]
        error = np.square(R[:, others] @ W[:, others].T - R[:, left] @ change).sum()
        assert error == pytest.approx(np.square(output - best).sum(), rel=1e-6)


def test_an_expert_that_no_token_reaches_keeps_finite_weights():
    empty = UnitMoments(torch.zeros(2, 6, 6).double(), torch.zeros(2, 6).double(), torch.zeros(2).double())
    weight = drawn(2, 3, 6)
    left, refitted = fit_units(empty, weight, 3, 1e-3, has_bias=True)
    assert torch.equal(refitted, weight.gather(2, left[:, None].expand(-1, 3, -1)))


# --- a layer
def reference(
    rows: Tensor, ones: Tensor, W: Tensor, b: Tensor | None, width: int
) -> list[tuple[list[int], Tensor, Tensor]]:
    """Units that are left, weights and bias of each expert, from r (b,m,e,h) and s (b,m,e) of all inputs.

    Of all ridges the one whose experts of one half have the least error on the other is taken for all.
    """
    is_second, W = half_of(0, len(rows)).numpy() == 1, W.double().numpy()

    def fitted(which: np.ndarray, j: int, ridge: float) -> tuple[list[int], np.ndarray, np.ndarray]:
        R, S = rows[which, :, j].flatten(0, 1).numpy(), ones[which, :, j].reshape(-1, 1).numpy()
        mean = (S * R).sum(0) / np.square(S).sum() if b is not None else np.zeros(R.shape[1])
        A = (R - S * mean).T @ (R - S * mean)
        A = A / (np.trace(A) / len(A)) + ridge * np.eye(len(A))
        left = left_by_brute_force(A, W[j], width)
        others, found = [unit for unit in range(len(A)) if unit not in left], np.zeros_like(W[j])
        found[:, left] = (
            W[j][:, left] + np.linalg.solve(A[np.ix_(left, left)], A[np.ix_(left, others)] @ W[j][:, others].T).T
        )
        return left, found, mean

    def error(which: np.ndarray, j: int, found: tuple[list[int], np.ndarray, np.ndarray]) -> float:
        R, S = rows[which, :, j].flatten(0, 1).numpy(), ones[which, :, j].reshape(-1, 1).numpy()
        return float(np.square((R - S * found[2]) @ (W[j] - found[1]).T).sum())

    def held_out(ridge: float) -> float:
        halves = (is_second, ~is_second)
        return sum(error(~half, j, fitted(half, j, ridge)) for half in halves for j in range(len(W)))

    ridge, results = min(RIDGES, key=held_out), []
    for j in range(len(W)):
        left, found, mean = fitted(np.full(len(rows), True), j, ridge)
        bias = (
            torch.zeros(len(found)).double() if b is None else b[j].double() + torch.from_numpy((W[j] - found) @ mean)
        )
        results.append((left, torch.from_numpy(found[:, left]), bias))
    return results


@pytest.mark.parametrize(("kind", "bias"), KINDS)
def test_a_layer_loses_the_units_that_the_formulas_say(kind, bias, data):
    """Of kept experts, under the router that they get, behind a pruned layer."""
    full = model_of(kind, bias)
    plan = LayerPlan("static", 2, N, "combine", "renorm", KEPT, width=3)
    with behind_a_pruned_layer(full, data) as (stage, model):
        layer = prune_layer(stage.layer, plan, Calibrated(fewer_units=fewer_units(stage, plan)))
        x = layer_inputs_and_outputs(model, LAST, data)[0]
    dense = prune_layer(full.moe_layers[LAST], LayerPlan("static", 2, N, "combine", "renorm-refit", KEPT))
    products = rows_of(dense, x)
    rows = products[:, :, : 2 * H].unflatten(2, (2, H))
    ones = products[:, :, 2 * H :] if bias else ones_of(dense, x)
    expected = reference(rows, ones, dense.fc2_weight, dense.fc2_bias, 3)
    for j, (left, weight, constant) in enumerate(expected):
        units = left + [unit + H for unit in left] if kind == "geglu" else left
        assert torch.equal(layer.fc1_weight[j], dense.fc1_weight[j][:, units])
        torch.testing.assert_close(layer.fc2_weight[j].double(), weight, rtol=1e-4, atol=1e-4)
        if bias:
            assert torch.equal(layer.fc1_bias[j], dense.fc1_bias[j][units])
            torch.testing.assert_close(layer.fc2_bias[j].double(), constant, rtol=1e-4, atol=1e-4)


def ones_of(layer, x: Tensor) -> Tensor:
    """The weights of each expert (b,m,e), summed over its slots."""
    seen = []
    layer.observer = seen.append
    layer(x)
    layer.observer = None
    return seen[0].weights.double().sum(3)


@pytest.mark.parametrize(("kind", "bias"), KINDS)
def test_with_all_units_the_experts_stay_as_they_are(kind, bias, data):
    full = model_of(kind, bias)
    pruned = moeprune.prune(full, data=data, width="1.0", runtime=CPU)
    for name, layer in pruned.moe_layers.items():
        assert (layer.plan.width, layer.plan.k, layer.plan.kept) == (H, N, (0, 1, 2, 3, 4))
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, full.state_dict()[f"{name}.{key}"]), key


def test_units_that_copy_others_are_dropped_without_any_loss(data):
    full = model_of()
    for layer in full.moe_layers.values():
        for tensor in (layer.fc1_weight, layer.fc1_bias):
            tensor[..., 3:] = tensor[..., :3]
    pruned = moeprune.prune(full, data=data, width=3, runtime=CPU)
    assert output_error(pruned, full, LAST, data) < 1e-5


def test_moments_of_all_experts_need_not_be_held_at_once(data, monkeypatch):
    monkeypatch.setattr(width_module, "RIDGES", (1e-3,))
    layers = []
    for held in (1 << 30, 2 * 2 * 8 * H * H, 1):
        monkeypatch.setattr(width_module, "HELD", held)
        layers.append(
            moeprune.prune(model_of(), data=data, width=3, compensate="none", runtime=CPU).moe_layers[LAST].state_dict()
        )
    for key, tensor in layers[0].items():
        torch.testing.assert_close(layers[1][key], tensor)
        torch.testing.assert_close(layers[2][key], tensor)


def test_outputs_do_not_depend_on_the_batch_size(data):
    x, outputs = next(data.batches(40))[0], []
    for size in (3, 17, 40):
        runtime = moeprune.Runtime("cpu", batch_size=size)
        outputs.append(moeprune.prune(model_of(), data=data, keep=3, width=3, compensate="lstsq", runtime=runtime)(x))
    assert float((outputs[0] - outputs[2]).norm() / outputs[2].norm()) < 1e-3
    assert float((outputs[1] - outputs[2]).norm() / outputs[2].norm()) < 1e-3


def test_units_that_are_too_large_for_squares_are_an_error(data):
    full = model_of()
    full.moe_layers[FIRST].fc1_weight *= 1e25
    full.moe_layers[FIRST].fc2_weight *= 1e-25
    message = r"hidden units of layer `blocks\.0\.soft_moe` cannot be chosen: numbers are NaN or infinite"
    with pytest.raises(moeprune.MoepruneError, match=message):
        moeprune.prune(full, data=data, width=3, runtime=CPU)


# --- beside other ways
@pytest.mark.parametrize("keep", [2, 5])
def test_fits_make_up_for_what_narrower_experts_lose(keep, data):
    full = model_of()
    errors = {}
    for compensate in ("none", "mean", "renorm", "lstsq", "affine", "refit", "renorm-refit", "low-rank"):
        pruned = moeprune.prune(
            full, data=data, keep=keep, width=3, compensate=compensate, signal="combine", runtime=CPU
        )
        errors[compensate] = output_error(pruned, full, FIRST, data)
        layer, fit = pruned.moe_layers[FIRST], pruned.details.provenance["fits"][FIRST]
        assert layer.fc2_weight.shape == (keep, 12, 3)
        assert layer.fc1_weight.shape == (keep, 12, 3)
        assert 0.8 * fit["fitted_error"] < errors[compensate] <= 1.2 * fit["held_out_error"], compensate
    assert errors["refit"] < errors["affine"] < errors["lstsq"] < errors["none"]
    assert errors["renorm-refit"] < errors["renorm"]
    if keep == 5:
        assert errors["mean"] == errors["low-rank"] == errors["renorm"] == errors["none"]  # nothing else is lost
    else:
        assert errors["low-rank"] < errors["affine"] < errors["mean"] < errors["none"]


def test_more_units_leave_less_error(data):
    full = model_of()
    pruned = [
        moeprune.prune(full, data=data, width=width, compensate="none", runtime=CPU) for width in (1, "1/3", "50%", 5)
    ]
    assert [model.plan[FIRST].width for model in pruned] == [1, 2, 3, 5]
    errors = [output_error(model, full, FIRST, data) for model in pruned]
    assert errors == sorted(errors, reverse=True)
    for model in pruned:
        assert model.details.provenance["fits"][FIRST]["regressors"] == 5 * model.plan[FIRST].width


COSTS = [
    SoftMoEConfig(12, 5, 2, 6),
    SoftMoEConfig(12, 5, 1, 6, expert="geglu", out_dim=7),
    SoftMoEConfig(12, 5, 2, 6, bias=False),
]


@pytest.mark.parametrize("config", COSTS, ids=lambda config: f"{config.expert}-{config.bias}")
@pytest.mark.parametrize("k", [2, 5])
def test_shapes_and_flops(config, k):
    for compensation in ("none", "renorm", "mean", "lstsq", "affine", "refit", "renorm-refit", *LOW_RANK):
        rank = 2 if compensation in LOW_RANK else None
        plan = LayerPlan("static", k, 5, "combine", compensation, tuple(range(k)), rank=rank, width=2)
        layer = SoftMoE(config, plan)
        assert config.shapes(plan) == {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        assert counted(layer, torch.randn(2, 9, 12)) == 2 * config.flops(9, plan).total, plan


def test_auto_chooses_among_compensations_of_narrower_experts(data):
    pruned = moeprune.prune(model_of(), data=data, keep="2/5", width="1/2", runtime=CPU)
    assert {(layer.k, layer.width) for layer in pruned.plan.values()} == {(2, 3)}
    assert len({layer.compensation for layer in pruned.plan.values()}) == 1
    whole = moeprune.prune(model_of(), data=data, width="1/2", runtime=CPU)
    [(k, compensation)] = {(layer.k, layer.compensation) for layer in whole.plan.values()}
    assert (k, compensation) in ((5, "none"), (5, "renorm-refit"))


@pytest.mark.parametrize("budget", ["max_size", "max_flops"])
def test_a_budget_counts_narrower_experts(budget, data):
    full = model_of()
    sizes = []
    for width in (None, "1/2"):
        pruned = moeprune.prune(full, data=data, width=width, compensate="mean", runtime=CPU, **{budget: "80%"})
        cost, whole = pruned.cost(), full.cost()
        sizes.append(sum(layer.k for layer in pruned.plan.values()))
        share = (
            cost.bytes / whole.bytes
            if budget == "max_size"
            else cost.flops_per_input.total / whole.flops_per_input.total
        )
        assert share <= 0.8
    assert sizes[0] < sizes[1]


def test_under_a_budget_auto_tries_all_experts_with_the_most_units_within_it(data):
    """They are taken where nothing else is as near: experts that nothing can replace, with units that copy others."""
    full = model_of()
    for layer in full.moe_layers.values():
        for tensor in (layer.fc1_weight, layer.fc1_bias):
            tensor[..., 4:] = tensor[..., :2]
    config, tensors = full.config, tensor_infos(full.state_dict())
    sizes = {}
    for width in range(1, 7):
        plan = {name: LayerPlan("static", N, N, "gram", "none", (0, 1, 2, 3, 4), width=width) for name in (FIRST, LAST)}
        infos = {name: tensor for name, tensor in tensors.items() if ".soft_moe." not in name}
        layers = sum(4 * np.prod(shape) for name, shape in config.shapes(plan).items() if ".soft_moe." in name)
        sizes[width] = int(sum(tensor.nbytes for tensor in infos.values()) + layers)
    for width in range(1, 6):
        for more in (0, 1, sizes[width + 1] - sizes[width] - 1):
            found = narrower_within(config, tensors, f"{sizes[width] + more}B")
            assert {layer.width for layer in found.values()} == {width}
    assert narrower_within(config, tensors, f"{sizes[1] - 1}B") is None
    pruned = moeprune.prune(full, data=data, max_size=f"{sizes[4]}B", runtime=CPU)
    assert {(layer.k, layer.width, layer.compensation) for layer in pruned.plan.values()} == {(5, 4, "none")}
    assert pruned.cost().bytes == sizes[4]


# --- the command line
def test_pruned_evaluated_and_loaded_it_computes_the_same(tmp_path, run, run_json):
    full, data = files(tmp_path, "geglu")
    pruned, plan = tmp_path / "pruned.safetensors", tmp_path / "plan.json"
    report = run_json(f"prune {full} --data {data} --width 1/2 --compensate none -o {pruned} --save-plan {plan}")
    assert {layer["width"] for layer in report["plan"].values()} == {3}
    assert report["model"]["bytes_by_part"]["experts"] < 0.6 * report["full_model"]["bytes_by_part"]["experts"]
    assert report["model"]["flops_per_input"]["experts"] == report["full_model"]["flops_per_input"]["experts"] / 2
    found = run_json(f"eval {pruned} --baseline {full} --data {data}")
    loaded, model = moeprune.load(pruned), moeprune.load(full)
    inputs = moeprune.open_data(data, model.input_format)
    expected = moeprune.prune(model, data=inputs, width=0.5, compensate="none", runtime=CPU)
    x = next(inputs.batches(40))[0]
    torch.testing.assert_close(loaded(x), expected(x), rtol=1e-4, atol=1e-5)
    agreement = float((loaded(x).argmax(1) == model(x).argmax(1)).double().mean())
    assert found["difference"]["agreement"] == pytest.approx(agreement)
    assert "static, 5 of 5 by gram, none, 3 hidden units each" in run("inspect", pruned).stdout
    again = tmp_path / "again.safetensors"
    run_json(f"prune {full} --data {data} --plan {plan} -o {again}")
    assert again.read_bytes() == pruned.read_bytes()


def test_budgets_are_met_with_narrower_experts_too(tmp_path, run, run_json):
    full, data = files(tmp_path)
    call = f"prune {full} --data {data} --max-size 70% -o {tmp_path}/pruned.safetensors --force"
    found = run_json(call)["candidates"]
    assert {(each["compensate"], *set(each["width"].values())) for each in found if each["width"]} == {
        ("renorm-refit", 3), ("renorm-refit", 2), ("none", 2),
    }  # fmt: skip
    assert all(each["size"] <= 0.7 for each in found)
    result = run(f"{call} --width 1/2")  # of the kept experts, however many
    assert result.code == 0, result.stderr
    assert "3 hidden units each" in result.stdout
    assert " of width 3" in result.stdout
    assert "of width 2" not in result.stdout


def test_a_plan_may_give_each_layer_a_width_of_its_own(tmp_path, run_json):
    full, data = files(tmp_path)
    layers = {FIRST: {"k": 5, "width": 4}, LAST: {"kept": [0, 4], "width": 1, "compensation": "affine"}}
    (tmp_path / "plan.json").write_text(json.dumps({"schema_version": 1, "plan": layers}))
    run_json(f"prune {full} --data {data} --plan {tmp_path}/plan.json -o {tmp_path}/pruned.safetensors")
    model = moeprune.load(tmp_path / "pruned.safetensors")
    assert [layer.fc2_weight.shape for layer in model.moe_layers.values()] == [(5, 12, 4), (2, 12, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--width 7", r"`--width 7` is more than the 6 hidden units of layer `blocks.0.soft_moe`"),
        ("--width 0", r"`--width 0` keeps no hidden unit"),
        ("--width 2.5", r"`--width 2.5` is more than all hidden units"),
        ("--width half", r"`--width half` is neither a share nor a number"),
        ("--width 3 --keep 2 --scope input", r"`--width` goes with `--scope static`, at least one expert"),
        ("--width 3 --mass 0.5", r"`--width` goes with `--scope static`, at least one expert"),
        ("--width 3 --keep 2 --compensate merge", r"any compensation but `merge` and `linear`"),
        ("--width 3 --compensate linear", r"any compensation but `merge` and `linear`"),
        ("--width 3 --plan plan.json", r"`--width` does not go with `--plan`"),
    ],
)
def test_a_width_that_cannot_be_is_refused(options, message, tmp_path, run):
    full, data = files(tmp_path)
    result = run("prune", full, "--data", data, *options.split(), "-o", tmp_path / "pruned.safetensors")
    assert result.code == 2
    assert message in result.stderr
    assert not (tmp_path / "pruned.safetensors").exists()


def test_a_width_needs_data_and_hidden_units(tmp_path, run):
    full, data = files(tmp_path)
    output = ("-o", tmp_path / "pruned.safetensors")
    result = run("prune", full, "--width", "1/2", *output)
    assert result.code == 2
    assert "dropping hidden units (`--width`) needs calibration data" in result.stderr
    run("analyze", full, "--data", data, "-o", tmp_path / "analysis.safetensors")
    result = run(
        "prune", full, "--width", "1/2", "--analysis", tmp_path / "analysis.safetensors", "--one-shot", *output
    )
    assert "`width` of layer `blocks.0.soft_moe` is fitted to data, not in one shot" in result.stderr
    moeprune.save(two_layer_model(kind="linear"), tmp_path / "linear.safetensors")
    result = run("prune", tmp_path / "linear.safetensors", "--data", data, "--width", "1/2", *output)
    assert result.code == 2
    assert "layer `blocks.0.soft_moe` has experts without hidden units that could be dropped" in result.stderr


# --- other libraries
def test_a_narrower_model_is_exported(tmp_path, run, run_json):
    block = BlockConfig(soft_moe=SoftMoEConfig(12, 4, 2, 8))
    model = SoftMoEViT(ViTConfig((8, 8), (4, 4), 1, 7, dim=12, num_heads=3, blocks=(block, block)))
    moeprune.save(model, tmp_path / "full.safetensors")
    data = write_inputs(tmp_path / "a.npz", None, 30)
    prune = f"prune {tmp_path}/full.safetensors --data {data} --width 1/4"
    run_json(f"{prune} -o {tmp_path}/pruned.safetensors")
    run_json(f"export {tmp_path}/pruned.safetensors -o {tmp_path}/small.pt --to soft-moe")
    arguments = ["num_heads=3", "img_size=8", "global_pool=avg"]
    settings = " ".join(f"--source-arg {each}" for each in arguments)
    found = run_json(f"inspect {tmp_path}/small.pt {settings}")
    assert {(layer["experts"], layer["settings"]["hidden_dim"]) for layer in found["layers"].values()} == {(4, 2)}
    run_json(f"{prune} --compensate affine -o {tmp_path}/affine.safetensors")
    result = run("export", tmp_path / "affine.safetensors", "-o", tmp_path / "affine.pt", "--to", "soft-moe")
    assert result.code == 2
    assert "layer `blocks.0.soft_moe` has compensation affine beside its experts" in result.stderr


def test_a_narrower_layer_of_the_users_own_model_is_exported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "user_nets", SimpleNamespace(build=ours))
    torch.manual_seed(0)
    model = moeprune.adopt(ours(), SHAPE, "user_nets:build")
    pruned = moeprune.prune(model, data=torch.randn(30, *SHAPE), width=3)
    found = moeprune.export(pruned, tmp_path / "small.pt", "moeprune")
    assert found.parity.max_relative_difference < 1e-6
    smaller = ours()
    for index in range(2):
        config = found.layers[f"layers.{index}"].arguments["config"]
        assert config["hidden_dim"] == 3
        smaller.layers[index] = new_layer(layer_from_json(config, ""))
    smaller.load_state_dict(torch.load(tmp_path / "small.pt"), strict=True)
    x = torch.randn(4, *SHAPE)
    torch.testing.assert_close(smaller.eval()(x), pruned(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["mlp", "glu", "linear"])
def test_an_expert_is_rebuilt_with_fewer_hidden_units(form):
    experts = {"mlp": Mlp(), "glu": Glu(), "linear": nn.Sequential(nn.Dropout(), nn.Linear(12, 4))}
    smaller = resized(experts[form], 3)
    linears = [tuple(linear.weight.shape) for linear in smaller.modules() if isinstance(linear, nn.Linear)]
    assert linears == {"mlp": [(3, 12), (4, 3)], "glu": [(3, 12), (3, 12), (4, 3)], "linear": [(4, 12)]}[form]
    assert smaller(torch.randn(5, 12)).shape == (5, 4)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Glu(nn.Module):
    def __init__(self):
        super().__init__()
        self.values, self.gate, self.last = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.values(x) * nn.functional.silu(self.gate(x)))
