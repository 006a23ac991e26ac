"""What calibration data says about every Soft MoE layer, in one streaming pass, and its file.

Axes: b inputs, m tokens, d model width, n experts, p slots per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeprune import __version__, checkpoint
from moeprune.data import Dataset
from moeprune.errors import MoepruneError
from moeprune.model import SoftMoEViT, dataset_for, fingerprint, require_soft_moe_layers, soft_moe_layers
from moeprune.runtime import Runtime
from moeprune.scores import combine_mass, rank
from moeprune.soft_moe import Observation

FORMAT = 1
MASS_LEVELS = (0.5, 0.9, 0.99)
INFORMATIVE_MASS = 0.4
"""Below this mass of the best n/8 experts, keeping them was no better than keeping random ones on
the digits (tests/benchmarks/sharpness.py)."""
GRAM_WORKSPACE = 2**24
"""Numbers at most in the two matrices over slots that the Gram matrix of some inputs needs."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer over the calibration inputs, in float32 on the CPU.

    mean_mass, max_mass: the combine mass of each expert, mean and maximum over inputs (n).
    rank_frequency: row r, column j: share of inputs whose r-th best expert is j (n,n). The sum of
        the first k rows is how often an expert is among the best k.
    kept_mass: entry k-1: mean mass of the best k experts of an input (n).
    experts_for_mass: mean number of an input's experts that hold each of MASS_LEVELS (3).
    class_mass: mean mass of each expert over the inputs of a class (classes,n); no rows without
        labels.
    slot_mean: mu, the mean output of each slot weighted by its combine mass (n,p,d).
    deviation: sigma, the root mean square of |f - mu| with the same weights (n).
    gram: G_jl = E sum over p, q of (CᵀC)_jp,lq · <f_jp, f_lq> (n,n): the expected squared error of the
        layer's output when the set Z is dropped is the sum of G over Z×Z (design of this tool;
        |Y - Y'|² with Y = C·f written out).
    """

    mean_mass: Tensor
    max_mass: Tensor
    rank_frequency: Tensor
    kept_mass: Tensor
    experts_for_mass: Tensor
    class_mass: Tensor
    slot_mean: Tensor
    deviation: Tensor
    gram: Tensor

    @property
    def num_experts(self) -> int:
        """The number of experts, n."""
        return len(self.mean_mass)

    def top_k_frequency(self, k: int) -> Tensor:
        """How often each expert is among the best k of an input: shares (n)."""
        return self.rank_frequency[:k].sum(0)


@dataclass(frozen=True)
class Analysis:
    """The statistics of a model's Soft MoE layers by name, and what they were made from.

    provenance: `checkpoint` (fingerprint), `data` (spec, samples, fingerprint), `moeprune` (version).
    """

    layers: dict[str, LayerStatistics]
    provenance: dict[str, Any]


def analyze(model: SoftMoEViT, data: Dataset | str, runtime: Runtime = Runtime()) -> Analysis:
    """Statistics of every Soft MoE layer of an unpruned model, from one pass over the data.

    Memory does not depend on the number of samples, nor the result on the batch size (beyond
    rounding). The model is moved to the runtime's device.

    Raises:
        MoepruneError: no Soft MoE layer, a pruned one, or data that does not fit the model.
    """
    layers = require_soft_moe_layers(model)
    if pruned := [name for name, layer in layers.items() if layer.plan is not None]:
        raise MoepruneError(
            f"layers {', '.join(f'`{name}`' for name in pruned)} are already pruned",
            "analyze the unpruned checkpoint",
        )
    data = dataset_for(model, data, split="calibration")
    statistics = measure(model, list(layers), data, runtime, "analyze")
    provenance = {
        "checkpoint": {"fingerprint": fingerprint(model)},
        "data": data.to_json(),
        "moeprune": __version__,
    }
    return Analysis(statistics, provenance)


def measure(
    model: nn.Module, names: Sequence[str], data: Dataset, runtime: Runtime, what: str
) -> dict[str, LayerStatistics]:
    """Statistics of the named dense layers, from one pass that ends each batch at the last of them.

    Raises:
        MoepruneError: NaN or infinite numbers in a layer, named.
    """
    model.to(runtime.torch_device).eval()
    layers = soft_moe_layers(model)
    accumulators = {name: _Accumulator(layers[name].phi) for name in names}
    for inputs, labels in runtime.batches(data, what):

        def observe(name: str, observation: Observation, labels: Tensor | None = labels) -> None:
            accumulators[name].add(observation, labels)

        observe_layers(model, names, observe, inputs, runtime)
    statistics = {name: accumulator.result() for name, accumulator in accumulators.items()}
    for name, layer in statistics.items():
        if not all(getattr(layer, field.name).isfinite().all() for field in fields(layer)):
            raise MoepruneError(
                f"layer `{name}` computes NaN or infinite numbers on `{data.spec}`",
                "check the checkpoint and the scale of the inputs, or use `--dtype float32`",
            )
    return statistics


class _Enough(Exception):
    """Every layer that was asked for has been observed."""


def observe_layers(
    model: nn.Module,
    names: Sequence[str],
    observe: Callable[[str, Observation], None],
    inputs: Tensor,
    runtime: Runtime,
) -> None:
    """Run the model on inputs as far as the named layers and hand each one's observation over."""
    waiting = set(names)

    def observer(name: str) -> Callable[[Observation], None]:
        def seen(observation: Observation) -> None:
            observe(name, observation)
            waiting.discard(name)
            if not waiting:
                raise _Enough

        return seen

    with _observing(model, {name: observer(name) for name in names}), suppress(_Enough):
        runtime.forward(model, inputs)


@contextmanager
def _observing(model: nn.Module, observers: Mapping[str, Callable[[Observation], None]]) -> Iterator[None]:
    layers = soft_moe_layers(model)
    for name, observer in observers.items():
        layers[name].observer = observer
    try:
        yield
    finally:
        for name in observers:
            layers[name].observer = None


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest float that sums over a data set can be kept in on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Accumulator:
    """Running sums over the inputs of one layer; nothing in it grows with their number."""

    def __init__(self, phi: Tensor):
        d, n, p = phi.shape
        kind: dict[str, Any] = {"device": phi.device, "dtype": wide_dtype(phi.device)}
        self.samples = 0
        self.mass = torch.zeros(n, **kind)
        self.max_mass = torch.zeros(n, **kind)
        self.rank_counts = torch.zeros(n * n, device=phi.device, dtype=torch.int64)
        self.kept_mass = torch.zeros(n, **kind)
        self.experts_for_mass = torch.zeros(len(MASS_LEVELS), **kind)
        self.class_mass = torch.zeros(0, n, **kind)
        self.class_samples = torch.zeros(0, device=phi.device, dtype=torch.int64)
        self.slot_mass = torch.zeros(n, p, **kind)
        self.weighted_outputs = torch.zeros(n, p, d, **kind)
        self.weighted_squares = torch.zeros(n, p, **kind)
        self.gram = torch.zeros(n, n, **kind)

    def add(self, observation: Observation, labels: Tensor | None) -> None:
        combine_weights = observation.combine_weights.float()
        slot_outputs = observation.slot_outputs.float()
        mass = combine_mass(combine_weights).to(self.mass.dtype)  # (b,n)
        self.samples += len(mass)
        self.mass += mass.sum(0)
        self.max_mass = torch.maximum(self.max_mass, mass.amax(0))
        self._add_ranks(mass)
        if labels is not None:
            self._add_classes(mass, labels.to(mass.device))
        slot_mass = combine_weights.sum(1)  # (b,n,p)
        self.slot_mass += slot_mass.sum(0, dtype=self.mass.dtype)
        weighted = slot_mass[..., None] * slot_outputs  # (b,n,p,d)
        self.weighted_outputs += weighted.sum(0, dtype=self.mass.dtype)
        self.weighted_squares += (weighted * slot_outputs).sum((0, 3), dtype=self.mass.dtype)
        self._add_gram(combine_weights, slot_outputs)

    def _add_ranks(self, mass: Tensor) -> None:
        n = mass.shape[1]
        order = rank(mass)
        cells = (torch.arange(n, device=mass.device) * n + order).flatten()
        self.rank_counts.scatter_add_(0, cells, torch.ones_like(cells))
        best = mass.gather(1, order).cumsum(1)  # of the best k, k = 1…n
        self.kept_mass += best.sum(0)
        for index, level in enumerate(MASS_LEVELS):
            missing = (best < level * best[:, -1:]).sum(1)
            self.experts_for_mass[index] += (missing + 1).sum()

    def _add_classes(self, mass: Tensor, labels: Tensor) -> None:
        new = int(labels.max()) + 1 - len(self.class_mass)
        if new > 0:
            self.class_mass = torch.cat([self.class_mass, self.class_mass.new_zeros(new, mass.shape[1])])
            self.class_samples = torch.cat([self.class_samples, self.class_samples.new_zeros(new)])
        self.class_mass.index_add_(0, labels, mass)
        self.class_samples.index_add_(0, labels, torch.ones_like(labels))

    def _add_gram(self, combine_weights: Tensor, slot_outputs: Tensor) -> None:
        _, _, n, p = combine_weights.shape
        step = max(1, GRAM_WORKSPACE // (2 * (n * p) ** 2))
        weights, outputs = combine_weights.flatten(2).split(step), slot_outputs.flatten(1, 2).split(step)
        for c, f in zip(weights, outputs, strict=True):
            slots = ((c.mT @ c) * (f @ f.mT)).sum(0, dtype=self.gram.dtype)  # (n·p,n·p)
            self.gram += slots.view(n, p, n, p).sum((1, 3))

    def result(self) -> LayerStatistics:
        n = len(self.mass)
        # A slot without any mass (it underflowed) has no mean; zero is as good as any.
        slot_mass = self.slot_mass.clamp_min(torch.finfo(self.mass.dtype).tiny)
        slot_mean = self.weighted_outputs / slot_mass[..., None]
        spread = self.weighted_squares - self.slot_mass * slot_mean.square().sum(-1)
        variance = spread.sum(1).clamp_min(0) / slot_mass.sum(1)
        return LayerStatistics(
            **{
                name: tensor.to("cpu", torch.float32)
                for name, tensor in {
                    "mean_mass": self.mass / self.samples,
                    "max_mass": self.max_mass,
                    "rank_frequency": self.rank_counts.view(n, n) / self.samples,
                    "kept_mass": self.kept_mass / self.samples,
                    "experts_for_mass": self.experts_for_mass / self.samples,
                    "class_mass": self.class_mass / self.class_samples.clamp_min(1)[:, None],
                    "slot_mean": slot_mean,
                    "deviation": variance.sqrt(),
                    "gram": self.gram / self.samples,
                }.items()
            }
        )


def summarize(statistics: LayerStatistics) -> dict[str, Any]:
    """What a person wants to know of a layer, as JSON values.

    Returns:
        `experts`; `best_eighth_mass`: the mean mass of an input's best n/8 experts, and
        `uniform_mass`: what they would hold if the router told experts apart for no input;
        `experts_for_mass_per_input` and `experts_for_mass_overall`: how many experts hold 50, 90 and
        99 % of one input's mass (mean), and of the mass of all inputs; `unused_experts`: those that
        never hold a tenth of a fair share 1/n; `informative`: whether the mass is concentrated enough
        for the signal `combine` to tell experts apart (see INFORMATIVE_MASS).
    """
    n = statistics.num_experts
    eighth = max(1, n // 8)
    overall = statistics.mean_mass.double().sort(descending=True).values.cumsum(0)
    best_eighth_mass = float(statistics.kept_mass[eighth - 1])
    return {
        "experts": n,
        "best_eighth_mass": best_eighth_mass,
        "uniform_mass": eighth / n,
        "experts_for_mass_per_input": statistics.experts_for_mass.tolist(),
        "experts_for_mass_overall": [int((overall < level * overall[-1]).sum()) + 1 for level in MASS_LEVELS],
        "unused_experts": (statistics.max_mass < 0.1 / n).nonzero().flatten().tolist(),
        "informative": best_eighth_mass >= INFORMATIVE_MASS,
    }


def save_analysis(analysis: Analysis, path: str | Path) -> None:
    """Write an analysis file: equal analyses give equal bytes.

    Raises:
        MoepruneError: the path cannot be written.
    """
    tensors = {
        f"{name}.{field.name}": getattr(statistics, field.name)
        for name, statistics in analysis.layers.items()
        for field in fields(statistics)
    }
    metadata = {
        "format": FORMAT,
        "kind": "analysis",
        "layers": list(analysis.layers),
        "provenance": analysis.provenance,
    }
    checkpoint.write(path, tensors, metadata)


def load_analysis(path: str | Path) -> Analysis:
    """Read an analysis file.

    Raises:
        MoepruneError: it is missing, damaged, no analysis, or of an unknown format.
    """
    file = checkpoint.read(path)
    metadata = file.metadata or {}
    if metadata.get("kind") != "analysis":
        raise MoepruneError(f"`{path}` is no analysis", "write one with `moeprune analyze`")
    checkpoint.require_format(metadata, FORMAT, path)
    try:
        layers = {
            name: LayerStatistics(
                **{field.name: file.tensors[f"{name}.{field.name}"] for field in fields(LayerStatistics)}
            )
            for name in metadata["layers"]
        }
        provenance = metadata["provenance"]
        _ = provenance["checkpoint"]["fingerprint"], provenance["data"]["spec"]
    except (KeyError, TypeError) as error:
        raise MoepruneError(f"`{path}` lacks {error}", "write it again with `moeprune analyze`") from None
    checkpoint.check_finite(file.tensors, path)
    return Analysis(layers, provenance)


def require_analysis_of(model_fingerprint: str, analysis: Analysis) -> None:
    """Raise a MoepruneError if the analysis was made for a checkpoint of another fingerprint."""
    found, expected = analysis.provenance["checkpoint"]["fingerprint"], model_fingerprint
    if found != expected:
        raise MoepruneError(
            f"the analysis was made for another checkpoint (fingerprint {found[:12]}…, this one has"
            f" {expected[:12]}…)",
            "run `moeprune analyze` on this checkpoint",
        )
