"""The report of a pruning: what is left, what was compared to choose it, and how well it fits."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from moeprune.models.folders.form import IN_WORDS
from moeprune.pruning.results import SAME, Candidate, FitQuality, Pruned, Repeats
from moeprune.report.document import Block, Cell, Document, Facts, Lines, Table
from moeprune.report.words import amount, ci95, flops_in_words, keep_in_words, percent, plan_in_words, plural, points


def pruning(result: Pruned, with_kept: bool = False) -> Document:
    """Return size, FLOPs, the confirmed accuracy drop, and the plan of each layer; with_kept: with its experts."""
    facts: list[tuple[str, str]] = []
    if result.keep is not None:
        facts.append(("kept", f"{keep_in_words(result.keep)} in each layer"))
    if result.model is not None:
        full, pruned = result.full_model, result.model
        is_adaptive = any(plan.mass is not None for plan in result.plan.values())  # FLOPs depend on the input
        sizes = f"{amount(full.bytes, 'B')} → {amount(pruned.bytes, 'B')} ({percent(pruned.bytes / full.bytes)})"
        most, measured = ("at most ", " (eval measures it)") if is_adaptive else ("", "")
        flops = f"{amount(full.flops_per_input.total)} → {most}{flops_in_words(pruned.flops_per_input)}"
        share = percent(pruned.flops_per_input.total / full.flops_per_input.total)
        facts += [("size", sizes), ("FLOPs per input", f"{flops}, {share}{measured}")]
    if result.search is not None:
        found, tried = result.search.confirmed, len(result.search.tried)
        bound = "" if found.bound is None else f"; at most {points(found.bound)} with confidence {found.confidence:g}"
        drop = f"{points(found.accuracy_drop)} ({ci95(found.accuracy_drop_ci95)}{bound})"
        sample = f"{found.samples} samples that were not searched ({tried} plans tried)"
        facts.append(("accuracy drop", f"{drop} on {sample}"))
    if result.form is not None:
        facts.append(("form", IN_WORDS[result.form]))
    facts += [(name, plan_in_words(plan, with_kept)) for name, plan in result.plan.items()]
    blocks: list[Block] = [Facts(facts)]
    if result.candidates:
        blocks.append(_candidates(result.candidates))
    if result.fits:
        blocks.append(_fits(result.fits))
    if result.repeats is not None:
        blocks.append(_repeats(result.repeats))
    written = [path for path in (result.checkpoint, result.saved_plan) if path is not None]
    return Document(f"wrote {' and '.join(written)}", blocks)


def _candidates(candidates: Sequence[Candidate]) -> Table:
    """Return what was compared on held-out inputs, and what was chosen."""
    rows: list[Sequence[Cell] | None] = []
    for each in sorted(candidates, key=lambda each: each.distance):
        rank = "" if each.rank is None else f" of rank {each.rank:g}"
        kept = "/".join(dict.fromkeys(str(k) for k in each.k.values()))
        if each.width is not None:
            kept += f" of width {'/'.join(dict.fromkeys(map(str, each.width.values())))}"
        figures = f"{100 * each.distance:.2f}", f"{100 * each.size:.1f}", f"{100 * each.flops:.1f}"
        rows.append([f"{'→ ' if each.is_chosen else ''}{each.compensate}{rank}", kept, *figures])
    layers, of_all = candidates[0].layers, len(candidates[0].k)
    what = plural(candidates[0].samples, "held-out input")
    what += f", with {layers} of {of_all} layers pruned" if layers < of_all else ""
    near = f"{100 * SAME * layers / of_all:.2g} pt"
    wins = f"→ the cheapest that is surely within {near} of the least"
    title = f"tried on {what}: change of the predictions (total variation); {wins}"
    return Table(("compensation", "kept", "change\n%", "size\n%", "FLOPs\n%"), rows, title)


def _repeats(repeats: Repeats) -> Lines:
    """Return the spread over draws of the calibration data."""
    parts = [("change", repeats.distance)] + ([("same", repeats.agreement)] if repeats.agreement else [])
    spread = ", ".join(
        f"{name} {percent(fmean(values), 2)} ± {100 * stdev(values):.2f} ({percent(min(values), 2)} to"
        f" {percent(max(values), 2)})"
        for name, values in parts
    )
    draws = f"{len(repeats.distance)} draws of {plural(repeats.samples, 'sample')}"
    return Lines([f"predictions over {draws}, on {plural(repeats.held_out, 'held-out input')}: {spread}"])


def _fits(fits: Mapping[str, FitQuality]) -> Table:
    """Return how well each layer's compensation is fitted."""
    rows: list[Sequence[Cell] | None] = [
        (name, f"{fit.regressors:,}", f"{100 * fit.fitted_error:.3g}", f"{100 * fit.held_out_error:.3g}")
        for name, fit in fits.items()
    ]
    samples = plural(next(iter(fits.values())).samples, "sample")
    title = f"squared error of each layer's output, % of its square, on either half of {samples}"
    return Table(("layer", "regressors", "fitted half", "held-out half"), rows, title)
