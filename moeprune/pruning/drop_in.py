"""Ways to prune a language model that a folder can hold: as many experts, of one width, in each layer.

A budget of bytes can be spent on fewer experts, on narrower ones, or on both: at the same bytes, a few experts dropped
and the rest narrowed can be better than either. FLOPs of a token are those of the experts that it chooses, so that
only narrower experts save them.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from moeprune.amounts import experts_to_keep, parse_budget, parse_keep
from moeprune.errors import MoepruneError
from moeprune.models.architecture import ModelConfig
from moeprune.models.folders.costs import PrunedBytes
from moeprune.models.folders.form import DROP_IN
from moeprune.models.folders.quantised import quantisation_of
from moeprune.models.folders.widths import SHARED
from moeprune.models.language import LanguageModel
from moeprune.models.language_config import LanguageConfig
from moeprune.plan import Compensation, LayerPlan, Method, Plan, Wanted, refusal, uniform_plan
from moeprune.pruning.budgets import TooSmall
from moeprune.pruning.request import PruneRequest

SHARES = (Fraction(7, 8), Fraction(3, 4), Fraction(1, 2))  # of the experts, that are kept and narrowed under a budget
ALIGNED = 8  # kernels of grouped products take rows of so many numbers at least
COMPARED = ("auto", "none", *DROP_IN)  # compensations that go with a budget


def is_compared(config: ModelConfig, request: PruneRequest) -> bool:
    """Return True if a request leaves open, in a language model, how to compensate or how many experts to keep, and
    asks for nothing that a folder cannot hold.
    """
    wanted = request.wanted
    is_open = wanted.compensate == "auto" or request.max_size is not None or request.max_flops is not None
    is_plain = wanted.compensate in COMPARED and wanted.concrete_scope == "static" and wanted.energy is None
    return isinstance(config, LanguageConfig) and is_open and is_plain


class Size(NamedTuple):
    """Experts of each layer, and their hidden units; None: all."""

    k: int
    width: int | None


def drop_in_plans(model: LanguageModel, request: PruneRequest) -> list[Plan]:
    """Return the plans to choose from, first the one to take where nothing can be compared.

    Raises a MoepruneError if no plan meets the budget, or the folder cannot hold what is asked for.
    """
    wanted, layers = request.wanted, model.config.moe_layers
    if request.max_size is None and request.max_flops is None:
        sizes = [_stated(model, request)]
    else:
        sizes = _Budget(model, request).sizes()
    plans = []
    for size in sizes:
        for compensation in _ways(wanted, size, model.folder.num_experts, request.one_shot):
            signal: Any = wanted.signal_for(compensation)
            width = None if size.width is None else str(size.width)
            plans.append(uniform_plan(layers, size.k, Method("static", signal, compensation, width=width)))
    return plans


def _stated(model: LanguageModel, request: PruneRequest) -> Size:
    """Return the number of experts and their width that a request states."""
    name, layer = next(iter(model.config.moe_layers.items()))
    k = experts_to_keep(parse_keep(request.keep or "1.0"), layer.num_experts, name)
    return Size(k, _stated_width(model, request))


def _stated_width(model: LanguageModel, request: PruneRequest) -> int | None:
    if request.width is None:
        return None
    name, layer = next(iter(model.config.moe_layers.items()))
    what = "--width", "hidden units"
    return experts_to_keep(parse_keep(request.width, *what), layer.expert_width, name, *what)


def _ways(wanted: Wanted, size: Size, num_experts: int, one_shot: bool) -> Sequence[Compensation]:
    """Return the compensations to try for a number of experts and a width.

    With dropped experts a refit is better than none even on some hundreds of tokens, as its ridge is chosen on others.
    """
    if wanted.compensate != "auto":
        return (wanted.compensate,)
    if size.k == num_experts:
        return ("renorm",) if size.width is None else ("none", "renorm-refit")
    return ("renorm",) if one_shot else ("renorm-refit",)


class _Budget:
    """The numbers of experts and widths that meet a budget of bytes or FLOPs."""

    def __init__(self, model: LanguageModel, request: PruneRequest):
        self.model, self.request, self.layers = model, request, model.config.moe_layers
        self.num_experts = model.folder.num_experts
        self.bytes = None if request.max_size is None else PrunedBytes(model.folder, self.layers)
        given, unit, self.option = request.max_size, "B", "--max-size"
        if given is None:
            given, unit, self.option = request.max_flops, "FLOPs", "--max-flops"
        assert given is not None
        self.given, self.unit = given, unit
        amount, self.is_share = parse_budget(given, unit, self.option)
        self.full = self.cost(Size(self.num_experts, None))
        self.amount = amount * self.full if self.is_share else amount

    def plan(self, size: Size) -> Plan:
        """Return a plan of this size, for its cost and whether it is possible."""
        plan = LayerPlan("static", size.k, self.num_experts, "random", "renorm", width=size.width)
        return dict.fromkeys(self.layers, plan)

    def cost(self, size: Size) -> int:
        """Return the bytes or the FLOPs of the model."""
        return self.model.config.flops(self.plan(size)).total if self.bytes is None else self.bytes.of(*size)

    def most(self, sizes: Sequence[Size]) -> Size | None:
        """Return the last of some sizes, from small to large, that meets the budget."""
        place = bisect_right(sizes, self.amount, key=self.cost)
        return sizes[place - 1] if place else None

    def sizes(self) -> list[Size]:
        """Return what meets the budget, narrower experts first; raise a MoepruneError if nothing does."""
        if self.full <= self.amount and self.request.width is None:
            return [Size(self.num_experts, None)]
        counts, stated = self._counts(), _stated_width(self.model, self.request)
        if self.request.wanted.compensate == "none":
            counts = counts[-1:]
        fewest: list[Size] = []
        if stated is not None:
            self.model.require_writable(self.plan(Size(counts[-1], stated)))
            lists = [[Size(k, stated) for k in counts]]
        else:
            widths = [] if self.request.one_shot else self._widths()
            lists = [*self._narrower(counts, widths), [Size(k, None) for k in counts]]
            fewest = [Size(counts[0], width) for width in widths]
        found = [self.most(sizes) for sizes in lists]
        if possible := [*dict.fromkeys(filter(None, found))] or [*filter(None, [self.most(fewest)])]:
            return possible
        smallest = min(self.cost(sizes[0]) for sizes in [*lists, fewest] if sizes)
        least = f"{math.ceil(smallest / self.full * 1e4) / 1e4:g}" if self.is_share else f"{smallest}{self.unit}"
        tried = "" if self.request.width is not None else " without `--width`"
        message = f"`{self.option} {self.given}` is less than any plan takes that is tried{tried}"
        raise TooSmall(message, f"give at least {least}", smallest)

    def _counts(self) -> list[int]:
        """Return how many experts each layer can keep, ascending."""
        folder = self.model.folder
        plans = {k: self.plan(Size(k, None)) for k in range(1, self.num_experts + 1)}
        return [k for k, plan in plans.items() if not (refusal(plan, self.layers) or refusal(plan, folder.layers))]

    def _widths(self) -> list[int]:
        """Return how many hidden units a folder can state, ascending: whole blocks, multiples of ALIGNED if all are."""
        full = min(layer.hidden_units or 0 for layer in self.layers.values())
        how, language = quantisation_of(self.model.folder), self.model.folder.language
        block = 1 if how is None or how.block is None else math.lcm(*how.block)
        step = math.lcm(block, ALIGNED) if full % math.lcm(block, ALIGNED) == 0 else block
        shared = next((language[key] for key in SHARED if language.get(key)), 0) * full
        widths = [width for width in range(step, full, step) if not shared % width]
        try:
            self.model.require_writable(self.plan(Size(self.num_experts, widths[-1] if widths else 1)))
        except MoepruneError:
            return []
        return widths

    def _narrower(self, counts: Sequence[int], widths: Sequence[int]) -> Iterator[list[Size]]:
        """Yield sizes from small to large, the last within the budget of each of which is one to try: all experts of
        any width, and some of the widest that leaves as many.
        """
        yield [Size(self.num_experts, width) for width in widths]
        for share in SHARES:
            least = next(k for k in counts if k >= share * self.num_experts)
            if self.cost(Size(least, None)) <= self.amount:
                continue
            if (widest := self.most([Size(least, width) for width in widths])) is not None:
                yield [Size(k, widest.width) for k in counts if k >= least]
