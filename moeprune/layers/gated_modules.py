"""The layer of token-gated experts that are modules of the user's own code, all of one kind, each followed by a linear.

The tensors of all experts are stacked as those of other layers are, so that experts are chosen, dropped and refitted as
there. A module of one expert runs with the tensors of each.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from moeprune.layers.experts import Experts, Features
from moeprune.layers.gated_config import GatedModulesConfig
from moeprune.layers.gated_moe import GatedMoE
from moeprune.layers.layer import MoELayer
from moeprune.plan import LayerPlan


class GatedModules(GatedMoE):
    """A layer of token-gated experts of the user's own code."""

    config: GatedModulesConfig
    module_of_expert: tuple[nn.Module]  # its tensors are not used; in a tuple it is no part of the layer

    @property
    def experts(self) -> Experts:
        """The weights of the experts that are stored."""
        (module,) = self.module_of_expert
        tensors = {name.replace("/", "."): self.get_parameter(f"features/{name}") for name in self.config.features}
        return Experts(None, None, self.fc2_weight, self.fc2_bias, "identity", features=Features(module, tensors))

    def with_plan(self, plan: LayerPlan, tensors: Mapping[str, Tensor]) -> MoELayer:
        """Return a layer of the same kind under a plan, of these tensors."""
        layer = super().with_plan(plan, tensors)
        assert isinstance(layer, GatedModules)
        layer.module_of_expert = self.module_of_expert
        return layer
