"""Warnings where a model is calibrated or judged on samples that should be kept from it."""

import logging
from pathlib import Path

from moeprune.data.datasets import Dataset
from moeprune.data.spec import BUILT_IN, DataInfo

logger = logging.getLogger(__name__)
NOT_TO_CALIBRATE_ON = {
    "train": "the split that models are trained on, where they may route otherwise than elsewhere",
    "test": "the split to evaluate on, which says little of new inputs after that",
}


def warn_of_calibration_split(data: Dataset) -> None:
    """Warn if a model is calibrated on a training or test split where other samples would be better."""
    split, better = data.source.split, data.source.better
    if better:
        logger.warning(
            f"the model is calibrated on `{data.spec}`, {NOT_TO_CALIBRATE_ON[split]}: calibrate on `{better}`"
        )


def warn_of_seen_samples(data: Dataset, calibrated_on: DataInfo | None) -> None:
    """Warn if a model is judged on samples that it was trained or calibrated on, as far as that is cheap to see.

    data: after a whole pass. calibrated_on: None if nothing was calibrated, or nobody knows on what.
    """
    if data.source.split == "train":
        logger.warning(f"`{data.spec}` is the split that models are trained on: they do worse on other inputs")
    if calibrated_on is not None and (shared := _shared(data, calibrated_on)):
        logger.warning(
            f"the model was calibrated on {shared} of `{data.spec}`: it may do worse on other inputs; evaluate it on"
            " samples that it has not seen"
        )


def _shared(data: Dataset, used: DataInfo) -> str | None:
    """Return in words which samples of data were used: of the same file or split, with any limits."""
    if used.fingerprint == data.fingerprint:
        return "the very samples"
    (own, _, _), (other, part, _) = (Path(spec).name.partition(" (") for spec in (data.spec, used.spec))
    if own != other:
        return None
    if own.partition(":")[0] in BUILT_IN:
        return "samples"
    whole = Dataset(data.spec, data.source, data.classes, range(data.source.samples))
    if not data.source.files or used.samples > whole.samples:
        return None
    if part:
        return "a part of a file with the name"
    drawn = whole.sample(used.samples)  # as a limit draws them
    return "samples" if drawn.read_fingerprint() == used.fingerprint else None
