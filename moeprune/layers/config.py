"""The families of layers, and the configuration of Soft MoE; no torch."""

from collections.abc import Mapping
from typing import Any, Literal

from moeprune.errors import MoepruneError
from moeprune.layers.gated_config import GatedModulesConfig, GatedMoEConfig
from moeprune.layers.interface import Activation, ExpertsConfig, LayerConfig, Shapes
from moeprune.plan import COMPENSATIONS, SCOPES, LayerPlan, Positive
from moeprune.records import Record, from_json

RouterNorm = Literal["none", "l2", "rms", "layer"]
Expert = Literal["mlp", "glu", "geglu", "linear"]


class SoftMoEConfig(ExpertsConfig, Record, frozen=True, tag_field="family", tag="soft_moe"):
    """One Soft MoE layer (Puigcerver et al. 2023, arXiv 2308.00951, section 2).

    Attributes:
        hidden_dim: hidden width of an expert, h; None for `linear` experts.
        router_norm: of the tokens X and of phi before they are multiplied: `none`; `l2` scales both to unit
            length, phi then by a learned scale; `rms` to root mean square 1 and `layer` to mean 0 and
            variance 1, each then times a learned gain of width d.
        dispatch_input: slots average the `raw` tokens or the `normalized` ones.
        expert: an `mlp` (linear, activation, linear); a `glu`, whose first linear has twice the hidden width, the
            first half times the activation of the second; one `linear`; or a `geglu`, a `glu` with `gelu`.
        out_dim: width of the output; None: that of the input.
        dynamic_slots: there is no phi: n consecutive tokens at a time are averaged and projected, once for
            each expert, to a column of phi for this input; m tokens make m/n slots per expert, rounded up.
        dispatch_over: the dispatch softmax runs over an input's `tokens`, or, as in one library's old
            release, over the `batch`, so that inputs depend on each other.
        windows: inputs of the layer for each input of the model, folded into the batch; they share their experts.
        interleaved: the windows of an input are not beside each other, but the first windows of all inputs are.
        activation: of an `mlp`, or of the gate of a `glu`.
        bias: the linears of the experts have biases.
    """

    dim: Positive
    num_experts: Positive
    slots_per_expert: Positive
    hidden_dim: Positive | None
    router_norm: RouterNorm = "l2"
    dispatch_input: Literal["raw", "normalized"] = "normalized"
    expert: Expert = "mlp"
    out_dim: Positive | None = None
    dynamic_slots: bool = False
    dispatch_over: Literal["tokens", "batch"] = "tokens"
    windows: Positive = 1
    interleaved: bool = False
    activation: Activation = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_hidden_dim()
        if self.expert in ("geglu", "linear") and self.activation != "gelu":
            why = "has no activation" if self.expert == "linear" else "has the activation `gelu`"
            hint = "leave `activation` out" + (", or make it a `glu`" if self.expert == "geglu" else "")
            raise MoepruneError(f"`activation` is {self.activation!r}, but an expert `{self.expert}` {why}", hint)

    @property
    def output_width(self) -> int:
        """Width of the output tokens, o."""
        return self.out_dim or self.dim

    @property
    def is_gated(self) -> bool:
        """True if half of the output of an expert's first linear gates the other half."""
        return self.expert in ("glu", "geglu")

    @property
    def terms_per_expert(self) -> int:
        """One for each slot."""
        return self.slots_per_expert

    @property
    def scopes(self) -> tuple[str, ...]:
        """All but `static` with dynamic slots: with fewer experts, other tokens would be averaged."""
        return tuple(scope for scope in SCOPES if not (self.dynamic_slots and scope == "static"))

    @property
    def compensations(self) -> tuple[str, ...]:
        """All."""
        return COMPENSATIONS

    @property
    def mixes_batch(self) -> bool:
        """True if the dispatch softmax runs over the batch."""
        return self.dispatch_over == "batch"

    def refusal(self, plan: LayerPlan) -> str | None:
        """Return why the layer cannot be pruned by a plan, None if it can."""
        if self.dynamic_slots and plan.scope == "static":
            why = "makes its slots anew from each input's tokens, and the number of its experts decides how"
            return f"{why}: it can be pruned with scope input or batch only"
        return super().refusal(plan)

    def padded_tokens(self, tokens: int) -> int:
        """Return the tokens of whole dynamic slots, or the same number."""
        return self.num_experts * self.slots_per_expert if self.dynamic_slots else tokens

    def router_shapes(self, num_experts: int) -> Shapes:
        """Return the tensors of the router if it has columns for so many experts."""
        d = self.dim
        shapes: Shapes = {"phi": (d, num_experts, self.slots_per_expert)}
        if self.dynamic_slots:
            shapes = {"slot_projection": (num_experts, d, d)}
        if self.router_norm == "l2":
            shapes["scale"] = (1,)
        elif self.router_norm != "none":
            shapes |= {"input_gain": (d,), "phi_gain": (d,)}
        return shapes

    def router_axis(self, tensor: str) -> int | None:
        """Return the axis of phi, or of what takes its place, that has a place for each expert."""
        return {"phi": 1, "slot_projection": 0}.get(tensor)

    def router_flops(self, tokens: int, routed: int, running: float) -> float:
        """Logits and dispatch take 2·m·d·p an expert, combine 2·m·o·p, dynamic slots 2·d·d·p more."""
        d, p, out = self.dim, self.slots_per_expert, self.output_width
        projection = 2 * d * d * routed * p if self.dynamic_slots else 0
        return 2 * tokens * p * (d * routed + (d + out) * running) + projection

    def expert_rows(self, tokens: int) -> float:
        """One for each slot."""
        return self.slots_per_expert


FAMILIES: dict[str, tuple[Any, str]] = {
    "soft_moe": (SoftMoEConfig, "moeprune.layers.soft_moe:SoftMoE"),
    "gated_moe": (GatedMoEConfig, "moeprune.layers.gated_moe:GatedMoE"),
    "gated_modules": (GatedModulesConfig, "moeprune.layers.gated_modules:GatedModules"),
}
"""By the `family` in JSON: the configuration, and the place of the module, imported late for torch."""


def register(config_class: Any, module_class: type) -> None:
    """Make a family known: its configuration (a tagged Record that is a LayerConfig) and its MoELayer."""
    place = f"{module_class.__module__}:{module_class.__qualname__}"
    FAMILIES[config_class.__struct_config__.tag] = config_class, place


def layer_from_json(value: Any, where: str) -> LayerConfig:
    """Read a layer's configuration from JSON values; without `family` it is a Soft MoE.

    Raises a MoepruneError for an unknown family, an unknown or missing key, or a value that does not fit.
    """
    family = value.get("family", "soft_moe") if isinstance(value, Mapping) else "soft_moe"
    if not isinstance(family, str) or family not in FAMILIES:
        raise MoepruneError(f"{where}: unknown family {family!r}", f"known are {', '.join(FAMILIES)}")
    return from_json(value, FAMILIES[family][0], where)
