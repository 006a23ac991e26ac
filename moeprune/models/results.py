"""Results about one model or checkpoint; no torch."""

from typing import Any

from moeprune.plan import LayerPlan
from moeprune.records import Report, Result


class BytesByPart(Result, frozen=True):
    """Bytes of a model's tensors by purpose."""

    experts: int
    routing: int
    compensation: int
    other: int


class FlopsByPart(Result, frozen=True):
    """FLOPs for one input; 1 multiply-add = 2 FLOPs."""

    total: float
    experts: float
    routing: float
    compensation: float
    other: float


class ModelCost(Result, frozen=True):
    """Size and cost of a model.

    experts_per_input: experts that run, summed over layers; the mean if a plan does not fix it.
    """

    parameters: int
    bytes: int
    bytes_by_part: BytesByPart
    flops_per_input: FlopsByPart
    experts_per_input: float


class InspectedLayer(Result, frozen=True):
    """One MoE layer of a checkpoint; settings: of its family. plan: None if it is not pruned."""

    family: str
    experts: int
    settings: dict[str, Any]
    parameters: int
    plan: LayerPlan | None


class Parity(Result, frozen=True):
    """Agreement of our model with the library's own, or the user's, on random images.

    max_relative_difference: the largest difference of two logits over the largest logit; None: not measured.
    dtype: in which both computed. images: how many. skipped: why it was not measured.
    """

    max_relative_difference: float | None
    dtype: str | None
    images: int | None
    skipped: str | None


class Reading(Result, frozen=True):
    """Facts read from a checkpoint of another program.

    arguments: of the library's constructor, or of the user's own factory. defaults: those of them that are
    assumed, as neither the file nor the user states them. dropped: tensors that the model does not use. prefix:
    taken off the names of all others; wrappers: parts taken off anywhere in names, such as `_orig_mod`.
    """

    library: str
    arguments: dict[str, Any]
    parity: Parity
    defaults: dict[str, Any]
    dropped: list[str]
    prefix: str
    wrappers: list[str]


class Inspection(Report, frozen=True):
    """Contents of a checkpoint; size and cost as in ModelCost.

    states_normalisation: False if mean and std of the preprocessing are a guess. class_names: in the order of the
    outputs; empty if they are not known.
    source: the library that wrote it. provenance: training, or calibration data, seed and versions. reading:
    None for a checkpoint of moeprune.
    """

    parameters: int
    bytes: int
    bytes_by_part: BytesByPart
    flops_per_input: FlopsByPart
    experts_per_input: float
    checkpoint: str
    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    states_normalisation: bool
    class_names: list[str]
    layers: dict[str, InspectedLayer]
    source: dict[str, Any]
    provenance: dict[str, Any]
    reading: Reading | None


class ExportedLayer(Result, frozen=True):
    """How a library's class builds a layer of the kept experts."""

    class_name: str
    arguments: dict[str, Any]


class Export(Report, frozen=True):
    """A checkpoint written for another library.

    source: origin of the weights. arguments: with which the library, or the user's own code, builds the model
    that loads it. layers: of a pruned model of the user's own code, which has to build them this way, by name.
    """

    output: str
    to: str
    source: dict[str, Any]
    arguments: dict[str, Any]
    layers: dict[str, ExportedLayer]
    parity: Parity
    model: ModelCost
