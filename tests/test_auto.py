"""What `auto` tries and takes, draws of the calibration data, and data that is not like it, on the shipped model."""

import math

import numpy as np
import pytest
import torch

import moeprune
from moeprune.plan import LOW_RANK
from moeprune.pruning.auto import half, select, split
from tests.damage import metadata_of
from tests.endings import refusal
from tests.stock import STATIC

CPU = moeprune.Runtime("cpu")
LAYER = "blocks.0.soft_moe"
DATA = "--data digits --limit 200"
AFFINE = "--signal gram --compensate affine"


@pytest.fixture(scope="module")
def model(single):
    return moeprune.load(single)


@pytest.fixture(scope="module")
def halves(model):
    """What candidates are fitted on, and what they are compared on."""
    return split(moeprune.open_data("digits:calibration", model.input_format, limit=200))


@pytest.fixture(scope="module")
def tried(single, run_json, tmp_path_factory):
    """The file and the report of a pruning that leaves all to `auto`."""
    path = tmp_path_factory.mktemp("auto") / "auto.safetensors"
    return path, run_json(f"prune {single} {DATA} --keep 1/8 -o {path}")


def options_of(candidate: dict) -> dict:
    return {name: candidate[name] for name in ("scope", "signal", "compensate", "rank")}


def change(pruned, model, data) -> np.ndarray:
    """Half the sum of absolute differences of two models' probabilities, for each input."""
    inputs = torch.cat([inputs for inputs, _ in data.batches(64)])
    first, second = (one(inputs).double().softmax(-1).numpy() for one in (pruned, model))
    return np.abs(first - second).sum(-1) / 2


# --- what is chosen
def test_the_cheapest_of_the_candidates_near_the_nearest_is_taken(tried, model, halves):
    candidates, (fitted_on, held_out) = tried[1]["candidates"], halves
    assert {one["compensate"] for one in candidates} == {
        "mean", "lstsq", "affine", "refit", "renorm-refit", "low-rank", "low-rank-lstsq",
    }  # fmt: skip
    changes = {}
    for index, one in enumerate(candidates):
        pruned = moeprune.prune(model, data=fitted_on, keep="1/8", runtime=CPU, **options_of(one))
        changes[index] = change(pruned, model, held_out)
        assert one["samples"] == held_out.samples == len(changes[index])
        assert one["distance"] == pytest.approx(changes[index].mean(), rel=0.02, abs=1e-5)
        cost, full = pruned.cost(), model.cost()
        assert one["size"] == pytest.approx(cost.bytes / full.bytes)
        assert one["flops"] == pytest.approx(cost.flops_per_input.total / full.flops_per_input.total)
    assert all(one["size"] < 1 and one["flops"] < 1 for one in candidates)  # others are not tried: low-rank of rank 2
    ranks = {name: {one["rank"] for one in candidates if one["compensate"] == name} for name in LOW_RANK}
    assert ranks == {"low-rank": {1, 0.25}, "low-rank-lstsq": {2, 0.5, 0.25}}
    nearest = min(changes.values(), key=np.mean)
    more = {index: each - nearest for index, each in changes.items()}
    near = [i for i, each in more.items() if each.mean() + each.std(ddof=1) / len(each) ** 0.5 <= 0.01]
    cheapest = min(near, key=lambda i: (candidates[i]["size"] + candidates[i]["flops"], changes[i].mean()))
    assert [i for i, one in enumerate(candidates) if one["is_chosen"]] == [cheapest]


def test_the_file_is_that_of_the_chosen_options_and_the_same_each_time(tried, single, run_json, tmp_path):
    path, found = tried
    [chosen] = [one for one in found["candidates"] if one["is_chosen"]]
    words = [word for name, value in options_of(chosen).items() if value is not None for word in (f"--{name}", value)]
    for given in ((), words):
        again = tmp_path / "again.safetensors"
        repeated = run_json("prune", single, *DATA.split(), "--keep", "1/8", *given, "-o", again, "--force")
        assert again.read_bytes() == path.read_bytes()
        assert repeated["plan"] == found["plan"]
        assert repeated["candidates"] == ([] if given else found["candidates"])


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize(
    ("options", "compensations"),
    [
        ("--signal random --seed 3", {"mean", "lstsq", "affine", "refit", "renorm-refit", *LOW_RANK}),
        ("--energy 0.9", {"lstsq", "affine", "refit", *LOW_RANK}),
        ("--scope input", {"mean", "lstsq", "affine", "low-rank-lstsq"}),
        ("--compensate low-rank", set()),
    ],
)
def test_what_is_given_is_not_chosen(options, compensations, single, run_json, tmp_path):
    found = run_json(f"prune {single} {DATA} --keep 1/8 {options} -o {tmp_path}/a.safetensors")
    assert {one["compensate"] for one in found["candidates"]} == compensations
    assert sum(one["is_chosen"] for one in found["candidates"]) == bool(compensations)
    [plan] = found["plan"].values()
    scope, signal = ("input", "deviation") if "input" in options else ("static", "gram")
    assert (plan["scope"], plan["signal"]) == (scope, "random" if "random" in options else signal)


@pytest.mark.parametrize("options", ["--data digits --limit 7", "--analysis ANALYSIS --one-shot"])
def test_without_a_comparison_dropped_experts_give_their_means(options, single, small_analysis, run_json, tmp_path):
    words = options.replace("ANALYSIS", str(small_analysis))
    found = run_json(f"prune {single} {words} --keep 1/8 -o {tmp_path}/a.safetensors")
    assert (found["plan"][LAYER]["compensation"], found["candidates"], found["fits"]) == ("mean", [], {})
    warnings = found.get("warnings", [])
    assert any("7 samples are too few to compare" in each for each in warnings) == ("--limit" in options)


def test_distances_that_are_no_numbers_are_passed_over():
    near, far, none = torch.tensor([0.1, 0.1]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, math.nan])
    assert select([none, far, near], [1, 2, 3]) == 2


def test_few_inputs_do_not_make_a_cheap_candidate_look_as_good():
    """The same mean difference of 0.005, with a standard error of 0.01 or of next to nothing."""
    near, cheap = torch.full((16,), 0.1), torch.full((16,), 0.105)
    cheap[::2] += 0.04
    cheap[1::2] -= 0.04
    assert select([near, cheap], [2, 1]) == 0
    assert select([near.repeat(100), cheap.repeat(100)], [2, 1]) == 1


# --- no layer at all
def test_linear_keeps_no_expert_and_no_router(single, run, run_json, tmp_path):
    path = tmp_path / "linear.safetensors"
    call = f"prune {single} {DATA} --compensate linear -o"
    refusal(run, f"{call} {path} --keep 1/8".split(), "`--keep` does not go with `--compensate linear`")
    refusal(run, f"{call} {path} --scope input".split(), "`--compensate linear` needs one set of experts")
    found = run_json(f"{call} {path}")
    assert (found["plan"][LAYER]["k"], found["plan"][LAYER]["kept"], found["keep"]) == (0, [], None)
    for part in ("experts", "routing"):
        assert (found["model"]["bytes_by_part"][part], found["model"]["flops_per_input"][part]) == (0, 0)
    assert found["model"]["bytes_by_part"]["compensation"] == 4 * (2 * 32 * 32 + 32)
    judged = run_json(f"eval {path} --data digits --limit 60 --baseline {single}")
    assert judged["model"]["bytes"] == found["model"]["bytes"]
    assert judged["model"]["accuracy"] > 0.3


# --- several draws
@pytest.mark.slow
def test_repeats_are_prunings_of_random_halves(single, model, halves, run, run_json, tmp_path):
    found = run_json(f"prune {single} {DATA} --keep 1/8 {AFFINE} --repeat 2 --seed 5 -o {tmp_path}/a.safetensors")
    fitted_on, held_out = halves
    draws = [half(fitted_on, seed) for seed in (5, 6)]
    repeats = found["repeats"]
    assert (repeats["samples"], repeats["held_out"]) == (draws[0].samples, held_out.samples)
    assert draws[0].samples == fitted_on.samples // 2
    assert draws[0].indices != draws[1].indices
    for index, draw in enumerate(draws):
        pruned = moeprune.prune(model, data=draw, keep="1/8", signal="gram", compensate="affine", runtime=CPU)
        distance = change(pruned, model, held_out)
        assert repeats["distance"][index] == pytest.approx(distance.mean(), rel=0.02)
        inputs = torch.cat([inputs for inputs, _ in held_out.batches(64)])
        same = pruned(inputs).argmax(1) == model(inputs).argmax(1)
        assert repeats["agreement"][index] == pytest.approx(float(same.float().mean()))
    shown = run(f"prune {single} {DATA} --keep 1/8 {AFFINE} --repeat 2 -o {tmp_path}/b.safetensors").stdout
    assert f"2 draws of {draws[0].samples} samples, on {held_out.samples} held-out inputs" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (f"--keep 4 --data digits --limit 7 {AFFINE} -o NEW", ("`--repeat` needs at least 8 samples",)),
        ("--keep 4 --analysis ANALYSIS --one-shot -o NEW", ("`--repeat` goes with `--output`",)),
        (f"--keep 4 --analysis ANALYSIS {STATIC} --save-plan NEW", ("`--repeat` goes with `--output`",)),
        ("--data digits --max-accuracy-drop 0.1 -o NEW", ("not with `--one-shot` or `--max-accuracy-drop`",)),
        ("--keep 4 --scope input --signal combine --compensate none -o NEW", ("`--repeat` needs calibration data",)),
    ],
    ids=["few samples", "one-shot", "plan", "drop", "no data"],
)
def test_what_cannot_be_repeated(options, messages, single, small_analysis, run, tmp_path):
    words = options.replace("NEW", f"{tmp_path}/new").replace("ANALYSIS", str(small_analysis))
    refusal(run, f"prune {single} --repeat 2 {words}".split(), *messages, folder=tmp_path)


@pytest.mark.slow
def test_repeats_of_a_sweep_are_its_draws(single, small_analysis, model, run_json):
    words = "--sweep 1/8 --scope static --signal gram --compensate affine --repeat 2"
    found = run_json(f"eval {single} --data digits --limit 100 --analysis {small_analysis} {words}")
    [row] = [row for row in found["rows"] if row["signal"] == "gram"]
    calibration = moeprune.open_data("digits:calibration", model.input_format, limit=60)
    test = moeprune.open_data("digits:test", model.input_format, limit=100)
    accuracies = []
    for seed in (0, 1):
        options = {"keep": "1/8", "signal": "gram", "compensate": "affine", "runtime": CPU}
        pruned = moeprune.prune(model, data=half(calibration, seed), **options)
        accuracies.append(moeprune.evaluate(pruned, test).model.accuracy)
    assert row["draws"] == 2
    assert row["accuracy"] == pytest.approx(np.mean(accuracies))
    assert row["accuracy_sd"] == pytest.approx(np.std(accuracies, ddof=1))
    assert row["model"]["accuracy"] == pytest.approx(accuracies[-1])


# --- data that is not like the calibration data
@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Pixels that are no digits."""
    path = tmp_path_factory.mktemp("noise") / "noise.npz"
    pixels = np.random.default_rng(0).random((100, 1, 8, 8), dtype=np.float32)
    np.savez(path, inputs=pixels, labels=np.arange(100) % 10)
    return path


@pytest.fixture(scope="module")
def affine(single, made):
    return made(f"prune {single} {DATA} --keep 1/8 {AFFINE}")


def outputs(model, inputs) -> torch.Tensor:
    """What the layer returns (b,m,d)."""
    seen = []
    handle = model.moe_layers[LAYER].register_forward_hook(lambda _, __, output: seen.append(output.double()))
    model(inputs)
    handle.remove()
    return seen[0]


def test_a_shift_is_warned_of_and_its_error_is_that_of_the_outputs(affine, noise, single, model, run, run_json):
    found = run_json(f"eval {affine} --data {noise} --baseline {single}")
    shift = found["shift"][LAYER]
    recorded = metadata_of(affine.read_bytes())["provenance"]
    assert shift["is_shifted"]
    assert shift["predicted_error"] == recorded["fits"][LAYER]["held_out_error"]
    data = moeprune.open_data(str(noise), model.input_format)
    inputs = torch.cat([inputs for inputs, _ in data.batches(100)])
    first, second = (outputs(one, inputs) for one in (moeprune.load(affine), model))
    each = (first - second).square().sum((1, 2)) / second.square().sum((1, 2)).mean()
    assert shift["error"] == pytest.approx(float(each.mean()), rel=1e-4)
    assert shift["standard_error"] == pytest.approx(float(each.std()) * math.sqrt(1 / 100 + 1 / 200), rel=0.02)
    assert 0 < shift["mass_moved"] < 1
    said = run(f"eval {affine} --data {noise} --baseline {single}").stderr
    assert "warning: the data is not like the calibration data" in said
    assert LAYER in said


def test_test_data_like_the_calibration_data_is_not_warned_of(affine, single, run_json):
    found = run_json(f"eval {affine} --data digits --baseline {single}")
    shift = found["shift"][LAYER]
    assert "warnings" not in found or found["warnings"] == []
    assert not shift["is_shifted"]
    assert shift["error"] == pytest.approx(shift["predicted_error"], rel=0.5)
    assert shift["mass_moved"] < 0.1


def test_files_without_fits_have_no_shift(noise, single, small_analysis, made, run_json):
    pruned = made(f"prune {single} --analysis {small_analysis} --keep 1/8 {STATIC}")
    assert run_json(f"eval {pruned} --data {noise} --baseline {single}")["shift"] == {}
