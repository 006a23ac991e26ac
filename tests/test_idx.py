"""Data in the format of MNIST: splits, images with their labels, and files that are not as they should be."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import moeprune
from moeprune.data import idx
from moeprune.data.preprocessing import InputFormat, Preprocessing
from tests.endings import refusal

FORM = InputFormat(1, 8, 8, classes=10, preprocessing=Preprocessing(mean=(0.25,), std=(0.5,)))
SAMPLES = {"train": 23, "t10k": 11}
TRAIN, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
PIXELS = {name: np.random.default_rng(n).integers(0, 256, (n, 8, 8), dtype=np.uint8) for name, n in SAMPLES.items()}


def labels_of(name: str) -> np.ndarray:
    return (np.arange(SAMPLES[name]) * 7 % 10).astype(np.uint8)


def encoded(array: np.ndarray, kind: int = 0x08, sizes: tuple[int, ...] | None = None) -> bytes:
    """An array as the bytes of an idx file, whose header may say something else."""
    sizes = array.shape if sizes is None else sizes
    return struct.pack(f">BBBB{len(sizes)}I", 0, 0, kind, len(sizes), *sizes) + array.tobytes()


def write(folder: Path, suffix: str = "", dot: str = "-") -> Path:
    """The four files of a data set."""
    folder.mkdir(exist_ok=True)
    for name, pixels in PIXELS.items():
        for kind, array in ((f"images{dot}idx3", pixels), (f"labels{dot}idx1", labels_of(name))):
            content = encoded(array)
            path = folder / f"{name}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
    return folder


def read(spec: object, batch_size: int = 4, **options) -> tuple[str, np.ndarray, np.ndarray | None]:
    """The spec of what is opened, its pixels (n,8,8) in 0…255, and its labels."""
    data = moeprune.open_data(str(spec), FORM, **options)
    inputs, labels = zip(*data.batches(batch_size), strict=True)
    assert inputs[0].dtype == torch.float32
    pixels = (255 * (0.5 * torch.cat(inputs) + 0.25)).round().numpy().astype(np.uint8)
    return data.spec, pixels[:, 0], torch.cat(labels).numpy() if data.has_labels else None


@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["plain", "gzip"])
@pytest.mark.parametrize("dot", ["-", "."], ids=["dash", "dot"])
@pytest.mark.parametrize(
    ("end", "split", "expected"),
    [
        ("", None, "test"), ("", "test", "test"), ("", "calibration", "train"), ("", "train", "train"),
        (":train", None, "train"), (":test", "calibration", "test"), (":calibration", None, "train"),
    ],
    ids=lambda value: str(value),
)  # fmt: skip
def test_a_folder_has_two_splits(tmp_path, suffix, dot, end, split, expected):
    folder = write(tmp_path / "fashion", suffix, dot)
    spec, pixels, labels = read(f"{folder}{end}", split=split)
    name = "train" if expected == "train" else "t10k"
    assert spec == f"{folder}:{expected}"
    assert np.array_equal(pixels, PIXELS[name])
    assert np.array_equal(labels, labels_of(name))


@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["plain", "gzip"])
def test_one_file_comes_with_the_labels_beside_it_in_whichever_form(tmp_path, suffix):
    write(tmp_path)
    write(tmp_path, ".gz")
    for other in ("", ".gz"):
        (tmp_path / (LABELS + other)).rename(tmp_path / "aside")
        _, pixels, labels = read(tmp_path / (TRAIN + suffix), limit=5)
        (tmp_path / "aside").rename(tmp_path / (LABELS + other))
        assert len(pixels) == 5
        assert all(labels[i] == labels_of("train")[(PIXELS["train"] == pixels[i]).all((1, 2))] for i in range(5))
    for other in ("", ".gz"):
        (tmp_path / (LABELS + other)).unlink()
    assert read(tmp_path / (TRAIN + suffix))[2] is None


def test_plain_files_are_mapped_and_others_are_decompressed_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(idx.gzip, "open", lambda path, real=gzip.open: (opened.append(path.name), real(path))[1])
    found = {}
    for suffix in (".gz", ""):
        data = moeprune.open_data(str(write(tmp_path / f"x{suffix}", suffix)), FORM)
        found[suffix] = {data.read_fingerprint(size) for size in (1, 4, 64)}
        assert len(opened) == 2
    assert len(found[""] | found[".gz"]) == 1
    array = idx._values(tmp_path / "x" / TRAIN, ("images", "height", "width"))
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap)


def test_a_folder_whose_name_ends_like_a_split_is_itself(tmp_path):
    folder = write(tmp_path / "a:train")
    assert read(folder)[0] == f"{folder}:test"
    assert read(f"{folder}:train")[0] == f"{folder}:train"


PIXELS_OF_TRAIN, LABELS_OF_TRAIN = encoded(PIXELS["train"]), encoded(labels_of("train"))
HUGE = encoded(PIXELS["train"], sizes=(2**32 - 1, 8, 8))
DAMAGED: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "images of floats": (TRAIN, encoded(PIXELS["train"], kind=0x0D), ("type float32, expected uint8",)),
    "labels of int32": (LABELS, encoded(labels_of("train"), kind=0x0C), ("type int32, expected uint8",)),
    "labels as images": (TRAIN, LABELS_OF_TRAIN, ("00 00 08 01", "expected 00 00 08 03")),
    "images as labels": (LABELS, PIXELS_OF_TRAIN, ("00 00 08 03", "expected 00 00 08 01", "1 dimension)")),
    "text": (TRAIN, b"<html>", ("3c 68 74 6d", "expected 00 00 08 03")),
    "gzip without its suffix": (TRAIN, gzip.compress(PIXELS_OF_TRAIN), ("1f 8b", "add `.gz` to its name")),
    "a header cut off": (TRAIN, PIXELS_OF_TRAIN[:9], ("after 9 of 16 bytes",)),
    "three bytes": (TRAIN, PIXELS_OF_TRAIN[:3], ("00 00 08, expected 00 00 08 03",)),
    "an empty file": (TRAIN, b"", ("is empty, expected images in the format of MNIST",)),
    "images cut off": (TRAIN, PIXELS_OF_TRAIN[:-1], ("has 1487 bytes, expected 1488", "23×8×8")),
    "labels cut off": (LABELS, LABELS_OF_TRAIN[:-1], ("has 30 bytes, expected 31",)),
    "bytes after the images": (TRAIN, PIXELS_OF_TRAIN + b"\0", ("has 1489 bytes, expected 1488",)),
    "more images than fit on a disk": (TRAIN, HUGE, ("has 1488 bytes, expected 274877906896",)),
    "images of another size": (TRAIN, encoded(PIXELS["train"].reshape(23, 4, 16)), ("[23, 4, 16]", "[n, 1, 8, 8]")),
    "no images": (TRAIN, encoded(np.zeros((0, 8, 8), np.uint8)), ("23 labels, expected 0",)),
    "labels of another split": (LABELS, encoded(labels_of("t10k")), ("11 labels, expected 23", TRAIN)),
    "a label too large": (LABELS, encoded(labels_of("train") + 5), ("label 1", "is 12", "10 classes (0 to 9)")),
    "compressed, not gzip": (f"{TRAIN}.gz", PIXELS_OF_TRAIN, ("is not gzip",)),
    "compressed, cut off": (f"{TRAIN}.gz", gzip.compress(PIXELS_OF_TRAIN)[:-9], ("is not gzip, or is damaged",)),
    "compressed, with a wrong checksum": (f"{TRAIN}.gz", gzip.compress(PIXELS_OF_TRAIN)[:-8] + b"\1" * 8, ("CRC",)),
    "compressed, with values cut off": (
        f"{TRAIN}.gz", gzip.compress(PIXELS_OF_TRAIN[:-1]), ("has 1487 bytes decompressed, expected 1488",),
    ),
    "compressed, with values that are too many": (
        f"{TRAIN}.gz", gzip.compress(PIXELS_OF_TRAIN + bytes(10**6)), ("has more than 1488 bytes decompressed",),
    ),
    "compressed, with more images than fit into memory": (f"{TRAIN}.gz", gzip.compress(HUGE), ("274877906896",)),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named_with_what_was_expected(stock, run, tmp_path, name):
    file, content, fragments = DAMAGED[name]
    folder = write(tmp_path, ".gz" if file.endswith(".gz") else "")
    (folder / file).write_bytes(content)
    refusal(run, ["eval", stock.path("dense.safetensors"), "--data", f"{folder}:train"], file, *fragments)


@pytest.mark.parametrize(
    ("end", "options", "fragments"),
    [
        (":valid", (), ("unknown split `valid`", "train, calibration, test")),
        (":train", ("--split", "test"), ("`--split test` does not go with",)),
        ("", ("--split", "valid"), ("`--split valid` is unknown",)),
        ("", (), ("no images of the split `test`", "`t10k-images-idx3-ubyte`", ":train`")),
        ("/train-labels-idx1-ubyte", (), ("not a known kind of data", "train-images-idx3-ubyte")),
        ("/train-images-idx3-ubyte", ("--split", "train"), ("does not go with",)),
        ("/x:train", (), ("no data",)),
    ],
    ids=["unknown", "twice", "unknown-option", "missing", "labels", "split-of-a-file", "nothing"],
)
def test_what_there_is_not_is_said(stock, run, tmp_path, end, options, fragments):
    folder = write(tmp_path)
    (folder / "t10k-images-idx3-ubyte").unlink()
    refusal(run, ["eval", stock.path("dense.safetensors"), "--data", f"{folder}{end}", *options], *fragments)


def test_images_without_labels_cannot_be_evaluated_on(stock, run, tmp_path):
    (write(tmp_path) / LABELS).unlink()
    dense, analysis = stock.path("dense.safetensors"), tmp_path / "analysis.safetensors"
    assert run("analyze", dense, "--data", f"{tmp_path}:train", "-o", analysis).code == 0
    refusal(run, ["eval", dense, "--data", f"{tmp_path}:train"], "has no labels", "labels beside")


# --- which samples a model may see
@pytest.fixture
def said(stock, tmp_path, caplog, monkeypatch) -> Callable[[str, str], list[str]]:
    """The warnings of a model that is calibrated on one spec and evaluated on another."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "fashion", ".gz")
    model = moeprune.load(stock.path("dense.safetensors"))

    def said(calibration: str, evaluation: str) -> list[str]:
        spec, _, limit = calibration.partition(" ")
        data = moeprune.open_data(spec, model.input_format, "calibration", int(limit) if limit else None)
        analysis = moeprune.analyze(model, data)
        moeprune.evaluate(moeprune.prune(model, analysis=analysis, keep="1/2", signal="gram"), evaluation)
        return [record.getMessage() for record in caplog.records]

    return said


@pytest.mark.parametrize(
    ("calibration", "evaluation", "expected"),
    [
        ("fashion", "fashion", []),
        ("fashion:train 9", "fashion:test", []),
        ("fashion 9", "fashion:train", ["is the split that models are trained on", "was calibrated on samples of"]),
        ("fashion:test 9", "fashion", ["calibrate on `fashion:train`", "was calibrated on samples of"]),
        ("fashion/t10k-images-idx3-ubyte.gz", f"fashion/{TRAIN}.gz",
         [f"calibrate on `fashion/{TRAIN}.gz`", "is the split that models are trained on"]),
    ],
    ids=["default", "limit", "train", "test", "files"],
)  # fmt: skip
def test_the_splits_are_known_to_the_warnings(said, calibration, evaluation, expected):
    found = said(calibration, evaluation)
    assert len(found) == len(expected), found
    assert all(part in text for part, text in zip(expected, found, strict=True)), found


@pytest.mark.parametrize("spec", ["", ":train", f"/{TRAIN}"], ids=["folder", "split", "file"])
@pytest.mark.parametrize("output", [TRAIN, LABELS])
def test_files_of_the_data_are_never_replaced(stock, run, tmp_path, spec, output):
    folder = write(tmp_path)
    words = ["analyze", stock.path("dense.safetensors"), "--data", f"{folder}{spec}", "-o", folder / output, "--force"]
    refusal(run, words, "would replace a file that the command reads", folder=folder)
