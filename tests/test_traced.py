"""Graphs of pruned layers and models by torch.export, compile, onnx and jit: they compute the same."""

from itertools import product

import pytest
import torch
from torch import nn

import moeprune
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.plan import LayerPlan
from tests.test_soft_moe import (
    COMPENSATIONS,
    SCOPES,
    D,
    M,
    N,
    adaptive_layer,
    dense_layer,
    pruned_layer,
    relative_error,
    surrogates,
)  # fmt: skip

DYNAMIC = ({0: torch.export.Dim("b")},)


def export(model, x, strict=False):
    return torch.export.export(model, (x,), dynamic_shapes=DYNAMIC, strict=strict).module()


def export_for_a_size(model, x):
    return torch.export.export(model, (x,)).module()


def export_strictly(model, x):
    return export(model, x, strict=True)


def compiled(model, x):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def trace_by_jit(model, x):
    return torch.jit.trace(model, x, check_trace=False)


def onnx(model, x):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    return lambda x: program(x)[0]


def layer_of(scope, compensation="none", **settings):
    dense = dense_layer(dtype=torch.float32, **settings)
    u = surrogates(settings.get("p", 2))
    if scope == "mass":
        dense.scale.fill_(8)
        return adaptive_layer(dense, 0.6, compensation, u=u)
    return pruned_layer(dense, scope, 2, compensation, u)


def images(b):
    return torch.randn(b, 1, 8, 8, generator=torch.Generator().manual_seed(b))


def tokens(b):
    return torch.randn(b, M, D, generator=torch.Generator().manual_seed(b))


WAYS = [export, export_for_a_size, export_strictly, compiled, onnx, trace_by_jit]
FEW = [(export, "input"), (compiled, "batch"), (onnx, "mass"), (trace_by_jit, "input")]
CASES = [  # each way meets each scope, each scope each compensation
    pytest.param(way, scope, COMPENSATIONS[(i + j) % 5], marks=() if (way, scope) in FEW else pytest.mark.slow)
    for (i, way), (j, scope) in product(enumerate(WAYS), enumerate((None, *SCOPES, "mass")))
]


@pytest.mark.parametrize(("trace", "scope", "compensation"), CASES)
def test_graphs_of_layers_compute_the_same(trace, scope, compensation):
    layer = layer_of(scope, compensation)
    traced = trace(layer, tokens(4))
    for b in (4,) if trace is export_for_a_size else (1, 4, 9):
        assert relative_error(traced(tokens(b)), layer(tokens(b))) < 2e-6, b


@pytest.mark.slow
@pytest.mark.parametrize("trace", WAYS)
def test_maps_of_different_ranks(trace):
    plan = LayerPlan("static", 2, N, "combine", "low-rank-lstsq", (1, 3), rank=2, ranks=(1, 0, 3))
    layer = prune_layer(dense_layer(dtype=torch.float32), plan, Calibrated(term_mean=surrogates()))
    for buffer in (layer.low_rank_in, layer.low_rank_out):
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)))
    traced = trace(layer, tokens(4))
    for b in (4,) if trace is export_for_a_size else (1, 4, 9):
        assert relative_error(traced(tokens(b)), layer(tokens(b))) < 2e-6, b


@pytest.mark.slow
@pytest.mark.parametrize("trace", [export, compiled, onnx])
@pytest.mark.parametrize("scope", ["input", "batch"])
def test_of_experts_of_equal_mass_a_graph_takes_the_lower(trace, scope):
    layer = layer_of(scope)
    layer.phi.zero_()
    assert torch.equal(layer.choose(torch.ones(2, N)), torch.tensor([[0, 1], [0, 1]]))
    assert relative_error(trace(layer, tokens(4))(tokens(9)), layer(tokens(9))) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("trace", WAYS)
@pytest.mark.parametrize(
    "settings", [{"expert": "geglu", "p": 1}, {"expert": "linear", "router_norm": "none"}], ids=str
)
@pytest.mark.parametrize("scope", ["input", "batch"])
def test_graphs_of_other_layers(trace, settings, scope):
    layer = layer_of(scope, **settings)
    assert relative_error(trace(layer, tokens(4))(tokens(4)), layer(tokens(4))) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("trace", [export, compiled, onnx])
@pytest.mark.parametrize("scope", SCOPES)
def test_graphs_of_models_compute_the_same(trace, scope, single):
    signal = "combine" if scope != "static" else "random"
    model = moeprune.prune(moeprune.load(single), keep=4, scope=scope, signal=signal, compensate="none")
    traced = trace(model, images(4))
    for b in (1, 9):
        assert relative_error(traced(images(b)), model(images(b))) < 2e-6


def test_a_graph_of_a_model_of_the_users_own(single):
    layer = moeprune.load(single).get_submodule("blocks.0.soft_moe")
    own = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 32)), layer, nn.Flatten())
    model = moeprune.prune(moeprune.adopt(own, (1, 8, 8)), keep=4, scope="batch", signal="combine", compensate="none")
    assert relative_error(export(model, images(4))(images(3)), model(images(3))) < 2e-6
