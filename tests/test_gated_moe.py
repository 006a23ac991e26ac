"""Layers of token-gated experts against a reference that computes one token and one expert at a time, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moeprune
from moeprune.layers.config import layer_from_json
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.layers.gated_moe import GatedMoE
from moeprune.layers.layer import layer_of_tensors, new_layer
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.plan import LayerPlan, require_fitting_plan
from moeprune.records import to_json

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning"
)
D, N, K, H = 8, 12, 3, 5
KEPT, EQUAL = (0, 1, 4, 5, 7, 10), (0, 1, 4, 6, 9, 11)  # the latter equally many of each group
SIGMOID = {"gates": "sigmoid", "selection_bias": True}
CONFIGS = {
    "softmax before the choice": {},
    "softmax over the chosen": {"normalized": True, "router_bias": True, "gate_scale": 1.5},
    "sigmoid": {"gates": "sigmoid"},
    "sigmoid, normalised, with a bias for the choice": {**SIGMOID, "normalized": True, "gate_scale": 2.5},
    "groups by their best two": {**SIGMOID, "groups": 3, "groups_kept": 2, "group_score": "best_two"},
    "groups by their best": {"groups": 3, "groups_kept": 2},
    "dense softmax": {"experts_per_token": None},
    "gates on inputs": {"gates": "sigmoid", "weigh": "inputs", "activation": "gelu"},
    "sparsemixer": {"gates": "sparsemixer", "jitter": 0.2, "experts_per_token": 2},
    "mlp with biases": {"expert": "mlp", "bias": True, "activation": "relu"},
    "linear": {"expert": "linear", "hidden_dim": None, "bias": True},
    "clamped, alternating": {"gate_columns": "even", "limit": 0.4, "activation": "quick_gelu", "bias": True},
    "gate last": {"gate_columns": "last", "normalized": True},
}


def make(name: str, **fields) -> GatedMoE:
    torch.manual_seed(0)
    config = GatedMoEConfig(
        **{"dim": D, "num_experts": N, "hidden_dim": H, "experts_per_token": K} | CONFIGS[name] | fields
    )
    layer = new_layer(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return layer.requires_grad_(False)


def chosen_gates(config: GatedMoEConfig, logits: list[float], bias: list[float], among: list[int]) -> dict[int, float]:
    """The gate of each expert that a token chooses, of those that the router knows."""
    if config.gates == "sparsemixer":
        gates, left = {}, list(among)
        for _ in range(config.top_k):
            best = max(left, key=lambda j: logits[j])
            near = [
                j for j in left if (logits[best] - logits[j]) / max(abs(logits[j]), logits[best]) <= 2 * config.jitter
            ]
            gates[best] = math.exp(logits[best]) / sum(math.exp(logits[j]) for j in near)
            left.remove(best)
        return gates
    total = sum(math.exp(logits[j]) for j in among)
    gates = {
        j: math.exp(logits[j]) / total if config.gates == "softmax" else 1 / (1 + math.exp(-logits[j])) for j in among
    }
    scores = {j: gates[j] + bias[j] for j in among}
    if config.groups > 1:
        members = [[scores[j] for j in among if j * config.groups // N == group] for group in range(config.groups)]
        best = [sum(sorted(part)[-(2 if config.group_score == "best_two" else 1) :]) for part in members]
        groups = sorted(range(config.groups), key=lambda group: best[group])[-config.groups_kept :]
        scores = {j: score for j, score in scores.items() if j * config.groups // N in groups}
    chosen = sorted(scores, key=lambda j: scores[j])[-config.top_k :]
    divisor = sum(gates[j] for j in chosen) if config.normalized else 1
    return {j: gates[j] / divisor * config.gate_scale for j in chosen}


ACTIVATIONS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
}


def expert_output(config: GatedMoEConfig, tensors: dict[str, Tensor], j: int, x: Tensor) -> Tensor:
    hidden = x
    if config.expert != "linear":
        first = x @ tensors["fc1_weight"][j] + (tensors["fc1_bias"][j] if config.bias else 0)
        f = ACTIVATIONS[config.activation]
        gate, values = {
            "first": (first[:H], first[H:]),
            "last": (first[H:], first[:H]),
            "even": (first[::2], first[1::2]),
        }[config.gate_columns]
        if config.expert == "mlp":
            gate, values = first, torch.ones_like(first)
        if config.limit:
            gate, values = gate.clamp(max=config.limit), values.clamp(-config.limit, config.limit) + 1
        hidden = values * x.new_tensor([f(float(v)) for v in gate])
    return tensors["fc2_weight"][j] @ hidden + (tensors["fc2_bias"][j] if config.bias else 0)


def reference(layer: GatedMoE, x: Tensor, kept=range(N), cut=False, added=None) -> Tensor:
    """Outputs for x (t,d) with some experts kept; added(j, x): what a dropped one gives in place of its output."""
    config, tensors = layer.config, dict(layer.named_parameters())
    output = torch.zeros_like(x)
    for row, token in enumerate(x):
        logits = (tensors["router_weight"] @ token + (tensors["router_bias"] if config.router_bias else 0)).tolist()
        bias = tensors["selection_bias"].tolist() if config.selection_bias else [0.0] * N
        for j, gate in chosen_gates(config, logits, bias, list(kept) if cut else list(range(N))).items():
            is_input = config.weigh == "inputs"
            if j in kept:
                output[row] += (1 if is_input else gate) * expert_output(
                    config, tensors, j, token * gate if is_input else token
                )
            elif added is not None:
                output[row] += (1 if is_input else gate) * added(j, token * gate if is_input else token)
    return output


def tokens(count=20) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plan(compensation: str, kept=KEPT, **fields) -> LayerPlan:
    return LayerPlan("static", len(kept), N, "combine", compensation, kept, **fields)


def ways(layer: GatedMoE, x: Tensor) -> list[Tensor]:
    """The output of an input of all tokens, of single tokens, with an observer, and in a traced graph."""
    seen = []
    found = [layer(x[None])[0], layer(x)]
    layer.observer = seen.append
    found.append(layer(x[None])[0])
    layer.observer = None
    found.append(torch.jit.trace(layer, torch.randn_like(x[None]), check_trace=False)(x[None])[0])
    return [*found, seen[0].output[0]]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unpruned_layer_is_the_sum_of_gated_experts(name):
    layer = make(name)
    assert layer_from_json(to_json(layer.config), "layer") == layer.config
    for found in ways(layer, tokens()):
        torch.testing.assert_close(found, reference(layer, tokens()), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("compensation", ["none", "renorm", "mean", "low-rank"])
def test_a_pruned_layer_runs_the_kept_experts_and_what_compensates_for_the_others(name, compensation):
    layer, x = make(name), tokens()
    mean = torch.randn(N, 1, D, dtype=torch.float64)
    kept = EQUAL if compensation == "renorm" else KEPT
    dropped = [j for j in range(N) if j not in kept]
    ranks = tuple(2 + j % 2 if j > dropped[0] else 0 for j in dropped) if compensation == "low-rank" else None
    pruned = prune_layer(layer, plan(compensation, kept, rank=ranks and 2, ranks=ranks), Calibrated(term_mean=mean))
    maps = {j: torch.zeros(D, D, dtype=torch.float64) for j in range(N)}
    shift = torch.zeros(D, dtype=torch.float64)
    if ranks:
        for part in (pruned.low_rank_in, pruned.low_rank_out, pruned.affine_token, pruned.affine_bias):
            part.normal_()
        row = 0
        for rank, j in sorted(zip(ranks, dropped, strict=True), key=lambda each: -each[0]):
            maps[j] = pruned.low_rank_in[row : row + rank].mT @ pruned.low_rank_out[row : row + rank]
            row += rank
        shift = x @ pruned.affine_token + pruned.affine_bias
        assert not hasattr(pruned, "affine_mean")  # a token must not see those after it
    added = None if compensation in ("none", "renorm") else lambda j, token: mean[j, 0] + token @ maps[j]
    expected = reference(layer, x, kept, compensation == "renorm", added) + shift
    for found in ways(pruned, x):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_linear_map_takes_the_place_of_the_layer():
    pruned = prune_layer(make("sigmoid"), LayerPlan("static", 0, N, "combine", "linear", ()))
    pruned.affine_token.normal_()
    for found in ways(pruned, tokens()):
        torch.testing.assert_close(found, tokens() @ pruned.affine_token)


def test_no_expert_is_kept_and_constants_take_their_place():
    layer, mean = make("sigmoid"), torch.randn(N, 1, D, dtype=torch.float64)
    pruned = prune_layer(layer, plan("mean", ()), Calibrated(term_mean=mean))
    expected = reference(layer, tokens(), (), added=lambda j, _: mean[j, 0])
    for found in ways(pruned, tokens()):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["softmax before the choice", "gates on inputs"])
def test_padding_does_not_count(name):
    layer, x = make(name), tokens(24).view(4, 6, D)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 0], seen = True, []
    layer.observer = seen.append
    layer(x, mask)
    [padded], seen[:] = list(seen), []
    for i in range(4):
        layer(x[i, mask[i]][None])
    for name in ("mass", "output", "tokens", "weights"):
        whole = getattr(padded, name)
        for i, each in enumerate(seen):
            part = whole[i] if name == "mass" else whole[i, mask[i]]
            torch.testing.assert_close(part, getattr(each, name)[0])
            assert name == "mass" or not whole[i, ~mask[i]].any()
    assert padded.rows.counts == [sum(each) for each in zip(*(one.rows.counts for one in seen), strict=True)]
    torch.testing.assert_close(padded.row_weights.sum(), sum(one.row_weights.sum() for one in seen))


def test_gradients_reach_router_and_experts():
    layer = make("softmax over the chosen").requires_grad_(True)
    layer(tokens()[None]).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("name", ["softmax over the chosen", "dense softmax", "mlp with biases", "linear"])
@pytest.mark.parametrize("compensation", [None, "renorm", "affine"])
def test_flops_are_those_of_matrix_products(name, compensation):
    layer, x = make(name), tokens(30)[None]
    kept = tuple(range(0, N, 2))
    if compensation:
        layer = prune_layer(layer, plan(compensation, kept), Calibrated(term_mean=torch.zeros(N, 1, D)))
    layer.observer = lambda _: None  # else few tokens are weighted and summed in one product
    with FlopCounterMode(display=False) as counter:
        layer(x)
    flops = layer.config.flops(30, layer.plan)
    found = counter.get_total_flops()
    if compensation == "affine" and layer.config.top_k < N:  # how many tokens run a kept expert is up to them
        routed = (layer.route(x[0]).chosen < len(kept)).sum()
        found += round(flops.experts * (1 - float(routed) / (30 * K / 2)))
    if compensation == "affine":
        found -= 2 * 30 * len(kept) * D  # constants of kept experts, which are zero
    assert flops.total == found


@pytest.mark.parametrize(
    ("name", "wrong", "reason"),
    [
        ("sigmoid", {"kept": (0, 1)}, "runs 3 experts for each token, and with compensation `renorm` its router knows"),
        ("groups by their best", {"kept": (0, 1, 2, 4, 5, 8)}, "keep equally many of each group"),
        ("groups by their best two", {"kept": (0, 4, 8)}, "best_two|3 experts for each token within 2 of 3 groups"),
        ("sigmoid", {"compensation": "refit"}, "can be compensated by"),
    ],
)
def test_what_cannot_be_is_refused(name, wrong, reason):
    wanted = plan(**{"compensation": "renorm", "kept": EQUAL} | wrong)
    with pytest.raises(moeprune.MoepruneError, match=reason):
        require_fitting_plan({"moe": wanted}, {"moe": make(name).config})
    alone = wanted.replace(compensation="none")
    require_fitting_plan({"moe": alone}, {"moe": make(name).config})  # dropped experts add nothing


@pytest.mark.parametrize(
    "wrong",
    [
        {"experts_per_token": 13}, {"groups": 5}, {"groups": 6, "groups_kept": 1}, {"expert": "linear"},
        {"hidden_dim": None}, {"gates": "sparsemixer"},
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_are_errors(wrong):
    with pytest.raises(moeprune.MoepruneError):
        make("softmax before the choice", **wrong)


def test_weights_are_used_where_they_lie():
    """As in transformers, where the first linear of an expert has its inputs along the contiguous axis."""
    layer = make("softmax over the chosen")
    tensors = dict(layer.state_dict())
    tensors["fc1_weight"] = tensors["fc1_weight"].mT.contiguous().mT
    same = layer_of_tensors(layer.config, None, tensors)
    assert same.fc1_weight.data_ptr() == tensors["fc1_weight"].data_ptr()
    torch.testing.assert_close(same(tokens()), layer(tokens()))
    kept = prune_layer(same, plan("renorm"))
    assert kept.fc1_weight.mT.is_contiguous()  # as products are fastest
    torch.testing.assert_close(kept(tokens()), prune_layer(layer, plan("renorm"))(tokens()))
