"""Folders of images: the order of classes is known or asked for, and no image is left out without a word."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moeprune
from moeprune.data.classes import label_folders
from moeprune.data.datasets import digits
from moeprune.data.images import SUFFIXES
from moeprune.data.preprocessing import InputFormat
from tests.peers import has

NATURAL = [str(label + 1) for label in range(10)]
PADDED = [f"{label + 1:02}" for label in range(10)]
COLOUR = InputFormat(3, 8, 8, classes=2)
rng = np.random.default_rng(0)


def folders_of_digits(path: Path, names: list[str]) -> Path:
    """60 digits of the test split: the folder of each digit has the name at its place."""
    pixels, labels = (part[:60] for part in digits("test"))
    for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        folder = path / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image[0]).round().to(torch.uint8).numpy()).save(folder / f"{index:03}.png")
    return path


def names_file(path: Path, names: list[str], encoding: str = "utf-8") -> Path:
    path.write_bytes("\r\n".join([*names, "", ""]).encode(encoding))
    return path


@pytest.fixture(scope="module")
def natural(tmp_path_factory):
    """Folders 1 to 10, which sort as 1, 10, 2, …, and the file with their names in order."""
    root = tmp_path_factory.mktemp("natural")
    return folders_of_digits(root / "data", NATURAL), names_file(root / "names.txt", NATURAL, "utf-8-sig")


def test_an_order_that_is_not_clear_is_asked_for(single, run, run_json, natural, tmp_path):
    data, names = natural
    accuracy = run_json("eval", single, "--data", folders_of_digits(tmp_path / "padded", PADDED))["model"]["accuracy"]
    assert accuracy > 0.9
    for command in (f"eval {single}", f"analyze {single} -o {tmp_path / 'none.safetensors'}"):
        refused = run(*command.split(), "--data", data)
        assert (refused.code, refused.stdout) == (2, "")
        for part in ("`1`, `10`, `2`, `3`", "`1`, `2`, `3`, `4`", "--classes names.txt"):
            assert part in refused.stderr
    assert run_json("eval", single, "--data", data, "--classes", names)["model"]["accuracy"] == accuracy
    for given in (NATURAL, names, str(names)):
        assert moeprune.evaluate(moeprune.load(single, class_names=given), data).model.accuracy == accuracy
    with pytest.raises(moeprune.MoepruneError, match="order of the class folders") as error:
        moeprune.evaluate(single, data)
    assert 'class_names="names.txt"' in str(error.value)


def test_analyses_and_pruned_checkpoints_keep_the_names(stock, run, run_json, natural, tmp_path):
    (data, names), dense = natural, stock.path("dense.safetensors")
    loss = run_json("eval", dense, "--data", data, "--classes", names)["model"]["loss"]
    analysis, pruned = tmp_path / "analysis.safetensors", tmp_path / "pruned.safetensors"
    run_json("analyze", dense, "--data", data, "--classes", names, "-o", analysis)
    assert run_json("eval", dense, "--data", data, "--analysis", analysis)["model"]["loss"] == loss
    sweep = ("--sweep", "1/2", "--compensate", "none", "--signal", "combine", "--scope", "static")
    [full, *_] = run_json("eval", dense, "--data", data, "--analysis", analysis, *sweep)["rows"]
    assert full["model"]["loss"] == loss
    renamed = folders_of_digits(tmp_path / "renamed", [f"class {name}" for name in NATURAL])
    for way in ("--signal gram --compensate affine", "--signal combine --compensate mean"):  # a pass, file to file
        run_json("prune", dense, "--analysis", analysis, "--keep", "1/2", *way.split(), "-o", pruned, "--force")
        assert run_json("eval", pruned, "--baseline", dense, "--data", data)["baseline_model"]["loss"] == loss
        assert run_json("inspect", pruned)["class_names"] == NATURAL
        refused = run("eval", pruned, "--data", renamed)
        assert refused.code == 2
        assert "no classes of the model: `class 1`, " in refused.stderr


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (NATURAL[:9], "names.txt` has the names of 9 classes, the model has 10 classes"),
        ([*NATURAL[:9], "9"], "names several classes `9`"),
        ([*NATURAL[:9], "11"], "no classes of the model: `10`; its classes are `1`, `2`, `3`, `4`, `5` and 5 more"),
        (PADDED, "no classes of the model: `1`, `2`, `3`, `4`, `5` and 4 more"),
    ],
)
def test_names_that_do_not_fit_are_refused(stock, run, natural, tmp_path, names, said):
    found = run(
        "eval",
        stock.path("dense.safetensors"),
        "--data",
        natural[0],
        "--classes",
        names_file(tmp_path / "names.txt", names),
    )
    assert found.code == 2
    assert said in found.stderr


def test_the_file_of_names_must_be_text(stock, run, natural, tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe1")
    for path, said in ((tmp_path / "names.txt", "not text in UTF-8"), (tmp_path / "missing", "no file")):
        found = run("eval", stock.path("dense.safetensors"), "--data", natural[0], "--classes", path)
        assert found.code == 2
        assert said in found.stderr


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["a", "B"], "`B`, `a` in alphabetical order (torchvision's), `a`, `B` in natural order"),
        (["img12", "img2"], "`img12`, `img2` in alphabetical"),
        (["train", "val"], "look like splits, not classes"),
        (["a", "b", "c"], "3 class folders, the model 2 classes"),
    ],
)
def test_folders_whose_labels_would_be_a_guess_are_refused(folders, said, tmp_path):
    with pytest.raises(moeprune.MoepruneError) as error:
        label_folders(tmp_path, folders, COLOUR)
    assert said in str(error.value)
    no_head = InputFormat(3, 8, 8, classes=0)
    assert label_folders(tmp_path, folders, no_head)[1] == tuple(sorted(folders))


def test_names_match_in_any_form_of_unicode_and_classes_without_a_folder_are_told(tmp_path, caplog):
    form = InputFormat(3, 8, 8, classes=3, class_names=("z", "caf\u00e9", "train"))
    found, names = label_folders(tmp_path, ["cafe\u0301", "train"], form)
    assert (list(found.values()), names) == ([1, 2], form.class_names)
    assert "no folder for 1 of 3 classes: `z`" in caplog.text


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    (image.convert("L") if path.suffix.lower() == ".pgm" else image).save(path, SUFFIXES[path.suffix.lower()])


def test_images_of_all_kinds_and_in_sub_folders_are_read_in_the_order_of_others(tmp_path, caplog):
    for place in ("a", "a/more", "a/more/deep", "b/only here", "b/.hidden"):
        for suffix in (*SUFFIXES, ".PNG", ".JPEG", ".WebP"):
            picture(tmp_path / "data" / place / f"x{suffix[1:]}{suffix}")
    (tmp_path / "data/b/up").symlink_to(tmp_path / "data/b")  # would be read for ever
    data = moeprune.open_data(str(tmp_path / "data"), COLOUR)
    assert data.samples == 4 * (len(SUFFIXES) + 3)
    [(inputs, labels)] = data.batches(data.samples)
    assert inputs.isfinite().all()
    assert labels.bincount().tolist() == [3 * (len(SUFFIXES) + 3), len(SUFFIXES) + 3]
    assert "left out" not in caplog.text
    if has("torchvision"):
        from torchvision.datasets import DatasetFolder

        (tmp_path / "data/b/up").unlink()
        theirs = DatasetFolder(str(tmp_path / "data"), os.path.getsize, is_valid_file=lambda name: "/." not in name)
        assert [str(path) for path in data.source.files] == [path for path, _ in theirs.samples]


def test_the_natural_order_is_that_of_timm(tmp_path):
    folder = pytest.importorskip("timm.data.readers.reader_image_folder")
    names = ["b2", "B10", "a", "1_x", "01_y", "10", "9", "Z 3 4", "z 3 12"]
    for name in names:
        picture(tmp_path / name / "x.png")
    _, order = folder.find_images_and_targets(str(tmp_path))
    from moeprune.data.classes import _natural

    assert sorted(names, key=_natural) == list(order)


def test_what_is_left_out_is_counted_by_suffix_and_folder_in_one_warning(tmp_path, caplog):
    for place in ("a/1.png", "b/1.png", "b/in/2.png", "3.png"):
        picture(tmp_path / place)
    for place in ("a/x.avif", "a/y.AVIF", "b/in/z.avif", "b/notes", ".hidden.avif", "a/.DS_Store"):
        (tmp_path / place).write_bytes(b"x")
    caplog.set_level(logging.WARNING)
    assert moeprune.open_data(str(tmp_path), COLOUR).samples == 3
    [said] = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    for part in ("3 `.avif` in `a`, `b/in`", "1 `.png` in `.`", "1 without a suffix in `b`"):
        assert part in said


def test_a_gif_is_its_first_frame(tmp_path):
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    [(inputs, labels)] = moeprune.open_data(str(tmp_path), COLOUR).batches(1)
    assert (inputs.abs().max(), labels) == (0, None)
