"""Folders of images: one folder for each class, or images without labels."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeprune.data.classes import label_folders
from moeprune.data.preprocessing import MAX_SIDE, InputFormat
from moeprune.data.sources import Batches, Source, one_ahead
from moeprune.errors import MoepruneError, listed
from moeprune.files.disk import refused, require_file

logger = logging.getLogger(__name__)
SUFFIXES = {
    ".bmp": "BMP", ".gif": "GIF", ".jfif": "JPEG", ".jpeg": "JPEG", ".jpg": "JPEG", ".pgm": "PPM", ".png": "PNG",
    ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
"""Suffixes of images, in lower case, and Pillow's names of their formats."""


def open_folder(path: Path, input_format: InputFormat) -> Source:
    """Open a folder of images, ordered by class and by path; raise a MoepruneError if it does not fit the model.

    Images in sub-folders of a class belong to it, as in torchvision. A warning counts the files that are left out.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        hint = "install it: `pip install Pillow`"
        raise MoepruneError("folders of images need Pillow", hint) from None
    try:
        entries = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
        folders = {entry.name: entry for entry in entries if entry.is_dir()}
        places, names = label_folders(path, list(folders), input_format) if folders else ({}, ())
        by_label = sorted((label, folders[name]) for name, label in places.items()) or [(0, path)]
        files = [(file, label) for label, folder in by_label for file in _files_below(folder)]
    except OSError as error:
        raise refused("read", path, error) from None
    images = [(file, label) for file, label in files if file.suffix.lower() in SUFFIXES]
    if not images:
        hint = f"expected {path}/CLASS/*.png, or other images ({', '.join(SUFFIXES)})"
        raise MoepruneError(f"no images in `{path}` ({len(folders)} class folders)", hint)
    beside = [entry for entry in entries if folders and not entry.is_dir()]
    _warn_of_left_out(path, [*beside, *(file for file, _ in files if file.suffix.lower() not in SUFFIXES)])
    paths, labels = zip(*images, strict=True)

    def read(batches: Batches) -> Iterator[Tensor]:
        read_one = partial(read_image, input_format=input_format)
        with ThreadPoolExecutor() as pool:
            for images in one_ahead(pool.map(read_one, [paths[index] for index in indices]) for indices in batches):
                yield input_format.normalize(torch.stack(list(images)))

    has_labels = bool(folders) and input_format.classes > 0
    return Source(
        len(paths), torch.tensor(labels) if has_labels else None, read, paths,
        is_pixels=True, class_names=names if has_labels else (),
    )  # fmt: skip


def _files_below(folder: Path) -> list[Path]:
    """Return the files of a folder and its sub-folders in torchvision's order, without hidden ones and cycles."""
    if folder.parent.resolve().is_relative_to(folder.resolve()):
        return []  # a link to a folder that it lies in

    def fail(error: OSError) -> None:
        raise error

    found = []
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(os.path.realpath(root))
        inner = [name for name in folders if name[0] != "."]
        folders[:] = [name for name in inner if not here.is_relative_to(os.path.realpath(here / name))]
        found.append((root, names))
    return [Path(root, name) for root, names in sorted(found) for name in sorted(names) if name[0] != "."]


def _warn_of_left_out(path: Path, files: list[Path]) -> None:
    """Warn of files that are not read, counted by suffix, and name their folders."""
    places: dict[str, list[str]] = defaultdict(list)
    for file in files:
        kind = f"`{file.suffix.lower()}`" if file.suffix else "without a suffix"
        places[kind].append(str(file.parent.relative_to(path)))
    if files:
        kinds = (f"{len(where)} {kind} in {listed(sorted(set(where)), 3)}" for kind, where in sorted(places.items()))
        logger.warning(f"left out of `{path}`: {'; '.join(kinds)} (images end with {', '.join(SUFFIXES)})")


def read_image(path: Path, input_format: InputFormat) -> Tensor:
    """Read an image, resized and cropped about its centre: pixels (c,H,W) in 0…1, or raise a MoepruneError."""
    from PIL import Image

    channels, height, width = input_format.shape
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise MoepruneError(f"the model takes {channels} channels, images have 1 (grey) or 3 (colour)")
    require_file(path, "an image")
    try:
        # Only these decoders: others run programs (EPS) or are seldom tested.
        with Image.open(path, formats=sorted(set(SUFFIXES.values()))) as file:
            if file.mode.startswith(("I", "F")):
                raise MoepruneError(f"`{path}` has more than 8 bits a channel", "convert it to 8 bits")
            image = file.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MoepruneError(f"`{path}` is not a readable image ({error})", "repair or remove it") from None
    resize, interpolation = input_format.preprocessing.resize, input_format.preprocessing.interpolation
    factor = max(width / image.width, height / image.height) if resize is None else resize / min(image.size)
    wide, high = round(image.width * factor), round(image.height * factor)
    if wide < width or high < height:
        small = f"smaller than the {width}×{height} that the model takes"
        raise MoepruneError(f"`{path}` is {wide}×{high} after `resize` {resize}, {small}")
    if max(wide, high) > MAX_SIDE:
        large = f"{wide}×{high}, which is more than {MAX_SIDE} pixels on a side"
        raise MoepruneError(f"`{path}` of {image.width}×{image.height} would be resized to {large}")
    if (wide, high) != image.size:
        image = image.resize((wide, high), Image.Resampling[interpolation.upper()])
    left, top = (wide - width) // 2, (high - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
