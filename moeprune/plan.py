"""Plans: the experts that each layer keeps, their compensation, and the JSON form."""

from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, get_args

import msgspec

from moeprune.amounts import experts_to_keep, parse_keep
from moeprune.errors import MoepruneError
from moeprune.records import Record, from_json

Scope = Literal["static", "input", "batch"]
Signal = Literal["combine", "deviation", "gram", "random", "frequency", "reap", "mone"]
Compensation = Literal[
    "none", "renorm", "mean", "lstsq", "affine", "refit", "renorm-refit", "low-rank", "low-rank-lstsq", "linear",
    "merge",
]  # fmt: skip
SCOPES, SIGNALS, COMPENSATIONS = get_args(Scope), get_args(Signal), get_args(Compensation)
WantedScope = Literal["auto", "static", "input", "batch"]
WantedSignal = Literal["auto", "combine", "deviation", "gram", "random", "frequency", "reap", "mone"]
WantedCompensation = Literal[
    "auto", "none", "renorm", "mean", "lstsq", "affine", "refit", "renorm-refit", "low-rank", "low-rank-lstsq",
    "linear", "merge",
]  # fmt: skip
LOW_RANK: tuple[Compensation, ...] = ("low-rank", "low-rank-lstsq")  # dropped experts become linear maps
FITTED = ("lstsq", "affine", "refit", "renorm-refit", *LOW_RANK, "linear")  # that a regression on data finds
AFFINE = ("affine", "refit", "low-rank", "linear")  # with a linear map of the layer's input
REFITS = ("refit", "renorm-refit")  # that change the kept experts' last linears
NARROWED = ("lstsq", "affine", "refit")  # that can be given in few directions of the output
WITH_RANK = (*NARROWED, *LOW_RANK)  # that have a rank, or an energy that decides it
OF_RUNS = ("frequency", "reap", "mone")  # signals by what tokens that choose an expert get from it
RANKING = ("gram", *OF_RUNS)  # signals by statistics of calibration data, for one set of experts
STATIC = (*REFITS, "linear", "merge", *RANKING)  # that need one set of experts for all inputs
RANK = 8  # of LOW_RANK, unless it is stated

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Rank = Positive | Annotated[float, msgspec.Meta(gt=0, lt=1)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Energy = Annotated[float, msgspec.Meta(gt=0, lt=1)]


def impossible(scope: str, signal: str, compensation: str) -> str | None:
    """Return why a scope, a signal and a compensation do not go together, or None if they do."""
    if compensation == "merge" and signal == "gram":  # the loss by merging is not a sum over pairs of experts
        return "compensation `merge` does not go with signal `gram`"
    for option, value in (("compensation", compensation), ("signal", signal)):
        if scope != "static" and value in STATIC:
            return f"{option} `{value}` needs one set of experts for all inputs, scope `static`"
    return None


def is_possible(scope: str, signal: str, compensation: str) -> bool:
    """Return True if a scope, a signal and a compensation go together."""
    return impossible(scope, signal, compensation) is None


class LayerPlan(Record, frozen=True, omit_defaults=False):
    """The experts of one layer that run, and the compensation for the others.

    Attributes:
        scope: `static` keeps one set for all inputs and removes the others from the checkpoint; with `input`
            each input runs its own k experts (Chung et al. 2024, arXiv 2409.00879, Algorithm 1), with `batch`
            each batch (Algorithm 2).
        k: experts that run; with a mass, the most that run.
        num_experts: experts of the unpruned layer (n).
        signal: the score that ranks the experts; `gram` (scope `static` only) scores sets of experts. Also for this
            scope only, in layers whose tokens choose experts: `frequency`, how many choose one; `reap`, the mean norm
            of what it adds to these (REAP, Lasby et al. 2025, arXiv 2510.13999); `mone`, how many choose it, times the
            variance of its output for these (MoNE, Zhang et al. 2025, arXiv 2507.00390).
        compensation: what a dropped expert gives: nothing (`none`); nothing, with weights normalised over
            the kept experts (`renorm`); its mean output (`mean`); the outputs that fit the unpruned layer
            best (`lstsq`), also with a linear map of the layer's input (`affine`), and with the kept experts'
            second linears fitted too (`refit`, scope `static` only). `renorm-refit` (scope `static` only) fits
            these to a router that knows kept experts alone: a smaller layer of the same kind. With `low-rank`
            dropped experts become linear maps of low rank, beside `affine`; with `low-rank-lstsq` beside `lstsq`.
            `linear` (scope `static` only) is a linear map of the layer's input in place of the layer: no expert is
            kept, nor the router. `merge` (scope `static` only) folds dropped experts into kept ones.
        kept: with scope `static`, the kept experts by their index in the unpruned layer, ascending; None
            until the signal has chosen them.
        mass: with scope `input`, each input runs the fewest experts, best first, that hold this share of its
            mass; None: k of them.
        merged_into: with `merge`, the kept expert that each dropped one, ascending, is folded into; None
            until data has decided.
        rank: with LOW_RANK, the mean rank of the maps, with scope `static` perhaps less than 1. With `lstsq`,
            `affine` and `refit` the number of output directions that they use; None: all.
        energy: with these four, the share of their energy that decides the rank. The last three take all directions
            if that is cheaper.
        ranks: with LOW_RANK, the rank of the map of each expert in `mapped`; None until data has decided.
        width: with scope `static`, the hidden units that are left of each kept expert; None: all.
    """

    scope: Scope
    k: Count
    num_experts: int
    signal: Signal
    compensation: Compensation
    kept: tuple[Count, ...] | None = None
    mass: Share | None = None
    merged_into: tuple[int, ...] | None = None
    rank: Rank | None = None
    energy: Energy | None = None
    ranks: tuple[Count, ...] | None = None
    width: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for is_broken, message in self._rules():
            if is_broken:
                raise MoepruneError(message)

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Yield whether each rule is broken, and what to say then."""
        k, n, kept, merged, compensation = self.k, self.num_experts, self.kept, self.merged_into, self.compensation
        yield k > n, f"`k` is {k}, expected 0 to {n}"
        needs_one = compensation in ("renorm", "renorm-refit", "merge")
        yield k == 0 and needs_one, f"compensation `{compensation}` needs at least one kept expert"
        keeps = compensation == "linear" and k > 0
        yield keeps, f"compensation `linear` keeps no expert, `k` is {k}"
        is_open = compensation in LOW_RANK and self.rank is None and self.energy is None
        yield is_open, f"compensation `{compensation}` needs a `rank` or an `energy`"
        is_part = self.rank is not None and self.rank < 1
        needed = f"expected a whole number; a share goes with `{'` or `'.join(LOW_RANK)}` and scope `static`"
        is_whole = compensation not in LOW_RANK or self.scope != "static"
        yield is_part and is_whole, f"`rank` is {self.rank}, {needed}"
        if self.ranks is not None:
            yield compensation not in LOW_RANK, f"`ranks` go with compensation `{'` or `'.join(LOW_RANK)}` only"
            maps = n - k if self.scope == "static" else n
            yield len(self.ranks) != maps, f"`ranks` has {len(self.ranks)} numbers, expected {maps}: one for each map"
            differ = self.scope != "static" and (len({*self.ranks}) > 1 or 0 in self.ranks)
            yield differ, f"`ranks` differ or are 0, expected equal ones above 0 with scope `{self.scope}`"
        reason = impossible(self.scope, self.signal, compensation)
        yield reason is not None, reason or ""
        is_adaptive = self.mass is not None
        yield (
            is_adaptive and (self.scope != "input" or k == 0),
            "`mass` goes with scope `input`, and at least one expert",
        )
        if kept is not None:
            yield self.scope != "static", "`kept` goes with scope `static` only"
            wrong = len(kept) != k or list(kept) != sorted(set(kept)) or any(j >= n for j in kept)
            yield wrong, f"`kept` is {list(kept)}, expected {k} different experts below {n}, as many as `k` says"
        if merged is not None:
            yield compensation != "merge" or kept is None, "`merged_into` goes with compensation `merge`, and `kept`"
            wrong = len(merged) != n - k or not set(merged) <= set(kept or ())  # the dropped may be too many to list
            expected = f"expected a kept expert for each of the {n - k} dropped ones"
            yield wrong, f"`merged_into` is {list(merged)}, {expected}"
        for name in ("rank", "energy"):
            of_none = getattr(self, name) is not None and compensation not in WITH_RANK
            yield of_none, f"`{name}` goes with the compensations {', '.join(WITH_RANK)}"
        both = self.rank is not None and self.energy is not None
        yield both, "`rank` and `energy` do not go together: the energy decides the rank"
        whole = self.scope != "static" or k == 0 or compensation in ("merge", "linear")
        expected = "scope `static`, at least one expert, and any compensation but `merge` and `linear`"
        yield self.width is not None and whole, f"`width` goes with {expected}"

    @property
    def drops(self) -> bool:
        """True if an expert may not run."""
        return self.k < self.num_experts or self.mass is not None

    @property
    def compensates(self) -> bool:
        """True if something is left out that the compensation makes up for: experts, or hidden units of all of them."""
        return self.drops or (self.width is not None and self.compensation not in ("mean", *LOW_RANK))

    @property
    def is_calibrated(self) -> bool:
        """True if calibration data decides something."""
        return (self.kept is None and self.is_ranked) or self.has_surrogate or self.is_fitted

    @property
    def is_ranked(self) -> bool:
        """True if the signal ranks the experts by statistics of calibration data."""
        return self.signal in ("deviation", *RANKING) or (self.scope == "static" and self.signal == "combine")

    @property
    def is_fitted(self) -> bool:
        """True if the compensation, or the experts that lose hidden units, need a pass over data."""
        return (self.compensation in FITTED and self.drops) or self.merges or self.width is not None

    @property
    def changes_experts(self) -> bool:
        """True if the weights of kept experts may differ from those in the unpruned layer."""
        return self.width is not None or (self.drops and self.compensation in (*REFITS, *LOW_RANK, "merge"))

    @property
    def merges(self) -> bool:
        """True if dropped experts are folded into kept ones."""
        return self.compensation == "merge" and self.drops

    @property
    def groups(self) -> list[list[int]]:
        """With `merge`, each kept expert, ascending, followed by those that are folded into it."""
        groups = {j: [j] for j in self.kept or ()}
        for i, j in zip(self.dropped, self.merged_into or (), strict=False):
            groups[j].append(i)
        return [*groups.values()]

    @property
    def stored_experts(self) -> int:
        """Number of experts whose weights are in the checkpoint."""
        return self.k if self.scope == "static" else self.num_experts

    @property
    def routed_experts(self) -> int:
        """Number of experts that the router has columns for: all, unless the router itself is cut."""
        return self.stored_experts if self.cuts_router else self.num_experts

    @property
    def cuts_router(self) -> bool:
        """True if the router knows kept experts alone."""
        return self.compensation in ("renorm", "renorm-refit", "linear")

    @property
    def dropped(self) -> tuple[int, ...]:
        """With scope `static`, the experts that are removed, ascending."""
        return tuple(sorted(set(range(self.num_experts)) - set(self.kept or ())))

    @property
    def columns(self) -> tuple[int, ...]:
        """With scope `static`, the experts in the order of the router's columns: kept first, or by groups; dropped ones
        by falling rank of their maps, if these have one.
        """
        if self.merges:
            return tuple(j for group in self.groups for j in group)
        kept, dropped = self.kept or (), self.dropped
        if self.ranks is not None and dropped:
            of = dict(zip(dropped, self.ranks, strict=True))
            dropped = tuple(sorted(dropped, key=lambda j: -of[j]))
        return kept if self.cuts_router else kept + dropped

    @property
    def has_surrogate(self) -> bool:
        """True if constants take the place of the outputs of dropped experts, or correct those of others."""
        return self.compensation in ("mean", *NARROWED, *LOW_RANK) and self.compensates

    @property
    def is_low_rank(self) -> bool:
        """True if dropped experts are linear maps of low rank."""
        return self.compensation in LOW_RANK and self.drops

    @property
    def mapped(self) -> tuple[int, ...]:
        """With LOW_RANK, the experts that have a map, ascending: the dropped ones, or all if routed."""
        return self.dropped if self.scope == "static" else tuple(range(self.num_experts))

    @property
    def maps_of_rank(self) -> dict[int, int]:
        """With LOW_RANK, how many maps have each rank above 0, from the largest: as many as `rank` says until `ranks`
        are decided.
        """
        maps = self.num_experts - self.k if self.scope == "static" else self.num_experts
        if self.ranks is None:
            rank = self.rank or 0
            return {1: max(1, int(rank * maps))} if 0 < rank < 1 else {int(rank): maps} if rank and maps else {}
        counts = Counter(self.ranks)
        return {rank: counts[rank] for rank in sorted(counts, reverse=True) if rank}

    @property
    def directions(self) -> int:
        """With LOW_RANK, the ranks of all maps together."""
        return sum(rank * maps for rank, maps in self.maps_of_rank.items())

    @property
    def has_basis(self) -> bool:
        """True if the compensation is given in few directions of the output."""
        return self.has_surrogate and self.rank is not None and not self.is_low_rank

    @property
    def has_affine(self) -> bool:
        """True if a linear map of the layer's input is added to its output."""
        return self.compensation in AFFINE and self.compensates


Plan = dict[str, LayerPlan]  # the plans of a model's layers by layer name, in the order of the data flow


class Method(Record, frozen=True):
    """A way to prune layers, for any number of experts; see LayerPlan for the fields."""

    scope: Scope = "static"
    signal: Signal = "combine"
    compensate: Compensation = "none"
    mass: Share | None = None
    energy: Energy | None = None
    rank: Rank | None = None
    width: str | None = None

    def plan(
        self, k: int, num_experts: int, kept: tuple[int, ...] | None = None, width: int | None = None
    ) -> LayerPlan:
        """Return the plan of a layer that keeps k experts, of `width` hidden units; `linear` keeps none."""
        k = 0 if self.compensate == "linear" else k
        is_known = self.scope == "static" and (k == 0 or (k == num_experts and width is not None))
        kept = tuple(range(k)) if is_known else kept
        return LayerPlan(
            self.scope, k, num_experts, self.signal, self.compensate, kept, self.mass,
            rank=self.rank, energy=self.energy, width=width,
        )  # fmt: skip

    def plan_of(self, layer: Any, name: str, k: int, kept: tuple[int, ...] | None = None) -> LayerPlan:
        """Return the plan of a layer (LayerConfig) of a name that keeps k experts, with the width in hidden units."""
        what = "--width", "hidden units"
        share = None if self.width is None else parse_keep(self.width, *what)
        width = None if share is None else experts_to_keep(share, layer.expert_width, name, *what)
        return self.plan(k, layer.num_experts, kept, width)

    def __str__(self) -> str:
        rank = "" if self.rank is None else f" of rank {self.rank:g}"
        width = "" if self.width is None else f" with {self.width} of the hidden units"
        return f"scope {self.scope}, signal {self.signal} and compensation {self.compensate}{rank}{width}"


class Wanted(Record, frozen=True):
    """A method as it is asked for; `auto` leaves a choice open, see moeprune.pruning.auto."""

    scope: WantedScope = "auto"
    signal: WantedSignal = "auto"
    compensate: WantedCompensation = "auto"
    mass: Share | None = None
    energy: Energy | None = None
    rank: Rank | None = None
    width: str | None = None

    @property
    def concrete_scope(self) -> Scope:
        """The scope; `auto` is `static`, or `input` with a mass."""
        if self.scope != "auto":
            return self.scope
        return "static" if self.mass is None else "input"

    def signal_for(self, compensation: str, has_data: bool = True) -> str:
        """Return the signal that goes with a compensation; has_data: calibration data can decide."""
        if self.signal != "auto":
            return self.signal
        if self.concrete_scope != "static":
            return "deviation" if has_data else "combine"
        return "combine" if compensation in ("merge", "linear") else "gram"


def uniform_plan(layers: Mapping[str, Any], keep: Fraction | int, method: Method, option: str = "--keep") -> Plan:
    """Keep the same share or number of experts in each layer (LayerConfig), for the signal to choose.

    option: the name of keep in errors, see experts_to_keep.
    """
    counts = {name: experts_to_keep(keep, layer.num_experts, name, option) for name, layer in layers.items()}
    return {name: method.plan_of(layer, name, counts[name]) for name, layer in layers.items()}


def require_fitting_plan(plan: Plan, layers: Mapping[str, Any]) -> None:
    """Raise a MoepruneError that names a layer of the plan that does not fit the model's (LayerConfig)."""
    for name, layer in plan.items():
        if name not in layers:
            hint = f"its MoE layers are {', '.join(f'`{known}`' for known in layers)}"
            raise MoepruneError(f"the plan names layer `{name}`, which is not in the model", hint)
        if (planned := layer.num_experts) != (n := layers[name].num_experts):
            raise MoepruneError(f"the plan of layer `{name}` is for {planned} experts, the layer has {n}")
    if reason := refusal(plan, layers):
        raise MoepruneError(reason)


def require_decided(plan: Plan) -> None:
    """Raise a MoepruneError if the plan of a pruned layer leaves something open."""
    for name, layer in plan.items():
        open_fields = {
            "merged_into": layer.merges and layer.merged_into is None,
            "rank": layer.energy is not None,
            "ranks": layer.is_low_rank and layer.ranks is None,
            "kept": layer.scope == "static" and layer.kept is None,
        }
        if lacking := [f"`{field}`" for field, is_open in open_fields.items() if is_open]:
            raise MoepruneError(f"the plan of layer `{name}` lacks {', '.join(lacking)}")


def refusal(plan: Plan, layers: Mapping[str, Any]) -> str | None:
    """Return why a layer of the model (LayerConfig) cannot be pruned by its plan, None if all can."""
    reasons = ((name, layers[name].refusal(layer)) for name, layer in plan.items())
    return next((f"layer `{name}` {reason}" for name, reason in reasons if reason), None)


def plan_from_json(value: Any) -> Plan:
    """Read a plan from JSON values, or raise a MoepruneError that names the layer."""
    if not isinstance(value, Mapping):
        raise MoepruneError(f"plan: found {type(value).__name__}, expected an object of layers")
    plan: Plan = {}
    for name, layer in value.items():
        try:
            plan[name] = from_json(layer, LayerPlan, "")
        except MoepruneError as error:
            raise MoepruneError(f"plan of `{name}`: {error.message}", error.hint) from None
    return plan
