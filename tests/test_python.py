"""The Python API: data in memory, paths in place of what they lead to, the options of the commands, and its errors."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

import moeprune
from moeprune.data.preprocessing import Preprocessing
from moeprune.errors import MoepruneError
from moeprune.records import to_text

CPU = moeprune.Runtime("cpu")
PIXELS = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(40) % 10


class Pairs(Dataset):
    """A data set of lists of numbers and of Python integers, with more than one worker's worth of samples."""

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return PIXELS[index], int(LABELS[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(PIXELS, LABELS, strict=True))


def halves(batch):
    """A collate_fn of one's own."""
    pixels, labels = zip(*batch, strict=True)
    return torch.stack(pixels), torch.tensor(labels)


KINDS = {
    "tensors": lambda: (PIXELS, LABELS),
    "arrays": lambda: (PIXELS.numpy(), LABELS.numpy().astype(np.uint8)),
    "channels last": lambda: (PIXELS.permute(0, 2, 3, 1), LABELS),
    "a batch": lambda: next(iter(DataLoader(TensorDataset(PIXELS, LABELS), 40))),
    "a data set": lambda: TensorDataset(PIXELS, LABELS),
    "a data set of one's own": lambda: Pairs(),
    "a stream": lambda: Stream(),
    "a loader": lambda: DataLoader(TensorDataset(PIXELS, LABELS), 7, shuffle=True),
    "a loader with workers": lambda: DataLoader(Pairs(), 7, shuffle=True, num_workers=2, collate_fn=halves),
    "a loader of a stream": lambda: DataLoader(Stream(), 7),
    "a loader of batches": lambda: DataLoader(
        [(PIXELS[:20], LABELS[:20]), (PIXELS[20:], LABELS[20:])], batch_size=None
    ),
}


@pytest.fixture(scope="module")
def model(single):
    return moeprune.load(single)


@pytest.fixture(scope="module")
def of_file(model, tmp_path_factory):
    """An analysis of the samples in a file."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, inputs=PIXELS.numpy(), labels=LABELS.numpy())
    return moeprune.analyze(model, path, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_in_memory_are_read_as_those_of_a_file(kind, model, of_file):
    samples = KINDS[kind]()
    before = torch.random.get_rng_state()
    data = moeprune.open_data(samples, model.input_format)
    passes = [[*data.batches(16)] for _ in range(2)]
    assert data.fingerprint == of_file.origin.data.fingerprint
    assert (data.samples, data.has_labels) == (40, True)
    assert all(torch.equal(one, other) for pair in zip(*passes, strict=True) for one, other in zip(*pair, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_loader_stands_for_the_samples_that_it_draws(model):
    every = TensorDataset(PIXELS, LABELS)
    drawn = {
        "a part": (DataLoader(Subset(every, range(5, 25)), 8, shuffle=True), PIXELS[5:25]),
        "whole batches": (DataLoader(every, 16, drop_last=True), PIXELS[:32]),
        "one sample": (DataLoader(every, sampler=WeightedRandomSampler([0.0] * 39 + [1.0], 3)), PIXELS[[39] * 3]),
    }
    for name, (loader, pixels) in drawn.items():
        found = torch.cat([inputs for inputs, _ in moeprune.open_data(loader, model.input_format).batches(64)])
        expected = moeprune.open_data(pixels, model.input_format)
        assert torch.equal(found, torch.cat([inputs for inputs, _ in expected.batches(64)])), name
        assert not expected.has_labels


def test_samples_in_memory_are_warned_of_as_those_of_files_are(model, caplog):
    guessed = replace(model.input_format, preprocessing=Preprocessing())
    for samples in (PIXELS, DataLoader(Pairs(), 4)):
        moeprune.open_data(samples, model.input_format)
        moeprune.open_data(PIXELS / 255, guessed)
        assert caplog.messages == []
        moeprune.open_data(samples, guessed)
        assert "are not normalised" in caplog.messages.pop()
        caplog.clear()
    pruned = moeprune.prune(model, (PIXELS, LABELS), keep=4, compensate="mean")
    moeprune.evaluate(pruned, DataLoader(Pairs(), 4))
    assert "calibrated on the very samples" in caplog.messages[-1]


class Broken(Pairs):
    def __getitem__(self, index):
        if index > 20:
            raise SystemExit(0)
        return super().__getitem__(index)


WRONG = {
    "nothing": ((), "gives tuple of nothing"),
    "a number": (3, "gives int of int"),
    "texts": (np.array(["a"]), "gives no numbers"),
    "wide": (PIXELS.repeat(1, 1, 1, 2), r"`<Tensor>` have the shape \[40, 1, 8, 16\], the model takes \[n, 1, 8, 8\]"),
    "integers": (PIXELS.int(), r"are torch.int32, expected uint8 pixels or floats"),
    "few labels": ((PIXELS, LABELS[1:]), r"shape \[39\], expected \[40\]"),
    "real labels": ((PIXELS, LABELS / 2), "expected integers"),
    "other labels": ((PIXELS, LABELS + 5), "the model has 10 classes"),
    "no samples": (PIXELS[:0], "no samples in `<Tensor>`"),
    "an empty loader": (DataLoader(TensorDataset(PIXELS[:3]), 4, drop_last=True), "no samples in `<DataLoader of "),
    "an empty stream": (DataLoader([], batch_size=None), "no samples in `<DataLoader of list>`"),
    "dictionaries": (DataLoader([{"x": 1.0}]), r"`<DataLoader of list>` gives dict of dict\n\nhint: give inputs"),
    "a generator": ((x for x in PIXELS), "gives generator of generator"),
    "not finite": (PIXELS / 0.0, "has NaN or infinite values"),
    "a class": (Pairs, "gives type of type"),
    "sizes that differ": (DataLoader([PIXELS[0]] * 10 + [PIXELS[0][:, :7]] * 10), r"shape \[10, 1, 7, 8\]"),
    "sizes that differ in a batch": (DataLoader([PIXELS[0], PIXELS[0][:, :7]]), "stack expects each tensor"),
    "an end of the program": (DataLoader(Broken(), 4), r"fails: it ended the program with `sys.exit\(0\)`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_samples_that_do_not_fit(kind, model):
    samples, message = WRONG[kind]
    with pytest.raises(MoepruneError, match=message):
        for _ in moeprune.open_data(samples, model.input_format).batches(10):
            pass


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    tensors = other.state_dict()
    return one.plan == other.plan and all(torch.equal(value, tensors[key]) for key, value in one.state_dict().items())


@pytest.fixture(scope="module")
def files(model, of_file, tmp_path_factory):
    """An analysis and a plan as files."""
    folder = tmp_path_factory.mktemp("files")
    moeprune.save_analysis(of_file, folder / "of.safetensors")
    moeprune.save(moeprune.prune(model, of_file, keep=3, one_shot=True), folder / "pruned.safetensors")
    return folder


OPTIONS = {
    "--keep 8": {"keep": 8},
    "--keep 1.0 --scope input": {"keep": 1.0, "scope": "input"},
    "--keep 1 --scope batch": {"keep": np.int64(1), "scope": "batch"},
    "--keep 1/3 --compensate affine --signal gram": {"keep": Fraction(1, 3), "compensate": "affine", "signal": "gram"},
    "--keep 1/4 --seed 3 --signal random --compensate renorm": {
        "keep": 0.25, "seed": 3, "signal": "random", "compensate": "renorm",
    },
    "--max-size 0.4 --compensate mean": {"max_size": 0.4, "compensate": "mean"},
    "--max-flops 0.9 --one-shot": {"max_flops": 0.9, "one_shot": True},
    "--mass 0.8": {"mass": 0.8},
}  # fmt: skip


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("options", OPTIONS)
def test_prune_does_what_the_command_does(options, model, single, of_file, files, run, tmp_path):
    path, analysis = tmp_path / "pruned.safetensors", files / "of.safetensors"
    assert run("prune", single, "--analysis", analysis, *options.split(), "-o", path).code == 0
    for way in ((model, of_file), (single, str(analysis))):
        assert same(moeprune.prune(*way, **OPTIONS[options]), moeprune.load(path))


@pytest.mark.slow
def test_plans_data_and_searches(model, single, of_file, files, run, tmp_path):
    planned = moeprune.prune(single, files / "of.safetensors", plan=files / "pruned.safetensors")
    assert same(planned, moeprune.prune(model, of_file, plan=planned.plan))
    loader = DataLoader(Pairs(), 16, shuffle=True)
    analysis = moeprune.analyze(single, loader, device="cpu", batch_size=8)
    assert analysis.data is not None
    fitted = moeprune.prune(model, analysis, max_size=0.4, compensate="affine", signal="gram")  # reads the loader again
    assert same(fitted, moeprune.prune(model, loader, max_size=0.4, compensate="affine", signal="gram", device="cpu"))
    moeprune.save_analysis(analysis, tmp_path / "of.safetensors")
    with pytest.raises(MoepruneError, match=r"`<DataLoader of Pairs>`.*\n\nhint: .*`data`"):
        moeprune.prune(model, tmp_path / "of.safetensors", keep=4, compensate="affine")
    words = ("--max-accuracy-drop", 0.3, "--data", "digits", "--compensate", "mean", "--batch-size", 128)
    assert run("prune", single, *words, "-o", tmp_path / "found.safetensors").code == 0
    data = moeprune.open_data("digits:calibration", model.input_format)
    pixels, labels = (torch.cat(parts) for parts in zip(*data.batches(64), strict=True))
    found = moeprune.prune(model, (pixels, labels), max_accuracy_drop=0.3, compensate="mean", batch_size=128)
    assert same(found, moeprune.load(tmp_path / "found.safetensors"))
    other = moeprune.analyze(model, (pixels[:50], labels[:50]))  # of the same name, but not the same data
    assert moeprune.prune(model, other, data=(pixels, labels), max_accuracy_drop=0.5, compensate="mean").plan
    with pytest.raises(MoepruneError, match="must not be calibrated on"):
        moeprune.prune(model, moeprune.analyze(model, (pixels, labels)), data=(pixels, labels), max_accuracy_drop=0.5)


def test_evaluate_does_what_the_command_does(model, single, files, run, run_json):
    pruned, data = files / "pruned.safetensors", ("--data", "digits", "--limit", 50, "--batch-size", 16)
    words = ("--max-accuracy-drop", 0.001, "--min-size-reduction", 0.1, "--confidence", 0.9)
    result = run("eval", pruned, *data, "--baseline", single, *words, "--output-format", "json")
    expected = json.loads(result.stdout)
    gates = {"max_accuracy_drop": 0.001, "min_size_reduction": 0.1}
    samples = moeprune.open_data("digits", model.input_format, limit=50)
    found = json.loads(to_text(
        moeprune.evaluate(pruned, samples, single, gates=gates, confidence=0.9, batch_size=16)
    ))  # fmt: skip
    assert result.code == 1
    assert [gate.pop("name") for gate in found["gates"]] == list(gates)
    assert [gate.pop("name") for gate in expected["gates"]] == list(gates)
    assert found == expected


CALLS = {
    "`keep` and `max_size` exclude each other": {"keep": 1, "max_size": 0.5},
    "`keep=1.5` is more": {"keep": 1.5},
    "keeps no expert": {"keep": 0},
    "`keep=.nan.` is neither a share nor a number": {"keep": float("nan")},
    "`keep=.True.` is neither a share nor a number": {"keep": True},
    "no number of experts to keep\n\nhint: give one of `keep`, `mass`, `max_size`": {},
    "`max_accuracy_drop` searches on labelled `data`": {"max_accuracy_drop": 0.1},
    "needs calibration data\n\nhint: add `data`, or `analysis` where": {"keep": 2},
    "needs calibration\n\nhint: give an analysis \\(`analysis`\\) or calibration data \\(`data`\\)": {
        "keep": 2,
        "compensate": "none",
    },
    "`scope`: expected one of auto, static, input, batch": {"keep": 2, "scope": "none"},
    '`signal="gram"` needs one set': {"keep": 2, "signal": "gram", "scope": "input"},
    "no device `cuda:77` here": {"keep": 2, "analysis": PIXELS, "device": "cuda:77"},
    "`batch_size`: expected": {"keep": 2, "analysis": PIXELS, "batch_size": 0},
    "`max_size=0.01` is less than": {"max_size": 0.01, "analysis": PIXELS},
    "no data `missing.safetensors`": {"keep": 2, "analysis": "missing.safetensors"},
}


@pytest.mark.parametrize("message", CALLS)
def test_errors_speak_of_arguments(message, model):
    with pytest.raises(MoepruneError, match=message) as error:
        moeprune.prune(model, **CALLS[message])
    assert "`--" not in str(error.value)


def test_other_errors_speak_of_arguments_too(model, single, files):
    pruned = moeprune.load(files / "pruned.safetensors")
    calls = {
        "unknown gate `min_acuracy`": lambda: moeprune.evaluate(model, "digits", gates={"min_acuracy": 0.5}),
        "`max_accuracy_drop` compares with the full model": lambda: moeprune.evaluate(
            model, "digits", gates={"max_accuracy_drop": 0.5}
        ),
        "`baseline` is pruned": lambda: moeprune.evaluate(model, "digits", pruned),
        "hint: give another path, or `overwrite=True` to replace it": lambda: moeprune.save(model, single),
        "`model` is a Linear, not a model of moeprune": lambda: moeprune.analyze(torch.nn.Linear(2, 2), "digits"),
        "already pruned": lambda: moeprune.analyze(pruned, "digits"),
        "`batch_size`: expected": lambda: moeprune.Runtime(batch_size=0),
    }
    for message, call in calls.items():
        with pytest.raises(MoepruneError, match=message) as error:
            call()
        assert "`--" not in str(error.value)
