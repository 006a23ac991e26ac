from itertools import product

import pytest
import torch
from torch import Tensor

from moeprune.layers import experts as routed
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.experts import grouped_linear
from moeprune.layers.observation import SlotObservation as Observation
from moeprune.layers.scores import top_k
from moeprune.layers.soft_moe import SoftMoE
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.plan import LayerPlan
from tests.reference import (
    best_subset,
    reference_combine,
    reference_layer,
    reference_mass,
    reference_router,
    reference_slot_output,
)

B, M, D, N, H = 4, 7, 10, 5, 6
ROUTERS = list(product(("none", "l2", "rms", "layer"), ("raw", "normalized")))
KINDS = [("mlp", None), ("geglu", None), ("linear", None), ("mlp", 7), ("linear", 13)]
TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
COMPENSATIONS = ("none", "renorm", "mean", "lstsq", "affine")


def dense_layer(
    router_norm="l2",
    dispatch_input="normalized",
    p=2,
    dtype=torch.float64,
    n=N,
    seed=0,
    expert="mlp",
    out_dim=None,
):
    generator = torch.Generator().manual_seed(seed)
    hidden = None if expert == "linear" else H
    layer = SoftMoE(SoftMoEConfig(D, n, p, hidden, router_norm, dispatch_input, expert, out_dim)).to(dtype)
    layer.reset_parameters(generator, scale=4.0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("gain"):
                parameter.uniform_(0.5, 1.5, generator=generator)
    return layer.requires_grad_(False).eval()


def inputs(b=B, dtype=torch.float64, seed=1) -> Tensor:
    return torch.randn(b, M, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def surrogates(p=2, n=N, seed=2, width=D) -> Tensor:
    return torch.randn(n, p, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expert_scores(n=N, seed=3) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def pruned_layer(dense, scope, k, compensation="none", signal="combine", scores=None, slot_mean=None):
    n = dense.config.num_experts
    """With scope static the k experts of the highest scores are kept; what `affine` adds is random."""
    kept = None
    if scope == "static":
        kept, scores = tuple(top_k(scores, k).tolist()), None
    plan = LayerPlan(scope, k, n, signal, compensation, kept)
    return with_random_affine(prune_layer(dense, plan, Calibrated(scores, slot_mean)))


def with_random_affine(layer):
    generator = torch.Generator().manual_seed(9)
    for name, buffer in layer.named_buffers():
        if name.startswith("affine"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return layer


def affine_of(layer) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in layer.named_buffers() if name.startswith("affine")}


def router(layer) -> tuple[str, str]:
    return layer.config.router_norm, layer.config.dispatch_input


def observe(layer, x) -> Observation:
    seen = []
    layer.observer = seen.append
    layer(x)
    layer.observer = None
    return seen[0]


def expected_sets(dense, x, scope, k, weights=None, use_mass=True) -> list[tuple[int, ...]]:
    """The best k experts of each input by the summed mass of all subsets."""
    n = dense.config.num_experts
    weights = [1.0] * n if weights is None else weights.tolist()
    masses = reference_mass(x, dense.state_dict(), *router(dense)) if use_mass else [[1.0] * n] * len(x)
    scores = [[m * w for m, w in zip(row, weights, strict=True)] for row in masses]
    if scope == "batch":
        scores = [[sum(column) for column in zip(*scores, strict=True)]] * len(x)
    return [best_subset(row, k) for row in scores]


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


# --- dense -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize(("router_norm", "dispatch_input"), ROUTERS)
def test_dense_layer_equals_the_formulas(router_norm, dispatch_input, p, dtype, tolerance):
    layer, x = dense_layer(router_norm, dispatch_input, p, dtype), inputs(dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, reference_layer(x, layer.state_dict(), router_norm, dispatch_input)) < tolerance


@pytest.mark.parametrize(("router_norm", "dispatch_input"), ROUTERS)
def test_observation_of_a_dense_layer_holds_combine_weights_and_slot_outputs(router_norm, dispatch_input):
    layer, x = dense_layer(router_norm, dispatch_input, p=3), inputs(b=2)
    tensors = layer.state_dict()
    observation = observe(layer, x)
    assert observation.chosen is None
    assert torch.equal(observation.output, layer(x))
    for i, one in enumerate(x):
        logits, tokens = reference_router(one, tensors, router_norm, dispatch_input)
        combine = reference_combine(logits, range(N))
        assert relative_error(observation.weights[i], combine) < 1e-10
        for j, q in product(range(N), range(3)):
            slot = reference_slot_output(logits[:, j, q], tokens, tensors, j)
            assert relative_error(observation.slot_outputs[i, j, q], slot) < 1e-10


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_router_scales_equal_the_formulas(scale):
    layer, x = dense_layer(), inputs()
    layer.scale.fill_(scale)
    assert relative_error(layer(x), reference_layer(x, layer.state_dict(), "l2", "normalized")) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("router_norm", ["none", "l2", "rms", "layer"])
def test_a_token_of_zeros_computes_finite_numbers(router_norm, dtype):
    layer, x = dense_layer(router_norm).to(dtype), inputs().to(dtype)
    x[1, 2] = 0
    assert layer(x).isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("expert", "out_dim"), KINDS)
def test_dense_layer_of_every_kind_of_expert_equals_the_formulas(expert, out_dim, dtype, tolerance):
    layer, x = dense_layer(dtype=dtype, expert=expert, out_dim=out_dim), inputs(dtype=dtype)
    expected = reference_layer(x, layer.state_dict(), "l2", "normalized")
    assert layer(x).shape == (B, M, out_dim or D)
    assert relative_error(layer(x), expected) < tolerance


@pytest.mark.parametrize(("scope", "compensation"), [(None, "none"), ("static", "mean"), ("input", "affine")])
def test_images_and_single_tokens_are_taken_as_tokens(scope, compensation):
    dense, u, scores = dense_layer(), surrogates(), expert_scores() if scope == "static" else None
    layer = dense if scope is None else pruned_layer(dense, scope, 2, compensation, "combine", scores, u)
    x = torch.randn(B, 2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = layer(x.flatten(1, 2))
    assert (
        relative_error(layer(x.permute(0, 3, 1, 2)), expected.unflatten(1, (2, 3)).permute(0, 3, 1, 2)) == 0
    )
    assert relative_error(layer(x[:, 0, 0]), layer(x[:, 0, :1])[:, 0]) == 0


@pytest.mark.parametrize("scope", [None, "static", "input", "batch"])
def test_padding_changes_nothing_for_real_tokens(scope):
    """Inputs of 7 and 4 tokens in one padded batch give what each gives alone."""
    dense, u, scores = dense_layer(), surrogates(), expert_scores() if scope == "static" else None
    layer = dense if scope is None else pruned_layer(dense, scope, 2, "affine", "combine", scores, u)
    x = inputs(b=2)
    mask = torch.ones(2, M, dtype=torch.bool)
    mask[1, 4:] = False
    seen = []
    layer.observer = seen.append
    together = layer(x, mask)
    layer.observer = None
    if scope != "batch":  # there one input's choice depends on the other
        assert relative_error(together[:1], layer(x[:1])) < 1e-12
        assert relative_error(together[1:, :4], layer(x[1:, :4])) < 1e-12
    alone = [observe(layer, x[:1]), observe(layer, x[1:, :4])]
    assert relative_error(seen[0].mass, torch.cat([one.mass for one in alone])) < 1e-12
    assert relative_error(seen[0].weights[1, :4], alone[1].weights[0]) < 1e-12
    assert not seen[0].weights[1, 4:].any()
    assert not seen[0].output[1, 4:].any()
    if scope == "batch":
        scores = torch.cat([one.mass for one in alone]).sum(0)
        assert seen[0].chosen[0].tolist() == top_k(scores, 2).tolist()


# --- pruned ------------------------------------------------------------------------------------


@pytest.fixture(params=["gathered", "in place"])
def _both_ways(request, monkeypatch):
    """Experts run on gathered copies of their weights, and in a loop over views."""
    if request.param == "in place":
        monkeypatch.setattr(routed, "GATHERED", 0)


PRUNED_SHAPES = [
    ("l2", "normalized", 1, torch.float64, 1e-10),
    ("rms", "raw", 3, torch.float64, 1e-10),
    ("none", "raw", 2, torch.float32, 1e-5),
]


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("k", [1, 2, N])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("scope", ["input", "batch"])
@pytest.mark.parametrize(("router_norm", "dispatch_input", "p", "dtype", "tolerance"), PRUNED_SHAPES)
def test_routed_layer_equals_the_masked_formulas(
    router_norm, dispatch_input, p, dtype, tolerance, scope, compensation, k
):
    dense, x, u = dense_layer(router_norm, dispatch_input, p, dtype), inputs(dtype=dtype), surrogates(p)
    layer = pruned_layer(dense, scope, k, compensation, slot_mean=u)
    kept = expected_sets(dense, x, scope, k)
    expected = reference_layer(
        x, dense.state_dict(), *router(dense), kept, compensation, u, affine=affine_of(layer)
    )
    assert relative_error(layer(x), expected) < tolerance


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("expert", "out_dim"), KINDS)
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("scope", ["static", "input", "batch"])
def test_pruned_layer_of_every_kind_of_expert_equals_the_masked_formulas(
    scope, compensation, expert, out_dim
):
    dense, x = dense_layer("layer", expert=expert, out_dim=out_dim), inputs()
    u, scores = surrogates(width=out_dim or D), expert_scores() if scope == "static" else None
    layer = pruned_layer(dense, scope, 2, compensation, scores=scores, slot_mean=u)
    if scope == "static":
        kept = [best_subset(scores.tolist(), 2)] * B
    else:
        kept = expected_sets(dense, x, scope, 2)
    expected = reference_layer(
        x, dense.state_dict(), *router(dense), kept, compensation, u, affine=affine_of(layer)
    )
    assert relative_error(layer(x), expected) < 1e-10


@pytest.mark.parametrize("k", [1, 2, N])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(("router_norm", "dispatch_input", "p", "dtype", "tolerance"), PRUNED_SHAPES)
def test_static_layer_equals_the_masked_formulas(
    router_norm, dispatch_input, p, dtype, tolerance, compensation, k
):
    dense, x, u, scores = (
        dense_layer(router_norm, dispatch_input, p, dtype),
        inputs(dtype=dtype),
        surrogates(p),
        expert_scores(),
    )
    given = u.clone()
    layer = pruned_layer(dense, "static", k, compensation, scores=scores, slot_mean=u)
    kept = best_subset(scores.tolist(), k)
    assert layer.plan.kept == kept
    assert torch.equal(u, given)
    expected = reference_layer(
        x, dense.state_dict(), *router(dense), [kept] * B, compensation, u, affine=affine_of(layer)
    )
    assert relative_error(layer(x), expected) < tolerance


def test_static_surrogate_of_a_kept_slot_is_added_to_its_output():
    dense, x, u, scores = dense_layer(), inputs(), surrogates(), expert_scores()
    layer = pruned_layer(dense, "static", 2, "lstsq", scores=scores, slot_mean=u)
    kept = best_subset(scores.tolist(), 2)
    layer.surrogate = u[[*kept, *(j for j in range(N) if j not in kept)]]
    expected = reference_layer(
        x, dense.state_dict(), *router(dense), [kept] * B, "lstsq", u, static_correction=True
    )
    assert relative_error(layer(x), expected) < 1e-10


@pytest.mark.parametrize(
    ("compensation", "routed"), [("none", N), ("renorm", 2), ("mean", N), ("lstsq", N), ("affine", N)]
)
def test_state_dict_of_a_static_layer_holds_only_the_kept_experts(compensation, routed):
    dense, scores = dense_layer(), expert_scores()
    layer = pruned_layer(dense, "static", 2, compensation, scores=scores, slot_mean=surrogates())
    kept = list(best_subset(scores.tolist(), 2))
    tensors = layer.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {
        "phi": (D, routed, 2),
        "scale": (1,),
        "fc1_weight": (2, D, H),
        "fc1_bias": (2, H),
        "fc2_weight": (2, D, H),
        "fc2_bias": (2, D),
    }
    if compensation in ("mean", "lstsq", "affine"):
        expected["surrogate"] = (N, 2, D)
    if compensation == "affine":
        expected |= {"affine_token": (D, D), "affine_mean": (D, D), "affine_bias": (D,)}
    assert shapes == expected
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        assert torch.equal(tensors[name], dense.state_dict()[name][kept])


@pytest.mark.parametrize("scope", ["static", "input", "batch"])
@pytest.mark.parametrize("compensation", ["none", "mean", "lstsq"])
def test_layer_without_kept_experts_gives_its_surrogates_alone(scope, compensation):
    dense, x, u = dense_layer(), inputs(), surrogates()
    scores = expert_scores() if scope == "static" else None
    layer = pruned_layer(dense, scope, 0, compensation, scores=scores, slot_mean=u)
    y = layer(x)
    if compensation == "none":
        assert torch.equal(y, torch.zeros_like(x))
    else:
        combine = torch.stack(
            [
                reference_combine(reference_router(one, dense.state_dict(), *router(dense))[0], range(N))
                for one in x
            ]
        )
        assert relative_error(y, torch.einsum("bmnp,npd->bmd", combine, u)) < 1e-10


def ragged_sets(dense, x, share, most=N) -> list[tuple[int, ...]]:
    """For each input the fewest experts, of most mass first, that hold a share of it."""
    sets = []
    for row in reference_mass(x, dense.state_dict(), *router(dense)):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        count = next(c for c in range(1, len(row) + 1) if sum(row[j] for j in order[:c]) >= share - 1e-12)
        sets.append(tuple(sorted(order[: min(count, most)])))
    return sets


def adaptive_layer(dense, share, compensation="none", most=N, slot_mean=None):
    plan = LayerPlan("input", most, N, "combine", compensation, mass=share)
    return with_random_affine(prune_layer(dense, plan, Calibrated(None, slot_mean)))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("share", "most"), [(0.3, N), (0.6, N), (0.95, N), (0.95, 2)])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(("router_norm", "dispatch_input", "p", "dtype", "tolerance"), PRUNED_SHAPES)
def test_layer_with_a_mass_runs_the_fewest_experts_that_hold_it(
    router_norm, dispatch_input, p, dtype, tolerance, compensation, share, most
):
    dense, x, u = dense_layer(router_norm, dispatch_input, p, dtype), inputs(dtype=dtype), surrogates(p)
    layer = adaptive_layer(dense, share, compensation, most, u)
    kept = ragged_sets(dense, x, share, most)
    expected = reference_layer(
        x, dense.state_dict(), *router(dense), kept, compensation, u, affine=affine_of(layer)
    )
    assert relative_error(layer(x), expected) < tolerance
    observation = observe(layer, x)
    found = [tuple(j for j in row if j < N) for row in observation.chosen.tolist()]
    assert found == kept
    assert not observation.slot_outputs[observation.chosen == N].any()


def test_with_a_mass_inputs_run_different_numbers_of_experts():
    dense, x = dense_layer(), inputs(b=12)
    dense.scale.fill_(8)
    kept = ragged_sets(dense, x, 0.6)
    assert {len(experts) for experts in kept} == {2, 3}
    for compensation in COMPENSATIONS:
        layer = adaptive_layer(dense, 0.6, compensation, slot_mean=surrogates())
        expected = reference_layer(
            x, dense.state_dict(), *router(dense), kept, compensation, surrogates(), affine=affine_of(layer)
        )
        assert relative_error(layer(x), expected) < 1e-10


# --- which experts run -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("signal", ["combine", "deviation", "random"])
@pytest.mark.parametrize("scope", ["input", "batch"])
def test_chosen_experts_are_the_best_subset_of_all(scope, signal, k):
    dense, x, scores = dense_layer(n=6), inputs(b=6), expert_scores(n=6)
    weights = None if signal == "combine" else scores
    layer = pruned_layer(dense, scope, k, signal=signal, scores=weights)
    expected = expected_sets(dense, x, scope, k, weights, use_mass=signal != "random")
    assert [tuple(row) for row in observe(layer, x).chosen.tolist()] == expected


def test_inputs_choose_different_experts_and_a_batch_shares_one_set():
    dense, x = dense_layer(n=6), inputs(b=6)
    own = {tuple(row) for row in observe(pruned_layer(dense, "input", 2), x).chosen.tolist()}
    shared = {tuple(row) for row in observe(pruned_layer(dense, "batch", 2), x).chosen.tolist()}
    assert len(own) > 1
    assert len(shared) == 1


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, 2.0, 1.0, 1.0], 2, [1, 2]),
        ([3.0, 1.0, 3.0, 3.0], 2, [0, 2]),
        ([1.0, 2.0, 3.0, 3.0], 3, [1, 2, 3]),
        ([5.0, 4.0], 0, []),
    ],
)
def test_best_k_break_ties_to_the_lower_index_and_ascend(scores, k, expected):
    assert top_k(torch.tensor(scores), k).tolist() == expected


@pytest.mark.parametrize("k", [1, 7, 150, 299, 300])
def test_best_k_of_many_rows_with_and_without_ties_are_those_of_a_stable_sort(k):
    generator = torch.Generator().manual_seed(6)
    scores = torch.stack(
        [
            torch.rand(300, generator=generator),
            torch.randint(3, (300,), generator=generator) / 2,
            torch.zeros(300),
        ]
    )
    expected = [sorted(sorted(range(300), key=lambda j: (-row[j], j))[:k]) for row in scores.tolist()]
    assert top_k(scores, k).tolist() == expected
    for row, experts in zip(scores, expected, strict=True):
        assert top_k(row, k).tolist() == experts


@pytest.mark.parametrize("scope", ["input", "batch"])
def test_experts_of_equal_mass_tie_to_the_lower_index(scope):
    dense = dense_layer(n=8)
    dense.phi.zero_()  # all combine weights are exactly 1/16
    chosen = observe(pruned_layer(dense, scope, 3), inputs(b=2)).chosen
    assert chosen.tolist() == [[0, 1, 2]] * 2


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("scope", ["input", "batch"])
def test_weights_of_experts_that_no_input_chose_are_not_used(scope):
    dense, x = dense_layer(n=6), inputs(b=2)
    layer = pruned_layer(dense, scope, 2)
    before, chosen = layer(x), observe(layer, x).chosen
    unused = sorted(set(range(6)) - set(chosen.flatten().tolist()))
    assert unused
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        getattr(layer, name)[unused] = torch.nan
    assert torch.equal(layer(x), before)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_scope_input_does_not_depend_on_how_inputs_are_batched(compensation):
    dense, x = dense_layer(), inputs(b=6)
    layer = pruned_layer(dense, "input", 2, compensation, slot_mean=surrogates())
    together, alone = observe(layer, x), [observe(layer, one[None]) for one in x]
    assert torch.equal(together.chosen, torch.cat([one.chosen for one in alone]))
    assert relative_error(together.output, torch.cat([one.output for one in alone])) < 1e-12


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_scope_batch_on_one_input_is_scope_input(compensation):
    dense, x = dense_layer(), inputs(b=1)
    by_input, by_batch = (
        pruned_layer(dense, scope, 2, compensation, slot_mean=surrogates()) for scope in ("input", "batch")
    )
    assert torch.equal(by_input(x), by_batch(x))


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("scope", ["static", "input", "batch"])
def test_layer_that_keeps_all_experts_equals_the_dense_one(scope, compensation):
    dense, x = dense_layer(p=3), inputs()
    scores = expert_scores() if scope == "static" else None
    layer = pruned_layer(dense, scope, N, compensation, scores=scores, slot_mean=surrogates(3))
    assert relative_error(layer(x), dense(x)) < 1e-12


# --- gradients and precision -------------------------------------------------------------------


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(
    ("scope", "compensation"),
    [
        (None, "none"),
        ("static", "renorm"),
        ("static", "mean"),
        ("input", "none"),
        ("input", "mean"),
        ("batch", "renorm"),
    ],
)
def test_calls_with_and_without_gradients_agree_and_gradients_are_those_of_the_formulas(scope, compensation):
    dense, u, scores = dense_layer(), surrogates(), expert_scores() if scope == "static" else None
    layer = dense if scope is None else pruned_layer(dense, scope, 2, compensation, "combine", scores, u)
    x, x_reference = inputs().requires_grad_(), inputs().requires_grad_()
    if scope is None:
        kept = None
    elif scope == "static":
        kept = [best_subset(scores.tolist(), 2)] * B
    else:
        kept = expected_sets(dense, x.detach(), scope, 2)
    y = layer(x)
    y.square().sum().backward()
    expected = reference_layer(
        x_reference, dense.state_dict(), *router(dense), kept, compensation, u, affine=affine_of(layer)
    )
    expected.square().sum().backward()
    assert relative_error(x.grad, x_reference.grad) < 1e-8
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scope", [None, "static", "input", "batch"])
def test_watching_a_layer_changes_nothing(scope, dtype):
    """Choices between experts that differ little are made in float32, watched or not."""
    dense, scores = dense_layer(n=40), expert_scores(40) if scope == "static" else None
    layer = dense if scope is None else pruned_layer(dense, scope, 20, scores=scores)
    layer.to(dtype)
    x = inputs(b=8).to(dtype)
    assert torch.equal(layer(x), observe(layer, x).output)


@pytest.mark.usefixtures("_both_ways")
def test_only_experts_that_ran_get_gradients():
    dense, x = dense_layer(n=6), inputs(b=2)
    layer = pruned_layer(dense, "input", 2).requires_grad_()
    layer(x).square().sum().backward()
    with_gradient = {j for j in range(6) if layer.fc1_weight.grad[j].abs().sum() > 0}
    assert with_gradient == set(observe(layer, x).chosen.flatten().tolist())


@pytest.mark.parametrize("counts", [[3, 0, 2, 4], [0, 0, 0, 9], [9, 0, 0, 0], [1, 1, 1, 1], [0, 5, 0, 0]])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matrix_product_equals_a_product_for_each_expert(counts, transposed):
    """Both layouts of the weights: that of the first and that of the second matrix of an MLP."""
    generator = torch.Generator().manual_seed(4)
    n, wide, narrow = len(counts), 8, 12
    rows = torch.randn(sum(counts), wide, generator=generator)
    shape = (n, narrow, wide) if transposed else (n, wide, narrow)
    weight = torch.randn(shape, generator=generator)
    weight = weight.mT if transposed else weight
    bias = torch.randn(n, narrow, generator=generator)
    expert_of_row = [j for j, count in enumerate(counts) for _ in range(count)]
    expected = torch.stack(
        [
            row.double() @ weight[j].double() + bias[j].double()
            for row, j in zip(rows, expert_of_row, strict=True)
        ]
    )
    assert relative_error(grouped_linear(rows, counts, weight, bias), expected) < 1e-5


@pytest.mark.parametrize("counts", [[3, 0, 2, 4], [0, 0, 0, 9]])
def test_grouped_matrix_product_runs_in_the_autocast_precision(counts):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(9, 8, generator=generator)
    weight, bias = torch.randn(4, 8, 16, generator=generator), torch.randn(4, 16, generator=generator)
    exact = grouped_linear(rows, counts, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        rough = grouped_linear(rows, counts, weight, bias)
    assert rough.dtype == torch.bfloat16
    assert relative_error(rough, exact) < 0.02


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(
    ("scope", "compensation"), [(None, "none"), *product(("static", "input", "batch"), COMPENSATIONS)]
)
def test_bfloat16_autocast_stays_near_float32(scope, compensation):
    dense, x, u = dense_layer(dtype=torch.float32), inputs(dtype=torch.float32), surrogates()
    scores = expert_scores() if scope == "static" else None
    layer = dense if scope is None else pruned_layer(dense, scope, 2, compensation, "combine", scores, u)
    exact = observe(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = observe(layer, x)
    assert rough.weights.dtype == torch.float32
    if exact.chosen is not None:
        assert torch.equal(rough.chosen, exact.chosen)
    assert 1e-5 < relative_error(rough.output, exact.output) < 0.03
