"""Folders of PNG and JPEG images: one folder for each class, or images without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeprune.data.preprocessing import MAX_SIDE, InputFormat
from moeprune.data.sources import Batch, Source, one_ahead
from moeprune.errors import MoepruneError
from moeprune.files.reading import require_file

SUFFIXES = (".png", ".jpg", ".jpeg")


def open_folder(path: Path, input_format: InputFormat) -> Source:
    """Open a folder of images, ordered by class and by name.

    Raises:
        MoepruneError: no images, class folders other in number than the model's classes, or no Pillow.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        hint = "install it, or moeprune's extra `images`"
        raise MoepruneError("folders of images need Pillow", hint) from None
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if classes and len(classes) != input_format.classes and input_format.classes:
        raise MoepruneError(
            f"`{path}` has {len(classes)} class folders, the model {input_format.classes} classes:"
            " the labels would be wrong",
            "make a folder for every class (it may be empty), or put unlabelled images into one flat folder",
        )
    files = [
        (file, label)
        for label, folder in enumerate(path / name for name in classes or ["."])
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES and file.name[0] != "."
    ]
    if not files:
        raise MoepruneError(
            f"no images in `{path}` ({len(classes)} class folders)", f"expected {path}/CLASS/*.png or *.jpg"
        )
    has_labels = bool(classes) and input_format.classes > 0

    def read(batches: Iterable[Sequence[int]]) -> Iterator[Batch]:
        with ThreadPoolExecutor() as pool:

            def start(indices: Sequence[int]) -> tuple[Sequence[int], list[Future[Tensor]]]:
                return indices, [pool.submit(read_image, files[i][0], input_format) for i in indices]

            for indices, images in one_ahead(start(indices) for indices in batches):
                pixels = torch.stack([image.result() for image in images])
                labels = torch.tensor([files[i][1] for i in indices]) if has_labels else None
                yield input_format.normalize(pixels), labels

    return Source(len(files), has_labels, read, [file for file, _ in files])


def read_image(path: Path, input_format: InputFormat) -> Tensor:
    """Read an image, resized and cropped about its centre: pixels (c,H,W) in 0…1.

    Raises:
        MoepruneError: not a PNG or JPEG image, or a model with channels other than 1 (grey) or 3 (colour).
    """
    from PIL import Image

    channels, height, width = input_format.shape
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise MoepruneError(f"the model takes {channels} channels, images have 1 (grey) or 3 (colour)")
    require_file(path, "an image")
    try:
        # Only these decoders: others run programs (EPS) or are seldom tested.
        with Image.open(path, formats=("PNG", "JPEG")) as file:
            if file.mode.startswith(("I", "F")):
                raise MoepruneError(f"`{path}` has more than 8 bits a channel", "convert it to 8 bits")
            image = file.convert(modes[channels])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MoepruneError(f"`{path}` is not a readable image ({error})", "repair or remove it") from None
    preprocessing = input_format.preprocessing
    factor = max(width / image.width, height / image.height)
    if preprocessing.resize is not None:
        factor = preprocessing.resize / min(image.size)
    resized = (round(image.width * factor), round(image.height * factor))
    if resized[0] < width or resized[1] < height:
        raise MoepruneError(
            f"`{path}` is {resized[0]}×{resized[1]} after `resize` {preprocessing.resize},"
            f" smaller than the {width}×{height} that the model takes"
        )
    if max(resized) > MAX_SIDE:
        raise MoepruneError(
            f"`{path}` of {image.width}×{image.height} would be resized to {resized[0]}×{resized[1]},"
            f" which is more than {MAX_SIDE} pixels on a side"
        )
    if resized != image.size:
        image = image.resize(resized, Image.Resampling[preprocessing.interpolation.upper()])
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
