"""Data sets: fixed splits, the same batches from every kind of file, and streams that stay small."""

import hashlib
import itertools
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

import moeprune
from moeprune.data import datasets
from moeprune.data.preprocessing import InputFormat, Preprocessing
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from tests import stock

GREY = InputFormat(1, 8, 8, classes=10)
COLOUR = InputFormat(3, 8, 8, classes=10)
WIDE = InputFormat(1, 8, 16, classes=100)
NORMALIZED = Preprocessing(mean=(0.25,), std=(0.5,))
SPLITS = ("train", "calibration", "test")
SAMPLES = 23


def collect(spec: object, form: InputFormat, batch_size: int = 7, **options) -> tuple[Tensor, Tensor | None]:
    """All inputs and labels of one pass."""
    dataset = moeprune.open_data(str(spec), form, **options)
    batches = list(dataset.batches(batch_size))
    assert all(len(inputs) == batch_size for inputs, _ in batches[:-1])
    assert all(inputs.dtype == torch.float32 for inputs, _ in batches)
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert len(inputs) == dataset.samples
    if not dataset.has_labels:
        assert all(labels is None for _, labels in batches)
        return inputs, None
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    return inputs, labels


def pixels(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Grey images and labels that are not in the order of the classes."""
    return {"inputs": pixels((SAMPLES, 1, 8, 8)), "labels": (np.arange(SAMPLES) * 7) % 10}


def expected(inputs: np.ndarray, form: InputFormat) -> Tensor:
    """Pixels (n,c,H,W) in 0…255 as the model's inputs."""
    mean, std = (np.array(getattr(form.preprocessing.effective, key))[:, None, None] for key in ("mean", "std"))
    return torch.from_numpy(((inputs / 255 - mean) / std).astype(np.float32))


def writer_of(kind: str):
    return lambda folder, arrays: stock.write_arrays(kind, folder / "data", arrays)


ARRAY_FILES = as_npz, as_compressed_npz, as_safetensors = [writer_of(kind) for kind in stock.ARRAY_FILES]


def write_folder(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """One folder a class, file names in the order of the arrays; grey (n,1,H,W) or colour (n,3,H,W)."""
    for label in range(10):
        (path / "images" / f"class{label}").mkdir(parents=True)
    for index, (array, label) in enumerate(zip(arrays["inputs"], arrays["labels"], strict=True)):
        picture = Image.fromarray(array[0] if len(array) == 1 else np.moveaxis(array, 0, 2))
        picture.save(path / "images" / f"class{label}" / f"{index:03}.png")
    return path / "images"


# --- built-in sets
@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    return {split: collect("digits", GREY, 100, split=split) for split in SPLITS}


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    return {split: collect(f"pairs:{split}", WIDE, 500) for split in SPLITS}


def test_splits_of_digits_are_a_partition_of_the_whole_set(digits):
    bunch = load_digits()
    whole = {(image.tobytes(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True)}
    inputs, labels = (torch.cat(parts) for parts in zip(*digits.values(), strict=True))
    images = (16 * inputs[:, 0]).double().numpy()
    parts = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    assert len(parts) == len(set(parts)) == 1797
    assert set(parts) == whole


def test_pairs_are_made_of_digits_of_the_same_split(digits, pairs):
    label_of = {
        split: {image.numpy().tobytes(): int(label) for image, label in zip(*digits[split], strict=True)}
        for split in SPLITS
    }
    for split, (inputs, labels) in pairs.items():
        assert inputs.shape == (2000, 1, 8, 16)
        assert (labels.bincount(minlength=100) == 20).all()
        for image, label in zip(inputs, labels.tolist(), strict=True):
            left, right = (half.contiguous().numpy().tobytes() for half in image.chunk(2, dim=2))
            assert 10 * label_of[split][left] + label_of[split][right] == label


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("digits", ("fb75e2f822ae7452", "03bbff44a515c4fd", "795d4af52c955450")),
        ("pairs", ("6bca4c2a35e4550f", "26e93a7fcea1ce39", "4a20d65925cdd459")),
    ],
)
def test_built_in_sets_never_change(request, name, starts):
    """Published figures depend on them."""
    for split, start in zip(SPLITS, starts, strict=True):
        inputs, labels = request.getfixturevalue(name)[split]
        digest = hashlib.sha256((16 * inputs).to(torch.uint8).numpy().tobytes())
        digest.update(labels.to(torch.uint8).numpy().tobytes())
        assert digest.hexdigest().startswith(start)


def test_the_split_of_a_spec_goes_before_the_option_and_pixels_are_normalised(digits):
    inputs, _ = collect("digits:calibration", replace(GREY, preprocessing=NORMALIZED), split="test")
    assert torch.equal(inputs, (digits["calibration"][0] - 0.25) / 0.5)
    assert torch.equal(collect("digits", GREY)[0], digits["test"][0])


# --- files
@pytest.mark.parametrize("write", [*ARRAY_FILES, write_folder])
@pytest.mark.parametrize("batch_size", [1, 7, SAMPLES, 64])
@pytest.mark.parametrize("limit", [None, 1, 5, 22, 100])
def test_files_give_the_arrays_and_folders_class_by_class(tmp_path, arrays, write, batch_size, limit):
    form = replace(GREY, preprocessing=NORMALIZED)
    inputs, labels = collect(write(tmp_path, arrays), form, batch_size, limit=limit)
    taken = np.argsort(arrays["labels"], kind="stable") if write is write_folder else np.arange(SAMPLES)
    if limit is not None and limit < SAMPLES:
        taken = taken[drawn(tmp_path, limit)]
    torch.testing.assert_close(inputs, expected(arrays["inputs"][taken], form), rtol=0, atol=1e-6)
    assert labels.tolist() == arrays["labels"][taken].tolist()


def drawn(tmp_path, limit, samples=SAMPLES):
    """Which of so many samples a limit takes."""
    inputs = np.broadcast_to(np.arange(samples, dtype=np.float32)[:, None, None, None], (samples, 1, 8, 8))
    numbered = tmp_path / "numbered"
    numbered.mkdir(exist_ok=True)
    taken, _ = collect(as_npz(numbered, {"inputs": inputs}), GREY, limit=limit)
    return taken[:, 0, 0, 0].int().tolist()


def test_a_limit_takes_different_samples_in_order_and_always_the_same(tmp_path):
    for limit in (1, 50, 99, 500):
        taken = drawn(tmp_path, limit, 1000)
        assert len(taken) == limit
        assert taken == sorted(set(taken))
        assert taken == drawn(tmp_path, limit, 1000)
    assert 200 < sum(index % 2 for index in taken) < 300  # also where classes take turns


@pytest.mark.parametrize("write", ARRAY_FILES)
def test_floats_are_taken_as_they_are(tmp_path, write):
    """Whatever mean and standard deviation: only pixels are normalised."""
    values = np.random.default_rng(1).normal(size=(SAMPLES, 1, 8, 8))
    form = replace(GREY, preprocessing=NORMALIZED)
    for dtype in (np.float16, np.float32, np.float64):
        inputs, _ = collect(write(tmp_path, {"inputs": values.astype(dtype)}), form)
        assert torch.equal(inputs, torch.from_numpy(values.astype(dtype).astype(np.float32)))
    save_file({"inputs": torch.from_numpy(values).bfloat16()}, tmp_path / "data.safetensors")
    inputs, _ = collect(tmp_path / "data.safetensors", form)
    assert torch.equal(inputs, torch.from_numpy(values).bfloat16().float())


def test_big_endian_arrays(tmp_path, arrays):
    values = (arrays["inputs"] / 255).astype(">f4")
    path = as_npz(tmp_path, {"inputs": values, "labels": arrays["labels"].astype(">i2")})
    inputs, labels = collect(path, GREY)
    assert torch.equal(inputs, torch.from_numpy(values.astype("<f4")))
    assert labels.tolist() == arrays["labels"].tolist()


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1"])
@pytest.mark.parametrize("write", ARRAY_FILES)
def test_labels_may_be_any_integers_beside_other_arrays(tmp_path, arrays, write, dtype):
    labels = arrays["labels"].astype(dtype)
    path = write(tmp_path, {**arrays, "labels": labels, "names": np.arange(5), "features": np.zeros(3)})
    assert collect(path, GREY)[1].tolist() == arrays["labels"].tolist()


LAYOUTS = {"NCHW": lambda x: x, "NHWC": lambda x: np.moveaxis(x, 1, 3), "NHW": lambda x: x[:, 0]}


@pytest.mark.parametrize("write", ARRAY_FILES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [GREY, WIDE, COLOUR], ids=["grey", "wide", "colour"])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_layouts(tmp_path, write, form, layout, kind):
    if (form, layout) == (COLOUR, "NHW"):
        pytest.skip("has no place for channels")
    if form is COLOUR:
        form = replace(form, preprocessing=Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)))
    if kind == np.float32:
        form = replace(form, preprocessing=Preprocessing())
    images = pixels((SAMPLES, *form.shape))
    stored = images if kind == np.uint8 else (images / 255).astype(kind)
    inputs, _ = collect(write(tmp_path, {"inputs": np.ascontiguousarray(LAYOUTS[layout](stored))}), form)
    torch.testing.assert_close(inputs, expected(images, form), rtol=0, atol=1e-6)


# --- fingerprints
def fingerprint(spec: object, form: InputFormat = GREY, batch_size: int = 7, **options) -> str:
    dataset = moeprune.open_data(str(spec), form, **options)
    assert dataset.fingerprint is None
    for _ in dataset.batches(batch_size):
        assert dataset.fingerprint is None
    assert len(dataset.fingerprint) == 64
    return dataset.fingerprint


def test_equal_data_has_equal_fingerprints_in_every_kind_of_file_and_size_of_batch(tmp_path, arrays):
    in_order = np.argsort(arrays["labels"], kind="stable")  # as folders have them
    arrays = {name: array[in_order] for name, array in arrays.items()}
    kinds = itertools.product(ARRAY_FILES, (1, 7, 8, 64))
    found = {fingerprint(write(tmp_path, arrays), batch_size=size) for write, size in kinds}
    found.add(fingerprint(as_npz(tmp_path, {**arrays, "inputs": arrays["inputs"][:, 0]})))
    found.add(fingerprint(write_folder(tmp_path, arrays)))
    assert len(found) == 1


def test_different_data_has_different_fingerprints(tmp_path, arrays):
    path = as_npz(tmp_path, arrays)
    one_pixel, one_label = arrays["inputs"].copy(), arrays["labels"].copy()
    one_pixel[5, 0, 2, 3] ^= 1
    one_label[5] ^= 1
    found = {fingerprint(path), fingerprint(path, limit=20)}
    found.add(fingerprint(path, replace(GREY, preprocessing=NORMALIZED)))
    reverse = {name: array[::-1] for name, array in arrays.items()}
    unlabelled = {"inputs": arrays["inputs"]}
    for other in ({**arrays, "inputs": one_pixel}, {**arrays, "labels": one_label}, reverse, unlabelled):
        found.add(fingerprint(as_npz(tmp_path, other)))
    assert len(found) == 7


def test_samples_are_checked_and_hashed_once_and_not_on_the_main_thread(tmp_path, arrays, monkeypatch):
    threads = []

    def isfinite(array):
        threads.append(threading.current_thread())
        return np.isfinite(array)

    monkeypatch.setattr(datasets, "np", SimpleNamespace(isfinite=isfinite))
    data = moeprune.open_data(str(as_npz(tmp_path, arrays)), GREY)
    passes = [torch.cat([inputs for inputs, _ in data.batches(size)]) for size in (4, 9)]
    assert torch.equal(*passes)
    assert len(threads) == 6
    assert threading.main_thread() not in threads
    before = data.fingerprint
    as_npz(tmp_path, {**arrays, "inputs": arrays["inputs"] ^ 1})
    assert len(list(data.batches(SAMPLES))) == 1
    assert len(threads) == 7
    assert data.fingerprint != before


def test_an_abandoned_pass_leaves_no_thread_behind(tmp_path, arrays):
    before = threading.active_count()
    data = moeprune.open_data(str(as_npz(tmp_path, arrays)), GREY)
    batches = data.batches(2)
    next(batches)
    batches.close()
    assert threading.active_count() == before
    assert data.fingerprint is None


# --- samples and labels
def test_a_sample_is_drawn_from_the_samples_that_are_left(tmp_path, arrays):
    path = as_npz(tmp_path, arrays)
    limited = moeprune.open_data(str(path), GREY, limit=10)
    for data in (limited, limited.part([1, 3, 5, 7], "some")):
        sample = data.sample(3)
        assert sample.samples == 3
        assert set(sample.indices) < set(data.indices)
        assert data.sample(data.samples).indices == data.indices
    with pytest.raises(moeprune.MoepruneError, match="cannot take 0 samples"):
        limited.sample(0)


@pytest.mark.parametrize("label", [-1, 2**40, 0.5])
@pytest.mark.parametrize("write", ARRAY_FILES)
def test_labels_are_not_read_for_a_model_without_a_head(tmp_path, arrays, write, label):
    """The first of them gave a traceback in `analyze`, the second asked for 70 TB."""
    path = write(tmp_path, {**arrays, "labels": np.full(SAMPLES, label)})
    config = ViTConfig((8, 8), (4, 4), 1, 0, 8, 1, (BlockConfig(soft_moe=SoftMoEConfig(8, 4, 1, 4)),))
    model = SoftMoEViT(config)
    data = moeprune.open_data(str(path), model.input_format)
    assert not data.has_labels
    [layer] = moeprune.analyze(model, data).layers.values()
    assert layer.class_mass.numel() == 0


# --- image folders
def test_other_files_in_a_folder_do_not_matter_nor_does_the_case_of_suffixes(tmp_path):
    for level, name in ((51, "one.PNG"), (102, "two.JPG"), (153, "x.jpeg")):
        Image.new("L", (8, 8), level).save(tmp_path / name)
    (tmp_path / "readme.txt").write_text("two lines\n")
    (tmp_path / "000.png.part").write_bytes(b"")
    inputs, labels = collect(tmp_path, GREY)
    assert labels is None
    torch.testing.assert_close(inputs[:, 0, 4, 4], torch.tensor([0.2, 0.4, 0.6]))


def save_picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> Path:
    """A folder with one picture without symmetries, of this width and height."""
    width, height = size
    Image.fromarray(pixels((height, width, 3) if mode == "RGB" else (height, width), seed=3)).save(path / "picture.png")
    return path


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("form", "size", "resize", "resized", "box"),
    [
        (COLOUR, (20, 14), 10, (14, 10), (3, 1, 11, 9)),  # the shorter side becomes 10
        (COLOUR, (14, 20), 10, (10, 14), (1, 3, 9, 11)),
        (COLOUR, (20, 14), None, (11, 8), (1, 0, 9, 8)),  # as small as covers 8×8
        (COLOUR, (14, 20), None, (8, 11), (0, 1, 8, 9)),
        (COLOUR, (5, 4), None, (10, 8), (1, 0, 9, 8)),  # and as large
        (COLOUR, (20, 14), 14, (20, 14), (6, 3, 14, 11)),  # only cropped
        (COLOUR, (16, 16), 8, (8, 8), (0, 0, 8, 8)),  # only resized
        (WIDE, (40, 30), None, (16, 12), (0, 2, 16, 10)),
    ],
)
def test_resize_and_crop_equal_pillow_by_hand(tmp_path, form, size, resize, resized, box, interpolation):
    mode = "L" if form is WIDE else "RGB"
    folder = save_picture(tmp_path, size, mode)
    form = replace(form, preprocessing=Preprocessing(resize=resize, interpolation=interpolation))
    inputs, _ = collect(folder, form)
    with Image.open(folder / "picture.png") as picture:
        resampling = Image.Resampling[interpolation.upper()]
        by_hand = np.asarray(picture.convert(mode).resize(resized, resampling).crop(box))
    by_hand = by_hand.reshape(*by_hand.shape[:2], -1)
    torch.testing.assert_close(inputs, expected(np.moveaxis(by_hand, 2, 0)[None], form), rtol=0, atol=1e-6)


def test_a_colour_model_sees_grey_in_all_channels_and_a_grey_one_the_luma(tmp_path):
    for name in ("grey", "colour"):
        (tmp_path / name).mkdir()
    grey, colour = save_picture(tmp_path / "grey", (8, 8), "L"), save_picture(tmp_path / "colour", (8, 8))
    assert torch.equal(collect(grey, COLOUR)[0], collect(grey, GREY)[0].expand(1, 3, 8, 8))
    inputs, _ = collect(colour, GREY)
    with Image.open(colour / "picture.png") as picture:
        red, green, blue = np.moveaxis(np.asarray(picture, dtype=np.float64), 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R 601
    np.testing.assert_allclose(255 * inputs[0, 0], luma, atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "LA", "CMYK"])
def test_images_of_other_modes_are_converted(tmp_path, mode):
    """A white image stays white, whatever its file stores."""
    white = {"RGBA": (255,) * 4, "LA": (255, 255), "CMYK": (0,) * 4, "1": 1, "P": 255}[mode]
    picture = Image.new("L", (8, 8), 255).convert("P") if mode == "P" else Image.new(mode, (8, 8), white)
    picture.save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    for form in (GREY, COLOUR):
        inputs, _ = collect(tmp_path, form)
        torch.testing.assert_close(inputs, torch.ones(1, *form.shape), rtol=0, atol=0.01)


# --- preprocessing
def test_settings_replace_those_of_the_checkpoint():
    start = Preprocessing(resize=20, mean=(0.5,), std=(0.5,))
    changed = Preprocessing(resize=20, interpolation="nearest", mean=(0.1, 0.2, 0.3), std=(0.5,))
    assert start.updated({"mean": [0.1, 0.2, 0.3], "interpolation": "nearest"}) == changed
    assert start.updated({"mean": 0}).mean == (0.0,)
    assert start.updated({}) == start


def test_preprocess_option_changes_what_the_model_sees(single, run_json, tmp_path, arrays):
    path = as_npz(tmp_path, arrays)
    model = moeprune.load(single)
    form = replace(model.input_format, preprocessing=Preprocessing(mean=(0.1,), std=(0.2,)))
    found = run_json("eval", single, "--data", path, "--preprocess", "mean=0.1", "--preprocess", "std=0.2")
    assert found["data"]["fingerprint"] == fingerprint(path, form)
    assert run_json("eval", single, "--data", path)["data"]["fingerprint"] == fingerprint(path, model.input_format)
    labels = torch.from_numpy(arrays["labels"])
    logits = model(expected(arrays["inputs"], form))
    assert found["model"]["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["model"]["loss"] == pytest.approx(loss, rel=1e-4)


# --- memory
@pytest.mark.parametrize("write", [as_npz, as_compressed_npz])
@pytest.mark.parametrize("limit", [None, 700])
def test_reading_takes_no_more_memory_for_more_samples(tmp_path, write, limit):
    form = InputFormat(3, 64, 64, classes=10)
    samples, batch_size = 1000, 20
    sample_bytes = 4 * 3 * 64 * 64  # 49 kB, the file has 49 MB
    inputs = np.zeros((samples, 3, 64, 64), np.float32)
    inputs[:, 0, 0, 0] = np.arange(samples)
    path = write(tmp_path, {"inputs": inputs})
    del inputs
    dataset = moeprune.open_data(str(path), form, limit=limit)
    seen = 0
    tracemalloc.start()
    try:
        for batch, _ in dataset.batches(batch_size):
            assert batch[0, 0, 0, 0] >= seen
            seen += len(batch)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == (limit or samples)
    assert peak < 6 * batch_size * sample_bytes  # 6 MB


@pytest.mark.parametrize("shape", [(), (SAMPLES,)])
@pytest.mark.parametrize("form", [GREY, COLOUR])
def test_inputs_that_are_no_images_do_not_fit(shape, form, tmp_path):
    np.savez(tmp_path / "x.npz", inputs=np.zeros(shape, np.float32))
    with pytest.raises(moeprune.MoepruneError, match="have the shape"):
        moeprune.open_data(str(tmp_path / "x.npz"), form)
