"""The GPU kernels: on a GPU where there is one, else on the CPU through Triton's interpreter."""

import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import moeprune
from moeprune.layers import experts as routed
from moeprune.layers import soft_moe
from moeprune.layers.experts import top_k
from moeprune.layers.surgery import prune_layer
from moeprune.plan import LayerPlan
from tests import test_activations as activations
from tests import test_soft_moe as layers
from tests.stock import some_slow
from tests.test_soft_moe import COMPENSATIONS, KINDS, ROUTERS, SCOPES, D, N, observe, relative_error, surrogates

kernels = pytest.importorskip("moeprune.layers.kernels", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
no_bfloat16 = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no bfloat16 product")
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=no_bfloat16)]
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
PRUNINGS = list(product(SCOPES, COMPENSATIONS))
ROUGH = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def _through_kernels(monkeypatch):
    """Layers compute with the kernels: on a GPU by themselves."""
    if DEVICE == "cpu":
        for module in (routed, soft_moe):
            monkeypatch.setattr(module, "kernels_for", lambda *tensors: kernels)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def chosen_experts(b, n, k, seed=0):
    return top_k(torch.rand(b, n, generator=torch.Generator().manual_seed(seed)), k).to(DEVICE)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 2), (16, 16), (37, 1), (130, 17)])
def test_choose_is_top_k_with_its_ties(n, k):
    random_scores = torch.rand(6, n, generator=torch.Generator().manual_seed(1))
    scores = torch.cat([random_scores, (random_scores * 3).round(), torch.zeros(1, n)]).to(DEVICE)
    assert torch.equal(kernels.choose(scores, k).cpu(), top_k(scores.cpu(), k))
    shared = scores[:1].expand(4, n)
    assert torch.equal(kernels.choose(shared, k).cpu(), top_k(shared.cpu(), k))


def test_choose_stays_inside_its_output_when_scores_are_nan():
    scores = torch.tensor([[torch.nan, 1.0, torch.nan, 0.0, 2.0], [torch.nan] * 5], device=DEVICE)
    chosen = kernels.choose(scores, 2)
    assert chosen.shape == (2, 2)
    assert ((chosen >= 0) & (chosen < 5)).all()


@pytest.mark.parametrize(("b", "n", "k"), [(1, 5, 2), (7, 5, 2), (3, 4, 4), (300, 6, 5)])
def test_pairs_are_grouped_by_expert(b, n, k):
    chosen = chosen_experts(b, n, k)
    pairs, counts = kernels.group_by_expert(chosen, n)
    for expert in range(n):
        expected = (chosen.flatten() == expert).nonzero().flatten()
        assert counts[expert] == len(expected)
        assert torch.equal(pairs[expert, : len(expected)].long(), expected)


@pytest.mark.mostly_slow(10)
@pytest.mark.parametrize(
    ("b", "n", "k", "p", "width_in", "width_out"),
    [
        (1, 5, 2, 1, 17, 33), (6, 5, 2, 3, 20, 70), (9, 3, 2, 4, 64, 16), (40, 2, 1, 1, 130, 8),
        (1, 5, 2, 17, 8, 8), (2, 8, 8, 33, 8, 8), (1, 4, 1, 100, 8, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("gelu", "with_bias"), [(False, True), (True, True), (True, False)])
def test_grouped_product_equals_a_product_for_each_row(b, n, k, p, width_in, width_out, transposed, gelu, with_bias):
    chosen, rows = chosen_experts(b, n, k), random(b * k, p, width_in)
    weight = random(n, width_out, width_in, seed=1).mT if transposed else random(n, width_in, width_out)
    bias = random(n, width_out, seed=2) if with_bias else None
    of_row = chosen.flatten().long()
    expected = torch.einsum("rpi,rio->rpo", rows.double(), weight[of_row].double())
    if bias is not None:
        expected = expected + bias[of_row, None].double()
    found = kernels.grouped_linear(rows, *kernels.group_by_expert(chosen, n), weight, bias, gelu)
    assert relative_error(found, F.gelu(expected) if gelu else expected) < 1e-5


def test_grouped_product_reads_no_expert_that_has_no_row():
    chosen = torch.tensor([[0, 3], [0, 4]], device=DEVICE)
    rows, weight, bias = random(4, 2, 8), random(6, 8, 16), random(6, 16)
    groups = kernels.group_by_expert(chosen, 6)
    before = kernels.grouped_linear(rows, *groups, weight, bias)
    weight[[1, 2, 5]] = bias[[1, 2, 5]] = torch.nan
    assert torch.equal(kernels.grouped_linear(rows, *groups, weight, bias), before)


@pytest.mark.parametrize("dtype", HALVES)
def test_grouped_product_converts_weights_to_the_type_of_the_rows(dtype):
    chosen, rows = chosen_experts(5, 4, 2), random(10, 1, 32, dtype=dtype)
    weight, bias = random(4, 32, 24, seed=1), random(4, 24, seed=2)
    groups = kernels.group_by_expert(chosen, 4)
    found = kernels.grouped_linear(rows, *groups, weight, bias)
    assert found.dtype == dtype
    assert 1e-5 < relative_error(found, kernels.grouped_linear(rows.float(), *groups, weight, bias)) < ROUGH[dtype]


@pytest.mark.parametrize(("shape", "dim"), [((2, 7, 10), -1), ((10, 37), 0), ((1, 1, 1), -1), ((9000, 3), 0)])
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("with_factor", [False, True])
def test_unit_vectors(shape, dim, with_gain, with_factor):
    x = random(*shape)
    x.select(1 if dim == 0 else -2, 0).zero_()  # a vector of zeros stays one
    gain = random(shape[dim], seed=1) if with_gain else None
    factor = random(1, seed=2) if with_factor else None
    expected = F.normalize(x.double(), dim=dim) * (factor if with_factor else 1)
    if with_gain:
        expected = expected * (gain if dim == -1 else gain[:, None])
    for given in (x, x.mT.contiguous().mT):  # in both orders of memory
        assert (kernels.unit(given, dim, gain, factor) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("m", "p", "k"), [(1, 1, 1), (7, 3, 2), (33, 1, 5), (7, 12, 2), (20000, 1, 2)])
def test_slot_weights_are_softmaxes_and_columns_of_the_chosen(m, p, k):
    b, n = 3, 6
    logits, source, chosen = random(b, m, n, p), random(b, m, n, p, seed=1), chosen_experts(b, n, k)
    dispatch, combine = kernels.slot_weights(logits, chosen, source, torch.float32)
    for i, j, q in product(range(b), range(k), range(p)):
        column = logits[i, :, chosen[i, j], q].double()
        assert relative_error(dispatch[i, j * p + q], column.softmax(0)) < 1e-6
        assert torch.equal(combine[i, :, j * p + q], source[i, :, chosen[i, j], q])


def layer_inputs(dtype=torch.float32):
    return layers.inputs(dtype=dtype).to(DEVICE)


def error_of(settings, x, scope, k=2, compensation="none") -> float:
    """Of a layer pruned in a scope (None: the dense one) on the device, against the formulas."""
    dense = layers.dense_layer(**settings)
    u = surrogates(settings.get("p", 2), settings.get("out_dim") or D)
    layer = layers.pruned_layer(dense, scope, k, compensation, u).to(DEVICE)
    expected = layers.formulas(layer, dense, x, layers.expected_sets(dense, x, scope, k), u)
    return relative_error(layer(x.to(DEVICE)).cpu(), expected)


LAYERS = [
    *(({"router_norm": norm, "dispatch_input": form, "p": p}, None) for (norm, form), p in product(ROUTERS, (1, 3))),
    *(({"p": p}, scope, k, of) for scope, of in PRUNINGS for k, p in ((1, 3), (N, 1))),
    *(
        ({"router_norm": "layer", "expert": expert, "out_dim": width}, scope, 2, "mean")
        for expert, width in KINDS
        for scope in (None, "input")
    ),
    *(({"p": 20}, scope) for scope in (None, "input")),
    *(({}, scope, 0, "mean") for scope in ("input", "batch")),
]


@pytest.mark.mostly_slow(8)
@pytest.mark.usefixtures("_through_kernels")
@pytest.mark.parametrize("case", some_slow(LAYERS), ids=str)
def test_layers_equal_the_formulas(case):
    settings, *way = case
    assert error_of({**settings, "dtype": torch.float32}, layer_inputs(), *way) < 1e-5


@pytest.mark.usefixtures("_through_kernels")
@pytest.mark.parametrize("kind", ["mlp", "glu"])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_other_activations_equal_the_formulas(kind, bias):
    dense, x = activations.dense(kind, "silu", bias).float(), activations.tokens().float()
    expected = activations.expected(dense, x)
    assert relative_error(dense.to(DEVICE)(x.to(DEVICE)).cpu(), expected) < 1e-5
    every = prune_layer(dense, LayerPlan("input", activations.N, activations.N, "combine", "none"))
    assert relative_error(every(x.to(DEVICE)).cpu(), expected) < 1e-5


@pytest.mark.usefixtures("_through_kernels")
@pytest.mark.parametrize("compensation", some_slow(COMPENSATIONS))
@pytest.mark.parametrize("p", [1, 3])
def test_layer_with_a_mass_equals_the_masked_formulas(p, compensation):
    dense, x, u = layers.dense_layer(p=p, dtype=torch.float32), layer_inputs(), surrogates(p)
    dense.scale.fill_(8)
    layer = layers.adaptive_layer(dense, 0.6, compensation, u=u).to(DEVICE)
    expected = layers.formulas(layer, dense, x, layers.ragged_sets(dense, x, 0.6), u)
    assert relative_error(layer(x).cpu(), expected) < 1e-5


@pytest.mark.mostly_slow(2)
@pytest.mark.usefixtures("_through_kernels")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scope", [None, *SCOPES])
def test_half_precision_stays_near_float32(scope, dtype):
    x = layer_inputs()
    layer = layers.pruned_layer(layers.dense_layer(dtype=torch.float32), scope, 2, "mean", surrogates())
    exact = observe(layer.to(DEVICE), x)
    rough = observe(layer.to(dtype), x.to(dtype))
    assert (rough.output.dtype, rough.weights.dtype) == (dtype, torch.float32)
    assert exact.chosen is None or torch.equal(rough.chosen, exact.chosen)
    assert relative_error(rough.output, exact.output) < ROUGH[dtype]


def test_without_triton_there_are_no_kernels(monkeypatch):
    routed._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "moeprune.layers.kernels", None)
    monkeypatch.delattr("moeprune.layers.kernels")
    assert routed._kernels() is None
    routed._kernels.cache_clear()


def test_tensors_on_the_cpu_take_no_kernels():
    assert routed.kernels_for(torch.zeros(1)) is None


@on_gpu
def test_tensors_on_the_gpu_take_kernels_where_these_can_compute():
    x = torch.zeros(1, device="cuda")
    assert routed.kernels_for(x, x.bfloat16()) is kernels
    assert routed.kernels_for(x, x.double()) is None
    assert routed.kernels_for(x.requires_grad_()) is None
    with torch.no_grad():
        assert routed.kernels_for(x) is kernels


@on_gpu
@pytest.mark.parametrize(("scope", "compensation"), [(None, "none"), *PRUNINGS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_forward_pass_waits_for_nothing_and_a_graph_can_hold_it(scope, compensation, dtype):
    layer = layers.pruned_layer(layers.dense_layer(p=3, dtype=torch.float32), scope, 2, compensation, surrogates(3))
    layer, x = layer.to("cuda", dtype), layer_inputs(dtype)
    with torch.inference_mode():
        layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in (5, 6):
            other = layers.inputs(seed=seed).to("cuda", dtype)
            x.copy_(other)
            graph.replay()
            assert torch.equal(y, layer(other))


@on_gpu
@pytest.mark.parametrize(("scope", "compensation"), [(None, "none"), *PRUNINGS])
def test_autocast_on_the_gpu_stays_near_float32(scope, compensation):
    layer = layers.pruned_layer(layers.dense_layer(dtype=torch.float32), scope, 2, compensation, surrogates())
    exact, x = observe(layer.to("cuda"), layer_inputs()), layer_inputs()
    with torch.autocast("cuda", torch.bfloat16):
        rough, unobserved = observe(layer, x), layer(x)
    assert rough.weights.dtype == torch.float32
    assert exact.chosen is None or torch.equal(rough.chosen, exact.chosen)
    assert 1e-5 < relative_error(rough.output, exact.output) < 0.03
    assert torch.equal(unobserved, rough.output)


@on_gpu
@pytest.mark.parametrize(("scope", "compensation"), PRUNINGS)
@pytest.mark.parametrize("p", [1, 3])
def test_float64_on_the_gpu_equals_the_masked_formulas(scope, compensation, p):
    assert error_of({"p": p}, layers.inputs(), scope, 2, compensation) < 1e-10


@on_gpu
def test_a_model_that_the_gpu_measured_lies_where_it_was(single):
    model = moeprune.load(single)
    pruned = moeprune.prune(model, keep="1/8", data="digits:calibration", runtime=moeprune.Runtime("cuda"))
    assert {tensor.device.type for tensor in pruned.state_dict().values()} == {"cpu"}


@on_gpu
@pytest.mark.parametrize("scope", ["input", "batch"])
def test_gradients_on_the_gpu_equal_those_on_the_cpu(scope):
    layer, x = layers.pruned_layer(layers.dense_layer(), scope, 2, "mean", surrogates()), layers.inputs()
    gradients = []
    for device in ("cpu", "cuda"):
        moved = x.detach().to(device).requires_grad_()
        layer.to(device)(moved).square().sum().backward()
        gradients.append(moved.grad.cpu())
    assert relative_error(*gradients) < 1e-10
