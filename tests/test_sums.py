"""Sums of the regressions that compensations are fitted by, against the products of the rows themselves."""

from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

from moeprune.calibration.sums import RegressionSums
from moeprune.layers import observation
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.plan import LOW_RANK, LayerPlan
from tests.reference import reference_combine, reference_hidden, reference_router, replace
from tests.test_soft_moe import D, M, N, dense_layer, inputs, observe, router

B, OUT = 6, 4
KINDS = ["mlp", "geglu", "linear"]


def pruned(kind="mlp", p=1, k=2, compensation="refit", scope="static", windows=1, **options):
    """A layer that keeps the last experts, with a compensation of zeros."""
    dense = dense_layer(p=p, out_dim=OUT, expert=kind)
    dense.config = replace(dense.config, windows=windows)
    kept = tuple(range(N - k, N)) if scope == "static" else None
    rank = 2 if compensation in LOW_RANK else None
    plan = LayerPlan(scope, k, N, "combine", compensation, kept, rank=rank, **options)
    return prune_layer(dense, plan, Calibrated(None, torch.zeros(N, p, OUT)))


def masks(b: int = B) -> Tensor:
    mask = torch.ones(b, M, dtype=torch.bool)
    mask[::2, 4:] = False
    return mask


def drawn_gap(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def rows_of(layer, x: Tensor, mask: Tensor | None = None, chosen: list[list[int]] | None = None) -> Tensor:
    """All regressors (b,m,q) from the formulas, one input and expert at a time; zero for padding."""
    tensors = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    kinds, found = layer.regressor_kinds(), []
    stored = len(layer.fc2_weight)
    for i, one in enumerate(x.double()):
        real = torch.ones(len(one), dtype=torch.bool) if mask is None else mask[i]
        given, parts = one[real], []
        if "hidden" in kinds or "bias" in kinds or "terms" in kinds:
            logits, tokens = reference_router(given, tensors, *router(layer))
            combine = reference_combine(logits, range(logits.shape[1]))
        if "hidden" in kinds:
            for j in range(stored):
                slots = [reference_hidden(logits[:, j, q], tokens, tensors, j) for q in range(logits.shape[2])]
                parts.append(sum(combine[:, j, q, None] * slot for q, slot in enumerate(slots)))
        if "bias" in kinds:
            parts.append(combine.sum(2))
        if "terms" in kinds:
            weights = combine.clone()
            if chosen is not None:
                weights[:, chosen[i]] = 0
            parts.append(weights.flatten(1))
        if "token" in kinds:
            parts += [given, given.mean(0).expand_as(given), torch.ones(len(given), 1).double()]
        of_input = torch.zeros(len(one), sum(kinds.values()), dtype=torch.float64)
        of_input[real] = torch.cat(parts, 1)
        found.append(of_input)
    return torch.stack(found)


def summed(layer, x, gap, mask=None, splits=(0,)) -> RegressionSums:
    sums = RegressionSums(layer.regressor_kinds(), OUT, x.device)
    windows = layer.config.windows
    for start, end in zip(splits, (*splits[1:], len(gap)), strict=True):
        part = slice(windows * start, windows * end)
        sums.add(observe(layer, x[part], None if mask is None else mask[part]), gap[start:end])
    return sums


def assert_products_of(rows: Tensor, gap: Tensor, sums: RegressionSums) -> None:
    R, T = rows.flatten(0, -2).numpy(), gap.reshape(-1, OUT).numpy()
    (equations,) = sums.equations()
    for found, expected in ((equations.power, R.T @ R), (equations.cross, R.T @ T)):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())
    assert equations.square == pytest.approx(np.square(T).sum(), rel=1e-6)
    assert torch.equal(equations.power, equations.power.mT)


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "padding"])
@pytest.mark.parametrize(("p", "k"), [(1, 2), (3, 2), (3, 4)])  # slots that run: fewer than the 7 tokens, or more
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compensation", ["refit", "renorm-refit"])
def test_sums_with_hidden_units_are_products_of_the_rows(compensation, kind, p, k, masked):
    layer, x, mask = pruned(kind, p, k, compensation), inputs(B), masks() if masked else None
    gap = drawn_gap(B, M, OUT) * (1 if mask is None else mask[:, :, None])
    assert_products_of(rows_of(layer, x, mask), gap, summed(layer, x, gap, mask))


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "padding"])
@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize(
    ("scope", "compensation"),
    [("static", "lstsq"), ("static", "affine"), ("static", "low-rank"),
     ("static", "low-rank-lstsq"), ("input", "lstsq"), ("input", "affine"),
     ("batch", "affine"), ("input", "low-rank")],
)  # fmt: skip
def test_sums_of_weights_and_tokens_are_products_of_the_rows(scope, compensation, p, masked):
    """Terms that ran for their own input are no regressors."""
    layer, x, mask = pruned("mlp", p, 2, compensation, scope), inputs(B), masks() if masked else None
    gap = drawn_gap(B, M, OUT) * (1 if mask is None else mask[:, :, None])
    chosen = None if scope == "static" else observe(layer, x, mask).chosen.tolist()
    assert_products_of(rows_of(layer, x, mask, chosen), gap, summed(layer, x, gap, mask))


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "padding"])
def test_sums_of_a_linear_map_are_products_of_tokens_their_mean_and_one(masked):
    layer, x, mask = pruned(k=0, compensation="linear"), inputs(B), masks() if masked else None
    assert layer.regressor_kinds() == {"token": D, "mean": D, "one": 1}
    gap = drawn_gap(B, M, OUT) * (1 if mask is None else mask[:, :, None])
    assert_products_of(rows_of(layer, x, mask), gap, summed(layer, x, gap, mask))


@pytest.mark.parametrize("compensation", ["affine", "refit", "renorm-refit", "linear"])
def test_windows_are_rows_of_their_own_and_belong_to_their_input(compensation):
    layer = pruned(p=3, k=0 if compensation == "linear" else 2, compensation=compensation, windows=2)
    x, mask = inputs(2 * B), masks(2 * B)
    gap = drawn_gap(B, 2 * M, OUT) * mask.view(B, 2 * M, 1)
    assert_products_of(rows_of(layer, x, mask), gap, summed(layer, x, gap, mask))
    index = torch.tensor([1, 4])
    some = RegressionSums(layer.regressor_kinds(), OUT, x.device)
    some.add(observe(layer, x, mask).select(index), gap[index])
    rows = rows_of(layer, x, mask).unflatten(0, (B, 2))[index]
    assert_products_of(rows, gap[index], some)


@pytest.mark.parametrize("compensation", ["affine", "refit", "renorm-refit", "linear"])
def test_sums_do_not_depend_on_how_inputs_are_batched(compensation, monkeypatch):
    layer, x, mask = pruned("mlp", 3, 0 if compensation == "linear" else 3, compensation), inputs(B), masks()
    gap = drawn_gap(B, M, OUT) * mask[:, :, None]
    (expected,) = summed(layer, x, gap, mask).equations()
    found = [
        *chain.from_iterable(summed(layer, x, gap, mask, splits).equations() for splits in ((0, 1, 2, 3, 4, 5), (0, 4)))
    ]
    monkeypatch.setattr(observation, "WORKSPACE", 1)  # one input at once
    found += summed(layer, x, gap, mask).equations()
    for each in found:
        torch.testing.assert_close(each.power, expected.power, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(each.cross, expected.cross, rtol=1e-5, atol=1e-5)
        assert each.square == pytest.approx(expected.square)


@pytest.mark.parametrize("compensation", ["affine", "refit", "renorm-refit", "linear"])
def test_sums_for_two_targets_are_those_for_each(compensation):
    layer, x = pruned(k=0 if compensation == "linear" else 2, compensation=compensation), inputs(B)
    gaps = drawn_gap(B, M, OUT), drawn_gap(B, M, OUT).flip(0)
    sums = RegressionSums(layer.regressor_kinds(), OUT, x.device, targets=2)
    sums.add(observe(layer, x), *gaps)
    for found, gap in zip(sums.equations(), gaps, strict=True):
        (expected,) = summed(layer, x, gap).equations()
        torch.testing.assert_close(found.power, expected.power)
        torch.testing.assert_close(found.cross, expected.cross)
        assert found.square == pytest.approx(expected.square)


def test_no_inputs_add_nothing():
    layer = pruned()
    sums = RegressionSums(layer.regressor_kinds(), OUT, torch.device("cpu"))
    sums.add(observe(layer, inputs(B)).select(torch.tensor([], dtype=torch.int64)), drawn_gap(0, M, OUT))
    assert not sums.power.any()


def test_experts_without_biases_have_no_regressors_for_them():
    layer = dense_layer(out_dim=OUT)
    layer.config, layer.fc1_bias, layer.fc2_bias = replace(layer.config, bias=False), None, None
    layer = prune_layer(layer, LayerPlan("static", 2, N, "combine", "renorm-refit", (1, 3)))
    assert layer.regressor_kinds() == {"hidden": 12}
    x, gap = inputs(B), drawn_gap(B, M, OUT)
    assert_products_of(rows_of(layer, x), gap, summed(layer, x, gap))
