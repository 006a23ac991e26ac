"""Latency: how calls are timed and summarized, and what `eval --latency` makes of it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moeprune
from moeprune.evaluation import latency
from moeprune.evaluation.latency import interleaved, ready_batches, seconds_of_call, summarize_latency
from moeprune.records import to_json
from tests.stock import PAPER

CPU = torch.device("cpu")


@pytest.fixture
def brief(monkeypatch):
    """Real measurements, but short ones."""
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0.02)
    monkeypatch.setattr(latency, "MEASURED_SECONDS", 0.1)


class Calls(list):
    """Functions that note their name and input, and a timer that says each call took so many seconds."""

    def __init__(self, seconds: float):
        super().__init__()
        self.now = 0.0
        self.seconds = seconds

    def function(self, name):
        return lambda x: self.append((name, x))

    def seconds_of(self, call):
        call()
        self.now += self.seconds
        return self.seconds


def timed(calls: Calls, names: str, inputs: range = range(1)) -> dict[str, list[float]]:
    return interleaved({name: calls.function(name) for name in names}, inputs, calls.seconds_of)


def test_repetitions_call_all_on_the_same_input_in_alternating_order(monkeypatch):
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0)
    calls = Calls(seconds=10.0)
    assert timed(calls, "abc", range(5)) == {name: [10.0] * 7 for name in "abc"}
    warm_up, measured = calls[: 2 * 3], calls[2 * 3 :]
    assert warm_up == [(name, x) for x in range(2) for name in "abc"]
    assert measured == [(name, i % 5) for i in range(7) for name in ("cba" if i % 2 else "abc")]


@pytest.mark.parametrize(("seconds", "repetitions"), [(1e-6, 200), (0.0625, 16), (0.125, 8), (10.0, 7)])
def test_repetitions_go_on_until_the_budget_is_used(monkeypatch, seconds, repetitions):
    """Two seconds for both functions together, but never fewer than 7 repetitions nor more than 200."""
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0)
    found = timed(Calls(seconds), "ab")
    assert [len(found[name]) for name in "ab"] == [repetitions] * 2


@pytest.mark.parametrize(("seconds", "rounds"), [(1 / 64, 7), (10.0, 2)])
def test_warm_up_lasts_for_two_calls_and_a_fifth_of_a_second(monkeypatch, seconds, rounds):
    calls = Calls(seconds)
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: calls.now))
    found = timed(calls, "ab", range(3))
    warm_up = len(calls) - sum(len(values) for values in found.values())
    assert warm_up == 2 * rounds
    assert calls[:warm_up] == [(name, index % 3) for index in range(rounds) for name in "ab"]


class Machine(list):
    """Stands in for torch.cuda, torch.mps and the clock, and notes what is asked of them in which order."""

    def __init__(self):
        super().__init__()
        self.cuda = SimpleNamespace(Event=self.event, synchronize=self.synchronize)
        self.cuda.current_stream = lambda device: f"stream of {device}"
        self.mps = SimpleNamespace(synchronize=lambda: self.synchronize("mps"))

    def synchronize(self, device):
        self.append(f"wait for {device}")

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: self.append("wait for event"))
        event.record = lambda stream: self.append(f"record on {stream}")
        event.elapsed_time = lambda end: 1500.0 if end is not event else 0.0
        return event

    def perf_counter(self):
        self.append("clock")
        return 2.5 * self.count("clock")


@pytest.mark.parametrize(
    ("device", "seconds", "expected"),
    [
        ("cpu", 2.5, ["clock", "call", "clock"]),
        ("mps", 2.5, ["wait for mps", "clock", "call", "wait for mps", "clock"]),
        ("cuda:1", 1.5, [
            "wait for cuda:1", "record on stream of cuda:1", "call", "record on stream of cuda:1",
            "wait for event",
        ]),
    ],
)  # fmt: skip
def test_a_call_is_timed_from_an_idle_device_to_the_end_of_its_work(monkeypatch, device, seconds, expected):
    machine = Machine()
    monkeypatch.setattr(latency, "torch", machine)
    monkeypatch.setattr(latency, "time", machine)
    assert seconds_of_call(lambda: machine.append("call"), torch.device(device)) == seconds
    assert machine == expected


@pytest.mark.parametrize("repetitions", [7, 8, 57])
def test_summary_holds_medians_and_quartiles(repetitions):
    model, baseline = np.random.default_rng(repetitions).lognormal(size=(2, repetitions))
    found = to_json(summarize_latency(8, model.tolist(), baseline.tolist()))
    assert found.pop("repetitions") == repetitions
    figures = {"speedup": baseline / model, "model_seconds": model, "baseline_seconds": baseline}
    for name, values in figures.items():
        assert found.pop(name) == pytest.approx(np.median(values))
        assert found.pop(f"{name}_iqr") == pytest.approx(tuple(np.quantile(values, [0.25, 0.75])))
    assert found == {"batch_size": 8, "speedups": list(baseline / model)}


def test_speedup_is_the_median_of_ratios_within_repetitions():
    """While other programs slow down both, each repetition still tells the ratio."""
    found = summarize_latency(1, [1, 2, 4, 8, 16], [2, 4, 8, 16, 100])
    assert (found.speedup, found.speedup_iqr) == (2, (2, 2))
    assert (found.model_seconds, found.baseline_seconds) == (4, 8)


@pytest.mark.parametrize(
    ("batch_size", "samples", "batches"),
    [(1, 531, 8), (32, 531, 8), (32, 20, 8), (8, 8, 8), (3, 1, 8), (64, 531, 4), (300, 531, 2), (500, 40, 2)],
)
def test_inputs_are_those_of_the_data_in_order_and_from_the_first_again(single, batch_size, samples, batches):
    data = moeprune.open_data("digits", moeprune.load(single).input_format, limit=samples)
    everything = torch.cat([inputs for inputs, _ in data.batches(64)])
    found = ready_batches(data, batch_size, CPU)
    assert [len(batch) for batch in found] == [batch_size] * batches
    rows = torch.cat(found)
    assert all(torch.equal(row, everything[place % samples]) for place, row in enumerate(rows))


@pytest.fixture(scope="module")
def routed(single, made):
    """`single` where each input runs 1/8 of the experts."""
    return made(f"prune {single} --keep 1/8 {PAPER}")


@pytest.fixture
def call(routed, single):
    """An eval of `routed` against `single` with latency, on few samples."""
    return f"eval {routed} --data digits --limit 40 --baseline {single} --latency"


@pytest.fixture
def known(monkeypatch):
    """Makes every measurement give the seconds that are put in here, by batch size."""
    seconds: dict[int, dict[str, list[float]]] = {}

    def interleaved(functions, inputs):
        return {name: seconds[len(inputs[0])][name] for name in functions}

    monkeypatch.setattr(latency, "interleaved", interleaved)
    return seconds


def test_json_has_a_latency_for_each_batch_size_and_all_else_is_as_without(call, run_json, brief):
    found, without = run_json(call), run_json(call.removesuffix("--latency"))
    measured = found.pop("latency")
    assert without.pop("latency") is None
    assert found == without
    assert measured["threads"] == torch.get_num_threads()
    assert [batch["batch_size"] for batch in measured["batches"]] == [1, 8, 32]
    for batch in measured["batches"]:
        assert 7 <= batch["repetitions"] <= 200
        for figure in ("speedup", "model_seconds", "baseline_seconds"):
            low, high = batch[f"{figure}_iqr"]
            assert 0 < low <= batch[figure] <= high
    alone, _ = call.split("--baseline")
    alone = run_json(f"{alone} --latency --latency-batch 5 --latency-batch 2")["latency"]["batches"]
    assert [batch["batch_size"] for batch in alone] == [5, 2]
    assert {key for batch in alone for key, value in batch.items() if value is None} == {
        "speedup", "speedup_iqr", "baseline_seconds", "baseline_seconds_iqr", "speedups",
    }  # fmt: skip


def test_model_and_baseline_are_timed_as_the_runtime_runs_them(routed, single, monkeypatch):
    models = {"model": moeprune.load(routed), "baseline": moeprune.load(single).double()}
    outputs = {}

    def spy(functions, inputs):
        outputs.update({name: function(inputs[1]) for name, function in functions.items()})
        for name, output in outputs.items():
            assert torch.equal(output, runtime.forward(models[name], inputs[1]))
        return {name: [1.0, 1.0] for name in functions}

    monkeypatch.setattr(latency, "interleaved", spy)
    runtime = moeprune.Runtime("cpu", "bf16", batch_size=3)
    data = moeprune.open_data("digits", models["model"].input_format, limit=40)
    found = moeprune.evaluate(models["model"], data, models["baseline"], runtime, latency_batches=(4,))
    assert found.latency.batches[0].speedup == 1
    assert list(outputs) == ["model", "baseline"]
    assert all(output.shape == (4, 10) for output in outputs.values())


def latency_rows(text):
    """The cells of the table of latencies, its rule left out."""
    header, _, *rows = text[text.index("latency on ") :].splitlines()[1:]
    return [re.split(r"  +", line) for line in (header, *rows)]


def test_text_shows_the_ratio_first(call, printed, known):
    known[1] = {"model": [0.0004, 0.0005, 0.0006], "baseline": [0.001, 0.001, 0.0012]}
    known[8] = {"model": [0.9994, 0.9996, 1.5], "baseline": [0.123, 0.1234, 0.1227]}
    header, *rows = latency_rows(printed(f"{call} --latency-batch 8 --latency-batch 1"))
    assert header == ["batch", "speed-up", "model", "full model", "runs"]
    assert rows == [
        ["8", "0.12× (0.10 to 0.12)", "1 s (1 to 1.25)", "123 ms (123 to 123)", "3"],
        ["1", "2.00× (2.00 to 2.25)", "500 µs (450 to 550)", "1 ms (1 to 1.1)", "3"],
    ]


def test_text_without_baseline_has_no_ratio(routed, printed, known):
    known[1] = {"model": [2.0, 3.0, 4.0]}
    rows = latency_rows(printed(f"eval {routed} --data digits --limit 40 --latency --latency-batch 1"))
    assert rows == [["batch", "model", "runs"], ["1", "3 s (2.5 to 3.5)", "3"]]


@pytest.mark.parametrize(("limit", "passed"), [(1.5, True), (1.5001, False), (0.5, True), (1.9, False)])
def test_gate_judges_the_worst_batch_size(call, run, known, limit, passed):
    for batch_size, seconds in ((1, 2.0), (8, 1.5), (32, 1.75)):
        known[batch_size] = {"model": [1.0] * 3, "baseline": [seconds] * 3}
    result = run(f"{call} --min-speedup {limit} --output-format json")
    found = json.loads(result.stdout)
    [gate] = found["gates"]
    assert (gate["name"], gate["limit"], gate["value"], gate["passed"]) == ("min_speedup", limit, 1.5, passed)
    assert found["passed"] is passed
    assert result.code == (0 if passed else 1)
    text = run(f"{call} --min-speedup {limit}")
    assert text.code == result.code
    [row] = [re.split(r"  +", line) for line in text.stdout.splitlines() if line.startswith("min_speedup")]
    assert row[0] == "min_speedup (lowest of all batch sizes)"
    assert row[-1] == ("passed" if passed else "FAILED")


def test_gate_with_confidence_judges_the_batch_size_that_shows_least(call, run, known):
    """Ten repetitions of which eight are fast enough, and seven that all are."""
    known[1] = {"model": [1.0] * 10, "baseline": [1.0, 1.1, *[2.0] * 8]}
    known[8] = {"model": [1.0] * 7, "baseline": [1.5] * 7}
    call += " --latency-batch 1 --latency-batch 8 --confidence 0.95 --min-speedup"
    [gate] = json.loads(run(f"{call} 1.2 --output-format json").stdout)["gates"]
    assert (gate["value"], gate["bound"], gate["samples"]) == (1.5, 1.1, 10)  # P(0 or 1 of 10) = 0.011
    assert (gate["passed"], gate["reason"], gate["confidence"]) == (False, "undecided", 0.95)
    assert 10 < gate["samples_needed"] <= 15
    text = run(f"{call} 1.2").stdout
    assert f"FAILED: 10 repetitions cannot show it, about {gate['samples_needed']} would" in text
    passing = run(f"{call} 1.1")
    assert (passing.code, passing.stdout.split()[-1]) == (0, "passed")


def test_too_few_repetitions_for_the_level_show_nothing(call, run, known):
    known[1] = {"model": [1.0] * 7, "baseline": [3.0] * 7}
    call += " --latency-batch 1 --min-speedup 2 --output-format json --confidence"
    enough, too_few = (json.loads(run(f"{call} {level}").stdout)["gates"][0] for level in (0.99, 0.999))
    assert (enough["passed"], enough["bound"]) == (True, 3.0)
    assert (too_few["reason"], too_few["bound"], too_few["samples_needed"]) == ("undecided", 0.0, 10)


def test_a_batch_size_below_1_is_refused_in_python_too(single):
    with pytest.raises(moeprune.MoepruneError, match="found 0"):
        moeprune.evaluate(moeprune.load(single), "digits", latency_batches=(1, 0))


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("measure", [lambda *_, **__: torch.empty(2**50), no_memory], ids=["CPU", "CUDA"])
def test_out_of_memory_asks_for_smaller_batches(call, run, monkeypatch, measure):
    for target, line, hint in (
        ("latency.interleaved", call, "give a smaller `--batch-size` or `--latency-batch`"),
        ("evaluate.predict", call.removesuffix("--latency"), "give a smaller `--batch-size`"),
    ):
        monkeypatch.setattr(f"moeprune.evaluation.{target}", measure)
        result = run(line)
        monkeypatch.undo()
        assert (result.code, result.stdout) == (2, "")
        assert result.stderr.startswith("error: out of memory")
        assert result.stderr.endswith(f"\n\nhint: {hint}\n")
