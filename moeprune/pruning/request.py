"""Options of `moeprune prune` and `moeprune eval --sweep`; no torch."""

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import msgspec

from moeprune.amounts import parse_budget, parse_keep, parse_rank
from moeprune.data.spec import DataSpec
from moeprune.errors import MoepruneError
from moeprune.evaluation.request import EvalRequest
from moeprune.models.request import Checkpoint
from moeprune.models.runtime import Runtime
from moeprune.plan import LOW_RANK, RANK, Method, Share, Wanted, WantedCompensation, WantedScope, WantedSignal
from moeprune.records import Request, option

AMOUNTS = ("keep", "mass", "max_size", "max_flops", "max_accuracy_drop", "plan")
"""Fields of which exactly one sets the number of kept experts."""
BUDGETS = {"max_size": "B", "max_flops": "FLOPs"}  # units of their amounts
METHOD = ("scope", "signal", "compensate")
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1), option("Seed of everything random.")]


class PruneRequest(Request, frozen=True, kw_only=True):
    """An unpruned checkpoint, how many experts to keep, which, and what to write."""

    checkpoint: Checkpoint
    output: Annotated[Path | None, option("The checkpoint to write (.safetensors).", short=("-o",))] = None
    keep: Annotated[
        str | None,
        option(
            "Experts to keep in each layer: a number (16; 1 is one) or a share (1/8, 12.5%; 1.0 is all).", metavar="K"
        ),
    ] = None
    mass: Annotated[
        Share | None, option("With scope input: the fewest experts that hold this share of an input's mass.")
    ] = None
    width: Annotated[
        str | None,
        option(
            "Hidden units to keep in each kept expert: a number, or a share (1/2, 50%). Without --keep all are kept.",
            metavar="H",
        ),
    ] = None
    max_size: Annotated[
        str | None, option("Budget: most bytes (1.5MB), or share of the full model's (40%, 0.4).", metavar="SIZE")
    ] = None
    max_flops: Annotated[
        str | None,
        option("Budget: most FLOPs per input (2G), or share of the full model's (40%, 0.4).", metavar="FLOPS"),
    ] = None
    max_accuracy_drop: Annotated[
        Annotated[float, msgspec.Meta(ge=0, lt=1)] | None,
        option(
            "Search for the smallest model within this accuracy drop on one half of the labelled --data, and"
            " confirm it on the other half."
        ),
    ] = None
    confidence: Annotated[
        Annotated[float, msgspec.Meta(ge=0.5, lt=1)] | None,
        option("With --max-accuracy-drop: judge the drop's one-sided bound at this level, such as 0.95."),
    ] = None
    plan: Annotated[Path | None, option("Plan of each layer: a JSON file, or a pruned checkpoint.")] = None
    save_plan: Annotated[Path | None, option("Write the plan as JSON; -o may be omitted.")] = None
    analysis: Annotated[Path | None, option("The file that `moeprune analyze` wrote for this checkpoint.")] = None
    scope: Annotated[
        WantedScope | None,
        option(
            "static: one set of experts, the others are removed. input, batch: each chooses its own."
            " auto is static, or input with --mass.",
            show_default="auto",
        ),
    ] = None
    signal: Annotated[
        WantedSignal | None,
        option("Score that ranks the experts. auto is gram with scope static, else deviation.", show_default="auto"),
    ] = None
    compensate: Annotated[
        WantedCompensation | None,
        option(
            "Compensation for dropped experts. auto compares several on held-out calibration data; linear keeps no"
            " expert at all.",
            show_default="auto",
        ),
    ] = None
    rank: Annotated[
        str | None,
        option(
            "With low-rank(-lstsq): the mean rank of the dropped experts' linear maps, perhaps a share of one (1/4).",
            show_default="8",
            metavar="R",
        ),
    ] = None
    energy: Annotated[
        float | None,
        option(
            "With lstsq, affine or refit: use the fewest output directions that hold this share of the"
            " compensation, such as 0.99, if that is cheaper. With low-rank(-lstsq): use the least ranks that do.",
            show_default="all directions",
        ),
    ] = None
    data: Annotated[
        DataSpec | None,
        option(
            "Calibration data, to measure each layer behind the pruned ones before it. Without it, fits read"
            " the data of the analysis again."
        ),
    ] = None
    one_shot: Annotated[bool, option("Prune by the analysis alone, without another pass over data.")] = False
    repeat: Annotated[
        Annotated[int, msgspec.Meta(ge=2, le=100)] | None,
        option("Fit again on this many random halves of the calibration data, and report the spread."),
    ] = None
    seed: Seed = 0
    overwrite: bool = False
    runtime: Runtime = Runtime()

    @property
    def wanted(self) -> Wanted:
        """Scope, signal and compensation, as far as they are given."""
        given = {name: getattr(self, name) or "auto" for name in METHOD}
        rank = None if self.rank is None else parse_rank(self.rank)
        return Wanted(**given, mass=self.mass, energy=self.energy, rank=rank, width=self.width)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise a MoepruneError for fields that do not go together."""
        if self.output is None and self.save_plan is None:
            raise MoepruneError("nothing to write", "give `--output` or `--save-plan`")
        given = [f"`{name}`" for name in AMOUNTS if getattr(self, name) is not None]
        if self.compensate == "linear" and not (given and given[0] in ("`max_accuracy_drop`", "`plan`")):
            if given:
                raise MoepruneError(
                    f"{given[0]} does not go with `--compensate linear`, which keeps no expert", "leave it out"
                )
        elif len(given) != 1 and (given or self.width is None):
            options = ", ".join(f"`--{name.replace('_', '-')}`" for name in AMOUNTS)
            wrong = f"{' and '.join(given)} exclude each other" if given else "no number of experts to keep"
            raise MoepruneError(wrong, f"give one of {options}" + ", or `--width`" * (not given))
        for name in (*METHOD, "energy", "rank", "width"):
            if self.plan is not None and getattr(self, name) is not None:
                raise MoepruneError(f"`{name}` does not go with `plan`", "the plan sets it for each layer")
        if self.rank is not None and self.compensate not in LOW_RANK:
            raise MoepruneError(
                "`rank` goes with `--compensate low-rank` or `low-rank-lstsq`", "add it, or leave `--rank` out"
            )
        try:
            self._check_method()
        except MoepruneError as error:  # names options
            message = re.sub(r"\b(scope|signal|compensation)s? `(\w+)`", r"`--\1 \2`", error.message)
            raise MoepruneError(message.replace("--compensation", "--compensate"), error.hint) from None
        if self.keep is not None:
            parse_keep(self.keep)
        if self.width is not None:
            parse_keep(self.width, "--width", "hidden units")
        for name, unit in BUDGETS.items():
            if (budget := getattr(self, name)) is not None:
                parse_budget(budget, unit, f"--{name.replace('_', '-')}")
        if self.one_shot and self.data is not None:
            raise MoepruneError("`one_shot` and `data` exclude each other", "leave one of them out")
        if self.repeat is not None and (self.one_shot or self.output is None or self.max_accuracy_drop is not None):
            hint = "leave it out, or prune with the plan that is found (`--plan`)"
            raise MoepruneError("`repeat` goes with `output`, and not with `one_shot` or `max_accuracy_drop`", hint)
        if self.data is not None and self.output is None:
            hint = "leave it out, or give `--output` to choose experts by it"
            raise MoepruneError("`save_plan` alone reads no `data`", hint)
        if self.max_accuracy_drop is None and self.confidence is not None:
            raise MoepruneError("`confidence` goes with `max_accuracy_drop`", "leave it out")
        if self.max_accuracy_drop is not None and (self.data is None or self.output is None):
            raise MoepruneError("`max_accuracy_drop` searches on labelled `data`", "add `--data` and `--output`")

    def _check_method(self) -> None:
        """Raise a MoepruneError if what is given of a method does not go together."""
        wanted = self.wanted
        signal: Any = wanted.signal_for("mean" if wanted.compensate == "auto" else wanted.compensate)
        width = None if self.width is None else 1
        if wanted.compensate != "auto":
            is_open = wanted.compensate in LOW_RANK and self.energy is None
            rank = wanted.rank or (RANK if is_open else None)
            method = Method(wanted.concrete_scope, signal, wanted.compensate, self.mass, self.energy, rank)
        else:
            method = Method(wanted.concrete_scope, signal, "mean", self.mass)
        method.plan(1, 2, None, width)


class SweepRequest(EvalRequest, frozen=True, kw_only=True):
    """A checkpoint to evaluate; or, with shares or a plot, an unpruned one to prune in many ways first."""

    sweep: Annotated[
        str | None,
        option(
            "Prune in many ways (auto, others to compare with it, and controls) and evaluate each: shares such as"
            " 1/16,1/8,1/4.",
            metavar="SHARES",
        ),
    ] = None
    scope: Annotated[tuple[WantedScope, ...], option("With --sweep: all ways of this scope (repeatable).")] = ()
    signal: Annotated[tuple[WantedSignal, ...], option("With --sweep: all ways by this signal (repeatable).")] = ()
    compensate: Annotated[
        tuple[WantedCompensation, ...], option("With --sweep: all ways with this compensation (repeatable).")
    ] = ()
    plot: Annotated[
        Path | None,
        option("Draw accuracy over cost (.png or .svg) of a sweep, at six shares unless --sweep gives others."),
    ] = None
    repeat: Annotated[
        Annotated[int, msgspec.Meta(ge=2, le=100)] | None,
        option("With --sweep: prune on this many random halves of the calibration data, and report mean and spread."),
    ] = None
    seed: Seed = 0

    @property
    def is_sweep(self) -> bool:
        """True if the checkpoint is pruned in many ways."""
        return self.sweep is not None or self.plot is not None

    @property
    def keeps(self) -> list[Fraction | int]:
        """Shares and numbers of experts."""
        return [] if self.sweep is None else [parse_keep(keep, "--sweep") for keep in self.sweep.split(",")]

    def check(self) -> None:
        """Raise a MoepruneError for fields that do not go together."""
        judging = [name for name in ("baseline", "confidence", "by", *self.limits) if getattr(self, name) is not None]
        if self.is_sweep and judging:
            hint = "give it to an eval of the checkpoint that you choose"
            raise MoepruneError(f"`{judging[0]}` does not go with `sweep` or `plot`", hint)
        if self.is_sweep and self.analysis is None:
            raise MoepruneError("`sweep` and `plot` need `analysis`", "write one with `moeprune analyze`")
        if not self.is_sweep and (chosen := [name for name in (*METHOD, "repeat") if getattr(self, name)]):
            raise MoepruneError(f"`{chosen[0]}` goes with `sweep`", "add `--sweep 1/16,1/8,1/4`")
        self.keeps  # noqa: B018 (reads the text)
        super().check()
