"""The interface between MoE layers and everything else: the configuration of a layer; no torch.

Axes, here and everywhere: b inputs, m tokens, d width of the input, o width of the output, n experts, k of
them run. An expert adds p terms to each token's output, each a weight times a vector: one for each slot in a
Soft MoE, one for its gate in a token-gated layer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moeprune.errors import MoepruneError
from moeprune.plan import OF_RUNS, SCOPES, SIGNALS, LayerPlan

Activation = Literal[
    "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "elu", "selu", "silu", "hardswish",
    "mish", "softplus", "tanh", "sigmoid", "identity",
]  # fmt: skip
"""Elementwise; the functions are in moeprune.layers.activations."""

Shapes = dict[str, tuple[int, ...]]  # the shape of each tensor by name


class Usage(NamedTuple):
    """Mean numbers of experts for one input of a routed layer."""

    running: float  # experts that run
    applied: float  # experts whose router weights are applied, also where they are zero


@dataclass(frozen=True)
class Flops:
    """FLOPs for one input. 1 multiply-add = 2 FLOPs; matrix products alone are counted."""

    experts: int = 0  # the experts' MLPs
    routing: int = 0  # router logits, dispatch and combine
    compensation: int = 0
    other: int = 0  # the rest of the model

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())

    def __add__(self, more: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(vars(self).values(), vars(more).values(), strict=True)))


class LayerConfig:
    """The configuration of one unpruned layer.

    A family subclasses this and Record, tagged by its `family`, and provides what is abstract. Its tensors
    include `fc2_weight`, the last linears of its experts (n,o,h).
    """

    __slots__ = ()

    dim: int  # width of the input, d
    num_experts: int

    @property
    @abstractmethod
    def output_width(self) -> int:
        """Width of the output, o."""

    @property
    @abstractmethod
    def expert_width(self) -> int:
        """Width of the input of an expert's last linear, h."""

    @abstractmethod
    def router_shapes(self, num_experts: int) -> Shapes:
        """Return the tensors of the router if it has columns for so many experts."""

    @abstractmethod
    def expert_shapes(self, num_experts: int) -> Shapes:
        """Return the tensors of so many experts; the first axis of each is the expert."""

    @abstractmethod
    def router_axis(self, tensor: str) -> int | None:
        """Return the axis of one of the router's tensors that has a place for each expert, None if none."""

    @abstractmethod
    def router_flops(self, tokens: int, routed: int, running: float) -> float:
        """Return the FLOPs of weights for `routed` experts, and of applying those of `running` ones."""

    @abstractmethod
    def expert_flops(self, tokens: int, running: float) -> float:
        """Return the FLOPs of so many experts on one input of so many tokens."""

    @property
    def hidden_units(self) -> int | None:
        """Hidden units of an expert, of which some can be dropped; None, as by default, if none can."""
        return None

    @property
    def alternates_gates(self) -> bool:
        """True if the columns of gates and values of an expert's first linear alternate, and are not in two halves."""
        return False

    def with_width(self, width: int | None) -> LayerConfig:
        """Return the configuration whose experts have so many hidden units; None: as many as they have."""
        return self

    @property
    def terms_per_expert(self) -> int:
        """Terms that an expert adds to each token's output, p: one by default, a gate."""
        return 1

    def expert_rows(self, tokens: int) -> float:
        """Return the mean number of rows that an expert computes for an input of so many tokens: by default all."""
        return tokens

    @property
    def windows(self) -> int:
        """Inputs of the layer for each input of the model, folded into the batch: windows, frames or flips."""
        return 1

    @property
    def scopes(self) -> tuple[str, ...]:
        """Scopes in which the layer can be pruned: all by default."""
        return SCOPES

    @property
    def signals(self) -> tuple[str, ...]:
        """Signals that rank the experts: by default those that do not tell which tokens run an expert."""
        return tuple(signal for signal in SIGNALS if signal not in OF_RUNS)

    @property
    def compensations(self) -> tuple[str, ...]:
        """Compensations that the family can run: by default those of constants and of an affine map."""
        return ("none", "renorm", "mean", "lstsq", "affine")

    @property
    def uses_mean_token(self) -> bool:
        """True if the affine map takes the mean of an input's tokens too, as layers may whose tokens mix."""
        return True

    @property
    def refits_by_expert(self) -> bool:
        """True if `renorm-refit` can refit experts one after the other, so that any number is possible."""
        return False

    @property
    def mixes_batch(self) -> bool:
        """True if the output for one input depends on the others in the batch."""
        return False

    def padded_tokens(self, tokens: int) -> int:
        """Return how many tokens the layer computes with for an input of so many: as many by default."""
        return tokens

    def shapes(self, plan: LayerPlan | None) -> Shapes:
        """Return the shape of each tensor of the layer under a plan, by its name in the layer."""
        d, n, p, out = self.dim, self.num_experts, self.terms_per_expert, self.output_width
        if plan is None:
            return self.router_shapes(n) | self.expert_shapes(n)
        shapes = self.with_width(plan.width).expert_shapes(plan.stored_experts)
        if plan.compensation != "linear":
            shapes = self.router_shapes(plan.routed_experts) | shapes
        width = int(plan.rank) if plan.has_basis and plan.rank else out
        if plan.has_surrogate:
            shapes["surrogate"] = (plan.routed_experts, p, width)
        if plan.is_low_rank:
            shapes |= {"low_rank_in": (plan.directions, d), "low_rank_out": (plan.directions, out)}
        if plan.has_affine:
            of_mean = {"affine_mean": (d, width)} if self.uses_mean_token else {}
            shapes |= {"affine_token": (d, width), **of_mean, "affine_bias": (width,)}
        if plan.has_basis:
            shapes["basis"] = (width, out)
        if plan.scope != "static" and plan.signal != "combine":
            shapes["score_weights"] = (n,)
        return shapes

    def compensation_shapes(self, plan: LayerPlan) -> Shapes:
        """Return the shapes of the tensors that compensate for dropped experts."""
        return {name: shape for name, shape in self.shapes(plan).items() if self.part(name) == "compensation"}

    def part(self, tensor: str) -> str:
        """Return what a tensor is for: `experts`, `routing` or `compensation`."""
        if tensor in self.expert_shapes(1):
            return "experts"
        return "compensation" if tensor.startswith(("surrogate", "basis", "affine", "low_rank")) else "routing"

    def flops(self, tokens: int, plan: LayerPlan | None = None, usage: Usage | None = None) -> Flops:
        """Return the FLOPs of the layer for one input of the model; usage: where the plan does not fix it.

        tokens: m, of each window.

        Surrogates cost 2·m·w·p for each expert that has one (all of them with scope `input`, `batch` or a
        basis), with w the output width or the rank r; the affine map 2·(m + 1)·d·w, without the mean token
        2·m·d·w; the basis 2·m·r·o. With `low-rank` dropped experts whose map has a rank are dispatched to and
        combined as the others are.
        """
        n, p, out, m = self.num_experts, self.terms_per_expert, self.output_width, self.padded_tokens(tokens)
        r = self.windows
        if plan is None:
            return Flops(round(r * self.expert_flops(m, n)), round(r * self.router_flops(m, n, n)))
        k: float = n if plan.merges else plan.k
        running, applied = usage or (k, k)
        width = int(plan.rank) if plan.has_basis and plan.rank else out
        others = n - plan.k if plan.scope == "static" else n
        rows = m + 1 if self.uses_mean_token else m
        compensation: float = 2 * rows * self.dim * width if plan.has_affine else 0
        if plan.is_low_rank:
            maps = sum(plan.maps_of_rank.values())
            applied += maps
            compensation += self.expert_rows(m) * plan.directions * 2 * (self.dim + out)
            compensation += 2 * m * out * p * (others - maps)
        elif plan.has_surrogate:
            compensation += 2 * m * width * p * (n if plan.has_basis else others)
        compensation += 2 * m * width * out if plan.has_basis else 0
        routing = 0 if plan.compensation == "linear" else self.router_flops(m, plan.routed_experts, applied)
        of_experts = self.with_width(plan.width).expert_flops(m, running)
        return Flops(round(r * of_experts), round(r * routing), round(r * compensation))

    def reroutes(self, plan: LayerPlan) -> bool:
        """Return True if tokens choose others in place of the experts that a plan drops: False by default."""
        return False

    def equal_groups(self, plan: LayerPlan) -> int:
        """Return the number of groups of consecutive experts of which a plan must keep equally many: 1 by default."""
        return 1

    def refusal(self, plan: LayerPlan) -> str | None:
        """Return why the layer cannot be pruned by a plan, None if it can."""
        if plan.scope not in self.scopes:
            return f"can be pruned with scope {' or '.join(self.scopes)} only, the plan has `{plan.scope}`"
        if plan.signal not in self.signals:
            return f"can be pruned by signal {' or '.join(self.signals)} only, the plan has `{plan.signal}`"
        if plan.compensation not in self.compensations:
            possible = ", ".join(f"`{name}`" for name in self.compensations)
            return f"can be compensated by {possible}, the plan has `{plan.compensation}`"
        if plan.width is not None and self.hidden_units is None:
            return "has experts without hidden units that could be dropped, the plan has a `width`"
        if plan.width is not None and plan.width > (self.hidden_units or 0):
            return f"has experts of {self.hidden_units} hidden units, the plan has `width` {plan.width}"
        width = min(self.output_width, self.dim) if plan.is_low_rank else self.output_width
        if (rank := max([plan.rank or 0, *(plan.ranks or ())])) > width:
            return f"has {width} directions{' of output' * (not plan.is_low_rank)}, the plan has rank {rank}"
        return None


class ExpertsConfig(LayerConfig):
    """The configuration of a layer whose experts are two linears, the first perhaps gated, or one `linear`."""

    __slots__ = ()

    hidden_dim: int | None
    expert: str
    bias: bool

    @property
    @abstractmethod
    def is_gated(self) -> bool:
        """True if half of the output of an expert's first linear gates the other half."""

    def check_hidden_dim(self) -> None:
        """Raise a MoepruneError unless there is a hidden width, which one `linear` does not have."""
        if (self.expert == "linear") != (self.hidden_dim is None):
            expected = "null" if self.expert == "linear" else "a whole number of at least 1"
            found = f"`hidden_dim` is {self.hidden_dim!r}"
            raise MoepruneError(f"{found}, expected {expected} for an expert `{self.expert}`")

    @property
    def expert_width(self) -> int:
        """Width of the input of an expert's last linear."""
        return self.hidden_dim or self.dim

    @property
    def hidden_units(self) -> int | None:
        """Hidden units of an expert; None for one linear."""
        return self.hidden_dim

    def with_width(self, width: int | None) -> LayerConfig:
        """Return the configuration whose experts have so many hidden units; None: as many as they have."""
        return self if width is None else self.replace(hidden_dim=width)  # type: ignore[attr-defined]

    def expert_shapes(self, num_experts: int) -> Shapes:
        """Return the tensors of so many experts; h is the contiguous axis of both weights."""
        n, out, h = num_experts, self.output_width, self.expert_width
        first = 2 * h if self.is_gated else h
        shapes: Shapes = {"fc1_weight": (n, self.dim, first), "fc1_bias": (n, first)}
        if self.expert == "linear":
            shapes = {}
        shapes |= {"fc2_weight": (n, out, h), "fc2_bias": (n, out)}
        return {name: shape for name, shape in shapes.items() if self.bias or not name.endswith("bias")}

    def expert_flops(self, tokens: int, running: float) -> float:
        """Return the FLOPs of so many experts on their rows."""
        weights = [shape for name, shape in self.expert_shapes(1).items() if name.endswith("weight")]
        return 2 * running * self.expert_rows(tokens) * sum(map(math.prod, weights))
