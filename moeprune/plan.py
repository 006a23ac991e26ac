"""What a pruned checkpoint keeps, layer by layer, and its JSON form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any

from moeprune.errors import MoepruneError

SCOPES = ("static", "input", "batch")
SIGNALS = ("combine", "deviation", "gram", "random")
COMPENSATIONS = ("none", "renorm", "mean", "lstsq", "affine", "refit", "merge")
FITTED = ("lstsq", "affine", "refit")
"""Compensations that a regression on data finds."""
AFFINE = ("affine", "refit")
"""Compensations with a linear map of the layer's input."""


def is_possible(scope: str, signal: str, compensation: str) -> bool:
    """Whether a scope, a signal and a compensation go together."""
    if compensation == "merge" and signal == "gram":
        return False  # what is lost by merging is no sum over pairs of experts
    return scope == "static" or (signal != "gram" and compensation not in ("refit", "merge"))


def scopes_of(layers: Iterable[Any]) -> tuple[str, ...]:
    """The scopes in which layers can be pruned together: not `static` where slots of one are dynamic.

    Args:
        layers: each has `dynamic_slots` (see SoftMoEConfig).
    """
    is_dynamic = any(layer.dynamic_slots for layer in layers)
    return tuple(scope for scope in SCOPES if not (is_dynamic and scope == "static"))


@dataclass(frozen=True)
class LayerPlan:
    """Which experts of one layer run, and what stands in for the others.

    scope: `static` one set for all inputs, the others are gone from the checkpoint; `input` each
        input keeps its own k experts (Chung et al. 2024, arXiv 2409.00879, Algorithm 1); `batch`
        one set for each batch (Algorithm 2).
    k: experts that run; with a mass, that run at most.
    num_experts: experts of the unpruned layer (n).
    signal: the score that ranks the experts ; `gram`, with scope `static` alone, looks at sets
        of experts.
    compensation: what a dropped expert gives: nothing (`none`), nothing while the combine softmax
        is taken over the kept ones (`renorm`), its mean output (`mean`), the output that fits
        the unpruned layer best (`lstsq`), or that beside a linear map of the layer's input (`affine`).
        `refit`, with scope `static` alone, does the last and fits the kept experts' second linears too.
        `merge`, with scope `static` alone, folds dropped experts into kept ones, which run their slots too
        (moeprune.layers.merging).
    kept: with scope `static` the kept experts by their index in the unpruned layer, ascending; None where
        the signal is yet to choose them, which no checkpoint leaves open.
    mass: with scope `input`, that each input runs the fewest experts, best first, that hold this share of
        its combine mass; None: k of them.
    merged_into: with `merge`, for each dropped expert, ascending, the kept one that it is folded into; None
        where data is yet to tell.
    rank: with a fitted compensation, in how many directions of the output it is given ; None: in all of them.
    energy: that the rank is yet to be chosen: the fewest directions that hold this share of what the
        compensation adds, if that makes it cheaper.
    """

    scope: str
    k: int
    num_experts: int
    signal: str
    compensation: str
    kept: tuple[int, ...] | None = None
    mass: float | None = None
    merged_into: tuple[int, ...] | None = None
    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("scope", SCOPES), ("signal", SIGNALS), ("compensation", COMPENSATIONS)):
            if getattr(self, name) not in choices:
                raise MoepruneError(
                    f"plan: `{name}` is {getattr(self, name)!r}, expected one of {', '.join(choices)}"
                )
        if type(self.k) is not int or type(self.num_experts) is not int:
            raise MoepruneError(
                f"plan: `k` and `num_experts` are {self.k!r} and {self.num_experts!r}, expected whole numbers"
            )
        if not 0 <= self.k <= self.num_experts:
            raise MoepruneError(f"plan: `k` is {self.k}, expected 0 to {self.num_experts}")
        if self.k == 0 and self.compensation in ("renorm", "merge"):
            raise MoepruneError(f"plan: `{self.compensation}` needs at least one kept expert")
        if self.mass is not None:
            if not (type(self.mass) in (int, float) and 0 < self.mass <= 1):
                raise MoepruneError(f"plan: `mass` is {self.mass!r}, expected a share above 0 and at most 1")
            if self.scope != "input" or self.k == 0:
                raise MoepruneError("plan: `mass` goes with scope input, and at least one expert")
        if not is_possible(self.scope, self.signal, self.compensation):
            if self.scope == "static":
                raise MoepruneError("plan: compensation `merge` does not go with signal `gram`")
            what = f"compensation `{self.compensation}`" if self.signal != "gram" else "signal `gram`"
            raise MoepruneError(f"plan: {what} is for one set for all inputs: it goes with scope static")
        if self.kept is not None and self.scope != "static":
            raise MoepruneError("plan: `kept` goes with scope static and with no other")
        if self.kept is not None:
            valid = all(type(j) is int and 0 <= j < self.num_experts for j in self.kept)
            if not valid or len(self.kept) != self.k or list(self.kept) != sorted(set(self.kept)):
                raise MoepruneError(
                    f"plan: `kept` is {list(self.kept)}, expected {self.k} different experts"
                    f" below {self.num_experts}, ascending"
                )
        self._check_rank()
        if self.merged_into is not None:
            if self.compensation != "merge" or self.kept is None:
                raise MoepruneError("plan: `merged_into` goes with compensation `merge`, and `kept`")
            dropped = self.num_experts - self.k  # may be so many that they must not be listed
            if len(self.merged_into) != dropped or not set(self.merged_into) <= set(self.kept):
                raise MoepruneError(
                    f"plan: `merged_into` is {list(self.merged_into)}, expected a kept expert for each of the"
                    f" {dropped} dropped ones"
                )

    def _check_rank(self) -> None:
        if self.rank is None and self.energy is None:
            return
        if self.compensation not in FITTED:
            raise MoepruneError(f"plan: `rank` and `energy` go with compensations {', '.join(FITTED)}")
        if self.rank is not None and self.energy is not None:
            raise MoepruneError("plan: `rank` and `energy` do not go together: the energy chooses the rank")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise MoepruneError(f"plan: `rank` is {self.rank!r}, expected a number of directions, at least 1")
        if self.energy is not None and not (type(self.energy) is float and 0 < self.energy < 1):
            raise MoepruneError(f"plan: `energy` is {self.energy!r}, expected a share above 0 and below 1")

    @property
    def drops(self) -> bool:
        """Whether an expert may not run."""
        return self.k < self.num_experts or self.mass is not None

    @property
    def is_calibrated(self) -> bool:
        """Whether something is used that only calibration data can tell."""
        return (self.kept is None and self.is_ranked) or self.has_surrogate or self.merges

    @property
    def is_ranked(self) -> bool:
        """Whether the signal ranks the experts by what only calibration data can tell."""
        return self.signal in ("deviation", "gram") or (self.scope == "static" and self.signal == "combine")

    @property
    def is_fitted(self) -> bool:
        """Whether a pass over data finds what stands in for the dropped experts."""
        return (self.has_surrogate and self.compensation in FITTED) or self.merges

    @property
    def merges(self) -> bool:
        """Whether dropped experts are folded into kept ones."""
        return self.compensation == "merge" and self.drops

    @cached_property
    def groups(self) -> list[list[int]]:
        """With `merge` each kept expert, ascending, followed by those that are folded into it."""
        groups = {j: [j] for j in self.kept or ()}
        for i, j in zip(self.dropped, self.merged_into or (), strict=False):
            groups[j].append(i)
        return [*groups.values()]

    @property
    def stored_experts(self) -> int:
        """Experts whose weights are in the checkpoint."""
        return self.k if self.scope == "static" else self.num_experts

    @property
    def routed_experts(self) -> int:
        """Experts that have router logits: all of them, unless phi itself was sliced."""
        return self.k if self.scope == "static" and self.compensation == "renorm" else self.num_experts

    @property
    def dropped(self) -> tuple[int, ...]:
        """With scope `static` the experts that are gone, ascending."""
        return tuple(sorted(set(range(self.num_experts)) - set(self.kept or ())))

    @property
    def columns(self) -> tuple[int, ...]:
        """With scope `static` the experts that have router logits, in their order: kept ones first, or with
        `merge` group by group.
        """
        if self.merges:
            return tuple(j for group in self.groups for j in group)
        kept = self.kept or ()
        return kept if self.compensation == "renorm" else kept + self.dropped

    @property
    def has_surrogate(self) -> bool:
        """Whether something stands in for the dropped experts."""
        return self.compensation in ("mean", *FITTED) and self.drops

    @property
    def has_basis(self) -> bool:
        """Whether what stands in for the dropped experts is given in few directions of the output."""
        return self.has_surrogate and self.rank is not None

    @property
    def has_affine(self) -> bool:
        """Whether a linear map of the layer's input is added to its output."""
        return self.compensation in AFFINE and self.drops


Plan = dict[str, LayerPlan]
"""The plans of a model's layers by layer name, in the order of the data flow."""


def uniform_plan(
    layers: Mapping[str, int],
    keep: Fraction | int,
    scope: str,
    signal: str,
    compensation: str,
    mass: float | None = None,
    energy: float | None = None,
) -> Plan:
    """The same share or number of experts in each layer, which the signal is yet to choose.

    Args:
        layers: the number of experts of each layer.
        keep: as parse_keep returns it.
        scope: see LayerPlan, like signal, compensation, mass and energy.

    Raises:
        MoepruneError: more experts asked for than a layer has, or values that do not fit each other.
    """
    return {
        name: LayerPlan(
            scope, experts_to_keep(keep, n, name), n, signal, compensation, mass=mass, energy=energy
        )
        for name, n in layers.items()
    }


def require_fitting_plan(plan: Plan, layers: Mapping[str, Any]) -> None:
    """Raise a MoepruneError that names a layer of a plan that a model lacks, whose experts it has not, or
    that cannot be pruned so.

    Args:
        layers: of the model; each has `num_experts`, `output_width` and `dynamic_slots` (see SoftMoEConfig).
    """
    for name, layer in plan.items():
        if name not in layers:
            raise MoepruneError(
                f"the plan names layer `{name}`, which the model has not",
                f"its Soft MoE layers are {', '.join(f'`{known}`' for known in layers)}",
            )
        if layer.num_experts != layers[name].num_experts:
            raise MoepruneError(
                f"the plan of layer `{name}` is for {layer.num_experts} experts, the layer has"
                f" {layers[name].num_experts}"
            )
        if layer.rank is not None and layer.rank > layers[name].output_width:
            raise MoepruneError(
                f"the plan of layer `{name}` has the rank {layer.rank}, the layer's output has"
                f" {layers[name].output_width} directions"
            )
        if layer.scope == "static" and layers[name].dynamic_slots:
            raise MoepruneError(
                f"layer `{name}` makes its slots anew from each input's tokens, and the number of its experts"
                " sets how many tokens make one: without some of them it would be another layer",
                "prune with `--scope input` or `--scope batch`",
            )


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; `plan_from_json` reads it back."""
    return {name: asdict(layer) for name, layer in plan.items()}


def plan_from_json(value: Any) -> Plan:
    """Read a plan from JSON values.

    Raises:
        MoepruneError: an unknown or missing key, or a value that does not fit.
    """
    if not isinstance(value, Mapping):
        raise MoepruneError(f"plan: found {type(value).__name__}, expected an object of layers")
    plan = {}
    for name, layer in value.items():
        try:
            plan[name] = _layer_from_json(layer)
        except MoepruneError as error:
            message = error.message.removeprefix("plan: ")
            raise MoepruneError(f"plan of `{name}`: {message}", error.hint) from None
    return plan


def _layer_from_json(value: Any) -> LayerPlan:
    if not isinstance(value, Mapping):
        raise MoepruneError(f"found {type(value).__name__}, expected an object")
    known = [field.name for field in fields(LayerPlan)]
    needed = [field.name for field in fields(LayerPlan) if field.default is MISSING]
    if spare := [key for key in value if key not in known]:
        raise MoepruneError(f"`{spare[0]}` is unknown", f"a layer's plan has {', '.join(known)}")
    if lacking := [key for key in needed if key not in value]:
        raise MoepruneError(f"`{lacking[0]}` is missing")
    kept = value.get("kept")
    if not (kept is None or isinstance(kept, list | tuple)):
        raise MoepruneError(f"`kept` is {kept!r}, expected a list of experts")
    merged_into = value.get("merged_into")
    if not (merged_into is None or (isinstance(merged_into, list | tuple) and _all_experts(merged_into))):
        raise MoepruneError(f"`merged_into` is {merged_into!r}, expected a list of experts")
    tuples = {key: tuple(value[key]) for key in ("kept", "merged_into") if value.get(key) is not None}
    return LayerPlan(**{**value, **tuples})


def _all_experts(values: Any) -> bool:
    return all(type(value) is int for value in values)


def parse_keep(text: str, option: str = "--keep") -> Fraction | int:
    """Read how many experts to keep: a fraction of them such as `1/8` or `0.125`, or a number.

    Returns:
        A Fraction in (0, 1] for a share of the experts, an int of at least 1 for a number of them.

    Raises:
        MoepruneError: anything else.

    >>> parse_keep("1/8"), parse_keep("16")
    (Fraction(1, 8), 16)
    """
    hint = "give a share of the experts such as 1/8 or 0.125, or a number of experts such as 16"
    text = text.strip()
    try:
        if "e" in text.lower() and not 1e-9 < abs(float(text)) < 1e9:
            raise ValueError  # a Fraction writes all digits out
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise MoepruneError(f"`{option} {text}` is no fraction and no number", hint) from None
    if value <= 0:
        raise MoepruneError(f"`{option} {text}` keeps no expert", hint)
    if text.isdigit():
        return int(text)
    if value > 1:
        raise MoepruneError(f"`{option} {text}` is more than all experts", hint)
    return value


def experts_to_keep(keep: Fraction | int, num_experts: int, layer: str, option: str = "--keep") -> int:
    """k for a layer of num_experts experts: a share above 0 is rounded to the nearest, at least 1.

    Raises:
        MoepruneError: more experts asked for than the layer has.

    >>> experts_to_keep(Fraction(1, 8), 128, "blocks.0.soft_moe")
    16
    """
    if keep == 0:
        return 0
    if isinstance(keep, Fraction):
        return max(1, int(keep * num_experts + Fraction(1, 2)))
    if keep > num_experts:
        raise MoepruneError(
            f"`{option} {keep}` is more than the {num_experts} experts of layer `{layer}`",
            f"give at most {num_experts}, or a share such as 1/8",
        )
    return keep
