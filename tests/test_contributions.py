"""What is lost with each expert, by running sums, against regressions on the rows themselves."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from moeprune.calibration import sums as sums_module
from moeprune.calibration.ridge import choose_ridges
from moeprune.calibration.selection import best_kept
from moeprune.calibration.statistics import MomentsAccumulator
from moeprune.calibration.sums import Contributions, columns, explained, half_of, lost_gram
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import Observation
from tests.test_ridge import direct_ridge, scale_of_kinds
from tests.test_soft_moe import D, M, N, dense_layer, inputs, observe

B = 40


class Case(NamedTuple):
    layer: MoELayer
    seen: Observation
    gap: Tensor  # (b,m,o)
    mean: Tensor  # mu (n,p,o)

    def sums(self, splits=(0, 13)) -> tuple[Contributions, Contributions]:
        """The sums of both halves, of batches that begin at these inputs."""
        halves = Contributions(self.layer, self.mean), Contributions(self.layer, self.mean)
        for start, end in zip(splits, (*splits[1:], len(self.gap)), strict=True):
            half = half_of(start, end - start)
            for which, one in enumerate(halves):
                members = torch.arange(start, end)[half == which]
                one.add(self.seen.select(members), self.gap[members])
        return halves

    def lost(self) -> np.ndarray:
        """What each expert adds beside its means, and the gap: (n+1,b,m,o)."""
        beside = self.seen.term_outputs - self.mean
        return torch.cat([torch.einsum("bmnp,bnpo->nbmo", self.seen.weights, beside), self.gap[None]]).numpy()

    def rows(self, compensation: str) -> tuple[np.ndarray, list[int], list[int]]:
        """Regressors (b,m,q), how many there are of each kind, and in each group that shares a lambda."""
        return regressors(self.seen, compensation)


def regressors(seen: Observation, compensation: str) -> tuple[np.ndarray, list[int], list[int]]:
    """Weights of all terms; with `affine` also the tokens, their mean and 1: zero for padding."""
    weights = seen.weights.flatten(2).double().numpy()
    if compensation == "lstsq":
        return weights, [weights.shape[2]], [weights.shape[2]]
    tokens = seen.tokens.double().numpy()
    mask = np.ones(tokens.shape[:2]) if seen.mask is None else seen.mask.double().numpy()
    means = [one[real > 0].mean(0) for one, real in zip(tokens, mask, strict=True)]
    mean = np.stack(means)[:, None] * mask[:, :, None]
    width = tokens.shape[2]
    rows = np.concatenate([weights, tokens, mean, mask[:, :, None]], axis=2)
    return rows, [weights.shape[2], width, width, 1], [weights.shape[2], 2 * width + 1]


def make_case(p: int = 1, width: int = 5, n: int = N, samples: int = B, noise: float = 0.1) -> Case:
    layer = dense_layer(p=p, out_dim=width, n=n)
    mask = torch.ones(samples, M, dtype=torch.bool)
    mask[::3, 4:] = False
    seen = observe(layer, inputs(b=samples, seed=3), mask)
    generator = torch.Generator().manual_seed(4)
    gap = noise * torch.randn(samples, M, width, generator=generator, dtype=torch.float64) * mask[:, :, None]
    moments = MomentsAccumulator(layer)
    moments.add(seen)
    return Case(layer, seen, gap, moments.result().term_mean)


@pytest.fixture(params=[1, 3], ids=["one slot", "three slots"])
def case(request):
    return make_case(p=request.param)


def by_half(rows: np.ndarray) -> list[np.ndarray]:
    """The rows (b,m,…) of either half of the inputs, flat."""
    is_second = half_of(0, len(rows)).numpy() == 1
    return [rows[which].reshape(-1, rows.shape[-1]) for which in (~is_second, is_second)]


def held_out_error(rows: np.ndarray, target: np.ndarray, ridges: np.ndarray, scale: np.ndarray) -> float:
    """The squared error of regressions on one half of the inputs, on the other, both ways."""
    R, T = by_half(rows), by_half(target)
    fits = [direct_ridge(R[half], T[half], ridges / 2, scale) for half in (0, 1)]
    return sum(np.square(T[1 - half] - R[1 - half] @ fits[half]).sum() for half in (0, 1))


def chosen_ridges(rows, kinds, groups, target) -> np.ndarray | None:
    """The lambdas for what is lost with all experts, of equations in float64."""
    scale = scale_of_kinds(rows.reshape(-1, rows.shape[-1]), kinds)
    parts = zip(by_half(rows / scale), by_half(target), strict=True)
    first, second = (sums_module.Equations(*map(torch.from_numpy, (R.T @ R, R.T @ T)), float(np.square(T).sum()))
                     for R, T in parts)  # fmt: skip
    found = choose_ridges((first, second), groups)
    return None if found is None else found.numpy()


@pytest.mark.parametrize("dropped", [(0,), (1, 3), tuple(range(N))], ids=str)
def test_error_under_mean_is_that_of_the_rows(case, dropped):
    gram = lost_gram(*case.sums(), "mean")
    lost = [*dropped, N]
    expected = np.square(case.lost()[lost].sum(0)).sum()
    assert float(gram[lost][:, lost].sum()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("chunk", [2**24, 60])
@pytest.mark.parametrize("compensation", ["lstsq", "affine"])
def test_error_of_a_regression_is_that_on_the_rows_of_the_other_half(case, compensation, chunk, monkeypatch):
    monkeypatch.setattr(sums_module, "CHUNK", chunk)
    case = case._replace(mean=case.mean / 2)  # so that there is something to gain
    gram = lost_gram(*case.sums(), compensation).numpy()
    (rows, kinds, groups), parts = case.rows(compensation), case.lost()
    ridges = chosen_ridges(rows, kinds, groups, parts.sum(0))
    scale = scale_of_kinds(rows.reshape(-1, rows.shape[-1]), kinds)
    for dropped in ([1, 2, N], [0, N], [*range(N + 1)], [3]):
        expected = held_out_error(rows, parts[dropped].sum(0), ridges, scale)
        assert gram[np.ix_(dropped, dropped)].sum() == pytest.approx(expected, rel=1e-4)
    whole = [1, 2, N]
    assert gram[np.ix_(whole, whole)].sum() < 0.95 * np.square(parts[whole].sum(0)).sum()


def test_regressors_are_combine_weights_tokens_their_mean_and_one(case):
    kinds = {"terms": case.mean[..., 0].numel(), "token": D, "mean": D, "one": 1}
    found = columns(case.seen, kinds)
    real = case.seen.mask[:, :, None].float()
    rows = torch.cat([found.of_tokens, found.of_inputs[:, None] * real], 2)
    torch.testing.assert_close(rows.double(), torch.from_numpy(case.rows("affine")[0]), rtol=1e-6, atol=1e-7)
    assert found.weights == kinds["terms"]
    assert torch.equal(found.count, real.sum(1))
    assert not rows[~case.seen.mask].any()


@pytest.mark.parametrize("splits", [(0,), (0, 1, 2, 3), (0, 20, 39)], ids=str)
def test_sums_do_not_depend_on_how_inputs_are_batched(case, splits):
    for one, other in zip(case.sums(splits), case.sums(), strict=True):
        for name in ("power", "cross", "gram", "output_cross", "output_square"):
            found, expected = getattr(one, name).double(), getattr(other, name).double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_an_input_without_real_tokens_changes_nothing():
    case = make_case()
    before = case.sums()
    mask = torch.cat([case.seen.mask, torch.zeros(1, M, dtype=torch.bool)])
    seen = observe(case.layer, inputs(b=B + 1, seed=3), mask)
    after = case._replace(seen=seen, gap=torch.cat([case.gap, torch.zeros(1, M, 5)])).sums()
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one.power, other.power, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.gram, other.gram, rtol=1e-5, atol=1e-5)


# --- sketches
def chosen_error(case: Case, gram: Tensor, compensation: str, k: int) -> float:
    """The exact error of the k experts that a Gram matrix chooses, by that of the rows."""
    n = case.layer.config.num_experts
    dropped = [*sorted({*range(n)} - {*best_kept(gram, n, k)}), n]
    (rows, kinds, groups), parts = case.rows(compensation), case.lost()
    ridges = chosen_ridges(rows, kinds, groups, parts.sum(0))
    scale = scale_of_kinds(rows.reshape(-1, rows.shape[-1]), kinds)
    return held_out_error(rows, parts[dropped].sum(0), ridges, scale)


@pytest.fixture(scope="module")
def many():
    """A layer of 24 experts and 40 directions of output."""
    case = make_case(p=2, width=40, n=24, samples=120)
    return case._replace(mean=case.mean / 2)


@pytest.mark.parametrize("compensation", ["mean", "lstsq", "affine"])
def test_a_sketch_of_the_output_chooses_as_well_as_all_of_it(many, compensation, monkeypatch):
    exact = lost_gram(*many.sums(), compensation)
    monkeypatch.setattr(sums_module, "DIRECTIONS", 16)
    sketched = many.sums()
    assert sketched[0].cross.shape[2] == 16
    gram = lost_gram(*sketched, compensation)
    diagonal = exact.diagonal()[:24]
    assert float((gram.diagonal()[:24] / diagonal).mean()) == pytest.approx(1, abs=0.1)
    assert float((gram - exact).norm() / exact.norm()) < 0.25
    if compensation != "mean":
        for k in (3, 12):
            found, best = (chosen_error(many, each, compensation, k) for each in (gram, exact))
            assert found < 1.05 * best


def test_mixtures_of_weights_choose_as_well_as_all_weights(many, monkeypatch):
    exact = lost_gram(*many.sums(), "lstsq")
    monkeypatch.setattr(sums_module, "TERMS", 24)  # of 48
    mixed = many.sums()
    assert mixed[0].kinds["terms"] == 24
    gram = lost_gram(*mixed, "lstsq")
    assert float(gram.trace()) < 1.001 * float(lost_gram(*mixed, "mean").trace())
    for k in (3, 12):
        found, best = (chosen_error(many, each, "lstsq", k) for each in (gram, exact))
        assert found < 1.05 * best


def test_fewer_directions_are_looked_at_where_sums_are_large(many, monkeypatch):
    monkeypatch.setattr(sums_module, "CROSS", 0)
    assert many.sums()[0].cross.shape[2] == sums_module.LEAST_DIRECTIONS


# --- what explains the output
@pytest.mark.parametrize("width", [5, 80])
def test_shares_explained_are_those_of_regressions_on_the_rows(width):
    """With many outputs a sketch of them is taken, here of 32 directions."""
    case = make_case(p=2, width=width, samples=60)
    rows, kinds, _ = case.rows("affine")
    terms, output = kinds[0], case.seen.output.double().numpy()
    last = rows.shape[2] - 1
    left = []
    for index, sizes in (
        ([last], [1]),
        ([*range(terms, last + 1)], kinds[1:]),
        ([*range(terms), last], [terms, 1]),
        ([*range(last + 1)], kinds),
    ):
        some = rows[..., index]
        ridges = chosen_ridges(some, sizes, [len(index)], output)
        left.append(held_out_error(some, output, ridges, scale_of_kinds(some.reshape(-1, some.shape[-1]), sizes)))
    expected = [1 - each / left[0] for each in left[1:]]
    assert explained(*case.sums()).tolist() == pytest.approx(expected, abs=1e-4 if width == 5 else 0.03)
    assert 0 < expected[0] < expected[2]


def test_a_layer_that_is_linear_is_explained_by_a_linear_map():
    case = make_case(width=D)
    mask = case.seen.mask[:, :, None]
    generator = torch.Generator().manual_seed(5)
    maps = torch.randn(2, D, D, generator=generator, dtype=torch.float64)
    mean = case.seen.tokens.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    case.seen.output.copy_((case.seen.tokens @ maps[0] + mean @ maps[1] + 3) * mask)
    linear, router, both = explained(*case.sums()).tolist()
    assert linear > 0.9999
    assert both > 0.999
    assert router < 0.9


def test_sums_that_are_not_finite_explain_and_choose_nothing():
    case = make_case()
    case.seen.term_outputs[0, 0, 0, 0] = torch.inf
    case.seen.output[0, 0, 0] = torch.inf
    assert explained(*case.sums()).isnan().all()
    assert not lost_gram(*case.sums(), "affine").isfinite().all()


# --- halves
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
