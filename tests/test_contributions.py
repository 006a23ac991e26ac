"""What is lost with each expert, by running sums, against regressions on the rows themselves."""

import numpy as np
import pytest
import torch

from moeprune.calibration import sums as contributions
from moeprune.calibration.ridge import LAMBDAS
from moeprune.calibration.statistics import MomentsAccumulator
from moeprune.calibration.sums import Contributions, half_of, lost_gram
from tests.test_compensation import column_scale, direct_ridge
from tests.test_soft_moe import D, M, N, dense_layer, inputs, observe

B = 40


@pytest.fixture(params=[1, 3], ids=["one slot", "three slots"])
def case(request):
    """A layer's observation, a gap, the halves' sums, the slots' means and each expert's rows."""
    layer = dense_layer(p=request.param, out_dim=5)
    x = inputs(b=B, seed=3)
    mask = torch.ones(B, M, dtype=torch.bool)
    mask[::3, 4:] = False
    observation = observe(layer, x, mask)
    generator = torch.Generator().manual_seed(4)
    gap = 0.1 * torch.randn(B, M, 5, generator=generator, dtype=torch.float64) * mask[:, :, None]
    moments = MomentsAccumulator(layer)
    moments.add(observation, None)
    return layer, observation, gap, moments.moments()["term_mean"]


def sums(layer, observation, gap, compensation="affine") -> tuple[Contributions, Contributions]:
    halves = Contributions(layer, compensation), Contributions(layer, compensation)
    for first in (0, 13):  # two batches
        index = torch.arange(first, min(B, first + 13) if first == 0 else B)
        half = half_of(first, len(index))
        for which, one in enumerate(halves):
            members = index[half == which]
            one.add(observation.select(members), gap[members])
    return halves


def lost_rows(observation, gap, slot_mean) -> np.ndarray:
    """What each expert adds beside its means, and the gap: (n+1,b,m,o)."""
    beside = observation.term_outputs - slot_mean
    return torch.cat([torch.einsum("bmnp,bnpo->nbmo", observation.weights, beside), gap[None]]).numpy()


@pytest.mark.parametrize("dropped", [(0,), (1, 3), tuple(range(N))])
def test_error_under_mean_is_that_of_the_rows(case, dropped):
    layer, observation, gap, slot_mean = case
    gram = lost_gram(*sums(layer, observation, gap), slot_mean, "mean")
    lost = [*dropped, N]
    expected = np.square(lost_rows(observation, gap, slot_mean)[lost].sum(0)).sum()
    assert float(gram[lost][:, lost].sum()) == pytest.approx(expected, rel=1e-4)
    halves = sums(layer, observation, gap)
    whole = np.square(lost_rows(observation, gap, 0 * slot_mean)[lost].sum(0)).sum()
    assert float((halves[0].gram + halves[1].gram)[lost][:, lost].sum()) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("workspace", [2**24, 60])
@pytest.mark.parametrize("compensation", ["lstsq", "affine"])
def test_error_of_a_regression_is_that_on_the_rows_of_the_other_half(case, compensation, workspace, monkeypatch):
    monkeypatch.setattr(contributions, "CHUNK", workspace)
    layer, observation, gap, slot_mean = case
    slot_mean = slot_mean / 2  # so that there is something to gain
    gram = lost_gram(*sums(layer, observation, gap), slot_mean, compensation)
    rows = observation.regressors(compensation)
    parts = lost_rows(observation, gap, slot_mean)
    is_second = half_of(0, B).numpy() == 1
    kinds = [N * slot_mean.shape[1]] + ([D, D, 1] if compensation == "affine" else [])
    R = rows.flatten(0, 1).double().numpy()
    scale = np.concatenate([column_scale(part) for part in np.split(R, np.cumsum(kinds)[:-1], axis=1)])
    dropped = [1, 2, N]
    found = float(gram[dropped][:, dropped].sum())
    errors = []
    for ridge in LAMBDAS:
        error = 0.0
        for fitted in (is_second, ~is_second):
            target = parts[dropped].sum(0)
            R_fit, T_fit = rows[fitted].flatten(0, 1).double().numpy(), target[fitted].reshape(-1, 5)
            R_out, T_out = rows[~fitted].flatten(0, 1).double().numpy(), target[~fitted].reshape(-1, 5)
            error += np.square(T_out - R_out @ direct_ridge(R_fit, T_fit, ridge / 2, scale)).sum()
        errors.append(error)
    assert min(abs(found / error - 1) for error in errors) < 1e-4
    assert found < 0.95 * np.square(parts[dropped].sum(0)).sum()


def test_regressors_are_combine_weights_tokens_their_mean_and_one(case):
    _, observation, _, _ = case
    rows = observation.regressors("affine")
    mask = observation.mask
    slots = observation.weights[0, 0].numel()
    assert torch.equal(rows[..., :slots], observation.weights.float().flatten(2))
    assert torch.equal(rows[..., slots : slots + D], observation.tokens.float())
    for i in range(B):
        mean = observation.tokens[i, mask[i]].mean(0)
        torch.testing.assert_close(rows[i, mask[i], slots + D : -1], mean.expand(mask[i].sum(), D).float())
    assert torch.equal(rows[..., -1], mask.float())
    assert not rows[~mask].any()


def test_halves_are_about_equal_and_know_no_order():
    whole = half_of(0, 10_000)
    assert 0.48 < whole.float().mean() < 0.52
    assert torch.equal(torch.cat([half_of(0, 7), half_of(7, 93)]), whole[:100])
    for period in (2, 10, 100):  # classes often take turns
        shares = whole.view(-1, period).float().mean(0)
        assert shares.min() > 0.3
        assert shares.max() < 0.7


def test_a_layer_that_was_observed_holds_its_input():
    layer, x = dense_layer(), inputs(b=2)
    assert torch.equal(observe(layer, x).tokens, x)
    assert observe(layer, x).mask is None
