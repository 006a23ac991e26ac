"""Preprocessing of pixels into inputs of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from moeprune.errors import MoepruneError
from moeprune.records import Record, from_json, to_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_SIDE = 16384
"""Pixels of the longest side that an image is resized to; larger ones are a mistake and fill the memory."""
HINT = (
    f"resize is a whole number from 1 to {MAX_SIDE}; interpolation is nearest, bilinear, bicubic or lanczos;"
    " mean and std are one number for all channels or one for each, std above 0"
)


class Preprocessing(Record, frozen=True, omit_defaults=False):
    """Preprocessing settings; the size and the channels come from the model.

    resize: the shorter side of an image before the centre crop; None: as small as covers the crop.
    mean, std: of pixels in 0…1, one value for each channel or one for all.
    """

    resize: Annotated[int, Meta(ge=1, le=MAX_SIDE)] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: Annotated[tuple[float, ...], Meta(min_length=1)] = (0.0,)
    std: Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(min_length=1)] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):
            if not all(math.isfinite(value) for value in getattr(self, name)):
                raise MoepruneError(f"preprocessing: `{name}` has NaN or infinite values", HINT)

    def updated(self, settings: Mapping[str, Any]) -> Preprocessing:
        """Return a copy with some settings replaced, checked; one number stands for a list of one."""
        lists = {key: [settings[key]] for key in ("mean", "std") if isinstance(settings.get(key), int | float)}
        try:
            return from_json(to_json(self) | dict(settings) | lists, Preprocessing, "`--preprocess`")
        except MoepruneError as error:
            raise MoepruneError(error.message, HINT) from None


@dataclass(frozen=True)
class InputFormat:
    """A model's inputs and number of classes (0: no head), and how pixels become inputs."""

    channels: int
    height: int
    width: int
    classes: int
    preprocessing: Preprocessing = Preprocessing()

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one input: (c,H,W)."""
        return self.channels, self.height, self.width

    @property
    def in_words(self) -> str:
        """A description such as `3×224×224 in 1000 classes, normalised with mean 0.5 and std 0.5`."""
        size = "×".join(map(str, self.shape))
        mean, std = (", ".join(map(str, values)) for values in (self.preprocessing.mean, self.preprocessing.std))
        return f"{size} in {self.classes} classes, normalised with mean {mean} and std {std}"

    def misfit(self, spec: str, shape: tuple[int, ...]) -> MoepruneError:
        """Return the error that says that inputs of a data set have another shape."""
        expected = f"[n, {self.channels}, {self.height}, {self.width}]"
        hint = "give data of the size and the channels that `moeprune inspect` shows"
        return MoepruneError(f"inputs of `{spec}` have the shape {list(shape)}, the model takes {expected}", hint)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return pixels (b,c,H,W) in 0…1 minus the mean, divided by the standard deviation."""
        settings = {"mean": self.preprocessing.mean, "std": self.preprocessing.std}
        for name, values in settings.items():
            if len(values) not in (1, self.channels):
                raise MoepruneError(f"preprocessing: `{name}` has {len(values)} values for {self.channels} channels")
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in settings.values())
        return (pixels - mean).div_(std)
