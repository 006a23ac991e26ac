"""What makes a figure look better or worse than it is, is said on stderr and in every report."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moeprune

GUESS = "are not normalised, as the checkpoint does not state its preprocessing"


@pytest.fixture(scope="module")
def converted(stock, tmp_path_factory):
    """A checkpoint of a library, and the options that it needs."""
    path = tmp_path_factory.mktemp("converted") / "model.safetensors"
    moeprune.export(moeprune.load(stock.path("dense.safetensors")), path, "soft-moe")
    return path, "--source-arg", "num_heads=2", "--source-arg", "global_pool=avg"


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Grey pixels with labels: arrays, images, and a built-in set."""
    root = tmp_path_factory.mktemp("pixels")
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    np.savez(root / "pixels.npz", inputs=images, labels=np.arange(10))
    np.savez(root / "floats.npz", inputs=images / 255, labels=np.arange(10))
    for label, image in enumerate(images):
        (root / "images" / str(label)).mkdir(parents=True)
        Image.fromarray(image).save(root / "images" / str(label) / "x.png")
    return root


@pytest.mark.slow
def test_normalisation_that_is_a_guess_is_a_warning_in_every_command(converted, pixels, run, run_json, tmp_path):
    analysis, pruned = tmp_path / "analysis.safetensors", tmp_path / "pruned.safetensors"
    for name in ("pixels.npz", "images", "digits"):
        data = ("--data", name if name == "digits" else pixels / name)
        calls = {
            "analyze": ("analyze", *converted, *data, "-o", analysis, "--force"),
            "prune": ("prune", *converted, *data, "--keep", "1/2", "--signal", "gram", "-o", pruned, "--force"),
            "eval": ("eval", *converted, *data),
            "eval of what was written": ("eval", pruned, *data),
        }
        for command, call in calls.items():
            assert sum(GUESS in said for said in run_json(*call)["warnings"]) == 1, (name, command)
        assert GUESS not in run(*calls["eval"], "--preprocess", "mean=0").stderr, name
    assert GUESS in run("prune", *converted, "--analysis", analysis, "--keep", "1/2", "--compensate", "lstsq",
                        "-o", pruned, "--force").stderr  # fmt: skip
    assert run_json("eval", *converted, "--data", pixels / "floats.npz")["warnings"] == []


def test_inspect_names_the_guess(converted, single, run, run_json):
    for options, is_stated in (((), False), (("--preprocess", "mean=0.5"), True)):
        assert run_json("inspect", *converted, *options)["states_normalisation"] is is_stated
        assert ("mean and std are a guess" in run("inspect", *converted, *options).stdout) is not is_stated
    assert run_json("inspect", single)["states_normalisation"] is True


CALIBRATED = "the model was calibrated on"


@pytest.fixture
def files(stock, tmp_path, monkeypatch):
    """The same samples in a/x.npz, b/x.npz and b/other.npz; others in c/x.npz."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(name).mkdir()
    for name in ("a/x.npz", "b/x.npz", "b/other.npz"):
        shutil.copy(stock.path("data.npz"), name)
    arrays = np.load("a/x.npz")
    np.savez("c/x.npz", inputs=arrays["inputs"][::-1], labels=arrays["labels"][::-1])


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("calibration", "evaluation", "said"),
    [
        ("digits:calibration 50", "digits:test 50", ""),
        ("digits:calibration 50", "digits:calibration 50", f"{CALIBRATED} the very samples of"),
        ("digits:calibration 50", "digits:calibration 20", f"{CALIBRATED} samples of"),
        ("digits:calibration 50", "digits:train 50", "`digits:train` is the split that models are trained on"),
        ("a/x.npz", "a/x.npz", f"{CALIBRATED} the very samples of"),
        ("a/x.npz", "b/other.npz", f"{CALIBRATED} the very samples of"),
        ("a/x.npz 6", "b/x.npz", f"{CALIBRATED} samples of"),
        ("a/x.npz", "b/x.npz 6", f"{CALIBRATED} samples of"),
        ("a/x.npz", "c/x.npz", ""),
        ("a/x.npz 6", "c/x.npz", ""),
    ],
)
def test_samples_that_a_model_has_seen_are_a_warning(stock, caplog, calibration, evaluation, said):
    model = moeprune.load(stock.path("dense.safetensors"))

    def opened(text):
        spec, _, limit = text.partition(" ")
        return moeprune.open_data(spec, model.input_format, limit=int(limit) if limit else None)

    pruned = moeprune.prune(model, data=opened(calibration), keep="1/2", signal="gram", compensate="mean")
    assert not caplog.records
    moeprune.evaluate(pruned, opened(evaluation))
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == bool(said), found
    assert all(said in text for text in found)


@pytest.mark.slow
@pytest.mark.usefixtures("files")
def test_every_report_has_the_warnings(stock, run, run_json, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    data = ("--data", "a/x.npz", "--analysis", stock.path("analysis.safetensors"))
    sweep = ("--sweep", "1/2", "--scope", "static", "--compensate", "none")
    call = ("eval", stock.path("static.safetensors"), *data)
    [said] = run_json(*call)["warnings"]
    assert said.startswith(f"{CALIBRATED} the very samples")
    assert run_json("eval", stock.path("dense.safetensors"), *data, *sweep)["warnings"] == [said]
    run(*call, "--summary", "--report", "page.html", "--output-file", "report")
    for path in ("page.html", "report", "summary.md"):
        assert f"warning: {said[:40]}" in Path(path).read_text(), path


@pytest.mark.parametrize("split", ["train", "calibration", "test"])
def test_calibration_is_not_for_the_splits_to_train_and_to_evaluate_on(stock, run_json, tmp_path, split):
    call = ("analyze", stock.path("dense.safetensors"), "--data", "digits", "--split", split, "--limit", 20)
    found = run_json(*call, "-o", tmp_path / "a.safetensors")["warnings"]
    is_named = [f"calibrated on `digits:{split}`" in text for text in found]
    assert is_named == [True] * (split != "calibration")


def test_half_of_a_file_that_a_search_calibrated_on_is_a_warning(stock, run, run_json, tmp_path):
    data = ("--data", stock.path("data.npz"))
    ways = ("--max-accuracy-drop", 0.9, "--compensate", "mean", "-o", tmp_path / "pruned.safetensors")
    assert run("prune", stock.path("dense.safetensors"), *data, *ways).stderr == ""
    [said] = run_json("eval", tmp_path / "pruned.safetensors", *data)["warnings"]
    assert "calibrated on a part of a file with the name of" in said


@pytest.mark.parametrize("calibration", [{"spec": 3}, [], "digits", {"spec": "x", "samples": -1, "fingerprint": None}])
def test_a_calibration_that_nobody_understands_is_none(stock, calibration, tmp_path):
    model = moeprune.load(stock.path("static.safetensors"))
    model.details = model.details.replace(provenance=model.details.provenance | {"calibration": calibration})
    assert moeprune.evaluate(model, str(stock.path("data.npz"))).data.samples


def test_an_analysis_finds_its_data_beside_itself(stock, run, tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "data").mkdir(parents=True)
    shutil.copy(stock.path("data.npz"), old / "data" / "x.npz")
    monkeypatch.chdir(old)
    dense, analysis = stock.path("dense.safetensors"), "analysis.safetensors"
    ways = ("--keep", "1/2", "--compensate", "affine", "-o", tmp_path / "pruned.safetensors", "--force")
    run("analyze", dense, "--data", "data/x.npz", "-o", analysis)
    assert run("prune", dense, "--analysis", analysis, *ways).code == 0
    before = (tmp_path / "pruned.safetensors").read_bytes()
    old.rename(new)
    monkeypatch.chdir(tmp_path)
    for change in (lambda: None, lambda: (new / "data" / "x.npz").rename(new / "x.npz")):
        change()
        found = run("prune", dense, "--analysis", new / analysis, *ways)
        assert found.code == 0, found.stderr
        assert (tmp_path / "pruned.safetensors").read_bytes() == before
    (new / "x.npz").unlink()
    lost = run("prune", dense, "--analysis", new / analysis, *ways)
    assert lost.code == 2
    assert "cannot read the analysis's own data again" in lost.stderr
