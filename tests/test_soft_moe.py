from itertools import product

import pytest
import torch
from torch import Tensor

from moeprune.layers import experts as routed
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.experts import linear, top_k
from moeprune.layers.observation import Observation
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
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
COMPENSATIONS = ("none", "renorm", "mean", "lstsq", "affine")
SCOPES = ("static", "input", "batch")
WEIGHTS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def dense_layer(router_norm="l2", dispatch_input="normalized", p=2, dtype=torch.float64, n=N, expert="mlp",
                out_dim=None):  # fmt: skip
    generator = torch.Generator().manual_seed(0)
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


def surrogates(p=2, width=D) -> Tensor:
    return torch.randn(N, p, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def expert_scores(n=N) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(3))


def pruned_layer(dense, scope, k=2, compensation="none", u=None, signal="combine", scores=None):
    """The dense layer where the scope is None; with scope static the experts of the highest expert_scores
    are kept; what `affine` adds is random.
    """
    if scope is None:
        return dense
    n = dense.config.num_experts
    kept = tuple(top_k(expert_scores(n), k).tolist()) if scope == "static" else None
    plan = LayerPlan(scope, k, n, signal, compensation, kept)
    return with_random_affine(prune_layer(dense, plan, Calibrated(scores, u)))


def adaptive_layer(dense, share, compensation="none", most=N, u=None):
    plan = LayerPlan("input", most, N, "combine", compensation, mass=share)
    return with_random_affine(prune_layer(dense, plan, Calibrated(None, u)))


def with_random_affine(layer):
    generator = torch.Generator().manual_seed(9)
    for buffer in affine_of(layer).values():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return layer


def affine_of(layer) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in layer.named_buffers() if name.startswith("affine")}


def router(layer) -> tuple[str, str]:
    return layer.config.router_norm, layer.config.dispatch_input


def observe(layer, x, mask=None) -> Observation:
    seen = []
    layer.observer = seen.append
    layer(x, mask)
    layer.observer = None
    return seen[0]


def on_cpu(layer) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in layer.state_dict().items()}


def expected_sets(dense, x, scope, k, weights=None, use_mass=True) -> list[tuple[int, ...]] | None:
    """The best k experts of each input by the summed mass of all subsets; None where all run."""
    if scope is None:
        return None
    n = dense.config.num_experts
    if scope == "static":
        return [best_subset(expert_scores(n).tolist(), k)] * len(x)
    weights = [1.0] * n if weights is None else weights.tolist()
    masses = reference_mass(x.cpu(), on_cpu(dense), *router(dense)) if use_mass else [[1.0] * n] * len(x)
    scores = [[m * w for m, w in zip(row, weights, strict=True)] for row in masses]
    if scope == "batch":
        scores = [[sum(column) for column in zip(*scores, strict=True)]] * len(x)
    return [best_subset(row, k) for row in scores]


def ragged_sets(dense, x, share, most=N) -> list[tuple[int, ...]]:
    """For each input the fewest experts, of most mass first, that hold a share of it."""
    sets = []
    for row in reference_mass(x.cpu(), on_cpu(dense), *router(dense)):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        count = next(c for c in range(1, len(row) + 1) if sum(row[j] for j in order[:c]) >= share - 1e-12)
        sets.append(tuple(sorted(order[: min(count, most)])))
    return sets


def formulas(layer, dense, x, kept=None, u=None) -> Tensor:
    """What the dense layer gives when these experts run, with the compensation of the pruned layer."""
    compensation = layer.plan.compensation if layer.plan else "none"
    affine = {name: buffer.cpu() for name, buffer in affine_of(layer).items()}
    return reference_layer(x.cpu(), on_cpu(dense), *router(dense), kept, compensation, u, affine=affine)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


# --- dense
DENSE = [
    *({"router_norm": norm, "dispatch_input": form, "p": p} for (norm, form), p in product(ROUTERS, (1, 3))),
    *({"expert": expert, "out_dim": width} for expert, width in KINDS),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("settings", DENSE, ids=str)
def test_dense_layer_equals_the_formulas(settings, dtype):
    layer, x = dense_layer(**settings, dtype=dtype), inputs(dtype=dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (B, M, settings.get("out_dim") or D))
    assert relative_error(y, formulas(layer, layer, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("router_norm", "dispatch_input"), ROUTERS)
def test_observation_of_a_dense_layer_holds_combine_weights_and_term_outputs(router_norm, dispatch_input):
    layer, x = dense_layer(router_norm, dispatch_input, p=3), inputs(b=2)
    tensors = layer.state_dict()
    observation = observe(layer, x)
    assert observation.chosen is None
    assert torch.equal(observation.output, layer(x))
    for i, one in enumerate(x):
        logits, tokens = reference_router(one, tensors, router_norm, dispatch_input)
        assert relative_error(observation.weights[i], reference_combine(logits, range(N))) < 1e-10
        for j, q in product(range(N), range(3)):
            slot = reference_slot_output(logits[:, j, q], tokens, tensors, j)
            assert relative_error(observation.term_outputs[i, j, q], slot) < 1e-10


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_router_scales_equal_the_formulas(scale):
    layer, x = dense_layer(), inputs()
    layer.scale.fill_(scale)
    assert relative_error(layer(x), formulas(layer, layer, x)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("router_norm", ["none", "l2", "rms", "layer"])
def test_a_token_of_zeros_computes_finite_numbers(router_norm, dtype):
    layer, x = dense_layer(router_norm).to(dtype), inputs().to(dtype)
    x[1, 2] = 0
    assert layer(x).isfinite().all()


@pytest.mark.parametrize(("scope", "compensation"), [(None, "none"), ("static", "mean"), ("input", "affine")])
def test_images_and_single_tokens_are_taken_as_tokens(scope, compensation):
    layer = pruned_layer(dense_layer(), scope, 2, compensation, surrogates())
    x = torch.randn(B, 2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = layer(x.flatten(1, 2)).unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    assert torch.equal(layer(x.permute(0, 3, 1, 2)), expected)
    assert torch.equal(layer(x[:, 0, 0]), layer(x[:, 0, :1])[:, 0])


@pytest.mark.parametrize("scope", [None, *SCOPES])
def test_padding_changes_nothing_for_real_tokens(scope):
    """Inputs of 7 and 4 tokens in one padded batch give what each gives alone."""
    layer, x = pruned_layer(dense_layer(), scope, 2, "affine", surrogates()), inputs(b=2)
    mask = torch.ones(2, M, dtype=torch.bool)
    mask[1, 4:] = False
    seen, alone = observe(layer, x, mask), [observe(layer, x[:1]), observe(layer, x[1:, :4])]
    assert relative_error(seen.mass, torch.cat([one.mass for one in alone])) < 1e-12
    assert relative_error(seen.weights[1, :4], alone[1].weights[0]) < 1e-12
    assert not seen.weights[1, 4:].any()
    assert not seen.output[1, 4:].any()
    if scope == "batch":  # one input's choice depends on the other
        assert seen.chosen[0].tolist() == top_k(torch.cat([one.mass for one in alone]).sum(0), 2).tolist()
    else:
        assert relative_error(layer(x, mask)[:1], alone[0].output) < 1e-12
        assert relative_error(layer(x, mask)[1:, :4], alone[1].output) < 1e-12


# --- pruned
@pytest.fixture(params=["gathered", "in place"])
def _both_ways(request, monkeypatch):
    """Experts run on gathered copies of their weights, and in a loop over views."""
    if request.param == "in place":
        monkeypatch.setattr(routed, "GATHERED", 0)


SHAPES = [
    {"p": 1},
    {"router_norm": "rms", "dispatch_input": "raw", "p": 3},
    {"router_norm": "none", "dispatch_input": "raw", "dtype": torch.float32},
]
EXPERTS = [{"router_norm": "layer", "expert": expert, "out_dim": width} for expert, width in KINDS]


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("settings", "k"), [*product(SHAPES, (1, 2, N)), *((kind, 2) for kind in EXPERTS)], ids=str)
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_pruned_layer_equals_the_masked_formulas(scope, compensation, settings, k):
    dense = dense_layer(**settings)
    x, u = inputs(dtype=dense.phi.dtype), surrogates(dense.phi.shape[2], dense.fc2_bias.shape[1])
    given = u.clone()
    layer, kept = pruned_layer(dense, scope, k, compensation, u), expected_sets(dense, x, scope, k)
    assert torch.equal(u, given)
    assert scope != "static" or layer.plan.kept == kept[0]
    assert relative_error(layer(x), formulas(layer, dense, x, kept, u)) < TOLERANCE[x.dtype]


def test_static_surrogate_of_a_kept_slot_is_added_to_its_output():
    dense, x, u = dense_layer(), inputs(), surrogates()
    layer, [kept, *_] = (pruned_layer(dense, "static", 2, "lstsq", u), expected_sets(dense, inputs(), "static", 2))
    layer.surrogate = u[[*kept, *(j for j in range(N) if j not in kept)]]
    expected = reference_layer(x, dense.state_dict(), *router(dense), [kept] * B, "lstsq", u, static_correction=True)
    assert relative_error(layer(x), expected) < 1e-10


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_state_dict_of_a_static_layer_holds_only_the_kept_experts(compensation):
    dense = dense_layer()
    tensors = pruned_layer(dense, "static", 2, compensation, surrogates()).state_dict()
    expected = {
        "phi": (D, 2 if compensation == "renorm" else N, 2), "scale": (1,), "fc1_weight": (2, D, H),
        "fc1_bias": (2, H), "fc2_weight": (2, D, H), "fc2_bias": (2, D),
    }  # fmt: skip
    if compensation in ("mean", "lstsq", "affine"):
        expected["surrogate"] = (N, 2, D)
    if compensation == "affine":
        expected |= {"affine_token": (D, D), "affine_mean": (D, D), "affine_bias": (D,)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    kept = list(best_subset(expert_scores().tolist(), 2))
    assert all(torch.equal(tensors[name], dense.state_dict()[name][kept]) for name in WEIGHTS)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("compensation", ["none", "mean", "lstsq"])
def test_layer_without_kept_experts_gives_its_surrogates_alone(scope, compensation):
    dense, x, u = dense_layer(), inputs(), surrogates()
    y = pruned_layer(dense, scope, 0, compensation, u)(x)
    if compensation == "none":
        assert torch.equal(y, torch.zeros_like(x))
        return
    logits = (reference_router(one, dense.state_dict(), *router(dense))[0] for one in x)
    combine = torch.stack([reference_combine(of_one, range(N)) for of_one in logits])
    assert relative_error(y, torch.einsum("bmnp,npd->bmd", combine, u)) < 1e-10


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("share", "most"), [(0.3, N), (0.6, N), (0.95, N), (0.95, 2)])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_layer_with_a_mass_runs_the_fewest_experts_that_hold_it(settings, compensation, share, most):
    dense = dense_layer(**settings)
    x, u = inputs(dtype=dense.phi.dtype), surrogates(dense.phi.shape[2])
    layer, kept = adaptive_layer(dense, share, compensation, most, u), ragged_sets(dense, x, share, most)
    assert relative_error(layer(x), formulas(layer, dense, x, kept, u)) < TOLERANCE[x.dtype]
    observation = observe(layer, x)
    assert [tuple(j for j in row if j < N) for row in observation.chosen.tolist()] == kept
    assert not observation.term_outputs[observation.chosen == N].any()


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_with_a_mass_inputs_run_different_numbers_of_experts(compensation):
    dense, x, u = dense_layer(), inputs(b=12), surrogates()
    dense.scale.fill_(8)
    kept = ragged_sets(dense, x, 0.6)
    assert {len(experts) for experts in kept} == {2, 3}
    layer = adaptive_layer(dense, 0.6, compensation, u=u)
    assert relative_error(layer(x), formulas(layer, dense, x, kept, u)) < 1e-10


# --- which experts run
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("signal", ["combine", "deviation", "random"])
@pytest.mark.parametrize("scope", ["input", "batch"])
def test_chosen_experts_are_the_best_subset_of_all(scope, signal, k):
    dense, x = dense_layer(n=6), inputs(b=6)
    weights = None if signal == "combine" else expert_scores(6)
    layer = pruned_layer(dense, scope, k, signal=signal, scores=weights)
    expected = expected_sets(dense, x, scope, k, weights, use_mass=signal != "random")
    assert [tuple(row) for row in observe(layer, x).chosen.tolist()] == expected
    if signal == "combine" and k == 3:  # or this says little
        assert (len(set(expected)) > 1) == (scope == "input")


@pytest.mark.parametrize("k", [0, 1, 7, 150, 299, 300])
def test_best_k_are_those_of_a_stable_sort_in_ascending_order(k):
    generator = torch.Generator().manual_seed(6)
    few = torch.randint(3, (300,), generator=generator) / 2
    scores = torch.stack([torch.rand(300, generator=generator), few, torch.zeros(300)])
    expected = [sorted(sorted(range(300), key=lambda j: (-row[j], j))[:k]) for row in scores.tolist()]
    assert top_k(scores, k).tolist() == [top_k(row, k).tolist() for row in scores] == expected


@pytest.mark.parametrize("scope", ["input", "batch"])
def test_experts_of_equal_mass_tie_to_the_lower_index(scope):
    dense = dense_layer(n=8)
    dense.phi.zero_()  # all combine weights are exactly 1/16
    assert observe(pruned_layer(dense, scope, 3), inputs(b=2)).chosen.tolist() == [[0, 1, 2]] * 2


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("scope", ["input", "batch"])
def test_weights_of_experts_that_no_input_chose_are_not_used(scope):
    layer, x = pruned_layer(dense_layer(n=6), scope), inputs(b=2)
    before, chosen = layer(x), observe(layer, x).chosen
    unused = sorted(set(range(6)) - set(chosen.flatten().tolist()))
    assert unused
    for name in WEIGHTS:
        getattr(layer, name)[unused] = torch.nan
    assert torch.equal(layer(x), before)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_scope_input_does_not_depend_on_how_inputs_are_batched_and_is_batch_for_one_input(compensation):
    x, u = inputs(b=6), surrogates()
    layer, by_batch = (pruned_layer(dense_layer(), scope, 2, compensation, u) for scope in ("input", "batch"))
    together, alone = observe(layer, x), [observe(layer, one[None]) for one in x]
    assert torch.equal(together.chosen, torch.cat([one.chosen for one in alone]))
    assert relative_error(together.output, torch.cat([one.output for one in alone])) < 1e-12
    assert torch.equal(by_batch(x[:1]), alone[0].output)


# --- gradients and precision
@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(
    ("scope", "compensation"),
    [
        (None, "none"), ("static", "renorm"), ("static", "mean"), ("input", "none"), ("input", "mean"),
        ("batch", "renorm"),
    ],
)  # fmt: skip
def test_calls_with_and_without_gradients_agree_and_gradients_are_those_of_the_formulas(scope, compensation):
    dense, u = dense_layer(), surrogates()
    layer = pruned_layer(dense, scope, 2, compensation, u)
    x, x_reference = inputs().requires_grad_(), inputs().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    formulas(layer, dense, x_reference, expected_sets(dense, inputs(), scope, 2), u).square().sum().backward()
    assert relative_error(x.grad, x_reference.grad) < 1e-8
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scope", [None, *SCOPES])
def test_watching_a_layer_changes_nothing(scope, dtype):
    """Choices between experts that differ little are made in float32, watched or not."""
    layer, x = pruned_layer(dense_layer(n=40), scope, 20).to(dtype), inputs(b=8).to(dtype)
    assert torch.equal(layer(x), observe(layer, x).output)


@pytest.mark.usefixtures("_both_ways")
def test_only_experts_that_ran_get_gradients():
    layer, x = pruned_layer(dense_layer(n=6), "input").requires_grad_(), inputs(b=2)
    layer(x).square().sum().backward()
    with_gradient = {j for j in range(6) if layer.fc1_weight.grad[j].abs().sum() > 0}
    assert with_gradient == set(observe(layer, x).chosen.flatten().tolist())


@pytest.mark.parametrize("counts", [[3, 0, 2, 4], [0, 0, 0, 9], [9, 0, 0, 0], [1, 1, 1, 1], [0, 5, 0, 0]])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wide", [8, 6, 256])
def test_grouped_matrix_product_equals_a_product_for_each_expert(counts, transposed, wide):
    """Both layouts of the weights, that of the first and that of the second matrix of an MLP, of rows that torch's own
    grouped product takes and others, tiny weights and larger ones; and under autocast in its precision.
    """
    generator = torch.Generator().manual_seed(4)
    n, narrow = len(counts), max(16, wide)
    rows = torch.randn(sum(counts), wide, generator=generator)
    weight = torch.randn((n, narrow, wide) if transposed else (n, wide, narrow), generator=generator)
    weight = weight.mT if transposed else weight
    bias = torch.randn(n, narrow, generator=generator)
    of_row = torch.arange(n).repeat_interleave(torch.tensor(counts))
    without = torch.einsum("rw,rwn->rn", rows.double(), weight[of_row].double())
    assert relative_error(linear(rows, weight, None, counts), without) < 1e-5
    assert relative_error(linear(rows.double(), weight.double(), None, counts), without) < 1e-12
    expected = without + bias[of_row].double()
    assert relative_error(linear(rows, weight, bias, counts), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        rough = linear(rows, weight, bias, counts)
    assert rough.dtype == torch.bfloat16
    assert relative_error(rough, expected) < 0.02


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("scope", "compensation"), [(None, "none"), *product(SCOPES, COMPENSATIONS)])
def test_bfloat16_autocast_stays_near_float32(scope, compensation):
    x = inputs(dtype=torch.float32)
    layer = pruned_layer(dense_layer(dtype=torch.float32), scope, 2, compensation, surrogates())
    exact = observe(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = observe(layer, x)
    assert rough.weights.dtype == torch.float32
    assert exact.chosen is None or torch.equal(rough.chosen, exact.chosen)
    assert 1e-5 < relative_error(rough.output, exact.output) < 0.03
