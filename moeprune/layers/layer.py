"""Base of the modules of all families: tensors by configuration and plan, compensation, observer."""

from collections.abc import Callable, Mapping
from importlib import import_module

import torch
from torch import Tensor, nn

from moeprune.layers.config import FAMILIES
from moeprune.layers.experts import choose, fewest_with_mass, is_traced
from moeprune.layers.interface import LayerConfig
from moeprune.layers.observation import Observation, mean_token
from moeprune.plan import REFITS, LayerPlan

BESIDE_LOW_RANK = 2048  # hidden units of all kept experts that are refitted beside low-rank maps, at most


class MoELayer(nn.Module):
    """An MoE layer: tokens (b,m,d) in, tokens (b,m,o) out. Without a plan it is dense.

    With scope `static` only kept experts have weights; the router has their columns first, then those of the
    dropped ones. With `input` or `batch` all weights are there. A family provides `forward`, which calls
    `observe`.
    """

    fc2_weight: Tensor  # (e,o,h), the last linear of each expert that has weights
    surrogate: Tensor  # (n,p,o), outputs of dropped terms, in the order of the router's columns
    affine_token: Tensor  # W (d,o), V (d,o) and b (o) of X·W + mean(X)·V + b
    affine_mean: Tensor
    affine_bias: Tensor
    basis: Tensor  # (r,o), the directions that the last axis of these stands for, if there are few
    low_rank_in: Tensor  # (r,d) and (r,o), the directions of all low-rank maps, by falling rank of the maps
    low_rank_out: Tensor
    score_weights: Tensor  # (n); where the signal of a routed plan is not the mass alone
    weights_source: Callable[[nn.Module], None] | None = None  # gives it weights that stay on disk

    def __init__(self, config: LayerConfig, plan: LayerPlan | None = None):
        super().__init__()
        self.config = config
        self.plan = plan
        self.maps_of_rank = plan.maps_of_rank if plan is not None and plan.is_low_rank else {}
        self.observer: Callable[[Observation], None] | None = None
        for name, shape in config.shapes(plan).items():
            if name == "score_weights":
                self.register_buffer(name, torch.ones(shape))
            elif config.part(name) == "compensation":
                self.register_buffer(name, torch.zeros(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def load(self) -> "MoELayer":
        """Return the layer with its weights in memory: where they stay on disk, until others need the room."""
        if self.weights_source is not None:
            self.weights_source(self)
        return self

    def with_plan(self, plan: LayerPlan, tensors: Mapping[str, Tensor]) -> "MoELayer":
        """Return a layer of the same kind under a plan, of these tensors."""
        return layer_of_tensors(self.config, plan, tensors)

    @property
    def is_routed(self) -> bool:
        """True if experts are chosen anew for each input or batch."""
        return self.plan is not None and self.plan.scope != "static"

    @property
    def term_shape(self) -> tuple[int, int, int]:
        """(n,p,o) of the outputs of all terms that the router has columns for."""
        routed = self.plan.routed_experts if self.plan else self.config.num_experts
        return routed, self.config.terms_per_expert, self.config.output_width

    def choose(self, mass: Tensor) -> Tensor:
        """Return the experts (b,k) that run for each input, by the plan's signal and the mass (b,n).

        With a mass in the plan inputs may run fewer than k: n means none.
        """
        assert self.plan is not None
        scores = mass * self.score_weights if self.plan.signal == "deviation" else mass
        if self.plan.signal == "random":
            scores = self.score_weights.expand_as(mass)
        if self.plan.scope == "batch":
            scores = scores.sum(dim=0, keepdim=True).expand_as(scores)
        if self.plan.mass is None:
            return choose(scores, self.plan.k)
        chosen = fewest_with_mass(scores, mass, self.plan.mass, self.plan.k)
        if not (chosen.is_cuda or is_traced()) and len(chosen):  # the host may ask: what inputs need
            chosen = chosen[:, : int((chosen < self.config.num_experts).sum(1).amax())]
        return chosen

    def observe(self, observation: Callable[[], Observation]) -> None:
        """Hand the observer, if there is one, what a forward pass shows, in full precision."""
        if self.observer is not None:
            with torch.autocast(self.fc2_weight.device.type, enabled=False):
                self.observer(observation())

    def compensated(self, output: Tensor, x: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
        """Return an output (b,m,o) with the constants and the affine map that compensate for dropped experts, if any.

        x: the layer's input (b,m,d). weights: of all terms (b,m,n,p), zero for those that ran. mask: tokens
        that are not padding (b,m); None: all.
        """
        if self.plan is None or not self.plan.has_surrogate:
            return output
        added = weights.flatten(2).to(self.surrogate.dtype) @ self.surrogate.flatten(0, 1)
        if self.plan.has_affine:
            added = added + self.affine(x, mask)
        return output + (added @ self.basis if self.plan.has_basis else added)

    def affine(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return X·W + mean(X)·V + b (b,m,o or r) of the layer's input, or X·W + b."""
        if not self.config.uses_mean_token:
            return x @ self.affine_token + self.affine_bias
        of_mean = mean_token(x, mask) @ self.affine_mean + self.affine_bias
        return x @ self.affine_token + of_mean[:, None]

    def regressor_kinds(self) -> dict[str, int]:
        """Return the number of regressors of each kind that the compensation of a pruned layer is fitted on.

        hidden: what the kept experts' last linears take, times weights. bias: the experts' weights, for the biases of
        these linears. terms: weights of all terms. token, mean, one: the layer's input, the mean token, and 1.
        """
        assert self.plan is not None
        kinds, (n, p, _), d = {}, self.term_shape, self.config.dim
        hidden = len(self.fc2_weight) * self.fc2_weight.shape[2]
        is_beside = self.plan.is_low_rank and self.config.refits_by_expert and hidden <= BESIDE_LOW_RANK
        if hidden and (self.plan.compensation in REFITS or is_beside):
            kinds["hidden"] = hidden
        if self.plan.compensation == "renorm-refit" and getattr(self, "fc2_bias", None) is not None:
            kinds["bias"] = len(self.fc2_weight)
        if self.plan.has_surrogate:
            kinds["terms"] = n * p
        of_tokens = {"token": d, "mean": d, "one": 1} if self.config.uses_mean_token else {"token": d, "one": 1}
        return kinds | (of_tokens if self.plan.has_affine else {})

    def maps(self) -> list[tuple[slice, Tensor, Tensor]]:
        """Return the low-rank maps of each rank r: their places among all, and A (e,d,r) and B (e,r,o) of A·B.

        Maps are in the order of the router's columns; those of rank 0 are the last, and not returned.
        """
        found, first, row = [], 0, 0
        for rank, count in self.maps_of_rank.items():
            rows = slice(row, row + rank * count)
            into, out_of = (part[rows].unflatten(0, (count, rank)) for part in (self.low_rank_in, self.low_rank_out))
            found.append((slice(first, first + count), into.mT, out_of))
            first, row = first + count, rows.stop
        return found

    def split_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the rows (q,…) of a pruned layer's surrogates and affine map as its tensors."""
        assert self.plan is not None
        sizes = {name: size for name, size in self.regressor_kinds().items() if name not in ("hidden", "bias")}
        parts = dict(zip(sizes, rows.split([*sizes.values()]), strict=True))
        tensors = {"surrogate": parts["terms"].unflatten(0, self.term_shape[:2])} if "terms" in parts else {}
        if "token" in parts:
            tensors |= {"affine_token": parts["token"], "affine_bias": parts["one"][0]}
        if "mean" in parts:
            tensors["affine_mean"] = parts["mean"]
        return tensors

    def rows(self) -> Tensor:
        """Return the compensation tensors of a pruned layer as rows (q,o), in float64 on the CPU."""
        parts = [self.surrogate.flatten(0, 1)]
        if self.plan is not None and self.plan.has_affine:
            of_mean = [self.affine_mean] if self.config.uses_mean_token else []
            parts += [self.affine_token, *of_mean, self.affine_bias[None]]
        return torch.cat(parts).to("cpu", torch.float64)


def new_layer(config: LayerConfig, plan: LayerPlan | None = None) -> MoELayer:
    """Return a layer of a configuration under a plan, with fresh weights."""
    module, _, name = FAMILIES[config.__struct_config__.tag][1].partition(":")  # type: ignore[attr-defined]
    return getattr(import_module(module), name)(config, plan)


def layer_of_tensors(config: LayerConfig, plan: LayerPlan | None, tensors: Mapping[str, Tensor]) -> MoELayer:
    """Return a layer whose parameters and buffers are these very tensors, to run and not to train."""
    with torch.device("meta"):
        layer = new_layer(config, plan)
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False).eval()
