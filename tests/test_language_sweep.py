"""Sweeps of language models: each row is a pruning that a folder can hold, evaluated on text."""

import functools
import json
from pathlib import Path

import pytest

import moeprune
from moeprune.evaluation.language_results import LanguageEvaluation
from moeprune.models.folders.layout import read_folder
from tests.architectures import language_model
from tests.language import V, make_tokenizer, write_lines

pytest.importorskip("transformers")
DATA = ("--sequence-length", 16, "--device", "cpu")


@pytest.fixture(scope="module")
def analyzed(run, tmp_path_factory):
    """Return a small model's folder, its analysis, and a file of other text."""
    place = tmp_path_factory.mktemp("texts")
    texts = [f"text number {n} of some {'more ' * (n % 5)}words" for n in range(30)]
    first, other = (
        write_lines(place / f"{name}.jsonl", [{"text": f"{name} {text}"} for text in texts])
        for name in ("first", "other")
    )

    @functools.cache
    def analyzed(name: str) -> tuple[Path, Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        language_model(name, vocab_size=V).save_pretrained(folder / "full")
        make_tokenizer(folder / "full", texts)
        found = run("analyze", folder / "full", "--data", first, *DATA, "-o", folder / "analysis.safetensors")
        assert found.code == 0, found.stderr
        return folder / "full", folder / "analysis.safetensors", other

    return analyzed


@pytest.mark.slow
def test_rows_are_what_prune_and_eval_give(analyzed, run_json, tmp_path):
    folder, analysis, text = analyzed("qwen3_moe")
    call = ("eval", folder, "--data", text, *DATA, "--analysis", analysis, "--sweep")
    report = run_json(*call, "1/2", "--report", tmp_path / "page.html")
    full, *rows = report["rows"]
    ways = ["gram renorm-refit", "reap renorm", "frequency renorm", "random renorm", "gram none"]
    assert [f"{row['signal']} {row['compensate']}" for row in rows] == ways
    assert (full["loss_increase"], full["agreement"], full["size"], full["flops"]) == (0, 1, 1, 1)
    assert [row["draws"] for row in rows] == [1, 1, 1, 3, 1]
    data = moeprune.open_data(str(text), moeprune.load(folder).input_format, sequence_length=16)
    for row in (rows[0], rows[4]):
        pruned = tmp_path / row["compensate"]
        run_json("prune", folder, "--analysis", analysis, *row["options"].split(), "-o", pruned)
        found = moeprune.evaluate(pruned, data, folder, device="cpu")
        assert isinstance(found, LanguageEvaluation)
        assert found.difference is not None
        for name in ("loss_increase", "agreement", "kl"):
            assert row[name] == pytest.approx(getattr(found.difference, name), rel=1e-3, abs=1e-6)
        cost, whole = read_folder(pruned).cost(), read_folder(folder).cost()
        assert row["size"] == cost.bytes / whole.bytes
        assert row["flops"] == cost.flops_per_input.total / whole.flops_per_input.total
    assert "least loss increase at 1/2" in (tmp_path / "page.html").read_text()
    [_, row] = run_json(*call, "4", "--compensate", "renorm", "--repeat", "2")["rows"]
    assert (row["keep"], row["signal"], row["compensate"], row["draws"]) == ("4", "gram", "renorm", 2)


def test_what_a_folder_cannot_hold_is_left_out_with_a_warning(analyzed, run):
    folder, analysis, text = analyzed("hunyuan_v1_moe")
    call = ("eval", folder, "--data", text, *DATA, "--analysis", analysis, "--sweep", "1/2,1/8", "--signal", "auto")
    found = run(*call, "--output-format", "json")
    assert found.code == 0, found.stderr
    assert [row["keep"] for row in json.loads(found.stdout)["rows"]] == ["1.0", "1/2"]
    assert "left out: `--keep 1/8 --compensate renorm-refit --signal gram`: layer" in found.stderr
    shown = run(*call[:-2]).stderr
    assert "left out: `--width 1/2 --compensate none`" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plot", "plot.svg"), "`--plot` does not go with a sweep of a language model"),
        (("--latency",), "`--latency` does not go with a sweep of a language model"),
        (("--scope", "input"), "each token chooses experts anyway"),
        (("--compensate", "affine"), "leaves no drop-in folder"),
    ],
)
def test_what_a_sweep_of_text_lacks_is_refused(options, said, analyzed, run):
    folder, analysis, text = analyzed("qwen3_moe")
    found = run("eval", folder, "--data", text, *DATA, "--analysis", analysis, "--sweep", "1/2", *options)
    assert (found.code, said in found.stderr) == (2, True), found.stderr


def test_an_analysis_of_another_model_is_refused(analyzed, run):
    folder, _, text = analyzed("qwen3_moe")
    other = analyzed("hunyuan_v1_moe")[1]
    found = run("eval", folder, "--data", text, *DATA, "--analysis", other, "--sweep", "1/2")
    assert (found.code, "made for another checkpoint" in found.stderr) == (2, True), found.stderr
