"""Language models: figures against ten lines in float64, intervals over sequences, gates, groups and reports."""

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
import torch

import moeprune
from moeprune.calibration.changes import changes
from moeprune.evaluation import checkpoint
from moeprune.evaluation.language_results import LanguageEvaluation
from moeprune.models import runtime
from moeprune.pruning import auto
from tests.language import LONGEST, TinyLanguageModel, V, ids, make_tokenizer, spoken, write_lines
from tests.schemas import complaints

CPU = moeprune.Runtime("cpu", batch_size=8)
TEXTS = [{"text": f"{kind} text number {n}: " + kind * 9, "kind": kind} for n in range(12) for kind in ("a", "b ")]


@pytest.fixture(scope="module")
def full():
    return TinyLanguageModel()


@pytest.fixture(scope="module")
def pruned(full):
    return moeprune.prune(full, data=ids(64), keep=2, compensate="mean", runtime=CPU)


def oracle(model, full, tokens):
    """Loss, accuracy, agreement and divergence of each sequence."""
    found, expected = (each(tokens).double()[:, :-1].log_softmax(-1) for each in (model, full))
    targets, best = tokens[:, 1:], found.argmax(-1)
    return {
        "loss": -found.gather(-1, targets[..., None])[..., 0].mean(1),
        "accuracy": (best == targets).double().mean(1),
        "agreement": (best == expected.argmax(-1)).double().mean(1),
        "kl": (expected.exp() * (expected - found)).sum(-1).mean(1),
    }


def interval(values, confidence=0.95):
    return scipy.stats.t.interval(confidence, len(values) - 1, float(values.mean()), scipy.stats.sem(values.numpy()))


def near(value):
    return pytest.approx(value, rel=1e-4, abs=1e-6)


def test_figures_are_means_over_tokens_and_intervals_over_sequences(pruned, full):
    tokens = spoken(full, 30)
    found = moeprune.evaluate(pruned, tokens, full, CPU)
    own, of_full = oracle(pruned, full, tokens), oracle(full, full, tokens)
    assert isinstance(found, LanguageEvaluation)
    assert found.sequence_length == 12
    assert found.model.bits_per_byte is None
    for figures, expected in ((found.model, own), (found.baseline_model, of_full)):
        assert figures.loss == near(float(expected["loss"].mean()))
        assert figures.loss_ci95 == near(interval(expected["loss"]))
        assert figures.perplexity == near(math.exp(expected["loss"].mean()))
        assert figures.perplexity_ci95 == near([math.exp(bound) for bound in interval(expected["loss"])])
        assert figures.accuracy == near(float(expected["accuracy"].mean()))
    difference, increase = found.difference, own["loss"] - of_full["loss"]
    assert difference.loss_increase == near(float(increase.mean()))
    assert difference.loss_increase_ci95 == near(interval(increase))
    assert difference.perplexity_ratio == near(found.model.perplexity / found.baseline_model.perplexity)
    assert difference.agreement == near(float(own["agreement"].mean()))
    assert difference.agreement_ci95 == near(interval(own["agreement"]))
    assert difference.kl == near(float(own["kl"].mean()))
    assert difference.kl_ci95 == near(interval(own["kl"]))
    assert difference.accuracy_drop == near(float((of_full["accuracy"] - own["accuracy"]).mean()))
    assert difference.size_reduction == near(1 - found.model.bytes / found.baseline_model.bytes)


def test_batches_and_chunks_leave_no_trace(pruned, full, monkeypatch):
    whole = moeprune.evaluate(pruned, ids(9), full, CPU)
    monkeypatch.setattr(runtime, "CHUNK_ON_CPU", 5 * V)
    monkeypatch.setattr(runtime, "MOST_LOGITS", 2 * 12 * V)
    parts = moeprune.evaluate(pruned, ids(9), full, CPU)
    assert parts.difference.kl == near(whole.difference.kl)
    assert parts.model.loss == near(whole.model.loss)
    assert parts.data.fingerprint == whole.data.fingerprint


def test_comparisons_of_predictions_are_means_over_tokens_however_they_are_split(pruned, full, monkeypatch):
    data = moeprune.open_data(spoken(full, 9), full.input_format)
    expected = oracle(pruned, full, spoken(full, 9)[:, [*range(12), 0]])  # also of what follows the last token
    [whole] = auto.compare([pruned], full, data, CPU)
    monkeypatch.setattr(runtime, "CHUNK_ON_CPU", 5 * V)
    monkeypatch.setattr(runtime, "MOST_LOGITS", 2 * 12 * V)
    found = changes({"": pruned}, full, data, CPU, "compare")[""]
    assert float(found.divergence) == near(float(expected["kl"].mean()))
    assert float(found.agreement) == near(float(expected["agreement"].mean()))
    assert auto.compare([pruned], full, data, CPU)[0].tolist() == near(whole.tolist())


def test_a_model_beside_itself_differs_in_nothing(full):
    found = moeprune.evaluate(full, ids(4), full, CPU, gates={"min_agreement": 1, "max_kl": 0, "max_loss_increase": 0})
    assert (found.difference.kl, found.difference.agreement, found.difference.loss_increase) == (0, 1, 0)
    assert found.passed


def test_one_sequence_has_no_interval(full):
    found = moeprune.evaluate(full, ids(1), full, CPU)
    assert found.model.loss_ci95 is found.difference.kl_ci95 is None
    with pytest.raises(moeprune.MoepruneError, match="has one sequence, `confidence` needs at least two"):
        moeprune.evaluate(full, ids(1), full, CPU, gates={"max_kl": 1}, confidence=0.95)


class Padded(TinyLanguageModel):
    """No token of the last tenth of the vocabulary can follow."""

    def forward(self, ids):
        logits = super().forward(ids)
        logits[..., -V // 10 :] = -torch.inf
        return logits


def test_tokens_that_both_models_exclude_make_no_difference():
    tokens = ids(4) % (V // 2)
    assert moeprune.evaluate(Padded(), tokens, Padded(), CPU).difference.kl == 0


def test_logits_that_are_none_are_refused(full):
    with pytest.raises(moeprune.MoepruneError, match="computes NaN or infinite logits"):
        moeprune.evaluate(Padded(), torch.full((2, 4), V - 1), runtime=CPU)
    flat = TinyLanguageModel()
    flat.head.forward = lambda x: x.mean(1)
    with pytest.raises(moeprune.MoepruneError, match=r"gives \[2, 6\] for token ids \[2, 4\], expected logits"):
        moeprune.evaluate(flat, torch.zeros(2, 4, dtype=int), runtime=CPU)


# Gates


def upper(values, confidence):
    """The upper bound of a mean by Student's t."""
    n = len(values)
    return float(values.mean()) + scipy.stats.t.ppf(confidence, n - 1) * float(values.std()) / math.sqrt(n)


def test_bounds_of_gates_are_those_of_student(pruned, full):
    tokens = spoken(full, 30)
    own, of_full = oracle(pruned, full, tokens), oracle(full, full, tokens)
    increase = own["loss"] - of_full["loss"]
    expected = {
        "max_loss_increase": upper(increase, 0.9),
        "max_perplexity_ratio": math.exp(upper(increase, 0.9)),
        "max_kl": upper(own["kl"], 0.9),
        "min_agreement": -upper(-own["agreement"], 0.9),
    }
    gates = {
        "max_loss_increase": 9,
        "max_perplexity_ratio": 9,
        "max_kl": 9,
        "min_agreement": 0,
        "min_size_reduction": 0,
    }
    found = moeprune.evaluate(pruned, tokens, full, CPU, gates=gates, confidence=0.9)
    assert {gate.name: gate.bound for gate in found.gates if gate.bound is not None} == near(expected)
    assert found.passed
    assert {gate.samples for gate in found.gates} == {30, None}


@pytest.mark.parametrize("name", ["max_loss_increase", "max_perplexity_ratio", "max_kl", "min_agreement"])
def test_gates_are_missed_undecided_or_passed(pruned, full, name):
    tokens, sign = spoken(full, 30), 1 if name[:3] == "max" else -1
    [gate] = moeprune.evaluate(pruned, tokens, full, CPU, gates={name: 0.5}, confidence=0.9).gates
    half = (gate.bound - gate.value) / 2  # of the way to the bound
    assert half * sign > 0
    for limit, reason in ((gate.value - half, "missed"), (gate.value + half, "undecided"), (gate.bound + half, None)):
        [again] = moeprune.evaluate(pruned, tokens, full, CPU, gates={name: limit}, confidence=0.9).gates
        assert (again.reason, again.passed) == (reason, reason is None)
        if reason == "undecided":  # twice as near takes four times as many
            assert 3 * 30 < again.samples_needed < 5 * 30


def test_gates_go_with_one_kind_of_model(full, single):
    for name in ("max_accuracy_drop", "min_accuracy"):
        with pytest.raises(
            moeprune.MoepruneError, match=f"`{name}` does not go with the model: language models have no"
        ):
            moeprune.evaluate(full, ids(4), full, CPU, gates={name: 0.5})
    with pytest.raises(moeprune.MoepruneError, match="`max_kl` does not go with the model: the model is no language"):
        moeprune.evaluate(str(single), "digits", str(single), CPU, gates={"max_kl": 0.5})


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"max_kl": -0.1}, "`max_kl=-0.1` is not a number from 0"),
        ({"max_loss_increase": math.inf}, "is not a number from 0"),
        ({"max_perplexity_ratio": 0}, "`max_perplexity_ratio=0(.0)?` is not a ratio above 0"),
        ({"min_agreement": 2}, "is outside 0…1"),
    ],
)
def test_limits_that_cannot_be_judged_are_refused(full, gates, message):
    with pytest.raises(moeprune.MoepruneError, match=message):
        moeprune.evaluate(full, ids(4), full, CPU, gates=gates)


def test_a_baseline_of_another_kind_is_refused(full, single):
    with pytest.raises(moeprune.MoepruneError, match=r"the baseline takes 1×8×8 .* the model up to 64 tokens of a voc"):
        moeprune.evaluate(full, ids(4), str(single), CPU)


# Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, text of two kinds, and two checkpoints, which the command line opens as TinyLanguageModel."""
    pytest.importorskip("tokenizers")
    path = make_tokenizer(tmp_path_factory.mktemp("language"), [document["text"] for document in TEXTS])
    write_lines(path / "text.jsonl", TEXTS)
    full = TinyLanguageModel(path)
    moeprune.save(full, path / "full.safetensors")
    pruned = moeprune.prune(full, data=ids(64), keep=2, compensate="mean", runtime=CPU)
    moeprune.save(pruned, path / "pruned.safetensors")
    return path


@pytest.fixture
def models(folder, monkeypatch):
    full = TinyLanguageModel(folder)
    known = {"full": full, "pruned": moeprune.prune(full, data=ids(64), keep=2, compensate="mean", runtime=CPU)}
    monkeypatch.setattr(checkpoint, "open_model", lambda spec, **_: known[spec.path.stem])
    return known


def test_groups_and_bits_per_byte(folder, models, run_json):
    call = f"eval {folder}/pruned.safetensors --data {folder}/text.jsonl --sequence-length 16 --by kind --device cpu"
    found = run_json(f"{call} --baseline {folder}/full.safetensors")
    data = moeprune.open_data(folder / "text.jsonl", models["full"].input_format, None, None, 16, "kind")
    tokens = torch.cat([inputs for inputs, _ in data.batches(64)])
    own, of_full, texts = (
        oracle(models["pruned"], models["full"], tokens),
        oracle(models["full"], models["full"], tokens),
        data.source.texts,
    )
    nats = own["loss"].numpy() * 15
    assert found["model"]["bits_per_byte"] == near(nats.sum() / math.log(2) / texts.bytes.sum())
    assert found["data"]["samples"] == len(tokens)
    assert {group["name"] for group in found["groups"]} == {"a", "b "}
    for group in found["groups"]:
        where = texts.group == texts.groups.index(group["name"])
        increase = (own["loss"] - of_full["loss"])[where]
        assert group["samples"] == where.sum()
        assert group["loss_increase"] == near(float(increase.mean()))
        assert group["loss_increase_ci95"] == near(interval(increase))
        assert group["bits_per_byte"] == near(nats[where].sum() / math.log(2) / texts.bytes[where].sum())
        assert group["kl"] == near(float(own["kl"][where].mean()))
    increases = [group["loss_increase"] for group in found["groups"]]
    assert increases == sorted(increases, reverse=True)


def test_a_limit_draws_sequences_with_their_bytes_and_groups(folder, models, run_json):
    call = f"eval {folder}/full.safetensors --data {folder}/text.jsonl --sequence-length 16 --by kind --limit 5"
    found = run_json(f"{call} --device cpu")
    assert sum(group["samples"] for group in found["groups"]) == 5
    data = moeprune.open_data(folder / "text.jsonl", models["full"].input_format, None, 5, 16, "kind")
    loss = oracle(models["full"], models["full"], torch.cat([inputs for inputs, _ in data.batches(64)]))["loss"]
    chosen = data.source.texts.bytes[list(data.indices)]
    assert found["model"]["bits_per_byte"] == near(float(loss.sum()) * 15 / math.log(2) / chosen.sum())


def test_every_format_shows_the_figures_and_the_gates(folder, models, run, tmp_path):
    call = f"eval {folder}/pruned.safetensors --baseline {folder}/full.safetensors --data {folder}/text.jsonl"
    call += " --sequence-length 16 --by kind --device cpu --max-kl 0 --max-loss-increase 99"
    shown = {}
    for kind in ("text", "markdown", "github", "junit", "json"):
        shown[kind] = run(f"{call} --output-format {kind}")
        assert shown[kind].code == 1, shown[kind].stderr
    report = json.loads(shown["json"].stdout)
    assert complaints("eval-language", report) == []
    for kind in ("text", "markdown"):
        for words in (
            "samples of 16 tokens",
            "perplexity",
            "bits per byte",
            f"{report['model']['loss']:.4f}",
            "FAILED",
        ):
            assert words in shown[kind].stdout, (kind, words)
    assert "::error title=moeprune eval%3A max_kl failed::" in shown["github"].stdout
    suites = ElementTree.fromstring(shown["junit"].stdout)
    assert [case.get("name") for case in suites.iter("testcase")] == ["max_loss_increase", "max_kl"]
    assert suites.get("failures") == "1"
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.html"
    assert run(f"{call} --report {page}").code == 1
    assert "loss increase" in page.read_text()
    assert f"{report['difference']['loss_increase']:+.4f}" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--by kinds", "line 1 of `.*` has no field `kinds` to group by"),
        ("--sequence-length 65", "`--sequence-length 65` does not fit the model"),
        ("--sequence-length 64 --by kind --limit 0", "limit"),
        ("--min-accuracy 0.5", "`--min-accuracy` does not go with the model"),
    ],
)
def test_what_does_not_go_with_the_text_ends_with_two(folder, models, run, options, message):
    ended = run(f"eval {folder}/full.safetensors --data {folder}/text.jsonl --device cpu {options}")
    assert ended.code == 2
    assert re.search(message, ended.stderr), ended.stderr
    assert ended.stdout == ""


def test_a_language_model_takes_no_images(full):
    with pytest.raises(moeprune.MoepruneError, match="no data `digits`"):
        moeprune.evaluate(full, "digits", runtime=CPU)


# The rest of the pipeline


def test_auto_and_probes_and_shift_work_on_tokens(full, caplog):
    """The data of the evaluation uses tokens that calibration did not have."""
    low = ids(96) % 20
    pruned = moeprune.prune(full, data=low, keep="1/2", runtime=CPU)
    found = moeprune.evaluate(pruned, ids(96, seed=3) % 20, full, CPU)
    assert set(found.shift) == {"moe.0", "moe.1"}
    assert not any(shift.is_shifted for shift in found.shift.values())
    found = moeprune.evaluate(pruned, 200 + low, full, CPU)
    assert any(shift.is_shifted for shift in found.shift.values())
    assert "the data is not like the calibration data" in caplog.text


def test_compensation_lowers_the_divergence(full):
    losses = {}
    for compensate in ("none", "mean", "affine"):
        pruned = moeprune.prune(full, data=ids(100), keep=2, signal="gram", compensate=compensate, runtime=CPU)
        losses[compensate] = moeprune.evaluate(pruned, ids(60, seed=5), full, CPU).difference.kl
    assert losses["affine"] < losses["mean"] < losses["none"]


def test_analyze_reports_probes_of_predicted_tokens(folder, monkeypatch, run_json, tmp_path):
    from moeprune.calibration import analysis

    model = TinyLanguageModel(folder)
    monkeypatch.setattr(analysis, "open_model", lambda spec, **_: model)
    call = (
        f"analyze {folder}/full.safetensors --data {folder}/text.jsonl --sequence-length 16 -o {tmp_path}/a.safetensors"
    )
    found = run_json(f"{call} --device cpu")
    assert 0 < found["probes"]["no_experts"]["agreement"] < found["probes"]["best_eighth"]["agreement"] <= 1
    data = moeprune.open_data(folder / "text.jsonl", model.input_format, sequence_length=16)
    used = moeprune.load_analysis(tmp_path / "a.safetensors")
    assert moeprune.prune(model, used, data=data, keep=2, compensate="mean", runtime=CPU).plan


def test_searches_and_sweeps_by_accuracy_are_refused(full):
    with pytest.raises(moeprune.MoepruneError, match="no accuracy of classes") as error:
        moeprune.prune(full, data=ids(9), max_accuracy_drop=0.1, runtime=CPU)
    assert "--max-loss-increase" in error.value.hint


def test_the_longest_sequence_fits(full):
    assert moeprune.evaluate(full, ids(2, LONGEST), runtime=CPU).sequence_length == LONGEST
    with pytest.raises(moeprune.MoepruneError, match=r"have the shape \[2, 65\]"):
        moeprune.evaluate(full, np.zeros((2, LONGEST + 1), np.int64), runtime=CPU)


def test_a_sweep_by_accuracy_is_refused(folder, monkeypatch, run, tmp_path):
    from moeprune.pruning import checkpoint

    full = TinyLanguageModel(folder)
    monkeypatch.setattr(checkpoint, "open_model", lambda spec, **_: full)
    moeprune.save_analysis(moeprune.analyze(full, ids(8), CPU), tmp_path / "a.safetensors")
    call = f"eval {folder}/full.safetensors --data {folder}/text.jsonl --sequence-length 16 --device cpu"
    ended = run(f"{call} --sweep 1/2 --analysis {tmp_path}/a.safetensors")
    assert (ended.code, "no accuracy of classes" in ended.stderr) == (2, True), ended.stderr
