"""What one layer is made of, as plain data; no torch.

Axes, here and everywhere: b inputs, m tokens, d model width, n experts, p slots per expert,
h hidden width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moeprune.errors import MoepruneError
from moeprune.layers.flops import Flops
from moeprune.plan import LayerPlan

Shapes = dict[str, tuple[int, ...]]

ROUTER_NORMS = ("none", "l2", "rms", "layer")
DISPATCH_INPUTS = ("raw", "normalized")
DISPATCH_OVER = ("tokens", "batch")
EXPERTS = ("mlp", "geglu", "linear")


def later(default: Any) -> Any:
    """A field that came after the first release, with the default that says what was so before."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class SoftMoEConfig:
    """One Soft MoE layer (Puigcerver et al. 2023, arXiv 2308.00951, section 2).

    router_norm says what the router does to the tokens X and to phi before it multiplies them:
        `none` nothing; `l2` both to unit length, phi then times a learned scale;
        `rms` both to root mean square 1, `layer` both to mean 0 and variance 1 (as a LayerNorm),
        each then times a learned gain of width d.
    dispatch_input says which X the slots average: the `raw` one or the `normalized` one.
    expert says what an expert is: an `mlp` (linear, GELU, linear); a `geglu`, whose first linear has
        twice the hidden width, one half of it times the GELU of the other; or one `linear`, which has
        no hidden width.
    out_dim is the width of the output; None: that of the input.
    dynamic_slots says that there is no phi: an input's tokens, n consecutive ones at a time, are averaged
        and projected, once for each expert, to what stands for a column of phi, for this input alone. An
        input of m tokens has m/n slots per expert, rounded up.
    dispatch_over says what the dispatch softmax runs over: an input's `tokens`, or (a mistake that models
        were trained with) the `batch`, so that what an input gives depends on the others.
    """

    dim: int
    num_experts: int
    slots_per_expert: int
    hidden_dim: int | None
    router_norm: str = "l2"
    dispatch_input: str = "normalized"
    expert: str = later("mlp")
    out_dim: int | None = later(None)
    dynamic_slots: bool = later(False)
    dispatch_over: str = later("tokens")

    def __post_init__(self) -> None:
        require_positive(self, "dim", "num_experts", "slots_per_expert", "output_width", "expert_width")
        require_choice(self, "router_norm", ROUTER_NORMS)
        require_choice(self, "dispatch_input", DISPATCH_INPUTS)
        require_choice(self, "expert", EXPERTS)
        require_choice(self, "dispatch_over", DISPATCH_OVER)
        require_bool(self, "dynamic_slots")
        if self.expert == "linear" and self.hidden_dim is not None:
            raise MoepruneError(f"`hidden_dim` is {self.hidden_dim!r}, expected null for a linear expert")

    @property
    def output_width(self) -> int:
        """Width of the output tokens."""
        return self.dim if self.out_dim is None else self.out_dim

    @property
    def expert_width(self) -> int:
        """Width of what an expert's last linear takes."""
        return self.dim if self.expert == "linear" else self.hidden_dim  # type: ignore[return-value]

    @property
    def first_width(self) -> int:
        """Width of what an expert's first of two linears gives."""
        return self.expert_width * (2 if self.expert == "geglu" else 1)

    def shapes(self, plan: LayerPlan | None) -> Shapes:
        """Return the shape of each tensor of the layer by its name in the layer."""
        d, p, out = self.dim, self.slots_per_expert, self.output_width
        routed = plan.routed_experts if plan else self.num_experts
        stored = plan.stored_experts if plan else self.num_experts
        shapes: Shapes = {
            "fc2_weight": (stored, out, self.expert_width),
            "fc2_bias": (stored, out),
        }
        shapes |= {"slot_projection": (routed, d, d)} if self.dynamic_slots else {"phi": (d, routed, p)}
        if self.expert != "linear":
            shapes |= {"fc1_weight": (stored, d, self.first_width), "fc1_bias": (stored, self.first_width)}
        if self.router_norm == "l2":
            shapes["scale"] = (1,)
        elif self.router_norm in ("rms", "layer"):
            shapes |= {"input_gain": (d,), "phi_gain": (d,)}
        added = plan.rank if plan is not None and plan.rank is not None else out
        if plan is not None and plan.has_surrogate:
            shapes["surrogate"] = (routed, p, added)
        if plan is not None and plan.has_affine:
            shapes |= {"affine_token": (d, added), "affine_mean": (d, added), "affine_bias": (added,)}
        if plan is not None and plan.has_basis:
            shapes["basis"] = (added, out)
        if plan is not None and plan.scope != "static" and plan.signal != "combine":
            shapes["score_weights"] = (self.num_experts,)
        return shapes

    def flops(self, tokens: int, plan: LayerPlan | None = None, running: float | None = None) -> Flops:
        """FLOPs of one Soft MoE layer on one input of m tokens.

        Logits cost 2·m·d·n·p, dispatch 2·m·d·k·p and combine 2·m·o·k·p with o the width of the output, an
        expert of two linears 2·p·(d·f + h·o) with f the width after the first, one of one linear 2·p·d·o.
        Dynamic slots cost 2·d·d·n·p more, to project what stands for phi. Of the surrogates, scope `static`
        multiplies those of the dropped slots, the others those of all. `affine` costs 2·m·d·o more for the
        tokens and 2·d·o for their mean. With a rank r, o in these is r, the slots are all n·p, and 2·m·r·o is
        added for the directions.

        Args:
            tokens: m.
            plan: of the layer, where it is pruned.
            running: how many experts run, in the mean, where the plan does not fix it.
        """
        d, n, p, out = self.dim, self.num_experts, self.slots_per_expert, self.output_width
        k: float = plan.k if plan else n
        if running is not None:
            k = running
        if plan and plan.merges:
            k = n  # all slots run, each by the expert that its own was folded into
        routed = plan.routed_experts if plan else n
        if self.dynamic_slots:
            tokens = n * p  # padded to so many
        surrogates, added, basis = 0, out, 0
        if plan and plan.has_surrogate:
            surrogates = n - plan.k if plan.scope == "static" else n
        if plan and plan.has_basis and plan.rank is not None:
            surrogates, added, basis = n, plan.rank, 2 * tokens * plan.rank * out
        affine = 2 * (tokens + 1) * d * added if plan and plan.has_affine else 0
        projection = 2 * d * d * n * p if self.dynamic_slots else 0
        first = d * self.first_width if self.expert != "linear" else 0
        return Flops(
            experts=round(2 * k * p * (first + self.expert_width * out)),
            routing=round(2 * tokens * p * (d * routed + (d + out) * k)) + projection,
            compensation=2 * tokens * added * p * surrogates + affine + basis,
        )


def require_positive(config: Any, *names: str) -> None:
    """Raise a MoepruneError unless the named fields are whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise MoepruneError(f"`{name}` is {value!r}, expected a whole number of at least 1")


def require_bool(config: Any, *names: str) -> None:
    """Raise a MoepruneError unless the named fields are true or false."""
    for name in names:
        if type(getattr(config, name)) is not bool:
            raise MoepruneError(f"`{name}` is {getattr(config, name)!r}, expected true or false")


def require_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise a MoepruneError unless the named field is one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise MoepruneError(f"`{name}` is {value!r}, expected one of {', '.join(choices)}")
