"""Preprocessing of pixels into inputs of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from moeprune.errors import MoepruneError, listed
from moeprune.records import Record, from_json, to_json

if TYPE_CHECKING:
    from torch import Tensor

    from moeprune.data.tokens import AnyFormat

MAX_SIDE = 16384
"""Pixels of the longest side that an image is resized to; larger ones are a mistake and fill the memory."""
HINT = (
    f"resize is a whole number from 1 to {MAX_SIDE}; interpolation is nearest, bilinear, bicubic or lanczos;"
    " mean and std are one number for all channels or one for each, std above 0"
)


class Preprocessing(Record, frozen=True, omit_defaults=False):
    """Preprocessing settings; the size and the channels come from the model.

    resize: the shorter side of an image before the centre crop; None: as small as covers the crop.
    mean, std: of pixels in 0…1, one value for each channel or one for all; None: not known, taken as 0 and 1.
    """

    resize: Annotated[int, Meta(ge=1, le=MAX_SIDE)] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: Annotated[tuple[float, ...], Meta(min_length=1)] | None = None
    std: Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(min_length=1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):
            if not all(math.isfinite(value) for value in getattr(self, name) or ()):
                raise MoepruneError(f"preprocessing: `{name}` has NaN or infinite values", HINT)

    @property
    def states_normalisation(self) -> bool:
        """False if the normalisation is not known, so that pixels stay in 0…1."""
        return self.mean is not None or self.std is not None

    @property
    def effective(self) -> Preprocessing:
        """The settings, with mean 0 and standard deviation 1 where they are not known."""
        return self.replace(mean=self.mean or (0.0,), std=self.std or (1.0,))

    def updated(self, settings: Mapping[str, Any]) -> Preprocessing:
        """Return a copy with some settings replaced, checked; one number stands for a list of one."""
        lists = {key: [settings[key]] for key in ("mean", "std") if isinstance(settings.get(key), int | float)}
        try:
            return from_json(to_json(self) | dict(settings) | lists, Preprocessing, "`--preprocess`")
        except MoepruneError as error:
            raise MoepruneError(error.message, HINT) from None


@dataclass(frozen=True)
class InputFormat:
    """A model's inputs and number of classes (0: no head), and how pixels become inputs.

    class_names: in the order of the outputs; empty if they are not known.
    """

    channels: int
    height: int
    width: int
    classes: int
    preprocessing: Preprocessing = Preprocessing()
    class_names: tuple[str, ...] = ()

    array = "inputs"
    """The name of the array of inputs in a file."""

    @property
    def has_head(self) -> bool:
        """False if the model gives features, not logits."""
        return self.classes > 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one input: (c,H,W)."""
        return self.channels, self.height, self.width

    @property
    def in_words(self) -> str:
        """A description such as `3×224×224 in 1000 classes, normalised with mean 0.5 and std 0.5`."""
        settings = self.preprocessing.effective
        size = "×".join(map(str, self.shape))
        mean, std = (", ".join(map(str, values or ())) for values in (settings.mean, settings.std))
        classes = f"{self.classes} classes{f' ({listed(self.class_names)})' if self.class_names else ''}"
        return f"{size} in {classes}, normalised with mean {mean} and std {std}"

    def agrees_with(self, other: AnyFormat) -> bool:
        """Return True if both are the same, where the names of classes are known."""
        if not isinstance(other, InputFormat):
            return False
        names = self.class_names or other.class_names, other.class_names or self.class_names
        return names[0] == names[1] and replace(self, class_names=()) == replace(other, class_names=())

    def prepared(self, sequence_length: int | None, by: str | None) -> InputFormat:
        """Return the format as it is, or raise a MoepruneError for options of text."""
        for option, value in (("--sequence-length", sequence_length), ("--by", by)):
            if value is not None:
                raise MoepruneError(f"`{option}` is for models that take text, this one takes images", "leave it out")
        return self

    def misfit(self, spec: str, shape: tuple[int, ...]) -> MoepruneError:
        """Return the error that says that inputs of a data set have another shape."""
        expected = f"[n, {self.channels}, {self.height}, {self.width}]"
        hint = "give data of the size and the channels that `moeprune inspect` shows"
        return MoepruneError(f"inputs of `{spec}` have the shape {list(shape)}, the model takes {expected}", hint)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return pixels (b,c,H,W) in 0…1 minus the mean, divided by the standard deviation."""
        settings = {"mean": self.preprocessing.mean or (0.0,), "std": self.preprocessing.std or (1.0,)}
        for name, values in settings.items():
            if len(values) not in (1, self.channels):
                raise MoepruneError(f"preprocessing: `{name}` has {len(values)} values for {self.channels} channels")
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in settings.values())
        return (pixels - mean).div_(std)
