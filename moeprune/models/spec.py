"""A checkpoint with its options, as a command or a caller gives it; no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from moeprune.errors import MoepruneError
from moeprune.plan import Positive
from moeprune.records import Request

MAX_ELEMENTS = 2**28
"""Limit of the values of one input; more would fill the memory."""
LIBRARIES = ("soft-moe", "soft-moe-pytorch", "soft-mixture-of-experts", "moeprune")
"""Libraries whose models or layers are known; see moeprune.models.libraries, which imports torch."""


class ModelSpec(Request, frozen=True, kw_only=True):
    """A checkpoint of moeprune, of a known library, or of a model of the user's own code.

    path: a file, or a folder of shards. model: the factory `package.module:function` of the user's own model;
    its code is run. source: the library that wrote the file, with `==version` if that matters.
    arguments: of the factory, or those of the library's constructor that the tensors do not show. key: the
    entry of a training checkpoint that holds the weights. input_shape: of one input (c,H,W), with a factory.
    preprocess: settings in place of the checkpoint's, such as `{"resize": 256}`.
    """

    path: Path
    model: str | None = None
    source: str | None = None
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    key: str | None = None
    input_shape: tuple[Positive, Positive, Positive] | None = None
    preprocess: dict[str, Any] = msgspec.field(default_factory=dict)

    def check(self) -> None:
        """Raise a MoepruneError if the source is unknown or the input too large."""
        if self.source is not None and self.source.partition("==")[0] not in LIBRARIES:
            raise MoepruneError(f"`source` is {self.source!r}, expected one of {', '.join(LIBRARIES)}")
        if self.input_shape is not None and math.prod(self.input_shape) > MAX_ELEMENTS:
            raise MoepruneError(
                f"`input_shape` is {list(self.input_shape)}, expected at most {MAX_ELEMENTS} values"
            )

    @property
    def foreign_only(self) -> list[str]:
        """The fields that are set and that only a file of another program needs."""
        return [name for name in ("source", "arguments", "key", "input_shape") if getattr(self, name)]
