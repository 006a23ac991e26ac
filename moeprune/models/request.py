"""A checkpoint with its options, and the requests of `moeprune inspect` and `moeprune export`; no torch."""

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec

from moeprune.errors import MoepruneError
from moeprune.models.folders.layout import is_model_folder
from moeprune.plan import Positive
from moeprune.records import Request, option

MAX_ELEMENTS = 2**28  # of one input; more would fill the memory
LIBRARIES = ("soft-moe", "soft-moe-pytorch", "soft-mixture-of-experts", "own", "moeprune")
"""Libraries whose models or layers are known; see moeprune.models.libraries, which imports torch."""


class ModelSpec(Request, frozen=True, kw_only=True):
    """A checkpoint of moeprune, of a known library, or of a model of the user's own code.

    path: a file, or a folder of shards. input_shape: (c,H,W). preprocess, classes: replace the
    checkpoint's.
    """

    path: Path
    model: Annotated[
        str | None,
        option(
            "Builds the model, if it is your own: package.module:function or path/file.py:function. This code is run.",
            metavar="MODULE:FUNCTION",
        ),
    ] = None
    model_arg: Annotated[
        dict[str, Any], option("With --model: an argument of the function (repeatable).", metavar="KEY=VALUE")
    ] = msgspec.field(default_factory=dict)
    input_shape: Annotated[
        tuple[Positive, Positive, Positive] | None, option("With --model: the shape of one input.", metavar="C,H,W")
    ] = None
    source: Annotated[
        str | None,
        option(
            "The library that wrote the checkpoint, if its tensors do not show it: soft-moe,"
            " soft-moe-pytorch or soft-mixture-of-experts.",
            metavar="LIBRARY[==VERSION]",
        ),
    ] = None
    source_arg: Annotated[
        dict[str, Any],
        option(
            "An argument of the library's constructor that the tensors do not show, such as num_heads=6 (repeatable).",
            metavar="KEY=VALUE",
        ),
    ] = msgspec.field(default_factory=dict)
    key: Annotated[
        str | None, option("The entry of a training checkpoint that holds the weights, such as model_ema.")
    ] = None
    prefix: Annotated[
        str | None, option("The start of the names of the weights, such as ema_model., if a file holds several models.")
    ] = None
    ignore_layer: Annotated[
        tuple[str, ...], option("With --model: a layer to leave as it is (repeatable).", metavar="NAME")
    ] = ()
    preprocess: Annotated[
        dict[str, Any],
        option("A preprocessing setting, such as resize=256 or mean=0.5 (repeatable).", metavar="KEY=VALUE"),
    ] = msgspec.field(default_factory=dict)
    classes: Annotated[
        Path | None, option("A text file with the name of each class folder, one a line, in the order of the outputs.")
    ] = None

    def check(self) -> None:
        """Raise a MoepruneError if the source is unknown or the input too large."""
        if self.source is not None and self.source.partition("==")[0] not in LIBRARIES:
            raise MoepruneError(f"`source` is {self.source!r}, expected one of {', '.join(LIBRARIES)}")
        if self.input_shape is not None and math.prod(self.input_shape) > MAX_ELEMENTS:
            raise MoepruneError(f"`input_shape` is {list(self.input_shape)}, expected at most {MAX_ELEMENTS} values")

    @property
    def is_model_folder(self) -> bool:
        """True for a folder that transformers reads, unless options say that other code does."""
        return self.model is None and not self.foreign_only and is_model_folder(self.path)

    def require_offloadable(self, offload: bool) -> None:
        """Raise a MoepruneError if weights are to stay on disk and the checkpoint is no folder of transformers."""
        if offload and not self.is_model_folder:
            message = f"`--offload` goes with folders of transformers, and `{self.path}` is not one"
            raise MoepruneError(message, "leave it out")

    @property
    def foreign_only(self) -> list[str]:
        """The options that are given and that only a file of another program needs."""
        names = ("source", "source_arg", "model_arg", "key", "prefix", "input_shape", "ignore_layer")
        return ["--" + name.replace("_", "-") for name in names if getattr(self, name) not in (None, {}, ())]


Checkpoint = Annotated[
    ModelSpec, option("A checkpoint: of moeprune, a known library or your own model.", argument="CKPT")
]


class InspectRequest(Request, frozen=True, kw_only=True):
    """A checkpoint to look at."""

    checkpoint: Checkpoint


class ExportRequest(Request, frozen=True, kw_only=True):
    """A checkpoint, and the library to write it for."""

    checkpoint: Checkpoint
    to: Annotated[
        str, option("Library: soft-moe, soft-moe-pytorch, soft-mixture-of-experts, or own for layers of your own code.")
    ]
    output: Annotated[Path, option("File to write: .pt, .pth or .bin, else safetensors.", short=("-o",))]

    def check(self) -> None:
        """Raise a MoepruneError if the library is unknown."""
        if self.to not in LIBRARIES:
            raise MoepruneError(f"`to` is {self.to!r}", f"give one of {', '.join(LIBRARIES[:-1])}")
