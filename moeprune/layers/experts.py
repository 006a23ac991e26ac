"""Routed execution: each input runs its k best experts, and no others.

    combine weights (b,m,n,p) -> mass, a score (b,n)            combine_mass
    scores (b,n)          -> chosen (b,k)                       choose
    logits, chosen        -> dispatch (b,s,m), combine (b,m,s)  slot_weights
    dispatch · tokens     -> slot inputs (b,k,p,d)
    slot inputs, chosen   -> slot outputs (b,k,p,o)             run_experts
    combine · outputs     -> tokens (b,m,o)

Rows of all inputs are grouped by expert, so that each expert's weights are used where they lie, and once: on
the CPU as torch's grouped product or in a loop over views of the stacked weights, or, for little work, as a
product of gathered copies. On a GPU the kernels of moeprune.layers.kernels never synchronise with the host; the
loop, which does so once a layer, remains for gradients, float64, and platforms without Triton. In a graph that
torch traces the experts of an input are gathered, or all experts run, so that the graph does not depend on the
choice.

Axes: b inputs, m tokens, d model width, n experts, p slots per expert, h hidden width of an expert, o output
width; k experts run for an input, with s = k·p slots in the order of `chosen`.
"""

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from moeprune.layers.activations import ACTIVATIONS
from moeprune.layers.gated_config import GateColumns
from moeprune.layers.interface import Activation

FEW_ROWS = range(2, 6)  # of one expert
GATHERED = 2 << 20  # bytes of chosen experts' weights up to which copying them beats a loop over experts


class Features(NamedTuple):
    """What the last linears of experts take, computed by a module of the user's own code.

    module: of one expert, whose tensors are not used. tensors: those of all experts (n,…), by their names in it.
    """

    module: nn.Module
    tensors: Mapping[str, Tensor]

    def run(self, rows: Tensor, counts: list[int] | None) -> Tensor:
        """Return the features (…,h) of rows (…,d), each of its own expert, see `Experts`."""
        found = [
            functional_call(self.module, {name: part[j] for name, part in self.tensors.items()}, (group,), strict=True)
            for j, group in enumerate(rows.unbind(0) if counts is None else rows.split(counts))
            if counts is None or len(group)
        ]
        if counts is None:
            return torch.stack(found)
        return torch.cat(found) if found else rows


class Experts(NamedTuple):
    """The stacked weights of all experts, h contiguous in both.

    activation: of the output of the first linear, or of its columns that are a gate: the `last` half, the `first`, or
        every `even` one. limit: of these values, see GatedMoEConfig.
    features: what takes the place of the first linear and the activation, if there is something else.
    counts, in its methods: of the rows (r,d) of each expert, one expert after the other; None: rows are (n,r,d).
    """

    fc1_weight: Tensor | None  # (n,d,h), or (n,d,2·h) with a gate; None where an expert is one linear
    fc1_bias: Tensor | None
    fc2_weight: Tensor  # (n,o,h)
    fc2_bias: Tensor | None  # (n,o)
    activation: Activation = "gelu"
    gate_columns: GateColumns = "last"
    limit: float | None = None
    features: Features | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        others = [] if self.features is None else [*self.features.tensors.values()]
        return others + [tensor for tensor in self[:4] if tensor is not None]

    @property
    def is_gated(self) -> bool:
        """True if half of the first linear's output gates the other half."""
        return self.fc1_weight is not None and self.fc1_weight.shape[2] == 2 * self.fc2_weight.shape[2]

    def copies(self, chosen: Tensor) -> "Experts":
        """Return the weights of experts by their indices (r)."""
        return self._select(chosen)

    def one(self, expert: int) -> "Experts":
        """Return the weights of one expert, where they lie."""
        return self._select(slice(expert, expert + 1))

    def _select(self, index: Tensor | slice) -> "Experts":
        fc1_weight, fc1_bias, fc2_bias = (
            None if tensor is None else tensor[index] for tensor in (self.fc1_weight, self.fc1_bias, self.fc2_bias)
        )
        features = self.features
        if features is not None:
            features = features._replace(tensors={name: part[index] for name, part in features.tensors.items()})
        others = self.activation, self.gate_columns, self.limit, features
        return Experts(fc1_weight, fc1_bias, self.fc2_weight[index], fc2_bias, *others)

    def activate(self, hidden: Tensor) -> Tensor:
        """Return the input of the second linear (…,h), from the output of the first."""
        activation = ACTIVATIONS[self.activation]
        if not self.is_gated:
            return activation(hidden)
        if self.gate_columns == "even":
            gate, values = hidden[..., ::2], hidden[..., 1::2]
        else:
            gate, values = hidden.chunk(2, dim=-1)[:: 1 if self.gate_columns == "first" else -1]
        if self.limit is not None:
            gate, values = gate.clamp(max=self.limit), values.clamp(-self.limit, self.limit) + 1
        return values * activation(gate)

    def hidden(self, rows: Tensor, counts: list[int] | None = None) -> Tensor:
        """Return the input of the second linear (…,h), from rows (…,d)."""
        if self.features is not None:
            return self.features.run(rows, counts)
        if self.fc1_weight is None:
            return rows
        return self.activate(linear(rows, self.fc1_weight, self.fc1_bias, counts))

    def run(self, rows: Tensor, counts: list[int] | None = None) -> Tensor:
        """Return the experts' outputs (…,o) for rows (…,d)."""
        return linear(self.hidden(rows, counts), self.fc2_weight.mT, self.fc2_bias, counts)


def combine_mass(combine_weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mass of each expert (b,n) in float32 or better, by C (b,m,n,p) and a mask of tokens (b,m).

    The sum over tokens and slots of C, divided by m: the masses of one input sum to 1 (Chung et al. 2024,
    arXiv 2409.00879, Algorithm 1).
    """
    dtype = torch.promote_types(combine_weights.dtype, torch.float32)
    if mask is not None:
        tokens = mask.sum(1).clamp_min(1)[:, None]
        return (combine_weights * mask[:, :, None, None]).sum((1, 3), dtype=dtype) / tokens
    if combine_weights.shape[-1] == 1:
        return combine_weights.mean(dim=(1, 3), dtype=dtype)
    return combine_weights.mean(dim=1, dtype=dtype).sum(dim=-1)  # both at once is 20 times slower


def rank(scores: Tensor) -> Tensor:
    """Return expert indices (...,n) from the highest to the lowest score; of equal scores the lower first."""
    if not torch.compiler.is_exporting():
        return scores.sort(dim=-1, descending=True, stable=True).indices
    expert = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)  # ONNX has no stable sort
    one, other = scores[..., None], scores[..., None, :]
    is_behind = (other > one) | ((other == one) & (expert[..., None, :] < expert[..., None]))
    return torch.zeros_like(expert).scatter(-1, is_behind.sum(-1), expert)


def is_traced() -> bool:
    """Return True while a graph is made, which must not depend on what is chosen for the inputs at hand."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the k best experts of each row, ascending (...,k), with ties broken as in `rank`."""
    if scores.device.type == "cpu" and 0 < k < scores.shape[-1] and not is_traced():
        # Four times faster than ranking all, but which of two equal scores it takes is not specified.
        best = scores.topk(k + 1, dim=-1)
        if (best.values[..., k - 1] > best.values[..., k]).all():
            return best.indices[..., :k].sort(dim=-1).values
    return rank(scores)[..., :k].sort(dim=-1).values


def fewest_with_mass(scores: Tensor, mass: Tensor, share: float, most: int) -> Tensor:
    """Return the fewest experts of each input, best first by scores (b,n), with a share of its mass (b,n).

    As indices (b,most), ascending; n in place of those that are not needed.
    """
    n = scores.shape[-1]
    order = rank(scores)[..., :most]
    before = F.pad(mass.gather(-1, order).cumsum(-1)[..., :-1], (1, 0))
    is_needed = before < share * mass.sum(-1, keepdim=True)
    is_needed[..., 0] = True
    return torch.where(is_needed, order, n).sort(dim=-1).values


def random_scores(num_experts: int, seed: int, layer_index: int) -> Tensor:
    """Return the scores of the signal `random` (n): a fixed order for this seed and layer."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer_index) % 2**63)
    return torch.randperm(num_experts, generator=generator).to(torch.float32)


def choose(scores: Tensor, k: int) -> Tensor:
    """Return the k best experts of each input, ascending (b,k), for scores (b,n)."""
    kernels = kernels_for(scores)
    return kernels.choose(scores, k) if kernels and k else top_k(scores, k)


def slot_weights(
    router_logits: Tensor,
    combine_weights: Tensor | None,
    chosen: Tensor,
    over_batch: bool = False,
    idle: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Dᵀ (b,s,m) and C (b,m,s) of the chosen experts' slots, by softmaxes in float32 or better.

    router_logits: L (b,m,n,p). combine_weights: C (b,m,n,p); None for a softmax over the chosen slots alone.
    chosen: expert indices (b,k). over_batch: the dispatch softmax is over the inputs, not over the tokens of
    each. idle: which of the chosen do not count (b,k), with combine weights of zero; None: all do.
    """
    (b, m, _, p), dtype = router_logits.shape, router_logits.dtype
    wide = torch.promote_types(dtype, torch.float32)
    source, width = (router_logits, wide) if combine_weights is None else (combine_weights, dtype)
    kernels = None if over_batch else kernels_for(router_logits)
    if kernels and chosen.shape[1]:
        dispatch, combine = kernels.slot_weights(router_logits, chosen, source, width)
    else:
        index = chosen[:, None, :, None].expand(b, m, -1, p)
        chosen_logits, combine = (part.gather(2, index).flatten(2) for part in (router_logits, source))  # (b,m,s)
        dispatch = chosen_logits.softmax(1, dtype=wide).mT
        if over_batch:
            dispatch = router_logits.softmax(0, dtype=wide).gather(2, index).flatten(2).mT
    if idle is not None:
        is_idle_slot = idle.repeat_interleave(p, 1)[:, None]  # (b,1,s)
        combine = combine.masked_fill(is_idle_slot, -torch.inf if combine_weights is None else 0)
    if combine_weights is None:
        combine = combine.softmax(2, dtype=wide)
    return dispatch.to(dtype), combine.to(dtype)


def run_experts(
    slot_inputs: Tensor, chosen: Tensor, experts: Experts, idle: Tensor | None = None, is_shared: bool = False
) -> Tensor:
    """Run expert chosen[i,j] (b,k) on slot_inputs[i,j] (b,k,p,d): (b,k,p,o), zero where idle (b,k).

    is_shared: all inputs have the same experts.
    """
    kernels = None if experts.features is not None else kernels_for(slot_inputs, *experts.tensors)
    n, width, _ = experts.fc2_weight.shape
    if kernels and chosen.shape[1]:
        rows = slot_inputs.flatten(0, 1)
        pairs, counts = kernels.group_by_expert(chosen, n)
        if experts.fc1_weight is not None:
            fuse = experts.activation == "gelu" and not experts.is_gated
            rows = kernels.grouped_linear(rows, pairs, counts, experts.fc1_weight, experts.fc1_bias, fuse)
            rows = rows if fuse else experts.activate(rows)
        rows = kernels.grouped_linear(rows, pairs, counts, experts.fc2_weight.mT, experts.fc2_bias)
        rows = rows.view(*slot_inputs.shape[:-1], width)
        return rows if idle is None else rows.masked_fill_(idle[:, :, None, None], 0)  # nobody wrote there
    b, k, p, d = slot_inputs.shape
    if is_traced():
        outputs = _run_traced(slot_inputs, chosen, experts, is_shared)
        return outputs if idle is None else outputs.masked_fill(idle[:, :, None, None], 0)
    if idle is not None:
        outputs = slot_inputs.new_zeros(b, k, p, width)
        active = ~idle  # each pair as if it were an input of its own with one expert
        outputs[active] = run_experts(slot_inputs[active][:, None], chosen[active][:, None], experts)[:, 0]
        return outputs
    rows, chosen = slot_inputs.reshape(b * k, p, d), chosen.flatten()
    bytes_of_one = sum(tensor[0].nbytes for tensor in experts.tensors) if n else 0
    if 0 < len(chosen) * bytes_of_one <= GATHERED and experts.features is None:
        return experts.copies(chosen).run(rows).view(b, k, p, width)
    order = chosen.argsort(stable=True)
    rows_of_expert = [p * count for count in chosen.bincount(minlength=n).tolist()]
    outputs = experts.run(rows[order].flatten(0, 1), rows_of_expert)
    return outputs.view(b * k, p, width)[order.argsort()].view(b, k, p, width)


def _run_traced(slot_inputs: Tensor, chosen: Tensor, experts: Experts, is_shared: bool) -> Tensor:
    """Do the same in a graph that does not depend on the choice; what is idle (n) gets the last expert's outputs."""
    (b, k, p, d), (n, width, _) = slot_inputs.shape, experts.fc2_weight.shape
    someone = chosen.clamp_max(n - 1)
    if is_shared:
        rows = slot_inputs.transpose(0, 1).reshape(k, b * p, d)
        return experts.copies(someone[0]).run(rows).view(k, b, p, width).transpose(0, 1)
    if _is_known(b * k > n):  # more copies than experts: run each on all inputs
        places = chosen[:, :, None, None].expand(-1, -1, p, d)
        rows = slot_inputs.new_zeros(b, n + 1, p, d).scatter(1, places, slot_inputs)[:, :n]
        outputs = experts.run(rows.transpose(0, 1).reshape(n, b * p, d)).view(n, b, p, width)
        return outputs.transpose(0, 1).gather(1, someone[:, :, None, None].expand(-1, -1, p, width))
    return experts.copies(someone.flatten()).run(slot_inputs.reshape(b * k, p, d)).view(b, k, p, width)


def _is_known(condition: bool) -> bool:
    """Return a condition on the number of inputs; False if a graph is exported for any number of them."""
    if not torch.compiler.is_exporting():
        return condition  # a graph that is compiled is made anew where this differs
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int] | None) -> Tensor:
    """Return rows @ weight[e] + bias[e]; weight (n,in,out), bias (n,out) or None; rows and counts: see `Experts`."""
    if counts is None:
        return torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)
    used = [expert for expert, count in enumerate(counts) if count]
    if not used:
        return rows.new_empty(0, weight.shape[2])
    on_left = _is_quicker_on_left(weight)
    most_have_rows = 2 * len(used) > len(weight) and not (on_left and len(rows) < len(used) * FEW_ROWS.stop)
    if bias is None and most_have_rows and _runs_grouped(rows, weight):
        return F.grouped_mm(rows, weight, offs=torch.tensor(counts).cumsum(0, dtype=torch.int32))
    found = []
    for expert, group in zip(used, rows.split([counts[expert] for expert in used]), strict=True):
        added = None if bias is None else bias[expert]
        if on_left and len(group) in FEW_ROWS:
            found.append(_product(weight[expert].mT, group.mT, None if added is None else added[:, None]).mT)
        else:
            found.append(_product(group, weight[expert], added))
    return torch.cat(found)


def _product(one: Tensor, other: Tensor, added: Tensor | None) -> Tensor:
    return one @ other if added is None else torch.addmm(added, one, other)


def _is_quicker_on_left(weight: Tensor) -> bool:
    """Return True if products of FEW_ROWS with these weights (n,in,out) are quicker with the weights to the left: by
    1.2 to 1.5 times, on the CPU, where weights are stored output by output and are no tiny ones.
    """
    return weight.device.type == "cpu" and weight.stride(1) == 1 and weight[0].numel() >= 1 << 16


def _runs_grouped(rows: Tensor, weight: Tensor) -> bool:
    """Return True if torch has a grouped product of these rows (r,in) and weights (n,in,out) on the CPU.

    It computes what the loop over experts does, those without rows included, in one call.
    """
    if rows.device.type != "cpu" or rows.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    parts = rows, weight if weight.stride(2) == 1 else weight.mT
    is_aligned = all(part.is_contiguous() and part.shape[-1] * part.element_size() % 16 == 0 for part in parts)
    return is_aligned and _has_grouped_product(rows.dtype)


@functools.cache
def _has_grouped_product(dtype: torch.dtype) -> bool:
    rows = torch.zeros(8, 8, dtype=dtype)
    try:
        F.grouped_mm(rows, rows[None], offs=torch.tensor([8], dtype=torch.int32))
    except (AttributeError, RuntimeError):  # not for float64, nor in an older torch
        return False
    return True


def kernels_for(*given: Tensor | None) -> ModuleType | None:
    """Return the module moeprune.layers.kernels if it can compute with these tensors, else None."""
    tensors = [tensor for tensor in given if tensor is not None]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if needs_grad or not tensors[0].is_cuda:
        return None
    kernels = _kernels()
    return kernels if kernels and all(tensor.dtype in kernels.DTYPES for tensor in tensors) else None


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from moeprune.layers import kernels
    except ImportError:  # no Triton for this platform
        return None
    return kernels
