"""The search within a drop of accuracy, and budgets on the command line."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import norm

import moeprune
from moeprune.calibration.sums import half_of
from moeprune.evaluation.evaluate import predict
from moeprune.evaluation.intervals import drop_at_most, paired_difference
from moeprune.evaluation.results import Outcomes
from moeprune.plan import LayerPlan, Wanted
from moeprune.pruning.search import DropLimit, confirming_order, interval, prune_within_drop
from tests.reference import observe_layers
from tests.stock import PAPER, STATIC, some_slow

CPU = moeprune.Runtime("cpu", batch_size=256)
LAYER = "blocks.0.soft_moe"


@pytest.fixture(scope="module")
def full(single):
    return moeprune.load(single)


def search(full, data, limit, scope="static", signal="combine", compensate="none", **options):
    """The k of the model that a search finds, the model itself, and the report."""
    wanted = Wanted(scope, signal, compensate)
    model, report = prune_within_drop(full, data, limit, wanted=wanted, runtime=CPU, **options)
    return model.get_submodule(LAYER).plan.k, model, report


def confirmed_on(full, model, data):
    """Who is right on the half that confirms: both models, the full one, the pruned one, or neither."""
    is_second = half_of(0, data.samples) == 1
    right, pruned = (predictions.correct[is_second] for predictions in predict([full, model], data, CPU))
    return [int((a & b).sum()) for a, b in product((right, ~right), (pruned, ~pruned))]


@pytest.mark.parametrize(
    "way", some_slow([("static", "gram", "affine"), ("static", "combine", "mean"), ("input", "combine", "none")])
)
def test_the_confirmed_drop_is_that_of_the_model_on_samples_that_the_search_did_not_see(way, full):
    data = moeprune.open_data("digits:calibration", full.input_format)
    k, model, report = search(full, data, DropLimit(0.02), *way)
    both, lost, won, neither = confirmed_on(full, model, data)
    confirmed = report.confirmed
    assert confirmed.samples == both + lost + won + neither
    assert confirmed.accuracy_drop == pytest.approx((lost - won) / confirmed.samples, abs=1e-9)
    assert confirmed.accuracy_drop <= 0.02
    low, high = confirmed.accuracy_drop_ci95
    assert low <= confirmed.accuracy_drop <= high
    assert k <= full.moe_layers[LAYER].config.num_experts // 4
    tried = [entry.k[LAYER] for entry in report.tried]
    assert k in tried
    assert tried == sorted(tried)


@pytest.mark.slow
def test_a_larger_drop_never_takes_more_experts_and_some_need_nearly_all(full):
    (few, _, loose), (many, _, strict) = (search(full, "digits", DropLimit(limit)) for limit in (0.2, 0.02))
    assert few < many
    steps = [2 ** (-step / 2) for step in range(1, 17)]
    rungs = {round(128 * share) for step in steps for share in (step, 1 - step)}
    assert {tried.k[LAYER] for tried in (*loose.tried, *strict.tried)} <= rungs
    assert 96 < search(full, "digits:calibration", DropLimit(0.02), "static", "random", "renorm")[0] < 128


def test_what_cannot_be_searched(full):
    data = moeprune.open_data("digits:test", full.input_format, limit=30)
    words = r"drop of 0 on both halves.*the least drop on the worse half"
    with pytest.raises(moeprune.MoepruneError, match=words) as e:
        search(full, data, DropLimit(0.0), signal="random")
    assert float(e.value.message.split()[-1]) > 0
    with pytest.raises(moeprune.MoepruneError, match=r"the least drop bound at confidence 0.9 on the worse half"):
        search(full, data, DropLimit(0.02, 0.9))
    with pytest.raises(moeprune.MoepruneError, match="has one sample"):
        search(full, data.sample(1), DropLimit(0.1))
    with pytest.raises(moeprune.MoepruneError, match="`--confidence 1` is not within"):
        search(full, data, DropLimit(0.1, 1))


def test_what_confirms_must_not_have_been_calibrated_on(full):
    analysis = moeprune.analyze(full, "digits:calibration", CPU)
    for data in ("digits:calibration", moeprune.open_data("digits:calibration", full.input_format, limit=300)):
        with pytest.raises(moeprune.MoepruneError, match="must not be calibrated on"):
            search(full, data, DropLimit(0.02), analysis=analysis)
    _, _, report = search(full, "digits:test", DropLimit(0.02), analysis=analysis)
    assert report.confirmed.accuracy_drop <= 0.02


@pytest.mark.slow
def test_the_interval_and_the_bound_hold_for_all_plans_that_could_have_been_measured(full):
    data = moeprune.open_data("digits:test", full.input_format)
    ks = []
    for confidence in (None, 0.9):
        k, model, report = search(full, data, DropLimit(0.03, confidence), compensate="mean")
        cells, confirmed = confirmed_on(full, model, data), report.confirmed
        assert 2 < confirmed.plans < 10
        quantile = norm.isf(0.025 / confirmed.plans)
        assert confirmed.accuracy_drop_ci95 == pytest.approx(paired_difference(*cells, quantile))
        assert confirmed.confidence == confidence
        ks.append(k)
    assert confirmed.bound == pytest.approx(drop_at_most(*cells, 1 - 0.1 / confirmed.plans))
    assert confirmed.accuracy_drop < confirmed.bound <= 0.03
    assert ks[1] > ks[0]


def drawn_halves(limit, excess, seed, plans=26, samples=1000, runs=1500):
    """Outcomes of plans whose drops are beyond a limit by so many standard errors, drawn independently."""
    won = 0.01
    lost = limit + excess * ((limit + 2 * won) / samples) ** 0.5 + won
    shares = (0.9 - lost, lost, won, 0.1 - won)
    cells = np.random.default_rng(seed).multinomial(samples, shares, (runs, plans)).tolist()
    names = ("both", "lost", "won", "neither")
    return lost - won, [[Outcomes(**dict(zip(names, row, strict=True))) for row in run] for run in cells]


def first_within(limit, run, order, plans):
    """The first of the plans in an order that is within a limit, None without one."""
    return next((i for i in order if limit.judged(run[i], plans) <= limit.max_accuracy_drop), None)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_plans_beyond_the_limit_are_confirmed_no_more_often_than_the_confidence_says(confidence):
    """Whatever plan the search on the first half found; all drops are at the limit, the worst case."""
    limit = DropLimit(0.02, confidence)
    _, halves = drawn_halves(0.02, 0.0, seed=1)
    for smallest in (0, 20, 25):
        order = [smallest + place for place in confirming_order([1.04**step for step in range(26 - smallest)])]
        rate = np.mean([first_within(limit, run, order, len(order)) is not None for run in halves])
        assert rate < 1.2 * (1 - confidence) + 0.01


@pytest.mark.parametrize("excess", [0.0, 1.0, 2.0, 2.5])
def test_reported_intervals_cover_the_drop_though_the_plan_is_chosen_by_it(excess):
    drop, halves = drawn_halves(0.02, excess, seed=2)
    limit, order = DropLimit(0.02), confirming_order([1.04**step for step in range(26)])
    missed = 0
    for run in halves:
        chosen = first_within(limit, run, order, len(order))
        if chosen is not None:
            low, high = interval(run[chosen], len(order))
            missed += not low <= drop <= high
    assert missed / len(halves) < 0.05


def test_a_part_of_a_data_set_has_its_samples_in_any_batch_size(full):
    data = moeprune.open_data("digits:calibration", full.input_format, limit=50)
    whole = torch.cat([inputs for inputs, _ in data.batches(50)])
    places = [0, 3, 7, 49]
    part = data.part(places, "some")
    assert (part.samples, part.spec) == (4, "digits:calibration (some)")
    assert part.indices == [data.indices[place] for place in places]
    for size in (1, 3, 64):
        assert torch.equal(torch.cat([inputs for inputs, _ in part.batches(size)]), whole[places])


@pytest.mark.slow
def test_budgets_take_the_best_of_several_ways(vit, vit_analysis, run_json, tmp_path):
    for share, budget, also in (("size", 0.7, "renorm-refit"), ("flops", 0.9, "renorm-refit")):
        words = f"--max-{share} {budget} -o {tmp_path}/a.safetensors --force"
        found = run_json(f"prune {vit} --analysis {vit_analysis} {words}")
        tried = found["candidates"]
        assert all(one[share] <= budget for one in tried)
        assert {"linear", "affine", also} <= {one["compensate"] for one in tried}
        [chosen] = [one for one in tried if one["is_chosen"]]
        assert chosen["distance"] <= min(one["distance"] for one in tried) + 1e-3
        assert {name: layer["k"] for name, layer in found["plan"].items()} == chosen["k"]
        costs = {"size": lambda cost: cost["bytes"], "flops": lambda cost: cost["flops_per_input"]["total"]}
        assert costs[share](found["model"]) <= budget * costs[share](found["full_model"])


@pytest.mark.slow
def test_a_search_without_other_options_finds_a_small_model(single, run_json, tmp_path):
    found = run_json(f"prune {single} --data digits --max-accuracy-drop 0.01 -o {tmp_path}/a.safetensors")
    assert found["plan"][LAYER]["k"] <= 8
    search = found["search"]
    assert search["confirmed"]["accuracy_drop"] <= 0.01
    assert len({(tried["compensate"], tried["rank"]) for tried in search["tried"]}) > 3
    sizes = [tried["size"] for tried in search["tried"]]
    assert sizes == sorted(sizes)
    own = found["model"]["bytes"] / found["full_model"]["bytes"]
    [chosen] = [tried for tried in search["tried"] if tried["size"] == pytest.approx(own)]
    assert chosen["k"] == {LAYER: found["plan"][LAYER]["k"]}


def test_budgets_and_plans_on_the_command_line(vit, vit_analysis, run_json, tmp_path):
    chosen = f"prune {vit} --analysis {vit_analysis} --one-shot"
    small = f"prune {vit} --analysis {vit_analysis} --signal gram --compensate mean --max-size 0.4"
    planned = run_json(f"{small} --save-plan {tmp_path}/plan.json")
    assert planned["checkpoint"] is None
    assert planned["model"] is None
    layers = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert planned["plan"] == layers
    assert all(layer["kept"] is None for layer in layers.values() if layer["k"])  # for the signal to choose
    found = run_json(f"{small} --one-shot -o {tmp_path}/a.safetensors --save-plan {tmp_path}/final.json")
    assert found["model"]["bytes"] <= 0.4 * found["full_model"]["bytes"]
    assert found["model"]["bytes"] > 0.36 * found["full_model"]["bytes"]
    assert [layer["k"] for layer in found["plan"].values()] == [layer["k"] for layer in layers.values()]
    for plan in ("plan.json", "final.json", "a.safetensors"):
        path = tmp_path / f"from-{plan}.safetensors"
        run_json(f"{chosen} --plan {tmp_path / plan} -o {path}")
        assert path.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    run_json(f"{chosen} --keep 8 {STATIC} -o {tmp_path}/c.safetensors --save-plan {tmp_path}/c.json")
    run_json(f"{chosen} --plan {tmp_path}/c.json -o {tmp_path}/d.safetensors")
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    cheap = run_json("prune", vit, "--max-flops", 0.92, *PAPER.split(), "-o", tmp_path / "b.safetensors")
    flops, full_flops = (cheap[which]["flops_per_input"]["total"] for which in ("model", "full_model"))
    assert flops <= 0.92 * full_flops


@pytest.mark.parametrize(
    ("option", "spellings", "ks"),
    [
        ("--keep", ("1/8", "0.125", "12.5%", "12.5 %", "8"), {8}),
        ("--keep", ("1",), {1}),
        ("--keep", ("1.0", "1/1", "100%", "64"), {64}),
        ("--max-size", ("0.4", "40%", "4e1%"), None),
        ("--max-size", ("1MiB", "1048576B", "1024kiB", "1.048576 MB", "1048.576K"), None),
        ("--max-size", ("1.0", "1", "1GB"), {64}),
        ("--max-flops", ("11.4M", "11.4MFLOPs", "0.0114 G"), None),
    ],
)
def test_spellings_of_how_many_experts(option, spellings, ks, vit, vit_analysis, run_json, tmp_path):
    """A whole number is a number of experts, anything with a point, a slash or a percent sign a share."""
    words = *STATIC.split(), "--save-plan", tmp_path / "p.json", "--force"
    found = [run_json("prune", vit, "--analysis", vit_analysis, option, text, *words) for text in spellings]
    plans = [report["plan"] for report in found]
    assert plans == [plans[0]] * len(plans)
    assert ks in (None, {layer["k"] for layer in plans[0].values()})
    if option == "--keep":
        assert {report["keep"] for report in found} <= {"1/8", "8", "1", "1.0", "64"}


def test_a_search_on_the_command_line(single, run, run_json, tmp_path):
    path = tmp_path / "found.safetensors"
    call = f"prune {single} --data digits --signal combine --compensate mean --max-accuracy-drop"
    found = run_json(f"{call} 0.02 -o {path}")
    assert found["search"]["confirmed"]["accuracy_drop"] <= 0.02
    assert found["plan"][LAYER]["k"] <= 16
    text = run(f"{call} 0.02 -o {tmp_path}/again.safetensors")
    assert text.code == 0
    assert "samples that were not searched" in text.stdout
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    confirmed = run_json(f"{call} 0.04 --confidence 0.9 -o {tmp_path}/b.safetensors")["search"]["confirmed"]
    assert confirmed["confidence"] == 0.9
    assert confirmed["accuracy_drop"] < confirmed["bound"] <= 0.04


@pytest.mark.parametrize("compensate", ["none", "affine"])
def test_a_mass_on_the_command_line(compensate, single, run, run_json, tmp_path):
    path = tmp_path / "adaptive.safetensors"
    call = f"prune {single} --mass 0.8 --signal combine --compensate {compensate} --data digits"
    found = run_json(f"{call} -o {path}")
    assert found["plan"][LAYER] == {
        "scope": "input", "k": 128, "num_experts": 128, "signal": "combine", "compensation": compensate,
        "kept": None, "mass": 0.8, "rank": None, "energy": None, "ranks": None, "merged_into": None, "width": None,
    }  # fmt: skip
    evaluated = run_json("eval", path, "--data", "digits", "--limit", 100)
    model = moeprune.load(single)
    data = moeprune.open_data("digits:test", model.input_format, limit=100)
    counts = []

    def count(_, observation):
        ordered = observation.mass.sort(dim=1, descending=True).values.cumsum(1)
        counts.append((ordered < 0.8).sum(1) + 1)

    for inputs, _ in data.batches(64):
        observe_layers(model, [LAYER], count, inputs, CPU)
    mean = float(torch.cat(counts).float().mean())
    assert evaluated["model"]["experts_per_input"] == pytest.approx(mean, rel=1e-3)
    flops, most = (report["model"]["flops_per_input"] for report in (evaluated, found))
    assert flops["experts"] == pytest.approx(most["experts"] * mean / 128, rel=1e-3)
    assert flops["total"] < most["total"]
    text = run(f"{call} -o {tmp_path}/again.safetensors")
    assert "input, mass 0.8 in at most 128 of 128" in text.stdout
    assert "at most" in text.stdout.splitlines()[2]


def test_a_budget_of_everything_keeps_everything(vit, vit_analysis, run_json, tmp_path):
    call = f"prune {vit} --analysis {vit_analysis} --max-size 1 -o {tmp_path}/o.safetensors --force"
    for scope, compensate in (("static", "none"), ("static", "affine"), ("input", "affine")):
        found = run_json(f"{call} --scope {scope} --signal combine --compensate {compensate}")
        assert {layer["k"] for layer in found["plan"].values()} == {64}
        assert found["model"]["bytes"] == found["full_model"]["bytes"]


def test_plans_yet_to_be_chosen_are_no_checkpoint(vit, tmp_path):
    from moeprune.files import checkpoint
    from moeprune.files.header import read_header
    from moeprune.records import to_json

    header = read_header(vit)
    plan = {"blocks.1.soft_moe": LayerPlan("static", 2, 64, "combine", "none")}
    metadata = {**header.metadata, "plan": to_json(plan)}
    checkpoint.write(tmp_path / "x.safetensors", checkpoint.read_tensors(header), metadata)
    with pytest.raises(moeprune.MoepruneError, match="lacks `kept`"):
        moeprune.load(tmp_path / "x.safetensors")
