"""What a pruned checkpoint keeps, layer by layer, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from moeprune.errors import MoepruneError

SCOPES = ("static", "input", "batch")
SIGNALS = ("combine", "deviation", "gram", "random")
COMPENSATIONS = ("none", "renorm", "mean", "lstsq", "affine", "refit")
FITTED = ("lstsq", "affine", "refit")
"""Compensations that a regression on data finds."""
AFFINE = ("affine", "refit")
"""Compensations with a linear map of the layer's input."""


def is_possible(scope: str, signal: str, compensation: str) -> bool:
    """Whether a scope, a signal and a compensation go together."""
    return scope == "static" or (signal != "gram" and compensation != "refit")


@dataclass(frozen=True)
class LayerPlan:
    """Which experts of one layer run, and what stands in for the others.

    scope: `static` one set for all inputs, the others are gone from the checkpoint; `input` each
        input keeps its own k experts (Chung et al. 2024, arXiv 2409.00879, Algorithm 1); `batch`
        one set for each batch (Algorithm 2).
    k: experts that run; with a mass, that run at most.
    num_experts: experts of the unpruned layer (n).
    signal: the score that ranks the experts (moeprune.scores); `gram`, with scope `static` alone, looks
        at sets of experts (moeprune.selection).
    compensation: what a dropped expert gives: nothing (`none`), nothing while the combine softmax
        is taken over the kept ones (`renorm`), its mean output (`mean`), the output that fits
        the unpruned layer best (`lstsq`), or that beside a linear map of the layer's input (`affine`).
        `refit`, with scope `static` alone, does the last and fits the kept experts' second linears too.
    kept: with scope `static` the kept experts by their index in the unpruned layer, ascending; None where
        the signal is yet to choose them, which no checkpoint leaves open.
    mass: with scope `input`, that each input runs the fewest experts, best first, that hold this share of
        its combine mass; None: k of them.
    """

    scope: str
    k: int
    num_experts: int
    signal: str
    compensation: str
    kept: tuple[int, ...] | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("scope", SCOPES), ("signal", SIGNALS), ("compensation", COMPENSATIONS)):
            if getattr(self, name) not in choices:
                raise MoepruneError(
                    f"plan: `{name}` is {getattr(self, name)!r}, expected one of {', '.join(choices)}"
                )
        if type(self.k) is not int or type(self.num_experts) is not int:
            raise MoepruneError(f"plan: `k` and `num_experts` are {self.k!r}, {self.num_experts!r}")
        if not 0 <= self.k <= self.num_experts:
            raise MoepruneError(f"plan: `k` is {self.k}, expected 0 to {self.num_experts}")
        if self.k == 0 and self.compensation == "renorm":
            raise MoepruneError("plan: `renorm` needs at least one kept expert")
        if self.mass is not None:
            if not (isinstance(self.mass, int | float) and 0 < self.mass <= 1):
                raise MoepruneError(f"plan: `mass` is {self.mass!r}, expected a share above 0 and at most 1")
            if self.scope != "input" or self.k == 0:
                raise MoepruneError("plan: `mass` goes with scope input, and at least one expert")
        if not is_possible(self.scope, self.signal, self.compensation):
            what = "signal `gram` chooses" if self.signal == "gram" else "compensation `refit` is fitted to"
            raise MoepruneError(f"plan: {what} one set for all inputs: it goes with scope static")
        if self.kept is not None and self.scope != "static":
            raise MoepruneError("plan: `kept` goes with scope static and with no other")
        if self.kept is not None:
            valid = all(type(j) is int and 0 <= j < self.num_experts for j in self.kept)
            if not valid or len(self.kept) != self.k or list(self.kept) != sorted(set(self.kept)):
                raise MoepruneError(
                    f"plan: `kept` is {list(self.kept)}, expected {self.k} different experts"
                    f" below {self.num_experts}, ascending"
                )

    @property
    def drops(self) -> bool:
        """Whether an expert may not run."""
        return self.k < self.num_experts or self.mass is not None

    @property
    def is_calibrated(self) -> bool:
        """Whether something is used that only calibration data can tell."""
        static = self.scope == "static"
        ranks = self.kept is None and self.signal in (
            ("combine", "deviation", "gram") if static else ("deviation",)
        )
        return ranks or self.has_surrogate

    @property
    def is_fitted(self) -> bool:
        """Whether a regression on data finds what stands in for the dropped experts."""
        return self.has_surrogate and self.compensation in FITTED

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
        """With scope `static` the experts that have router logits, in their order: kept ones first."""
        kept = self.kept or ()
        return kept if self.compensation == "renorm" else kept + self.dropped

    @property
    def has_surrogate(self) -> bool:
        """Whether something stands in for the dropped experts."""
        return self.compensation in ("mean", *FITTED) and self.drops

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
) -> Plan:
    """The same share or number of experts in each layer, which the signal is yet to choose.

    Args:
        layers: the number of experts of each layer.
        keep: as parse_keep returns it.
        scope: see LayerPlan, like signal, compensation and mass.

    Raises:
        MoepruneError: more experts asked for than a layer has, or values that do not fit each other.
    """
    return {
        name: LayerPlan(scope, experts_to_keep(keep, n, name), n, signal, compensation, mass=mass)
        for name, n in layers.items()
    }


def require_fitting_plan(plan: Plan, layers: Mapping[str, Any]) -> None:
    """Raise a MoepruneError that names a layer of a plan that a model lacks, or whose experts it has not.

    Args:
        layers: of the model; each has `num_experts`.
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
            layer = dict(layer)
            if layer.get("kept") is not None:
                layer["kept"] = tuple(layer["kept"])
            plan[name] = LayerPlan(**layer)
        except (TypeError, ValueError) as error:
            raise MoepruneError(f"plan of `{name}`: {error}") from None
        except MoepruneError as error:
            raise MoepruneError(f"plan of `{name}`: {error.message}", error.hint) from None
    return plan


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
