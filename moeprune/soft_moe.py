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
from moeprune.scores import combine_mass, top_k


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
        combine_weights = _softmax(router_logits.flatten(2), dim=2).view_as(router_logits)
        if self.plan is None or self.plan.scope == "static":
            return self._run_stored(tokens, router_logits, combine_weights)
        return self._run_chosen(tokens, router_logits, combine_weights)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Router logits (b,m,n,p) of the tokens x (b,m,d), and the tokens that are dispatched."""
        phi = self.phi.flatten(1)  # (d,n·p)
        normalized = x
        if self.config.router_norm == "l2":
            normalized = _unit(x, dim=-1)
            phi = _unit(phi, dim=0) * self.scale
        elif self.config.router_norm == "rms":
            root_d = math.sqrt(self.config.dim)
            normalized = _unit(x, dim=-1) * (root_d * self.input_gain)
            phi = _unit(phi, dim=0) * (root_d * self.phi_gain)[:, None]
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
        dispatch_weights = _softmax(router_logits[:, :, :stored], dim=1)
        slot_outputs = self._run_experts(_slot_inputs(dispatch_weights, tokens))
        if self.plan is not None and self.plan.has_surrogate:
            kept, dropped = self.surrogate.to(slot_outputs.dtype).split(
                [stored, self.surrogate.shape[0] - stored]
            )
            all_outputs = torch.cat(
                [slot_outputs + kept, dropped.expand(len(slot_outputs), -1, -1, -1)], dim=1
            )
            output = _combine(combine_weights, all_outputs)
        else:
            output = _combine(combine_weights[:, :, :stored], slot_outputs)
        return self._observed(combine_weights, slot_outputs, None, output)

    def _run_experts(self, slot_inputs: Tensor) -> Tensor:  # (b,e,p,d) -> (b,e,p,d)
        """Expert j on slots j, for all experts at once."""
        b, e, p, d = slot_inputs.shape
        rows = slot_inputs.transpose(0, 1).reshape(e, b * p, d)
        hidden = F.gelu(torch.baddbmm(self.fc1_bias[:, None], rows, self.fc1_weight))
        rows = torch.baddbmm(self.fc2_bias[:, None], hidden, self.fc2_weight.mT)
        return rows.view(e, b, p, d).transpose(0, 1)

    def _run_chosen(self, tokens: Tensor, router_logits: Tensor, combine_weights: Tensor) -> Tensor:
        """Routed: each input, or the batch as one, runs its k best experts (b,k) and no others."""
        assert self.plan is not None
        scores = self.score(combine_weights)
        if self.plan.scope == "batch":
            scores = scores.sum(dim=0, keepdim=True).expand_as(scores)
        chosen = top_k(scores, self.plan.k)
        index = chosen[:, None, :, None].expand(-1, *router_logits.shape[1:2], -1, router_logits.shape[3])
        chosen_logits = router_logits.gather(2, index)  # (b,m,k,p)
        if self.plan.compensation == "renorm":
            chosen_combine = _softmax(chosen_logits.flatten(2), dim=2).view_as(chosen_logits)
        else:
            chosen_combine = combine_weights.gather(2, index)
        slot_inputs = _slot_inputs(_softmax(chosen_logits, dim=1), tokens)
        slot_outputs = self._run_experts_of_inputs(slot_inputs, chosen)
        if self.plan.has_surrogate:
            # The surrogates of all slots, corrected where a slot has its real output.
            output = _combine(combine_weights, self.surrogate)
            output = output + _combine(chosen_combine, slot_outputs - self.surrogate[chosen])
        else:
            output = _combine(chosen_combine, slot_outputs)
        return self._observed(combine_weights, slot_outputs, chosen, output)

    def _observed(
        self, combine_weights: Tensor, slot_outputs: Tensor, chosen: Tensor | None, output: Tensor
    ) -> Tensor:
        if self.observer is not None:
            with torch.autocast(output.device.type, enabled=False):  # statistics are never narrower
                self.observer(Observation(combine_weights, slot_outputs, chosen, output))
        return output

    def _run_experts_of_inputs(self, slot_inputs: Tensor, chosen: Tensor) -> Tensor:
        """Expert chosen[i,j] (b,k) on slot_inputs[i,j] (b,k,p,d): rows sorted by expert, each
        expert's weights used in place and once."""
        b, k, p, d = slot_inputs.shape
        order = chosen.flatten().argsort(stable=True)
        counts = torch.zeros(self.config.num_experts, dtype=torch.int64, device=chosen.device)
        counts.scatter_add_(0, chosen.flatten(), torch.full_like(chosen.flatten(), p))
        rows = slot_inputs.reshape(b * k, p, d)[order].view(b * k * p, d)
        if _has_grouped_kernel(self.fc1_weight):
            hidden = F.gelu(_grouped_linear_on_device(rows, counts, self.fc1_weight, self.fc1_bias))
            rows = _grouped_linear_on_device(hidden, counts, self.fc2_weight.mT, self.fc2_bias)
        else:
            rows_of_expert = counts.tolist()
            hidden = F.gelu(_grouped_linear(rows, rows_of_expert, self.fc1_weight, self.fc1_bias))
            rows = _grouped_linear(hidden, rows_of_expert, self.fc2_weight.mT, self.fc2_bias)
        outputs = torch.empty_like(rows).view(b * k, p, d)
        outputs[order] = rows.view(b * k, p, d)
        return outputs.view(b, k, p, d)


def _unit(x: Tensor, dim: int) -> Tensor:
    """Scaled to unit length, computed in float32 or better: in float16 a zero token would be 0/0."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.normalize(x.to(wide), dim=dim).to(x.dtype)


def _softmax(logits: Tensor, dim: int) -> Tensor:
    """Softmax in float32 or better, whatever the precision of the logits."""
    return logits.softmax(dim, dtype=torch.promote_types(logits.dtype, torch.float32))


def _slot_inputs(dispatch_weights: Tensor, tokens: Tensor) -> Tensor:
    """Dᵀ·X: (b,m,e,p), (b,m,d) -> (b,e,p,d)."""
    weights = dispatch_weights.flatten(2).mT.to(tokens.dtype)
    return (weights @ tokens).unflatten(1, dispatch_weights.shape[2:])


def _combine(combine_weights: Tensor, slot_outputs: Tensor) -> Tensor:
    """C·f: (b,m,e,p), (b,e,p,d) or (e,p,d) -> (b,m,d)."""
    return combine_weights.flatten(2).to(slot_outputs.dtype) @ slot_outputs.flatten(-3, -2)


def _has_grouped_kernel(weight: Tensor) -> bool:
    """Whether torch has a grouped matrix product for these weights that needs no word from the host:
    on CUDA, in bfloat16, with rows of whole 16 bytes.
    """
    if not weight.is_cuda:
        return False
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else weight.dtype
    return dtype == torch.bfloat16 and all(size * dtype.itemsize % 16 == 0 for size in weight.shape[1:])


def _grouped_linear(rows: Tensor, counts: list[int], weight: Tensor, bias: Tensor) -> Tensor:
    """rows @ weight[e] + bias[e], where the first counts[0] rows belong to expert 0, and so on.

    Args:
        rows: (r,in), sorted by expert.
        counts: rows of each expert, n of them.
        weight: (n,in,out).
        bias: (n,out).
    """
    groups = rows.split(counts)
    used = [(expert, group) for expert, group in enumerate(groups) if len(group)]
    if not used:
        return rows.new_empty(0, weight.shape[2])
    return torch.cat([torch.addmm(bias[expert], group, weight[expert]) for expert, group in used])


def _grouped_linear_on_device(rows: Tensor, counts: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as one grouped matrix product; the counts (n,) stay on the device."""
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
    offsets = counts.cumsum(0, dtype=torch.int32)
    biases = bias.repeat_interleave(counts, dim=0, output_size=len(rows))
    return F.grouped_mm(rows, weight, offs=offsets) + biases
