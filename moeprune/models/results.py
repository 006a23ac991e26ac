"""Results about one model or checkpoint; no torch."""

from __future__ import annotations

from typing import Any

import msgspec

from moeprune.plan import LayerPlan
from moeprune.records import Report, Result


class BytesByPart(Result, frozen=True):
    """Bytes of a model's tensors, by what they are for."""

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

    experts_per_input: experts that run, summed over layers; the mean where a plan does not fix it.
    """

    parameters: int
    bytes: int
    bytes_by_part: BytesByPart
    flops_per_input: FlopsByPart
    experts_per_input: float


class InspectedLayer(Result, frozen=True):
    """One MoE layer of a checkpoint; plan: None where it is not pruned."""

    experts: int
    slots_per_expert: int
    hidden_dim: int | None
    parameters: int
    plan: LayerPlan | None


class Inspection(ModelCost, Report, frozen=True):
    """Contents of a checkpoint, from its header.

    source: the library that wrote it. provenance: training, or calibration data, seed and versions.
    """

    checkpoint: str
    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    layers: dict[str, InspectedLayer]
    source: dict[str, Any]
    provenance: dict[str, Any]


class MeasuredParity(Result, frozen=True):
    """Agreement of our model with the library's own on random images.

    max_relative_difference: the largest difference of two logits over the largest logit.
    dtype: in which both computed.
    """

    max_relative_difference: float
    dtype: str
    images: int


class Conversion(Report, frozen=True):
    """A checkpoint written in another layout.

    arguments: of the constructor of the library on either side. defaults: those taken from the library.
    dropped: tensors that the model does not use. parity_skipped: why parity is None.
    """

    checkpoint: str
    output: str
    origin: str = msgspec.field(name="from")
    to: str
    source: dict[str, Any]
    arguments: dict[str, Any]
    defaults: dict[str, Any]
    dropped: list[str]
    parity: MeasuredParity | None
    parity_skipped: str | None
    model: ModelCost
