"""The Soft MoE layer: dense, statically pruned, or routed to the best experts per input or batch.

Axes: b inputs, m tokens, d model width, n experts, p slots per expert, h hidden width of an expert; k experts
are kept. The maths (Puigcerver et al. 2023, arXiv 2308.00951, section 2.1):

    L = X·phi               router logits     (b,m,n,p)
    D = softmax of L over m                   each slot is a weighted mean of tokens
    C = softmax of L over (n,p)               each token is a weighted mean of slot outputs
    Y = C · f(Dᵀ·X)                           f_j is expert j

With only some experts kept, Y = sum over kept slots of C·f plus, with a surrogate, the sum over dropped slots
of C·u, u a constant vector for each slot, also added to f of a kept slot if static. With `merge` all slots
run, those of dropped experts by kept ones.
"""

import math
from contextlib import nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.experts import Experts, combine_mass, kernels_for, run_experts, slot_weights
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import Observation, is_dropped, masked
from moeprune.plan import LayerPlan

FEW_ROWS = 128  # rows of an expert up to which the grouped kernel beats a batched product, where there is such a kernel


class SoftMoE(MoELayer):
    """A Soft MoE layer for tokens (b,m,d), images (b,d,H,W) or single tokens (b,d)."""

    config: SoftMoEConfig
    phi: Tensor  # (d,n,p), without dynamic slots
    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_bias: Tensor | None
    scale: Tensor
    input_gain: Tensor
    phi_gain: Tensor
    slot_projection: Tensor  # (n,d,d), from an averaged token to an expert's slot, with dynamic slots

    def __init__(self, config: SoftMoEConfig, plan: LayerPlan | None = None):
        super().__init__(config, plan)
        for name in ("fc1_weight", "fc1_bias", "fc2_bias"):
            if name not in config.expert_shapes(1):
                self.register_parameter(name, None)
        if not self.fc2_weight.is_meta:  # where drawing numbers would import half of PyTorch
            self.reset_parameters()

    @property
    def experts(self) -> Experts:
        """The weights of the experts that are stored."""
        return Experts(self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, self.config.activation)

    @property
    def _types(self) -> set[torch.dtype]:
        return {tensor.dtype for tensor in self._parameters.values() if tensor is not None}

    @property
    def is_mixed(self) -> bool:
        """True if the router has another type than the experts; all but the experts then run in the wider one."""
        return len(self._types) > 1

    def reset_parameters(self, generator: torch.Generator | None = None, scale: float = 1.0) -> None:
        """Draw initial weights; `scale` is the first value of the learned scale of `l2` routing."""
        d, h = self.config.dim, self.config.expert_width
        if self.plan is not None and self.plan.compensation == "linear":
            return
        with torch.no_grad():
            router = self.slot_projection if self.config.dynamic_slots else self.phi
            router.normal_(std=1 / math.sqrt(d), generator=generator)
            if self.config.router_norm == "l2":
                self.scale.fill_(scale)
            elif self.config.router_norm != "none":
                self.input_gain.fill_(1)
                self.phi_gain.fill_(1)
            for name in self.config.expert_shapes(1):
                bound = 1 / math.sqrt(d if name.startswith("fc1") else h)
                getattr(self, name).uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output, shaped as x: tokens (b,m,d), images (b,d,H,W) or single tokens (b,d).

        mask: tokens that are not padding (b,m); padding is not dispatched and not counted in scores.
        """
        with torch.cuda.device_of(x) if x.is_cuda else nullcontext():  # where kernels are launched
            windows = self.config.windows
            if x.shape[0] % windows:
                raise MoepruneError(f"a layer runs on {len(x)} windows, expected a multiple of {windows}")
            if not self.config.interleaved:
                return self._forward(x, mask)
            mask = None if mask is None else _swapped(mask, (windows, -1))
            return _swapped(self._forward(_swapped(x, (windows, -1)), mask), (-1, windows))

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.ndim == 4:
            return self._forward(x.flatten(2).mT, mask).mT.unflatten(2, x.shape[2:])
        if x.ndim == 2:
            return self._forward(x[:, None], mask)[:, 0]
        if self.config.dynamic_slots and (lacking := -x.shape[1] % self.config.num_experts):
            mask = torch.ones_like(x[:, :, 0], dtype=torch.bool) if mask is None else mask
            padded = F.pad(x, (0, 0, 0, lacking)), F.pad(mask, (0, lacking), value=False)
            return self._forward(*padded)[:, : x.shape[1]]
        if self.plan is not None and self.plan.compensation == "linear":
            return self._run_linear(x, mask)
        given, mixed = x.dtype, self.is_mixed
        if mixed:
            x = x.to(reduce(torch.promote_types, self._types, given))
        router_logits, tokens = self.route(x, mask)
        needs_mass = self.is_routed or self.observer is not None
        dtype = router_logits.dtype
        if needs_mass:  # scores and statistics are never narrower
            dtype = torch.promote_types(dtype, torch.float32)
        combine_weights = router_logits.flatten(2).softmax(2, dtype=dtype).view_as(router_logits)
        mass = self._mass(combine_weights, mask) if needs_mass else None
        chosen, slot_inputs = None, None
        if self.is_routed:
            assert mass is not None
            chosen = self.choose(mass)[:, None].expand(-1, self.config.windows, -1).flatten(0, 1)
            output, slot_outputs = self._run_chosen(tokens, router_logits, combine_weights, chosen)
        else:
            output, slot_outputs, slot_inputs = self._run_stored(tokens, router_logits, combine_weights)
        x = x.to(self.fc2_weight.dtype) if mixed else x
        if self.plan is not None and self.plan.has_basis:
            dropped = combine_weights if chosen is None else combine_weights * is_dropped(chosen, combine_weights)
            output = self.compensated(output, x, dropped, mask)
        elif self.plan is not None and self.plan.has_affine:
            output = output + self.affine(x, mask)  # the surrogates are in it

        def observation() -> Observation:
            assert mass is not None
            weights, shown, taken = (masked(part, mask) for part in (combine_weights, output, x))
            return Observation(weights, mass, shown, taken, mask, chosen, slot_outputs, slot_inputs, self.hidden)

        self.observe(observation)
        return output.to(given) if mixed else output

    def _run_linear(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Run the linear map that has taken the place of the layer."""
        output = self.affine(x.to(self.affine_token.dtype), mask).to(x.dtype)
        none = x.new_zeros(*x.shape[:2], 0, self.config.slots_per_expert)
        mass = none.new_zeros(len(x) // self.config.windows, 0)
        nothing = none.new_zeros(len(x), 0, self.config.slots_per_expert, self.config.output_width)
        self.observe(lambda: Observation(none, mass, masked(output, mask), masked(x, mask), mask, None, nothing))
        return output

    def _mass(self, combine_weights: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mass of each expert over all windows of an input."""
        sizes = -1, self.config.windows
        mask = None if mask is None else mask.unflatten(0, sizes).flatten(1, 2)
        return combine_mass(combine_weights.unflatten(0, sizes).flatten(1, 2), mask)

    def route(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return router logits (b,m,n,p) of tokens x (b,m,d), lowest for padding, and what is dispatched."""
        normalized = self._normalized(x, -1, "input_gain")
        if self.config.dynamic_slots:
            slots = self._dynamic_slots(normalized, mask)  # (b,n,p,d)
            router_logits = (normalized @ slots.flatten(1, 2).mT).unflatten(-1, slots.shape[1:3])
        else:
            phi = self._normalized(self.phi.flatten(1), 0, "phi_gain")  # (d,n·p)
            router_logits = (normalized @ phi.to(normalized.dtype)).unflatten(-1, self.phi.shape[1:])
        if mask is not None:
            lowest = torch.finfo(router_logits.dtype).min
            router_logits = router_logits.masked_fill(~mask[:, :, None, None], lowest)
            if self.config.dynamic_slots:
                is_empty = ~mask.unflatten(1, (-1, self.config.num_experts)).any(2)
                router_logits = router_logits.masked_fill(is_empty[:, None, None], lowest)
        return router_logits, x if self.config.dispatch_input == "raw" else normalized

    def _normalized(self, vectors: Tensor, dim: int, gain: str) -> Tensor:
        """Normalise vectors along dim, -1 for tokens and slots or 0 for phi, with the gain of this name."""
        norm = self.config.router_norm
        if norm == "none":
            return vectors
        if norm == "l2":
            return _unit(vectors, dim, factor=self.scale if gain == "phi_gain" else None)
        if norm == "rms":
            return _unit(vectors, dim, gain=math.sqrt(self.config.dim) * getattr(self, gain))
        return F.layer_norm(vectors.movedim(dim, -1), (self.config.dim,), getattr(self, gain)).movedim(-1, dim)

    def _dynamic_slots(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return the replacement of phi (b,n,p,d), made of the inputs' own tokens (b,n·p,d)."""
        n = self.config.num_experts
        segments = tokens.unflatten(1, (-1, n))  # (b,p,n,d)
        if mask is None:
            means = segments.mean(2)
        else:
            counted = mask.unflatten(1, (-1, n))[..., None]
            means = segments.masked_fill(~counted, 0).sum(2) / counted.sum(2).clamp_min(1)
        slots = F.linear(means, self.slot_projection.flatten(0, 1).to(means.dtype)).unflatten(-1, (n, -1))
        return self._normalized(slots, -1, "phi_gain").transpose(1, 2)

    def _run_stored(
        self, tokens: Tensor, router_logits: Tensor, combine_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run every expert that has weights on all inputs: output, slot outputs and slot inputs."""
        plan = self.plan
        stored = combine_weights.shape[2] if plan is not None and plan.merges else len(self.fc2_weight)
        maps = sum(self.maps_of_rank.values())
        places = [stored, stored + maps]
        slot_inputs, of_maps = self._slot_inputs(tokens, router_logits, stored + maps).tensor_split([stored], dim=1)
        slot_outputs = self._run_experts(slot_inputs)
        weights = combine_weights.to(slot_outputs.dtype).tensor_split(places, dim=2)
        for_stored, for_maps, for_constants = (part.flatten(2) for part in weights)
        if plan is not None and plan.has_surrogate and not plan.has_basis:
            stored_part, map_part, constants = self.surrogate.to(slot_outputs.dtype).tensor_split(places)
            output = for_constants @ constants.flatten(0, 1)
            if maps:
                mapped = self._run_low_rank(of_maps) + map_part
                output = torch.baddbmm(output, for_maps, mapped.flatten(1, 2))
            output = torch.baddbmm(output, for_stored, (slot_outputs + stored_part).flatten(1, 2))
        else:
            output = for_stored @ slot_outputs.flatten(1, 2)
        return output, slot_outputs, slot_inputs

    def _slot_inputs(self, tokens: Tensor, router_logits: Tensor, experts: int) -> Tensor:
        """Return what the first experts' slots take of tokens (b,m,d): (b,experts,p,d)."""
        kernels = None if self.config.mixes_batch else kernels_for(router_logits)
        if kernels and experts:
            every = _every_expert(router_logits, experts)
            dispatch, _ = kernels.slot_weights(router_logits, every, None, router_logits.dtype)
        else:
            wide = torch.promote_types(router_logits.dtype, torch.float32)
            dispatch = router_logits[:, :, :experts].softmax(0 if self.config.mixes_batch else 1, dtype=wide)
            dispatch = dispatch.flatten(2).mT.to(router_logits.dtype)
        return (dispatch @ tokens).unflatten(1, (experts, self.config.slots_per_expert))

    def _run_low_rank(self, slot_inputs: Tensor) -> Tensor:
        """Run the low-rank maps on the slots of their experts: (b,e,p,d) to (b,e,p,o)."""
        rows = slot_inputs.to(self.low_rank_in.dtype).transpose(0, 1)
        flat = rows.flatten(1, 2)
        outputs = torch.cat([flat[places] @ into @ out_of for places, into, out_of in self.maps()])
        return outputs.unflatten(1, rows.shape[1:3]).transpose(0, 1).to(slot_inputs.dtype)

    def _run_experts(self, slot_inputs: Tensor) -> Tensor:
        """Run expert j on slots j, with `merge` on those of its group: (b,e,p,d) to (b,e,p,o)."""
        if self.is_mixed and slot_inputs.dtype != self.fc2_weight.dtype:
            return self._run_experts(slot_inputs.to(self.fc2_weight.dtype)).to(slot_inputs.dtype)
        b, e, p, _ = slot_inputs.shape
        rows = slot_inputs.transpose(0, 1)
        if self.plan is not None and self.plan.merges:
            rows_of_expert = [len(group) * b * p for group in self.plan.groups]
            rows = self.experts.run(rows.flatten(0, 2), rows_of_expert)
        elif kernels_for(slot_inputs, *self.experts.tensors) and 0 < b * p <= FEW_ROWS and e:
            return run_experts(slot_inputs, _every_expert(slot_inputs, e), self.experts)
        else:
            rows = self.experts.run(rows.flatten(1, 2))
        return rows.view(e, b, p, self.config.output_width).transpose(0, 1)

    def hidden(self, slot_inputs: Tensor) -> Tensor:
        """Return what the last linear of each expert that has weights takes: (b,e,p,d) to (b,e,p,h)."""
        b, e, p, _ = slot_inputs.shape
        rows = slot_inputs.to(self.fc2_weight.dtype).transpose(0, 1).flatten(1, 2)
        return self.experts.hidden(rows).view(e, b, p, -1).transpose(0, 1)

    def _run_chosen(
        self, tokens: Tensor, router_logits: Tensor, combine_weights: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run each input's chosen experts (b,k), n for none: output and their slots' outputs (b,k,p,o)."""
        plan, (n, p) = self.plan, combine_weights.shape[2:]
        assert plan is not None
        idle = None if plan.mass is None else chosen == n
        someone = chosen if idle is None else chosen.clamp_max(n - 1)  # in place of none, and not counted
        weights = None if plan.cuts_router else combine_weights
        dispatch, combine = slot_weights(router_logits, weights, someone, self.config.mixes_batch, idle)
        slot_inputs = (dispatch @ tokens).unflatten(1, (chosen.shape[1], p))
        taken = slot_inputs.to(self.fc2_weight.dtype) if self.is_mixed else slot_inputs
        slot_outputs = run_experts(taken, chosen, self.experts, idle, is_shared=plan.scope == "batch")
        slot_outputs = slot_outputs.to(slot_inputs.dtype) if self.is_mixed else slot_outputs
        if plan.has_basis or not plan.has_surrogate:
            return combine @ slot_outputs.flatten(1, 2), slot_outputs
        surrogate = self.surrogate.to(slot_outputs.dtype) if self.is_mixed else self.surrogate
        # What stands for all slots, corrected where a slot has its real output.
        if plan.is_low_rank:
            surrogate = self._run_low_rank(self._slot_inputs(tokens, router_logits, n)) + surrogate
            places = someone[:, :, None, None].expand(-1, -1, *surrogate.shape[2:])
            of_chosen = surrogate.gather(1, places)
        else:
            of_chosen = surrogate[someone]
        output = combine_weights.flatten(2).to(combine.dtype) @ surrogate.flatten(-3, -2)
        corrections = (slot_outputs - of_chosen).flatten(1, 2)
        return torch.baddbmm(output, combine, corrections), slot_outputs


def _swapped(x: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Return rows in the order in which the two axes that they stand for are swapped."""
    return x.unflatten(0, sizes).transpose(0, 1).flatten(0, 1)


def _unit(x: Tensor, dim: int, gain: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """Scale vectors along dim, -1 or 0, to unit length, then by a gain for each element and a factor."""
    if kernels := kernels_for(x, gain, factor):
        return kernels.unit(x, dim, gain, factor)
    wide = torch.promote_types(x.dtype, torch.float32)  # in float16 a zero token would be 0/0
    unit = F.normalize(x.to(wide), dim=dim).to(x.dtype)
    if gain is not None:
        unit = unit * (gain if dim == -1 else gain[:, None])
    return unit if factor is None else unit * factor


def _every_expert(inputs: Tensor, num_experts: int) -> Tensor:
    """Return the experts 0 to e - 1 for each of b inputs (b,e)."""
    return torch.arange(num_experts, device=inputs.device).expand(len(inputs), -1)
