"""How pixels become a model's inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeprune.errors import MoepruneError

if TYPE_CHECKING:
    from torch import Tensor

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
MAX_SIDE = 16384
"""Pixels of the longest side that an image is resized to; larger ones are a mistake and fill the memory."""


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become inputs; the size and the channels come from the architecture.

    resize: the shorter side of an image before the centre crop; None: as small as covers the crop.
    mean, std: of pixels in 0…1, one value a channel or one for all.
    """

    resize: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `preprocessing_from_json` reads it back."""
        return asdict(self)

    def updated(self, settings: Sequence[str]) -> Preprocessing:
        """With settings such as `resize=256` or `mean=0.485,0.456,0.406` in place of its own.

        Raises:
            MoepruneError: an unknown key or a value that does not fit.
        """
        made, values = self, self.to_json()
        for setting in settings:
            key, _, text = setting.partition("=")
            if key not in values:
                raise MoepruneError(
                    f"`--preprocess {setting}`: unknown key `{key}`", f"known keys: {', '.join(values)}"
                )
            try:
                if key in ("mean", "std"):
                    values[key] = tuple(float(part) for part in text.split(","))
                else:
                    values[key] = int(text) if key == "resize" else text
            except ValueError:
                raise MoepruneError(f"`--preprocess {setting}`: `{text}` is no number") from None
            try:
                made = preprocessing_from_json(values)
            except MoepruneError as error:
                raise MoepruneError(f"`--preprocess {setting}` does not fit", error.hint) from None
        return made


def preprocessing_from_json(value: Any) -> Preprocessing:
    """Read a Preprocessing from JSON values.

    Raises:
        MoepruneError: an unknown key or a value that does not fit.
    """
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        made = Preprocessing(**values)
        numbers = [*made.mean, *made.std]
        fits = (
            all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
            and all(std > 0 for std in made.std)
            and (made.resize is None or (type(made.resize) is int and 0 < made.resize <= MAX_SIDE))
            and made.interpolation in INTERPOLATIONS
        )
    except (TypeError, AttributeError, OverflowError) as error:
        raise MoepruneError(f"preprocessing: {error}") from None
    if not fits:
        raise MoepruneError(
            f"preprocessing: {value} does not fit",
            f"resize is a whole number from 1 to {MAX_SIDE}, interpolation one of"
            f" {', '.join(INTERPOLATIONS)}, mean and std are numbers, std above 0",
        )
    return made


@dataclass(frozen=True)
class InputFormat:
    """What the model takes and tells: channels, height, width and classes, and how pixels become that."""

    channels: int
    height: int
    width: int
    classes: int
    preprocessing: Preprocessing = Preprocessing()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one input: (c,H,W)."""
        return self.channels, self.height, self.width

    @property
    def in_words(self) -> str:
        """Such as `3×224×224 in 1000 classes, normalised with mean 0.5 and std 0.5`."""
        mean, std = (
            ", ".join(str(value) for value in values)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        size = "×".join(str(side) for side in self.shape)
        return f"{size} in {self.classes} classes, normalised with mean {mean} and std {std}"

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels in 0…1 (b,c,H,W) minus mean, divided by std."""
        for name in ("mean", "std"):
            values = getattr(self.preprocessing, name)
            if len(values) not in (1, self.channels):
                raise MoepruneError(
                    f"preprocessing: `{name}` has {len(values)} values for {self.channels} channels"
                )
        mean = pixels.new_tensor(self.preprocessing.mean)[:, None, None]
        std = pixels.new_tensor(self.preprocessing.std)[:, None, None]
        return (pixels - mean) / std
