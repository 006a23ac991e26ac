"""The layer of token-gated experts: dense, or statically pruned.

Axes: b inputs, m tokens of each, t = b·m, d width, n experts, k of them chosen for each token, r ≤ t·k rows of a token
and one of its experts, h hidden width of an expert. The maths (Shazeer et al. 2017, arXiv 1701.06538, section 2):

    y = sum over the chosen experts j of g_j(x)·f_j(x)

Only rows are computed. With only some experts kept, a token's dropped experts give nothing, or g_j(x)·u_j, or with
`low-rank` g_j(x)·(A_j·B_j·x + u_j); or the router is cut to the kept experts, among which tokens then choose.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moeprune.layers.experts import GATHERED, Experts, is_traced, kernels_for, run_experts
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.layers.gates import Order, Routing, route
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import masked
from moeprune.layers.routed_rows import RoutedRows, Rows
from moeprune.plan import LayerPlan

COPIED = 48 << 10  # bytes of weights that are copied in the time that a loop takes for one expert more
FEW = 256 << 10  # bytes that are copied faster than a loop begins


class GatedMoE(MoELayer):
    """A layer of token-gated experts for inputs (b,m,d), or single tokens (b,d)."""

    config: GatedMoEConfig
    router_weight: Tensor  # (n,d)
    router_bias: Tensor | None  # (n)
    selection_bias: Tensor | None  # (n)
    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_bias: Tensor | None

    def __init__(self, config: GatedMoEConfig, plan: LayerPlan | None = None):
        super().__init__(config, plan)
        for name in ("router_bias", "selection_bias", "fc1_weight", "fc1_bias", "fc2_bias"):
            if name not in config.router_shapes(1) | config.expert_shapes(1):
                self.register_parameter(name, None)
        self._order: Order | None = None
        self._merged: Tensor | None = None  # the expert of each column (n)
        if not self.fc2_weight.is_meta:
            self.reset_parameters()

    @property
    def experts(self) -> Experts:
        """The weights of the experts that are stored."""
        config = self.config
        weights = self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
        return Experts(*weights, config.activation, config.gate_columns, config.limit)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw initial weights; biases for the choice are 0."""
        d, h = self.config.dim, self.config.expert_width
        with torch.no_grad():
            for name, tensor in self.named_parameters():
                bound = 1 / math.sqrt(h if name.startswith("fc2") else d)
                tensor.uniform_(-bound, bound, generator=generator)
            if self.selection_bias is not None:
                self.selection_bias.zero_()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output, shaped as x: inputs (b,m,d), or single tokens (b,d).

        mask: tokens that are not padding (b,m); the others do not count in statistics.
        """
        if x.ndim == 2:
            return self.forward(x[:, None], mask)[:, 0]
        self.load()
        plan, tokens = self.plan, x.flatten(0, 1)
        if plan is not None and plan.compensation == "linear":
            output = self.affine(x.to(self.affine_token.dtype), mask).to(x.dtype)
            nothing = Routing(torch.empty_like(tokens[:, :0], dtype=torch.int64), tokens[:, :0])
            no_rows = Rows.sorted(nothing.chosen, 0), output.flatten(0, 1)[:0]
            self.observe(lambda: self._observation(x, nothing, output, mask, no_rows))
            return output
        routing = self.route(tokens)
        found: tuple[Rows, Tensor] | None = None
        if self.observer is None and self._is_blind(routing):
            output = self._run_blindly(tokens, routing)
        else:
            output, found = self._run_rows(tokens, routing)
        output = output.to(x.dtype).view_as(x)
        if plan is not None and plan.has_surrogate:
            output = self.compensated(output, x, self._weights_of_terms(x, routing), mask).to(x.dtype)
        self.observe(lambda: self._observation(x, routing, output, mask, found))
        return output

    def route(self, tokens: Tensor) -> Routing:
        """Return the columns that tokens (t,d) choose, with `merge` the experts of these, and their gates (t,k)."""
        routing = route(self.config, self.logits(tokens), self.selection_bias, self._order_of(tokens.device))
        if self.plan is None or not self.plan.merges:
            return routing
        if self._merged is None or self._merged.device != tokens.device:
            sizes = torch.tensor([len(group) for group in self.plan.groups], device=tokens.device)
            self._merged = torch.arange(len(sizes), device=tokens.device).repeat_interleave(sizes)
        return routing._replace(chosen=self._merged[routing.chosen])

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the router's logits (t,n) for tokens (t,d)."""
        weight, bias = self.router_weight, self.router_bias
        dtype = torch.float32 if self.config.float32_router else weight.dtype
        dtype = torch.promote_types(tokens.dtype, dtype)
        with torch.autocast(tokens.device.type, enabled=False):  # which would round the logits
            return F.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def choose_by(self, logits: Tensor, experts: list[int] | None = None, without: Tensor | None = None) -> Routing:
        """Return the columns of logits (t,a) that tokens of a dense layer choose, and their gates (t,k).

        experts: that the columns are of; None: all. without: for each token a column that it may not choose (t).
        """
        bias = self.selection_bias if experts is None or self.selection_bias is None else self.selection_bias[experts]
        if without is not None:
            logits = logits.scatter(1, without[:, None], -torch.inf)
            bias = logits.new_zeros(()) if bias is None else bias
            bias = bias.expand_as(logits).scatter(1, without[:, None], -torch.inf)
        return route(self.config, logits, bias, None)

    def outputs_of_all(self, tokens: Tensor, directions: Tensor) -> Tensor:
        """Return the output of every expert of a dense layer for tokens (t,d), along directions (o,s): (n,t,s)."""
        rows = tokens.to(self.fc2_weight.dtype)[None]
        found = [self.experts.one(j).run(rows)[0].float() @ directions for j in range(len(self.fc2_weight))]
        return torch.stack(found)

    def _order_of(self, device: torch.device) -> Order | None:
        """Return the order of the router's rows, kept experts first, if it is not that of groups."""
        if self.plan is None or self.plan.cuts_router or self.config.groups == 1:
            return None
        if self._order is None or self._order.experts.device != device:
            experts = torch.tensor(self.plan.columns, device=device)
            self._order = Order(experts.argsort(), experts)
        return self._order

    def _weights(self, routing: Routing) -> Tensor:
        """Return what the outputs of the chosen experts are multiplied by (t,k)."""
        return torch.ones_like(routing.gates) if self.config.weigh == "inputs" else routing.gates

    def _weights_of_terms(self, x: Tensor, routing: Routing) -> Tensor:
        """Return the same for all experts (b,m,n,1), zero for those that are not chosen."""
        zeros = routing.gates.new_zeros(routing.gates.shape[0], self.term_shape[0])
        return zeros.scatter_add(1, routing.chosen, self._weights(routing)).view(*x.shape[:2], -1, 1)

    def _taken(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """Return what experts take of tokens with these gates."""
        return (tokens * gates[..., None]).to(tokens.dtype) if self.config.weigh == "inputs" else tokens

    @property
    def _parts(self) -> list[tuple[int, Experts]]:
        """The experts that run, and the column of the router where theirs begin: the kept ones, and low-rank maps."""
        kept = len(self.fc2_weight)
        parts = [(0, self.experts)]
        for places, into, out_of in self.maps():
            parts.append((kept + places.start, Experts(into, None, out_of.mT, None, "identity")))
        return [(first, experts) for first, experts in parts if len(experts.fc2_weight)]

    def _is_blind(self, routing: Routing) -> bool:
        """Return True if rows are computed without asking which experts are chosen."""
        weights = (tensor for _, experts in self._parts for tensor in experts.tensors)
        if self.experts.features is not None:
            return is_traced()
        if is_traced() or kernels_for(self.router_weight, *weights):
            return True
        rows, experts = routing.chosen.numel(), len(self.fc2_weight)
        bytes_of_one = sum(tensor[0].nbytes for tensor in self.experts.tensors) if experts else 0
        most = min(GATHERED, max(FEW, COPIED * min(rows, experts)))
        return rows * bytes_of_one <= most and experts == self.term_shape[0]

    def _run_blindly(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Return the weighted outputs (t,o) of tokens (t,d), without sorting rows on the host."""
        weights = self._weights(routing)
        taken = self._taken(tokens[:, None], routing.gates).expand(-1, weights.shape[1], -1)[:, :, None]
        output = tokens.new_zeros(tokens.shape[0], self.config.output_width)
        for first, experts in self._parts:
            count = len(experts.fc2_weight)
            places, idle = routing.chosen - first, None
            if count < self.term_shape[0]:
                idle = (places < 0) | (places >= count)
                places = places.masked_fill(idle, count)
            outputs = run_experts(taken, places, experts, idle)[:, :, 0]  # (t,k,o)
            output = output + (weights.to(outputs.dtype)[:, None] @ outputs)[:, 0]
        return output

    def _run_rows(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, tuple[Rows, Tensor]]:
        """Return the weighted outputs (t,o), and the rows of experts that have weights, with their outputs (r,o)."""
        every, weights = Rows.sorted(routing.chosen, self.term_shape[0]), self._weights(routing).flatten()
        output = weights.new_zeros(len(tokens), self.config.output_width)
        shown, outputs = every.of_experts(0, len(self.fc2_weight)), tokens.new_zeros(0, self.config.output_width)
        for first, experts in self._parts:
            rows = every.of_experts(first, len(experts.fc2_weight))
            taken = self._taken(tokens[rows.tokens], routing.gates.flatten()[rows.pairs])
            found = experts.run(taken, rows.counts)
            output.index_add_(0, rows.tokens, found * weights[rows.pairs, None])
            outputs = found if first < len(self.fc2_weight) else outputs
        return output, (shown, outputs)

    def hidden(self, rows: Tensor, expert: int) -> Tensor:
        """Return what the last linear of an expert takes (r,h) of rows (r,d)."""
        return self.experts.one(expert).hidden(rows.to(self.fc2_weight.dtype)[None])[0]

    def _observation(
        self, x: Tensor, routing: Routing, output: Tensor, mask: Tensor | None, found: tuple[Rows, Tensor] | None
    ) -> RoutedRows:
        assert found is not None
        rows, row_outputs = found
        if mask is not None:
            is_token = mask.flatten()[rows.tokens]
            rows, row_outputs = rows.where(is_token), row_outputs[is_token]
        gates = routing.gates.flatten()[rows.pairs]
        is_input = self.config.weigh == "inputs"
        of_experts = torch.zeros_like(routing.gates[:, :1]).expand(-1, self.term_shape[0])
        of_experts = masked(of_experts.scatter_add(1, routing.chosen, routing.gates).view(*x.shape[:2], -1), mask)
        count = x.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp_min(1)
        return RoutedRows(
            masked(self._weights_of_terms(x, routing), mask), of_experts.sum(1) / count, masked(output, mask),
            masked(x, mask), mask, None, row_outputs, rows=rows, row_hidden=self.hidden,
            row_weights=torch.ones_like(gates) if is_input else gates, row_gates=gates if is_input else None,
        )  # fmt: skip
