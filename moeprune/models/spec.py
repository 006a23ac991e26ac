"""Which model a command or a caller means; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from moeprune.records import Record


class ModelSpec(Record, frozen=True, kw_only=True):
    """A checkpoint of moeprune, of a known library, or of a model of the user's own code.

    path: a file, or a folder of shards. model: the factory `package.module:function` of the user's own model;
    its code is run. source: the library that wrote the file, with `==version` where that matters.
    arguments: of the factory, or of the library's constructor where the tensors do not tell. key: the entry
    of a training checkpoint that holds the weights. input_shape: of one input (c,H,W), with a factory.
    preprocess: settings in place of the checkpoint's, such as `{"resize": 256}`.
    """

    path: Path
    model: str | None = None
    source: str | None = None
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    key: str | None = None
    input_shape: tuple[int, int, int] | None = None
    preprocess: dict[str, Any] = msgspec.field(default_factory=dict)
