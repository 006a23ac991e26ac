"""Folders of PNG and JPEG images: one folder for each class, or images without labels."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeprune.data.preprocessing import MAX_SIDE, InputFormat
from moeprune.data.sources import Batches, Source, one_ahead
from moeprune.errors import MoepruneError
from moeprune.files.disk import require_file

SUFFIXES = (".png", ".jpg", ".jpeg")


def open_folder(path: Path, input_format: InputFormat) -> Source:
    """Open a folder of images, ordered by class and by name; raise a MoepruneError if it does not fit the model."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        hint = "install it: `pip install Pillow`"
        raise MoepruneError("folders of images need Pillow", hint) from None
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if classes and len(classes) != input_format.classes and input_format.classes:
        message = f"`{path}` has {len(classes)} class folders, the model {input_format.classes} classes"
        hint = "make a folder for every class (it may be empty), or put unlabelled images into one flat folder"
        raise MoepruneError(f"{message}: the labels would be wrong", hint)
    files = [
        (file, label)
        for label, folder in enumerate(path / name for name in classes or ["."])
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES and file.name[0] != "."
    ]
    if not files:
        hint = f"expected {path}/CLASS/*.png or *.jpg"
        raise MoepruneError(f"no images in `{path}` ({len(classes)} class folders)", hint)
    paths, labels = zip(*files, strict=True)

    def read(batches: Batches) -> Iterator[Tensor]:
        read_one = partial(read_image, input_format=input_format)
        with ThreadPoolExecutor() as pool:
            for images in one_ahead(pool.map(read_one, [paths[index] for index in indices]) for indices in batches):
                yield input_format.normalize(torch.stack(list(images)))

    return Source(len(paths), torch.tensor(labels) if classes and input_format.classes else None, read, paths)


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
        with Image.open(path, formats=("PNG", "JPEG")) as file:
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
