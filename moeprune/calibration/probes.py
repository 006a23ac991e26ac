"""Probes: how a model's predictions change if its layers run few of their experts, or none, uncompensated."""

from collections.abc import Mapping

from moeprune.calibration.changes import Change, changes
from moeprune.calibration.results import Probe, Probes
from moeprune.calibration.statistics import LayerStatistics
from moeprune.data.datasets import Dataset
from moeprune.layers.surgery import prune_layer
from moeprune.models.model import Model, private_copy
from moeprune.models.runtime import Runtime
from moeprune.plan import LayerPlan

MOST_INPUTS, FEWEST_INPUTS = 256, 8
PROBED_FLOPS = 5e10  # of all probes together, within these numbers of inputs
SCOPES = ("input", "static", "batch")  # the first that a layer can be pruned in is probed


def probe(
    model: Model, layers: Mapping[str, LayerStatistics], data: Dataset, runtime: Runtime
) -> tuple[Probes, dict[str, Probes]]:
    """Prune all layers at once, and each by itself, and compare predictions of some inputs with the full model's.

    layers: the statistics of all MoE layers. Returns the probes of all layers, and of each by name.
    """
    full, data = private_copy(model).to(runtime.torch_device), data.sample(probe_inputs(model))
    models: dict[tuple[str, bool], Model] = {}
    for with_experts in (False, True):
        together = models["", with_experts] = private_copy(full)
        for name, layer in full.moe_layers.items():
            n = layer.config.num_experts
            k = max(1, n // 8) if with_experts else 0
            scope = next(scope for scope in SCOPES if scope in layer.config.scopes)
            kept = layers[name].best_kept(k, "none") if scope == "static" else None
            pruned = prune_layer(layer, LayerPlan(scope, k, n, "combine", "none", kept))  # type: ignore[arg-type]
            together.set_submodule(name, pruned)
            if len(layers) > 1:
                models[name, with_experts] = private_copy(full)
                models[name, with_experts].set_submodule(name, pruned)
    found = changes(models, full, data, runtime, "probe predictions")

    def probes(name: str) -> Probes:
        name = name if len(layers) > 1 else ""
        none, eighth = (_probe(found[name, with_experts]) for with_experts in (False, True))
        return Probes(samples=data.samples, no_experts=none, best_eighth=eighth)

    return probes(""), {name: probes(name) for name in layers}


def probe_inputs(model: Model) -> int:
    """Return on how many inputs a model is probed: fewer, the more it costs."""
    passes = 1 + 3 * (len(model.moe_layers) + 1)
    return round(min(MOST_INPUTS, max(FEWEST_INPUTS, PROBED_FLOPS / (passes * model.config.flops({}).total))))


def _probe(change: Change) -> Probe:
    same = change.agreement
    return Probe(agreement=None if same is None else float(same), divergence=float(change.divergence))
