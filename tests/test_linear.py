"""A linear map in place of a whole layer, against least squares on the rows."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

import moeprune
from moeprune.calibration.ridge import TOLERANCE
from moeprune.calibration.walk import Walk
from moeprune.files.header import read_header
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.model import private_copy
from moeprune.plan import LayerPlan
from moeprune.pruning.compensation import fit
from tests.reference import replace
from tests.test_calibration import layer_inputs_and_outputs
from tests.test_compensation import LAST, behind_a_pruned_layer, block_outputs, model_and_data
from tests.test_cost import counted
from tests.test_soft_moe import D, N, affine_of, dense_layer, inputs, observe, relative_error, with_random_affine

CPU = moeprune.Runtime("cpu")
NONE = Calibrated(None, torch.zeros(5, 2, 12))


def plan_of(n: int = 5) -> LayerPlan:
    return LayerPlan("static", 0, n, "combine", "linear", ())


def linear_layer(windows: int = 1, **settings) -> SoftMoE:
    dense = dense_layer(**settings)
    dense.config = replace(dense.config, windows=windows)
    return with_random_affine(prune_layer(dense, plan_of(N)))


def formula(layer, x: Tensor) -> Tensor:
    """X·W + mean(X)·V + b, one input at a time."""
    W, V, b = (affine_of(layer)[f"affine_{part}"].double() for part in ("token", "mean", "bias"))
    return torch.stack([one @ W + one.mean(0) @ V + b for one in x.double()])


@pytest.mark.parametrize("out_dim", [None, 7])
@pytest.mark.parametrize("kind", ["mlp", "geglu", "linear"])
def test_layer_equals_the_formula(kind, out_dim):
    layer, x = linear_layer(expert=kind, out_dim=out_dim), inputs()
    assert relative_error(layer(x), formula(layer, x)) < 1e-12
    assert {*layer.state_dict()} - {*layer.config.expert_shapes(1)} == {"affine_token", "affine_mean", "affine_bias"}
    assert all(len(layer.get_parameter(name)) == 0 for name in layer.config.expert_shapes(0))


def test_images_and_single_tokens_are_taken_as_tokens():
    layer = linear_layer()
    x = torch.randn(4, 2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = layer(x.flatten(1, 2)).unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    assert torch.equal(layer(x.permute(0, 3, 1, 2)), expected)
    assert torch.equal(layer(x[:, 0, 0]), layer(x[:, 0, :1])[:, 0])


@pytest.mark.parametrize("windows", [1, 2])
def test_padding_changes_nothing_and_windows_are_inputs_of_their_own(windows):
    layer, x = linear_layer(windows), inputs(b=2)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    seen = observe(layer, x, mask)
    assert relative_error(seen.output[:1], formula(layer, x[:1])) < 1e-12
    assert relative_error(seen.output[1:, :4], formula(layer, x[1:, :4])) < 1e-12
    assert not seen.output[1, 4:].any()
    assert seen.mass.shape == (2 // windows, 0)


def test_a_layer_in_bfloat16_stays_near_float32():
    layer, x = linear_layer(dtype=torch.float32), inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(layer(x), formula(layer, x)) < 0.03
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("out_dim", [None, 7])
def test_shapes_and_flops(out_dim):
    config = SoftMoEConfig(12, 5, 2, 6, out_dim=out_dim)
    layer = SoftMoE(config, plan_of())
    assert config.shapes(plan_of()) == {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    cost = config.flops(9, plan_of())
    assert counted(layer, torch.randn(2, 9, 12)) == 2 * cost.total
    assert cost.total == cost.compensation == 2 * (9 + 1) * 12 * (out_dim or 12)


def test_it_is_the_least_squares_fit_of_what_the_stream_lacks(tmp_path):
    """With enough data the ridge hardly matters."""
    full, data = model_and_data(tmp_path, samples=400)
    with behind_a_pruned_layer(full, data) as (stage, model):
        layer, quality = fit(stage, plan_of(), NONE, tokens=4)
        x, dense = layer_inputs_and_outputs(model, LAST, data)
        own = layer_inputs_and_outputs(full, LAST, data)[1].double()
        y = block_outputs(full, data) - (block_outputs(model, data) - dense)
    mean = x.mean(1, keepdim=True).expand_as(x)
    R = torch.cat([x, mean, torch.ones_like(x[..., :1])], 2).flatten(0, 1).double().numpy()
    Y = y.flatten(0, 1).numpy()
    least = np.square(Y - R @ np.linalg.lstsq(R, Y, rcond=None)[0]).sum()
    error, of_own = (float((layer(x).double() - each).square().sum()) for each in (y, own))
    assert least <= error < (1 + 2 * TOLERANCE) * least
    assert quality.fitted_error == pytest.approx(of_own / float(own.square().sum()), rel=0.05)
    assert quality.fitted_error < quality.held_out_error


def test_a_layer_that_is_linear_is_met(tmp_path):
    """One expert whose slot is the mean token: the layer is linear."""
    full, data = model_and_data(tmp_path, "linear", samples=100)
    dense = full.moe_layers[LAST]
    dense.phi.zero_()
    with Walk(private_copy(full), None, data, CPU) as walk:
        layer, _ = fit(walk.reach(LAST), plan_of(), NONE, tokens=4)
    x, y = layer_inputs_and_outputs(full, LAST, data)
    assert float((layer(x) - y).square().sum() / y.square().sum()) < 2e-5


def test_saved_and_loaded_it_has_no_router_and_computes_the_same(tmp_path):
    full, data = model_and_data(tmp_path, samples=30)
    plan = {name: plan_of() for name in full.moe_layers}
    pruned = moeprune.prune(full, plan=plan, data=data, runtime=CPU)
    path = tmp_path / "pruned.safetensors"
    moeprune.save(pruned, path)
    names = {name.rpartition(".")[2] for name in read_header(path).tensors if "soft_moe" in name}
    assert not names & {"phi", "scale", "input_gain", "phi_gain", "surrogate"}
    loaded = moeprune.load(path)
    x = next(data.batches(8))[0]
    assert torch.equal(loaded(x), pruned(x))
    cost = loaded.cost()
    assert cost.experts_per_input == 0
    assert cost.bytes_by_part.routing == cost.bytes_by_part.experts == 0
    assert cost.flops_per_input.routing == cost.flops_per_input.experts == 0
    found = moeprune.evaluate(loaded, (x, torch.zeros(8, dtype=torch.int64)), runtime=CPU)
    assert found.model.bytes < full.cost().bytes


def test_adopted_windows_are_replaced_by_a_linear_map():
    windows = pytest.importorskip("tests.test_windows")
    model, data = moeprune.adopt(windows.folded("windows"), windows.SHAPE), windows.dataset()
    pruned = moeprune.prune(model, plan={name: plan_of(8) for name in model.moe_layers}, data=data, runtime=CPU)
    x = windows.images(5, dtype=torch.float32)
    assert relative_error(pruned(x), torch.cat([pruned(one[None]) for one in x])) < 1e-5
    empty = copy.deepcopy(pruned)
    for layer in empty.moe_layers.values():
        for buffer in layer.buffers():
            buffer.zero_()
    x, _ = next(data.batches(64))
    assert (pruned(x) - model(x)).norm() < 0.9 * (empty(x) - model(x)).norm()
