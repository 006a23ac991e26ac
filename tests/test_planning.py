"""Budgets split over layers, against brute force; plans as files."""

import json
import math
from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch

import moeprune
from moeprune.calibration.analysis import Analysis, Origin
from moeprune.calibration.statistics import LayerStatistics
from moeprune.data.spec import DataInfo
from moeprune.files.checkpoint import tensor_infos
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import COMPENSATIONS, LOW_RANK, SCOPES, LayerPlan, Method, is_possible, plan_from_json
from moeprune.pruning.budgets import allocate, costs_of, losses, plans_within
from moeprune.pruning.plan_file import read_plan, write_plan
from tests.test_calibration import write_inputs

CPU = moeprune.Runtime("cpu")
FIRST = "blocks.0.soft_moe"


def problem(seed: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Convex losses that fall, and costs that grow, of three layers."""
    generator = torch.Generator().manual_seed(seed)
    lost, costs = {}, {}
    for name, n in (("a", 4), ("b", 6), ("c", 5)):
        steps = torch.rand(n, generator=generator).sort().values  # what each expert less adds
        scale = 10 ** float(torch.rand(1, generator=generator) * 2)
        lost[name] = [scale * float(steps[: n - k].sum()) for k in range(n + 1)]
        price = 1 + float(torch.rand(1, generator=generator))
        costs[name] = [5 + price * k for k in range(n + 1)]
    return lost, costs


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_a_split_is_within_the_budget_and_nearly_the_best_of_all(share):
    for seed in range(10):
        lost, costs = problem(seed)
        least = sum(layer[1] for layer in costs.values())
        budget = least + share * (sum(layer[-1] for layer in costs.values()) - least)
        found = allocate(lost, costs, budget)
        assert sum(costs[name][k] for name, k in found.items()) <= budget + 1e-9
        splits = product(*(range(1, len(layer)) for layer in costs.values()))
        every = [dict(zip(lost, ks, strict=True)) for ks in splits]
        feasible = [e for e in every if sum(costs[name][k] for name, k in e.items()) <= budget + 1e-9]
        best = min(sum(lost[name][k] for name, k in experts.items()) for experts in feasible)
        dearest_step = max(max(a - b for a, b in pairwise(layer)) for layer in lost.values())
        assert sum(lost[name][k] for name, k in found.items()) <= best + dearest_step + 1e-9
        if share == 1:
            assert best == 0
            assert found == {name: len(layer) - 1 for name, layer in lost.items()}


def test_experts_go_where_they_matter():
    lost = {"a": [90.0, 80, 70, 60, 50], "b": [4.0, 3, 2, 1, 0], "c": [0.0] * 5}
    assert allocate(lost, {name: [math.inf, 1, 2, 3, 4] for name in lost}, 8.0) == {"a": 4, "b": 3, "c": 1}
    assert allocate(lost, {name: [0.0, 1, 2, 3, 4] for name in lost}, 8.0) == {"a": 4, "b": 4, "c": 0}


def test_a_full_layer_that_is_cheaper_than_one_with_surrogates_is_found():
    """The surrogates of dropped experts may cost more than the last expert."""
    assert allocate({"a": [3.0, 2.0, 1.0, 0.0]}, {"a": [9.0, 10.0, 11.0, 9.5]}, 9.6) == {"a": 3}


def three_layers() -> SoftMoEViT:
    torch.manual_seed(0)
    moe = [
        BlockConfig(soft_moe=SoftMoEConfig(12, n, slots_per_expert=p, hidden_dim=h), attention=False)
        for n, p, h in ((6, 1, 20), (4, 2, 10), (8, 1, 5))
    ]
    return SoftMoEViT(ViTConfig((8, 8), (4, 4), 1, 7, dim=12, num_heads=3, blocks=tuple(moe))).eval()


def seven_classes(folder) -> str:
    return write_inputs(folder / "data.npz", [index % 7 for index in range(30)], 30)


@pytest.mark.mostly_slow(6)
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_costs_are_those_of_the_pruned_model(scope, compensation, tmp_path):
    if not is_possible(scope, "combine", compensation):
        pytest.skip("they do not go together")
    model = three_layers()
    data = moeprune.open_data(seven_classes(tmp_path), model.input_format)
    rank = 2 if compensation in LOW_RANK else None
    method = Method(scope, "combine" if scope == "static" else "deviation", compensation, rank=rank)
    sizes = costs_of(model.config, method, tensor_infos(model.state_dict()))
    flops = costs_of(model.config, method, None)
    full = model.cost()
    assert (sizes.full, flops.full) == (full.bytes, full.flops_per_input.total)
    for ks in ((1, 1, 1), (2, 3, 7), (6, 4, 8)):
        experts = dict(zip(model.config.moe_layers, ks, strict=True))
        plan = {name: method.plan(k, model.config.moe_layers[name].num_experts) for name, k in experts.items()}
        found = moeprune.prune(model, plan=plan, data=data, runtime=CPU).cost()
        assert sizes.of(experts) == found.bytes
        assert flops.of(experts) == found.flops_per_input.total


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory):
    model = three_layers()
    data = moeprune.open_data(seven_classes(tmp_path_factory.mktemp("data")), model.input_format)
    return model, data, moeprune.analyze(model, data, CPU)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("budget", [0.65, 0.8, 1.0])
def test_plans_within_a_budget(budget, compensation, analyzed):
    model, data, analysis = analyzed
    signal = "gram" if is_possible("static", "gram", compensation) else "combine"
    method = Method("static", signal, compensation, rank=2 if compensation in LOW_RANK else None)
    infos = tensor_infos(model.state_dict())
    costs = costs_of(model.config, method, infos)
    budget = max(budget, costs.of(dict.fromkeys(costs.layers, 1)) / costs.full)
    plan = plans_within(model.config, infos, analysis, method, budget)[0]
    assert moeprune.prune(model, analysis, plan=plan, data=data, runtime=CPU).cost().bytes <= budget * costs.full
    assert {layer.signal for layer in plan.values()} == {signal}
    assert all(layer.kept is None if layer.k else layer.kept == () for layer in plan.values())


@pytest.mark.parametrize("scope", ["input", "batch"])
def test_routed_plans_keep_the_same_share_everywhere_and_no_larger_one_is_within(scope, analyzed):
    model, _, _ = analyzed
    costs = costs_of(model.config, Method(scope), None)
    [plan] = plans_within(model.config, {}, None, Method(scope), max_flops=0.8)
    shares = sorted({Fraction(k, n) for n in (4, 6, 8) for k in range(1, n + 1)})
    splits = [[max(1, int(share * n + Fraction(1, 2))) for n in (6, 4, 8)] for share in shares]
    names = model.config.moe_layers
    within = [ks for ks in splits if costs.of(dict(zip(names, ks, strict=True))) <= 0.8 * costs.full]
    assert [layer.k for layer in plan.values()] == max(within)


def test_losses_are_those_of_backward_elimination_and_end_at_zero(analyzed):
    _, _, analysis = analyzed
    for compensation in COMPENSATIONS:
        for name, layer in losses(analysis, compensation).items():
            statistics = analysis.layers[name]
            assert layer[-1] == 0
            assert min(layer) >= 0
            scale = (float(statistics.sensitivity) / float(statistics.gram.sum())) ** 0.5
            everything = scale * float(statistics.gram_under(compensation).sum())
            if compensation != "renorm":  # which keeps one expert at least
                assert layer[0] == pytest.approx(everything, rel=1e-5, abs=1e-8)


def test_of_twelve_equal_layers_those_that_matter_more_keep_more_experts():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(128, 300, generator=generator) * torch.rand(128, 1, generator=generator)
    gram = rows @ rows.mT
    layers = {}
    for index in range(12):
        fields = dict.fromkeys(LayerStatistics.__dataclass_fields__, gram)
        fields["mean_mass"] = torch.full((128,), 1 / 128)
        fields["sensitivity"] = torch.tensor(float(index + 1))
        layers[f"blocks.{index}.soft_moe"] = LayerStatistics(**fields)
    moe = BlockConfig(soft_moe=SoftMoEConfig(64, 128, slots_per_expert=1, hidden_dim=64))
    config = ViTConfig((32, 32), (8, 8), 3, 10, dim=64, num_heads=4, blocks=(moe,) * 12)
    with torch.device("meta"):
        infos = tensor_infos(SoftMoEViT(config).state_dict())
    analysis = Analysis(layers, Origin("", DataInfo(spec="", samples=1, fingerprint=""), ""))
    plan = plans_within(config, infos, analysis, Method("static", "gram", "affine"), 0.4)[0]
    ks = [layer.k for layer in plan.values()]
    assert ks == sorted(ks)
    assert ks[0] < ks[-1]


def test_a_plan_file_round_trips_and_equal_plans_give_equal_checkpoints(analyzed, tmp_path):
    model, data, analysis = analyzed
    plan = {
        "blocks.0.soft_moe": LayerPlan("static", 2, 6, "gram", "mean", (1, 4)),
        "blocks.2.soft_moe": LayerPlan("input", 3, 8, "deviation", "affine"),
    }
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json", model.config.moe_layers) == plan
    assert len((tmp_path / "plan.json").read_text().splitlines()) == 7
    for index in (1, 2):
        read = read_plan(tmp_path / "plan.json", model.config.moe_layers)
        pruned = moeprune.prune(model, analysis, plan=read, data=data, runtime=CPU)
        moeprune.save(pruned, tmp_path / f"{index}.safetensors")
    first, second = ((tmp_path / f"{index}.safetensors").read_bytes() for index in (1, 2))
    assert first == second
    assert read_plan(tmp_path / "1.safetensors", model.config.moe_layers) == plan
    pruned = moeprune.load(tmp_path / "1.safetensors")
    assert pruned.get_submodule("blocks.1.soft_moe").plan is None  # it is not in the plan


@pytest.mark.parametrize("scope", ["static", "input"])
def test_a_plan_applied_is_what_the_options_give(scope, analyzed, tmp_path):
    model, data, analysis = analyzed
    options = {"scope": scope, "signal": "deviation", "compensate": "lstsq"}
    by_options = moeprune.prune(model, analysis, keep=2, data=data, runtime=CPU, **options)
    moeprune.save(by_options, tmp_path / "a.safetensors")
    plan = read_plan(tmp_path / "a.safetensors", model.config.moe_layers)
    moeprune.save(moeprune.prune(model, analysis, plan=plan, data=data, runtime=CPU), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_a_plan_written_by_hand_leaves_out_has_defaults(tmp_path):
    path = tmp_path / "plan.json"
    layers = three_layers().config.moe_layers
    path.write_text(json.dumps({
        "schema_version": 1,
        "plan": {FIRST: {"k": 2}, "blocks.1.soft_moe": {"kept": [3, 0], "compensation": "mean"}},
    }))  # fmt: skip
    assert read_plan(path, layers) == {
        FIRST: LayerPlan("static", 2, 6, "combine", "none"),
        "blocks.1.soft_moe": LayerPlan("static", 2, 4, "combine", "mean", (0, 3)),
    }
    path.write_text(
        json.dumps({"schema_version": 1, "plan": {FIRST: MERGED, "blocks.2.soft_moe": {**FITTED, "rank": 3}}})
    )
    merged, fitted = read_plan(path, layers).values()
    assert (merged.groups, fitted.rank) == ([[0, 2, 4], [1, 3, 5]], 3)


FITTED = {"k": 2, "compensation": "affine"}
MERGED = {"k": 2, "compensation": "merge", "kept": [0, 1], "merged_into": [0, 1, 0, 1]}
WRONG_LAYERS = [
    ({"k": 7}, "`k` is 7, expected 0 to 6"),
    ({"k": "1"}, "`k`: expected `int`, got `str`, found '1'"),
    ({"kept": [1, 1]}, "2 different experts"),
    ({"kept": ["a"]}, "`kept[0]`: expected `int`, got `str`, found 'a'"),
    ({"k": 1, "nope": 1}, "unknown key `nope`"),
    ({"k": 1, "kept": 1}, "`kept`: expected `array | null`, got `int`"),
    ({"k": 1, "num_experts": 9}, "is for 9 experts"),
    ({"k": 1, "scope": "input", "signal": "gram"}, "signal `gram` needs one set of experts"),
    ({"k": 1, "scope": "input", "mass": True}, "`mass`: expected `float | null`, got `bool`"),
    ({**FITTED, "rank": 2, "energy": 0.5}, "do not go together"),
    ({**FITTED, "rank": 0}, "`rank`: expected `int` >= 1, found 0"),
    ({**FITTED, "rank": 2.5}, "`rank`: expected `float` < 1.0, found 2.5"),
    ({**FITTED, "energy": 1}, "`energy`: expected `float` < 1"),
    ({**FITTED, "energy": "much"}, "`energy`: expected `float | null`, got `str`"),
    ({**FITTED, "rank": 4, "compensation": "mean"}, "goes with the compensations lstsq, affine, refit"),
    ({**MERGED, "merged_into": [1]}, "expected a kept expert for each of the 4 dropped ones"),
    ({**MERGED, "merged_into": [0, 2, 0, 0]}, "expected a kept expert for each of the 4 dropped ones"),
    ({**MERGED, "merged_into": ["a"]}, "`merged_into[0]`: expected `int`, got `str`"),
    ({**MERGED, "merged_into": 3}, "expected `array | null`, got `int`"),
    ({**MERGED, "kept": None}, "goes with compensation `merge`, and `kept`"),
    ({**MERGED, "compensation": "none"}, "goes with compensation `merge`, and `kept`"),
    ({**MERGED, "k": 0, "kept": []}, "`merge` needs at least one kept expert"),
    ({**MERGED, "signal": "gram"}, "does not go with signal `gram`"),
]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "`schema_version` is None, expected 1"),
        ({"schema_version": 2, "plan": {}}, "`schema_version` is 2, expected 1"),
        ({"schema_version": True, "plan": {FIRST: {"k": 1}}}, "`schema_version` is True, expected 1"),
        ({"schema_version": 1, "plan": {FIRST: {"k": 1}}, "extra": 1}, "unknown key `extra`"),
        ({"schema_version": 1}, "plans no layer"),
        ({"schema_version": 1, "plan": {"blocks.9": {"k": 1, "num_experts": 4}}}, "not in the model"),
        ({"schema_version": 1, "plan": {FIRST: {}}}, "`k` or `kept` is missing"),
        ({"schema_version": 1, "plan": {FIRST: 3}}, "expected `object`, got `int`"),
        *(({"schema_version": 1, "plan": {FIRST: layer}}, message) for layer, message in WRONG_LAYERS),
    ],
)
def test_plans_that_are_wrong(content, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(moeprune.MoepruneError) as caught:
        read_plan(path, three_layers().config.moe_layers)
    assert message in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("key", "hint"), [("scop", "did you mean `scope`?"), ("xyz", "known keys are scope, k, num_experts")]
)
def test_unknown_keys_have_the_nearest_known_one(key, hint):
    with pytest.raises(moeprune.MoepruneError) as caught:
        plan_from_json({FIRST: {"num_experts": 6, "k": 1, key: 1}})
    assert hint in caught.value.hint


def test_a_plan_that_is_not_there(tmp_path, single):
    layers = three_layers().config.moe_layers
    missing = [(tmp_path / name, "no file") for name in ("none.json", "none.safetensors")]
    for path, words in (*missing, (tmp_path, "is a folder"), (single, "is not a pruned checkpoint")):
        with pytest.raises(moeprune.MoepruneError, match=words):
            read_plan(path, layers)
