"""The Soft MoE layer: dense, statically pruned, or routed to the best experts per input or batch.

Axes: b inputs, m tokens, d model width, n experts, p slots per expert, h hidden width of an
expert; k experts are kept. The maths (Puigcerver et al. 2023, arXiv 2308.00951, section 2.1):

    L = X·phi               router logits     (b,m,n,p)
    D = softmax of L over m                   each slot is a weighted mean of tokens
    C = softmax of L over (n,p)               each token is a weighted mean of slot outputs
    Y = C · f(Dᵀ·X)                           f_j is the MLP of expert j

With only some experts kept, Y = sum over kept slots of C·f plus, with a surrogate, the sum over
dropped slots of C·u, where u is a constant vector per slot. A static surrogate may also add a
constant u to the output f of a kept slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeprune.architecture import SoftMoEConfig
from moeprune.plan import LayerPlan
from moeprune.routed import Experts, choose, kernels_for, run_chosen, run_experts
from moeprune.scores import combine_mass

FEW_ROWS = 128
"""Rows an expert, up to which the grouped kernel beats a batched product where there is such a kernel."""


class Observation(NamedTuple):
    """What one forward pass of a layer computed; e experts ran, all inputs' or each input's own."""

    combine_weights: Tensor  # C (b,m,n,p), in the order of phi's columns
    slot_outputs: Tensor  # f (b,e,p,d), without surrogate
    chosen: Tensor | None  # experts that ran (b,e), or None where the first e of phi's columns did
    output: Tensor  # Y (b,m,d)


class SoftMoE(nn.Module):
    """A Soft MoE layer: tokens (b,m,d) in, tokens (b,m,d) out.

    Without a plan it is dense. With a plan of scope `static` only the kept experts have weights;
    phi has their columns first, then those of the dropped ones. With scope `input` or `batch` all
    weights are there and only those of the chosen experts are used.
    """

    surrogate: Tensor  # (n,p,d), in the order of phi's columns; where the plan has one
    score_weights: Tensor  # (n); where a routed plan's signal is not the mass alone

    def __init__(self, config: SoftMoEConfig, plan: LayerPlan | None = None):
        super().__init__()
        self.config = config
        self.plan = plan
        d, p, h = config.dim, config.slots_per_expert, config.hidden_dim
        routed = plan.routed_experts if plan else config.num_experts
        stored = plan.stored_experts if plan else config.num_experts
        self.phi = nn.Parameter(torch.empty(d, routed, p))
        if config.router_norm == "l2":
            self.scale = nn.Parameter(torch.empty(1))
        elif config.router_norm == "rms":
            self.input_gain = nn.Parameter(torch.empty(d))
            self.phi_gain = nn.Parameter(torch.empty(d))
        # h is the contiguous axis of both weights: the fastest layout for one row as for many.
        self.fc1_weight = nn.Parameter(torch.empty(stored, d, h))
        self.fc1_bias = nn.Parameter(torch.empty(stored, h))
        self.fc2_weight = nn.Parameter(torch.empty(stored, d, h))
        self.fc2_bias = nn.Parameter(torch.empty(stored, d))
        if plan is not None and plan.has_surrogate:
            self.register_buffer("surrogate", torch.zeros(routed, p, d))
        if plan is not None and plan.scope != "static" and plan.signal != "combine":
            self.register_buffer("score_weights", torch.ones(config.num_experts))
        self.reset_parameters()
        self.observer: Callable[[Observation], None] | None = None

    @property
    def experts(self) -> Experts:
        """The weights of the experts that are stored."""
        return Experts(self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)

    def reset_parameters(self, generator: torch.Generator | None = None, scale: float = 1.0) -> None:
        """Draw initial weights; scale is where the learned scale of `l2` routing starts."""
        d, h = self.config.dim, self.config.hidden_dim
        with torch.no_grad():
            self.phi.normal_(std=1 / math.sqrt(d), generator=generator)
            if self.config.router_norm == "l2":
                self.scale.fill_(scale)
            elif self.config.router_norm == "rms":
                self.input_gain.fill_(1)
                self.phi_gain.fill_(1)
            for parameter, fan_in in (
                (self.fc1_weight, d),
                (self.fc1_bias, d),
                (self.fc2_weight, h),
                (self.fc2_bias, h),
            ):
                bound = 1 / math.sqrt(fan_in)
                parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b,m,d) in, tokens (b,m,d) out."""
        router_logits, tokens = self.route(x)
        routed = self.plan is not None and self.plan.scope != "static"
        dtype = router_logits.dtype
        if routed or self.observer is not None:  # scores and statistics are never narrower
            dtype = torch.promote_types(dtype, torch.float32)
        combine_weights = router_logits.flatten(2).softmax(2, dtype=dtype).view_as(router_logits)
        run = self._run_chosen if routed else self._run_stored
        return run(tokens, router_logits, combine_weights)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Router logits (b,m,n,p) of the tokens x (b,m,d), and the tokens that are dispatched."""
        phi, normalized = self.phi.flatten(1), x  # (d,n·p)
        if self.config.router_norm == "l2":
            normalized, phi = _unit(x, -1), _unit(phi, 0, factor=self.scale)
        elif self.config.router_norm == "rms":
            root_d = math.sqrt(self.config.dim)
            normalized = _unit(x, -1, gain=root_d * self.input_gain)
            phi = _unit(phi, 0, gain=root_d * self.phi_gain)
        router_logits = (normalized @ phi).unflatten(-1, self.phi.shape[1:])
        return router_logits, x if self.config.dispatch_input == "raw" else normalized

    def score(self, combine_weights: Tensor) -> Tensor:
        """Scores (b,n) of the plan's signal: the higher, the more the expert matters."""
        mass = combine_mass(combine_weights)
        assert self.plan is not None
        if self.plan.signal == "combine":
            return mass
        if self.plan.signal == "deviation":
            return mass * self.score_weights
        return self.score_weights.expand_as(mass)  # random

    def _run_stored(self, tokens: Tensor, router_logits: Tensor, combine_weights: Tensor) -> Tensor:
        """Dense or static: every expert that has weights runs on all inputs."""
        stored = self.fc1_weight.shape[0]
        slot_inputs = _dispatch_weights(router_logits, stored) @ tokens
        slot_outputs = self._run_experts(slot_inputs.unflatten(1, (stored, self.config.slots_per_expert)))
        weights = combine_weights.to(slot_outputs.dtype)
        of_stored, of_dropped = (part.flatten(2) for part in weights.tensor_split([stored], dim=2))
        if self.plan is not None and self.plan.has_surrogate:
            kept, dropped = self.surrogate.to(slot_outputs.dtype).tensor_split([stored])
            output = of_dropped @ dropped.flatten(0, 1)
            output = torch.baddbmm(output, of_stored, (slot_outputs + kept).flatten(1, 2))
        else:
            output = of_stored @ slot_outputs.flatten(1, 2)
        return self._observed(combine_weights, slot_outputs, None, output)

    def _run_experts(self, slot_inputs: Tensor) -> Tensor:  # (b,e,p,d) -> (b,e,p,d)
        """Expert j on slots j, for all experts at once."""
        b, e, p, d = slot_inputs.shape
        if 0 < b * p <= FEW_ROWS and e and kernels_for(slot_inputs, *self.experts):
            return run_experts(slot_inputs, _every_expert(slot_inputs, e), self.experts)
        rows = slot_inputs.transpose(0, 1).reshape(e, b * p, d)
        hidden = F.gelu(torch.baddbmm(self.fc1_bias[:, None], rows, self.fc1_weight))
        rows = torch.baddbmm(self.fc2_bias[:, None], hidden, self.fc2_weight.mT)
        return rows.view(e, b, p, d).transpose(0, 1)

    def _run_chosen(self, tokens: Tensor, router_logits: Tensor, combine_weights: Tensor) -> Tensor:
        """Routed: each input, or the batch as one, runs its k best experts and no others."""
        assert self.plan is not None
        scores = self.score(combine_weights)
        if self.plan.scope == "batch":
            scores = scores.sum(dim=0, keepdim=True).expand_as(scores)
        chosen = choose(scores, self.plan.k)
        output, slot_outputs = run_chosen(
            tokens,
            router_logits,
            combine_weights,
            chosen,
            self.experts,
            renorm=self.plan.compensation == "renorm",
            surrogate=self.surrogate if self.plan.has_surrogate else None,
        )
        return self._observed(combine_weights, slot_outputs, chosen, output)

    def _observed(
        self, combine_weights: Tensor, slot_outputs: Tensor, chosen: Tensor | None, output: Tensor
    ) -> Tensor:
        if self.observer is not None:
            with torch.autocast(output.device.type, enabled=False):  # statistics are never narrower
                self.observer(Observation(combine_weights, slot_outputs, chosen, output))
        return output


def _unit(x: Tensor, dim: int, gain: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """Vectors along dim, -1 or 0, scaled to unit length, then times a gain for each of their elements
    and a factor; computed in float32 or better: in float16 a zero token would be 0/0.
    """
    given = [tensor for tensor in (x, gain, factor) if tensor is not None]
    if kernels := kernels_for(*given):
        return kernels.unit(x, dim, gain, factor)
    wide = torch.promote_types(x.dtype, torch.float32)
    unit = F.normalize(x.to(wide), dim=dim).to(x.dtype)
    if gain is not None:
        unit = unit * (gain if dim == -1 else gain[:, None])
    return unit if factor is None else unit * factor


def _dispatch_weights(router_logits: Tensor, stored: int) -> Tensor:
    """Dᵀ (b,e·p,m) for the slots of the first e experts."""
    if stored and (kernels := kernels_for(router_logits)):
        every = _every_expert(router_logits, stored)
        return kernels.slot_weights(router_logits, every, None, router_logits.dtype)[0]
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    return router_logits[:, :, :stored].softmax(1, dtype=wide).flatten(2).mT.to(router_logits.dtype)


def _every_expert(inputs: Tensor, num_experts: int) -> Tensor:
    """The same experts, 0 to e - 1, for each of b inputs: (b,e)."""
    return torch.arange(num_experts, device=inputs.device).expand(len(inputs), -1)
