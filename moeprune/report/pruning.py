"""The report of `moeprune prune`."""

from __future__ import annotations

from moeprune.models.results import ModelCost
from moeprune.pruning.results import Pruned, Search
from moeprune.report.document import Document, Facts
from moeprune.report.words import amount, flops_in_words, percent, plan_in_words, points


def pruning(result: Pruned) -> Document:
    """Return size, FLOPs, the confirmed accuracy drop, and the plan of each layer."""
    facts: list[tuple[str, str]] = []
    if result.model is not None:
        is_adaptive = any(plan.mass is not None for plan in result.plan.values())
        facts += _costs(result.full_model, result.model, is_adaptive)
    if result.search is not None:
        facts.append(("accuracy drop", _confirmed(result.search)))
    facts += [(name, plan_in_words(plan, with_kept=True)) for name, plan in result.plan.items()]
    written = [path for path in (result.checkpoint, result.saved_plan) if path is not None]
    return Document(f"wrote {' and '.join(written)}", [Facts(facts)])


def _costs(full: ModelCost, pruned: ModelCost, is_adaptive: bool) -> list[tuple[str, str]]:
    """Return size and FLOPs before and after; is_adaptive: FLOPs depend on the input."""
    sizes = f"{amount(full.bytes, 'B')} → {amount(pruned.bytes, 'B')} ({percent(pruned.bytes / full.bytes)})"
    full_flops, flops = full.flops_per_input.total, pruned.flops_per_input
    change = (
        f"{amount(full_flops)} → {'at most ' if is_adaptive else ''}{flops_in_words(flops)},"
        f" {percent(flops.total / full_flops)}{' (eval measures it)' if is_adaptive else ''}"
    )
    return [("size", sizes), ("FLOPs per input", change)]


def _confirmed(search: Search) -> str:
    confirmed = search.confirmed
    low, high = confirmed.accuracy_drop_ci95
    bound = ""
    if confirmed.bound is not None:
        bound = f"; at most {points(confirmed.bound)} with confidence {confirmed.confidence:g}"
    return (
        f"{points(confirmed.accuracy_drop)} (95 %: {points(low)} to {points(high)}{bound}) on"
        f" {confirmed.samples} samples that were not searched ({len(search.tried)} plans tried)"
    )
