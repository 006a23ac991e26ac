"""How many experts run in layers whose plans do not fix it."""

from collections import defaultdict
from functools import partial

from torch import Tensor

from moeprune.layers.interface import Usage
from moeprune.layers.observation import Observation
from moeprune.models.model import Model


class UsageObserver:
    """Counts the experts that run in each layer of a model; made before the model runs."""

    def __init__(self, model: Model):
        self.experts = defaultdict[str, list[tuple[Tensor, int]]](list)  # that run, and that are computed
        for name, layer in model.moe_layers.items():
            if layer.plan is not None and layer.plan.mass is not None:
                layer.observer = partial(self._observe, name)

    def _observe(self, name: str, observation: Observation) -> None:
        chosen = observation.chosen  # as many columns as the batch needs, or all
        assert chosen is not None
        chosen = chosen[:: len(chosen) // len(observation.mass)]  # the same for all windows of an input
        self.experts[name].append(((chosen < observation.mass.shape[1]).sum(), chosen.numel()))

    def result(self, inputs: int) -> dict[str, Usage]:
        """Return the mean numbers of experts that run and are computed for an input, by layer."""
        totals = {name: map(sum, zip(*parts, strict=True)) for name, parts in self.experts.items()}
        return {name: Usage(*(float(total) / inputs for total in both)) for name, both in totals.items()}
