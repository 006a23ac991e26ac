"""The Python API: data in memory, paths in place of what they lead to, the options of the commands, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

import moeprune
from moeprune.errors import MoepruneError

CPU = moeprune.Runtime("cpu")
PIXELS = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(40) % 10


class Pairs(Dataset):
    """A data set of lists of numbers and of Python integers, with more than one worker's worth of samples."""

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        print("reading", index)
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
def test_samples_in_memory_are_read_as_those_of_a_file(kind, model, of_file, capsys):
    samples = KINDS[kind]()
    before = torch.random.get_rng_state()
    data = moeprune.open_data(samples, model.input_format)
    passes = [[*data.batches(16)] for _ in range(2)]
    assert data.fingerprint == of_file.origin.data.fingerprint
    assert (data.samples, data.has_labels) == (40, True)
    assert all(torch.equal(one, other) for pair in zip(*passes, strict=True) for one, other in zip(*pair, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capsys.readouterr().out == ""


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
