"""Names of classes in the order of a model's outputs, and the order of class folders; no torch."""

import logging
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from moeprune.data.preprocessing import InputFormat
from moeprune.errors import MoepruneError, listed
from moeprune.files.disk import refused, require_file

logger = logging.getLogger(__name__)
SPLITS = {"calibration", "test", "testing", "train", "training", "val", "valid", "validation"}
"""Names of folders that hold a split of a data set, not a class."""


def read_names(path: Path) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank, or raise a MoepruneError: it has none, or is not UTF-8."""
    require_file(path, "a text file with the name of one class a line")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise refused("read", path, error) from None
    except UnicodeDecodeError:
        raise MoepruneError(f"`{path}` is not text in UTF-8", "write the name of one class a line") from None
    names = tuple(name for line in text.split("\n") if (name := line.strip()))
    if not names:
        raise MoepruneError(f"`{path}` has no names", "write the name of one class a line")
    return names


def require_names(names: Sequence[str], classes: int, where: str) -> None:
    """Raise a MoepruneError unless there are no names, or a different one for each class of a model."""
    hint = "give a different name for each class, in the order of the model's outputs"
    if len(names) not in (0, classes):
        raise MoepruneError(f"{where} has the names of {len(names)} classes, the model has {classes} classes", hint)
    if doubled := sorted(name for name in set(names) if names.count(name) > 1):
        raise MoepruneError(f"{where} names several classes {listed(doubled)}", hint)


def label_folders(path: Path, folders: Sequence[str], form: InputFormat) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the label of each class folder by its name, and the names of all classes.

    Names that the model states decide; else the folders are sorted. A MoepruneError if a folder is no class of the
    model, or if folders sort differently with numbers read as numbers (as timm does) than letter by letter (as
    torchvision does) and nothing decides.
    """
    if form.class_names and form.classes:
        labels = {_normal(name): label for label, name in enumerate(form.class_names)}
        found = {folder: labels.get(_normal(folder)) for folder in folders}
        if unknown := [folder for folder, label in found.items() if label is None]:
            raise MoepruneError(
                f"`{path}` has folders that are no classes of the model: {listed(unknown)}; its classes are"
                f" {listed(form.class_names)}",
                "name the folders like the classes, or give their names in the model's order: `--classes names.txt`",
            )
        if missing := [name for name in form.class_names if labels[_normal(name)] not in found.values()]:
            logger.warning(f"`{path}` has no folder for {len(missing)} of {form.classes} classes: {listed(missing)}")
        return {folder: label for folder, label in found.items() if label is not None}, form.class_names
    plain = sorted(folders)
    if form.classes:
        _require_one_order(path, plain, form.classes)
    return {folder: label for label, folder in enumerate(plain)}, tuple(plain)


def _require_one_order(path: Path, plain: list[str], classes: int) -> None:
    if {name.lower() for name in plain} <= SPLITS:
        hint = f"give one of them, such as `{path / plain[0]}`"
        raise MoepruneError(f"the folders {listed(plain)} of `{path}` look like splits, not classes", hint)
    if len(plain) != classes:
        hint = "make a folder for every class (it may be empty), or put unlabelled images into one flat folder"
        message = f"`{path}` has {len(plain)} class folders, the model {classes} classes"
        raise MoepruneError(f"{message}: the labels would be wrong", hint)
    if (natural := sorted(plain, key=_natural)) != plain:
        at = next(place for place, pair in enumerate(zip(plain, natural, strict=True)) if len(set(pair)) > 1)
        start = max(0, at - 1)
        first, second = (", ".join(f"`{name}`" for name in order[start : start + 5]) for order in (plain, natural))
        raise MoepruneError(
            f"the order of the class folders of `{path}` is not clear: from class {start} on, it is {first} in"
            f" alphabetical order (torchvision's), {second} in natural order (timm's)",
            "give the names of the classes, one a line, in the order of the model's training: `--classes names.txt`"
            f" (`ls {path} | LC_ALL=C sort`, or `ls -v {path}`, writes them)",
        )


def _normal(name: str) -> str:
    """Return a name in one of the forms that Unicode has for it: macOS stores another than people type."""
    return unicodedata.normalize("NFC", name)


def _natural(name: str) -> list[str | int]:
    """Return the key by which timm sorts: letter case is ignored, numbers count as numbers."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name.lower()))]
