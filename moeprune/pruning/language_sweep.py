"""Many ways to prune one language model that its folder can hold, each evaluated on the same text.

At each share of the experts the same bytes of experts are left by dropping the others and by narrowing all of them.
"""

import logging
import statistics
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from typing import NamedTuple

from moeprune.amounts import keep_to_text
from moeprune.calibration.analysis import Analysis
from moeprune.data.datasets import Dataset
from moeprune.data.leakage import warn_of_seen_samples
from moeprune.errors import MoepruneError
from moeprune.evaluation.language import Comparison, predict
from moeprune.evaluation.language_results import LanguageDifference
from moeprune.models.folders.costs import PrunedBytes
from moeprune.models.folders.form import DROP_IN
from moeprune.models.language import LanguageModel
from moeprune.models.model import Model, require_dense_layers
from moeprune.plan import Compensation, Method, Plan, Signal, uniform_plan
from moeprune.pruning.apply import ALREADY_PRUNED, apply_plan, calibration_data
from moeprune.pruning.auto import half
from moeprune.pruning.request import SweepRequest
from moeprune.pruning.results import LanguageSweepRow

logger = logging.getLogger(__name__)
RANDOM_DRAWS = 3
KEEPS = (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))
WAYS: tuple[tuple[Signal, Compensation], ...] = (
    ("gram", "renorm-refit"), ("reap", "renorm"), ("frequency", "renorm"), ("random", "renorm"),
)  # fmt: skip
"""Ways to drop experts that are compared by default: the second is REAP's."""


class Way(NamedTuple):
    """One way to prune a language model: to so many of its experts, or with so many hidden units of all of them."""

    keep: Fraction | int
    signal: Signal
    compensate: Compensation
    narrows: bool = False

    @property
    def options(self) -> str:
        """The options of `moeprune prune` that prune so."""
        size = f"--{'width' if self.narrows else 'keep'} {keep_to_text(self.keep)}"
        return f"{size} --compensate {self.compensate}" + ("" if self.narrows else f" --signal {self.signal}")

    def plan(self, model: LanguageModel) -> Plan:
        """Return the plan of all layers; raise a MoepruneError if the folder cannot hold it."""
        keep, width = (Fraction(1), keep_to_text(self.keep)) if self.narrows else (self.keep, None)
        method = Method("static", self.signal, self.compensate, width=width)
        plan = uniform_plan(model.config.moe_layers, keep, method, "--sweep")
        model.require_writable(plan)
        return plan


def language_ways(request: SweepRequest) -> list[Way]:
    """Return the ways that a request asks for; raise a MoepruneError for options that a sweep of text lacks."""
    for name in ("plot", "latency"):
        if getattr(request, name):
            raise MoepruneError(f"`--{name}` does not go with a sweep of a language model", "leave it out")
    if wrong := [scope for scope in request.scope if scope not in ("auto", "static")]:
        raise MoepruneError(f"`--scope {wrong[0]}`: each token chooses experts anyway", "leave it out")
    known = ("auto", *DROP_IN)
    if wrong := [name for name in request.compensate if name not in known]:  # type: ignore[misc]
        hint = f"give {' or '.join(f'`{name}`' for name in known)}"
        raise MoepruneError(f"`--compensate {wrong[0]}` leaves no drop-in folder, which a sweep compares", hint)
    stated = request.signal or request.compensate
    signals: list[Signal] = ["gram" if name == "auto" else name for name in request.signal or ("gram",)]
    compensations: list[Compensation] = [
        "renorm-refit" if name in ("auto", "renorm-refit") else "renorm" for name in request.compensate or ("auto",)
    ]
    found = list[Way]()
    for keep in request.keeps or KEEPS:
        ways = dict.fromkeys(product(signals, compensations)) if stated else WAYS
        found += [Way(keep, *way) for way in ways]
        if not stated and isinstance(keep, Fraction) and keep < 1:
            found.append(Way(keep, "gram", "none", narrows=True))
    return found


def language_sweep(
    model: LanguageModel, ways: list[Way], analysis: Analysis, data: Dataset, request: SweepRequest
) -> Iterator[tuple[LanguageSweepRow, int]]:
    """Prune the model in each way and evaluate it on text, one after the other; yield rows, and tokens of a sequence.

    The first row is the full model's. Ways that the folder cannot hold are left out with a warning.
    """
    require_dense_layers(model, ALREADY_PRUNED)
    calibration, runtime = calibration_data(model, analysis), request.runtime
    warn_of_seen_samples(data, analysis.origin.data)
    plans = list(_possible(ways, model))
    of_bytes = PrunedBytes(model.folder, model.config.moe_layers)

    def difference(pruned: Model) -> tuple[LanguageDifference, float, int]:
        found = Comparison(pruned, model, data, predict([pruned, model], data, runtime)).fields
        return found["difference"], found["model"].loss, found["sequence_length"]

    own, loss, length = difference(model)
    yield _row(None, [own], [loss], 1.0, 1.0), length
    for way, plan in runtime.bar("sweep", "ways", plans):
        differences, losses = [], []
        for draw in range(request.repeat or (RANDOM_DRAWS if way.signal == "random" else 1)):
            used = calibration if request.repeat is None else half(calibration, request.seed + draw)
            known = analysis if request.repeat is None else None
            pruned = apply_plan(model, plan, known, data=used, seed=request.seed + draw, runtime=runtime)
            found, loss, _ = difference(pruned)
            differences.append(found)
            losses.append(loss)
        first = next(iter(plan.values()))
        flops = model.config.flops(plan).total / model.config.flops({}).total
        yield _row(way, differences, losses, of_bytes.of(first.k, first.width) / of_bytes.full, flops), length


def _possible(ways: list[Way], model: LanguageModel) -> Iterator[tuple[Way, Plan]]:
    """Yield the ways that the folder can hold, and their plans; warn of others."""
    for way in ways:
        try:
            yield way, way.plan(model)
        except MoepruneError as error:
            logger.warning(f"left out: `{way.options}`: {error.message}")


def _row(
    way: Way | None, differences: list[LanguageDifference], losses: list[float], size: float, flops: float
) -> LanguageSweepRow:
    increases = [found.loss_increase for found in differences]
    return LanguageSweepRow(
        options=None if way is None else way.options,
        keep="1.0" if way is None or way.narrows else keep_to_text(way.keep),
        width=keep_to_text(way.keep) if way is not None and way.narrows else None,
        signal=None if way is None else way.signal,
        compensate=None if way is None else way.compensate,
        loss=statistics.fmean(losses),
        loss_increase=statistics.fmean(increases),
        loss_increase_sd=statistics.stdev(increases) if len(increases) > 1 else None,
        agreement=statistics.fmean(found.agreement for found in differences),
        kl=statistics.fmean(found.kl for found in differences),
        size=size,
        flops=flops,
        draws=len(differences),
    )
