"""What the options of a command stand for: a model, a data set, a runtime. Torch is imported inside only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeprune.cli.reporter import logger, warn
from moeprune.cli.settings import parse_settings
from moeprune.errors import MoepruneError
from moeprune.report.commands import amount

if TYPE_CHECKING:
    from moeprune.data.datasets import Dataset
    from moeprune.models.model import Model
    from moeprune.models.runtime import Runtime


def load_model(path: Path, factory: str | None, preprocess: list[str] | None) -> Model:
    """The model of a checkpoint, with what `--preprocess` overrides; warns if results depend on the batch."""
    from dataclasses import replace

    from moeprune.models.opening import load

    model = load(path, factory)
    parameters = amount(sum(tensor.numel() for tensor in model.state_dict().values()))
    logger.info(f"read `{path}`: {parameters} parameters, {len(model.config.moe_layers)} Soft MoE layers")
    for name, layer in model.config.moe_layers.items():
        if layer.mixes_batch:
            warn(
                f"layer `{name}` takes its dispatch softmax over the batch, as it was trained: results depend"
                " on `--batch-size` and on the order of the inputs"
            )
    if preprocess:
        settings = parse_settings(preprocess, "--preprocess")
        updated = model.details.preprocessing.updated(settings)
        model.details = replace(model.details, preprocessing=updated)
    return model


def open_data(spec: str, model: Model, split: str | None, default_split: str, limit: int | None) -> Dataset:
    """The data set that `--data`, `--split` and `--limit` name."""
    from moeprune.data.datasets import BUILT_IN
    from moeprune.models.model import dataset_for

    if split is not None and spec not in BUILT_IN:
        raise MoepruneError(
            f"`--split {split}` does not go with `{spec}`", f"it picks a split of {' or '.join(BUILT_IN)}"
        )
    data = dataset_for(model, spec, default_split if split is None else split, limit)
    logger.info(f"read `{data.spec}`: {data.samples} samples{'' if data.has_labels else ' without labels'}")
    return data


def runtime_for(device: str, dtype: str, batch_size: int, progress: bool) -> Runtime:
    """The runtime of `--device`, `--dtype` and `--batch-size`; a missing device is told before any work."""
    from moeprune.models.runtime import Runtime

    runtime = Runtime(device, dtype, batch_size, progress)
    logger.info(f"runs on {runtime.torch_device} in {dtype}, {batch_size} inputs at a time")
    return runtime
