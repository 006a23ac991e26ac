"""Options of `moeprune eval`; no torch."""

import math
from pathlib import Path
from typing import Annotated

import msgspec

from moeprune.data.spec import DataSpec
from moeprune.errors import MoepruneError
from moeprune.evaluation.gates import GATES, OF_LANGUAGE, check_confidence
from moeprune.models.request import Checkpoint, ModelSpec
from moeprune.models.runtime import Runtime
from moeprune.records import Request, from_json, option

BATCH_SIZES = (1, 8, 32)  # batch sizes that latency is measured at, unless others are given
RATIOS = {"min_speedup": "a speed-up such as 1.5", "max_perplexity_ratio": "a ratio such as 1.05"}
Gate = float | None
BatchSizes = tuple[Annotated[int, msgspec.Meta(ge=1, le=1_000_000)], ...]


class EvalRequest(Request, frozen=True, kw_only=True):
    """A checkpoint to evaluate on labelled data, alone or against the full model."""

    checkpoint: Checkpoint
    data: Annotated[
        DataSpec,
        option(
            "Labelled data: digits, pairs, a .npz, a .safetensors, or a folder; or text: a .txt, .jsonl or .parquet."
        ),
    ]
    baseline: Annotated[ModelSpec | None, option("The full model to compare with.")] = None
    max_accuracy_drop: Annotated[Gate, option("Gate: accuracy lost to the baseline.")] = None
    min_accuracy: Annotated[Gate, option("Gate: accuracy.")] = None
    max_loss_increase: Annotated[
        Gate, option("Gate for language models: nats per token that the loss is above the baseline's.")
    ] = None
    max_perplexity_ratio: Annotated[
        Gate, option("Gate for language models: perplexity over the baseline's, such as 1.05.")
    ] = None
    max_kl: Annotated[
        Gate, option("Gate for language models: mean KL divergence to the baseline's predictions, in nats per token.")
    ] = None
    min_flops_reduction: Annotated[Gate, option("Gate: share of FLOPs saved.")] = None
    min_size_reduction: Annotated[Gate, option("Gate: share of bytes saved.")] = None
    min_agreement: Annotated[Gate, option("Gate: share of inputs, or tokens, with the baseline's prediction.")] = None
    min_speedup: Annotated[
        Gate, option("Gate, with --latency: speed-up over the baseline, the worst of all batch sizes.")
    ] = None
    confidence: Annotated[
        float | None, option("Gates judge the one-sided bound of a value at this level, such as 0.95, not the value.")
    ] = None
    latency: Annotated[bool, option("Measure forward passes too; with --baseline, in turn with the full model's.")] = (
        False
    )
    latency_batch: Annotated[
        tuple[int, ...],
        option("With --latency: inputs of a forward pass (repeatable).", metavar="N", show_default="1, 8, 32"),
    ] = ()
    by: Annotated[
        str | None,
        option("Report results of each group too: the field of the text's documents that names it.", metavar="FIELD"),
    ] = None
    analysis: Annotated[
        Path | None, option("The file that `moeprune analyze` wrote; for --sweep, --plot and --report.")
    ] = None
    runtime: Runtime = Runtime()

    @property
    def limits(self) -> dict[str, float]:
        """The limits of gates by name."""
        return {name: limit for name in GATES if (limit := getattr(self, name)) is not None}

    @property
    def latency_batches(self) -> tuple[int, ...] | None:
        """Batch sizes to measure latency at; None: it is not measured."""
        return (self.latency_batch or BATCH_SIZES) if self.latency else None

    def check(self) -> None:
        """Raise a MoepruneError for limits that cannot be judged."""
        if self.latency_batch and not self.latency:
            raise MoepruneError("`latency_batch` goes with `latency`", "add `--latency`")
        if self.latency and self.runtime.offload:
            raise MoepruneError(
                "`latency` does not go with `--offload`", "leave one out: reading weights would be timed"
            )
        from_json(self.latency_batch, BatchSizes, "`--latency-batch`")
        check_confidence(self.confidence)
        if self.confidence is not None and not self.limits:
            gates = "`--max-accuracy-drop 0.01`, or `--max-loss-increase 0.05` of language models"
            raise MoepruneError("`confidence` goes with a gate", f"add one, such as {gates}")
        for name, limit in self.limits.items():
            is_timed, given = GATES[name] == "latency", f"`--{name.replace('_', '-')} {limit}`"
            if name in RATIOS:
                if not 0 < limit < math.inf:
                    raise MoepruneError(f"{given} is not a ratio above 0", f"give {RATIOS[name]}")
            elif name in OF_LANGUAGE:
                if not 0 <= limit < math.inf:
                    raise MoepruneError(f"{given} is not a number from 0", "give nats per token, such as 0.05")
            elif not 0 <= limit <= 1:
                raise MoepruneError(f"{given} is outside 0…1", "give a fraction: one percent is 0.01")
            if name == "max_accuracy_drop" and limit == 1:
                raise MoepruneError(f"{given} allows any loss", "give a fraction: one percent is 0.01")
            if is_timed and not self.latency:
                raise MoepruneError(f"`{name}` judges measured times", "give it with `--latency`")
            if GATES[name] != "model" and self.baseline is None:
                raise MoepruneError(f"`{name}` compares with the full model", "give it with `--baseline`")
