"""The configuration of a layer whose router gates experts for each token; no torch."""

from typing import Annotated, Literal

import msgspec

from moeprune.errors import MoepruneError
from moeprune.layers.interface import Activation, ExpertsConfig, Flops, Shapes, Usage
from moeprune.plan import LOW_RANK, SIGNALS, LayerPlan, Positive
from moeprune.records import Record

Gates = Literal["softmax", "sigmoid", "sparsemixer"]
GatedExpert = Literal["mlp", "glu", "linear"]
GateColumns = Literal["first", "last", "even"]


class GatedMoEConfig(ExpertsConfig, Record, frozen=True, tag_field="family", tag="gated_moe"):
    """One layer of token-gated experts (Shazeer et al. 2017, arXiv 1701.06538, section 2).

    Attributes:
        hidden_dim: hidden width of an expert, h; None for `linear` experts.
        experts_per_token: experts that run for each token; None: all.
        gates: `softmax` or `sigmoid` of the router logits; `sparsemixer` (Liu et al. 2024, arXiv 2409.12136) is a
            softmax over the logits within twice the `jitter` of the best, first of all, then without the best one.
        normalized: the gates of the chosen experts are divided by their sum; a softmax over their logits.
        gate_scale: factor of all gates.
        selection_bias: numbers added to the gates of experts for the choice alone (Wang et al. 2024, arXiv 2408.15664).
        groups, groups_kept, group_score: experts are chosen within the best groups of consecutive ones, by their best
            gate (`max`) or by the sum of their best two (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        weigh: gates multiply the `outputs` of experts, or their `inputs`.
        float32_router: logits are computed in float32 whatever the types of tokens and router are.
        expert: an `mlp` (linear, activation, linear); a `glu`, whose first linear has twice the hidden width: its
            gate_columns go through the activation and multiply the others; or one `linear`.
        gate_columns: of a `glu`; `even`: columns of gate and values alternate.
        limit: of a `glu`: the gate is at most this, values are clamped to it on both sides, and 1 is added to them
            (gpt-oss, arXiv 2508.10925).
        bias: the linears of the experts have biases.
    """

    dim: Positive
    num_experts: Positive
    hidden_dim: Positive | None
    experts_per_token: Positive | None
    gates: Gates = "softmax"
    normalized: bool = False
    gate_scale: float = 1.0
    selection_bias: bool = False
    groups: Positive = 1
    groups_kept: Positive = 1
    group_score: Literal["max", "best_two"] = "max"
    jitter: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    weigh: Literal["outputs", "inputs"] = "outputs"
    router_bias: bool = False
    float32_router: bool = False
    expert: GatedExpert = "glu"
    activation: Activation = "silu"
    gate_columns: GateColumns = "first"
    limit: Annotated[float, msgspec.Meta(gt=0)] | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_hidden_dim()
        n, groups = self.num_experts, self.groups
        if self.top_k > n:
            raise MoepruneError(f"`experts_per_token` is {self.top_k}, expected 1 to {n}")
        if n % groups or self.groups_kept > groups or n // groups * self.groups_kept < self.top_k:
            raise MoepruneError(
                f"{self.top_k} of {n} experts cannot be chosen within {self.groups_kept} of {groups} groups",
                "give groups of equal size, and as many of them as it takes",
            )
        if self.gates == "sparsemixer" and self.top_k != 2:
            raise MoepruneError(f"`experts_per_token` is {self.top_k}, expected 2 with gates `sparsemixer`")

    @property
    def top_k(self) -> int:
        """Experts that run for each token."""
        return self.experts_per_token or self.num_experts

    @property
    def output_width(self) -> int:
        """Width of the output: that of the input."""
        return self.dim

    @property
    def is_gated(self) -> bool:
        """True if half of the output of an expert's first linear gates the other half."""
        return self.expert == "glu"

    @property
    def alternates_gates(self) -> bool:
        """True if they do."""
        return self.expert == "glu" and self.gate_columns == "even"

    @property
    def scopes(self) -> tuple[str, ...]:
        """One set of experts for all inputs: each token chooses among them anyway."""
        return ("static",)

    @property
    def signals(self) -> tuple[str, ...]:
        """All."""
        return SIGNALS

    @property
    def compensations(self) -> tuple[str, ...]:
        """All but `refit`, for which `renorm-refit` serves."""
        return ("none", "renorm", "mean", "lstsq", "affine", "renorm-refit", *LOW_RANK, "linear", "merge")

    @property
    def uses_mean_token(self) -> bool:
        """False: the output for a token must not depend on others, which may come after it."""
        return False

    @property
    def refits_by_expert(self) -> bool:
        """True: a token's output is the sum of rows of its experts."""
        return True

    @property
    def scales_others(self) -> bool:
        """True if dropping an expert scales the gates of tokens that have not chosen it, all of a token's alike."""
        return self.gates == "softmax" and not self.normalized

    @property
    def changes_others(self) -> bool:
        """True if dropping an expert changes what tokens choose that have not chosen it, or their gates otherwise."""
        return self.gates == "sparsemixer" or (self.gates == "softmax" and self.selection_bias)

    def reroutes(self, plan: LayerPlan) -> bool:
        """Return True if what is lost with experts is known by trials: tokens choose others, in no groups."""
        return plan.cuts_router and self.equal_groups(plan) == 1 and self.weigh == "outputs"

    def router_shapes(self, num_experts: int) -> Shapes:
        """Return the tensors of the router if it has rows for so many experts."""
        shapes: Shapes = {"router_weight": (num_experts, self.dim)}
        if self.router_bias:
            shapes["router_bias"] = (num_experts,)
        if self.selection_bias:
            shapes["selection_bias"] = (num_experts,)
        return shapes

    def router_axis(self, tensor: str) -> int | None:
        """Return 0: each of the router's tensors has a row for each expert."""
        return 0

    def router_flops(self, tokens: int, routed: int, running: float) -> float:
        """Logits take 2·m·d an expert; no matrix product applies gates."""
        return 2 * tokens * self.dim * routed

    def expert_rows(self, tokens: int) -> float:
        """Return the tokens that choose an expert, if all are chosen equally often."""
        return tokens * self.top_k / self.num_experts

    def flops(self, tokens: int, plan: LayerPlan | None = None, usage: Usage | None = None) -> Flops:
        """Return the FLOPs of the layer for one input of the model, see `LayerConfig.flops`.

        Dropped experts leave a token fewer to run, but if the router is cut, tokens choose others in their place.
        """
        if plan is not None and plan.cuts_router:
            usage = Usage(min(self.top_k, plan.k) * self.num_experts / self.top_k, plan.k)
        return super().flops(tokens, plan, usage)

    def equal_groups(self, plan: LayerPlan) -> int:
        """Return the groups of which a plan must keep equally many experts: those that a cut router chooses within."""
        return self.groups if plan.cuts_router and plan.k and self.groups_kept < self.groups else 1

    def refusal(self, plan: LayerPlan) -> str | None:
        """Return why the layer cannot be pruned by a plan, None if it can."""
        if (reason := super().refusal(plan)) or not plan.cuts_router or plan.compensation == "linear":
            return reason
        alone = f"with compensation `{plan.compensation}` its router knows the {plan.k} kept ones alone"
        if self.experts_per_token and plan.k < self.experts_per_token:
            other = "a compensation that leaves the router whole, such as `low-rank`"
            return f"runs {self.experts_per_token} experts for each token, and {alone}: keep more, or give {other}"
        groups, size = self.equal_groups(plan), self.num_experts // self.groups
        if groups == 1:
            return None
        counts = {sum(j // size == group for j in plan.kept or ()) for group in range(groups)}
        if plan.k % groups or (plan.kept is not None and len(counts) > 1):
            return f"chooses among {groups} groups of experts, and {alone}: keep equally many of each group"
        least = 2 if self.group_score == "best_two" else 1
        if plan.k // groups < least or plan.k // groups * self.groups_kept < self.top_k:
            within = f"{self.top_k} experts for each token within {self.groups_kept} of {groups} groups"
            return f"chooses {within}, and {alone}: keep more"
        return None


class GatedModulesConfig(GatedMoEConfig, frozen=True, tag="gated_modules"):
    """One layer of token-gated experts that are modules of the user's own code, each followed by a linear.

    Attributes:
        hidden_dim: width of what the linear takes.
        last: the name of the linear in the module; None: it has been added.
        features: the shapes of a module's tensors, by their names with `/` in place of dots.
        feature_flops: of the module, for a row.
    """

    expert: Literal["module"] = "module"  # type: ignore[assignment]
    last: str | None = None
    features: dict[str, tuple[int, ...]] = msgspec.field(default_factory=dict)
    feature_flops: int = 0

    @property
    def hidden_units(self) -> int | None:
        """None: it is not known what they depend on."""
        return None

    @property
    def compensations(self) -> tuple[str, ...]:
        """All that do not look into modules."""
        return tuple(name for name in super().compensations if name != "merge")

    def expert_shapes(self, num_experts: int) -> Shapes:
        """Return the tensors of so many experts."""
        of_linear: Shapes = {
            "fc2_weight": (num_experts, self.dim, self.expert_width),
            "fc2_bias": (num_experts, self.dim),
        }
        of_linear = {name: shape for name, shape in of_linear.items() if self.bias or not name.endswith("bias")}
        return {f"features/{name}": (num_experts, *shape) for name, shape in self.features.items()} | of_linear

    def expert_flops(self, tokens: int, running: float) -> float:
        """Return the FLOPs of so many experts on their rows."""
        return running * self.expert_rows(tokens) * (self.feature_flops + 2 * self.dim * self.expert_width)
