"""One image file as pixels of the size and the channels that a model takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeprune.data.preprocessing import MAX_SIDE, InputFormat
from moeprune.errors import MoepruneError
from moeprune.files.header import require_file


def read_image(path: Path, input_format: InputFormat) -> Tensor:
    """An image, resized and cropped about its centre: pixels (c,H,W) in 0…1.

    Raises:
        MoepruneError: a file that is no image, or channels other than 1 (grey) or 3 (colour).
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
        raise MoepruneError(f"`{path}` is no readable image ({error})", "repair or remove it") from None
    preprocessing = input_format.preprocessing
    shorter = min(image.size)
    factor = max(width / image.width, height / image.height)
    if preprocessing.resize is not None:
        factor = preprocessing.resize / shorter
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
