"""`moeprune eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune.cli.opening import load_model, open_data, runtime_for
from moeprune.cli.options import (
    BatchSize,
    Checkpoint,
    Device,
    Dtype,
    Factory,
    Limit,
    Preprocess,
    Report,
    Seed,
    Split,
)
from moeprune.cli.reporter import Reporter, check_choice, warn
from moeprune.errors import MoepruneError
from moeprune.evaluation.gates import check_limits, judge
from moeprune.files.writing import write_text
from moeprune.plan import COMPENSATIONS, SCOPES, SIGNALS, parse_keep, scopes_of

if TYPE_CHECKING:
    from fractions import Fraction

    from moeprune.models.model import Model
    from moeprune.pruning.sweep import Variant


def eval(
    reporter: Reporter,
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Labelled data: digits, pairs, a .npz, a .safetensors, or a folder.")
    ],
    baseline: Annotated[Path | None, typer.Option(help="The full model to compare with.")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Prune in many ways and evaluate each: shares such as 1/32,1/16,1/8,1/4,1/2."),
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(
            help="Measure a few ways to prune at many shares (or those of --sweep), and draw the trade-off"
            " there (.png or .svg)."
        ),
    ] = None,
    analysis: Annotated[
        Path | None, typer.Option(help="With --sweep, --frontier or --report: what `moeprune analyze` wrote.")
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="With --sweep: only this scope (repeatable).")
    ] = None,
    signal: Annotated[
        list[str] | None, typer.Option(help="With --sweep: only this signal (repeatable).")
    ] = None,
    compensate: Annotated[
        list[str] | None, typer.Option(help="With --sweep: only this compensation (repeatable).")
    ] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Gate: accuracy lost to the baseline.")
    ] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Gate: accuracy.")] = None,
    min_flops_reduction: Annotated[float | None, typer.Option(help="Gate: share of FLOPs saved.")] = None,
    min_size_reduction: Annotated[float | None, typer.Option(help="Gate: share of bytes saved.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Gate: share of inputs with the baseline's prediction.")
    ] = None,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency/--no-latency",
            show_default=False,
            help="Time forward passes too; with --baseline, in turn with the full model's.",
        ),
    ] = False,
    latency_batch: Annotated[
        list[int] | None,
        typer.Option(help="With --latency: inputs of a forward pass (repeatable).", show_default="1, 8, 32"),
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option(
            help="Gate, with --latency: times as fast as the baseline, at all batch sizes (the worst counts)."
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            help="With gates: each judges the one-sided bound of its value at this level, such as 0.95, in"
            " place of the value itself."
        ),
    ] = None,
    report: Report = None,
    model: Factory = None,
    split: Split = None,
    preprocess: Preprocess = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
) -> int:
    """Report accuracy, size, FLOPs and latency, and judge them.

    Compares a checkpoint with the full model (--baseline); a gate that fails makes exit code 1. With
    --sweep, prunes a full model in many ways and evaluates each.
    """
    limits = {
        "max_accuracy_drop": max_accuracy_drop,
        "min_accuracy": min_accuracy,
        "min_flops_reduction": min_flops_reduction,
        "min_size_reduction": min_size_reduction,
        "min_agreement": min_agreement,
        "min_speedup": min_speedup,
    }
    if latency_batch and not latency:
        raise MoepruneError("`--latency-batch` goes with `--latency`", "add `--latency`")
    sweep_only = {"--scope": scope, "--signal": signal, "--compensate": compensate}
    reporter.check_outputs(frontier=frontier, report=report)
    if report is not None:
        from moeprune.report.html import check_page

        check_page(report)
    is_sweep = sweep is not None or frontier is not None
    if not is_sweep:
        for option, given in sweep_only.items():
            if given:
                raise MoepruneError(f"`{option}` goes with `--sweep`", "add `--sweep 1/16,1/8,1/4`")
        if analysis is not None and report is None:
            raise MoepruneError(
                "`--analysis` goes with `--sweep`, `--frontier` or `--report`", "add `--sweep 1/16,1/8,1/4`"
            )
        check_limits(limits, baseline is not None, latency, confidence)
        keeps = []
    else:
        given_gates = [*limits.values(), confidence]
        _check_sweep(frontier, analysis, sweep_only, baseline, latency, given_gates)
        keeps = [] if sweep is None else [parse_keep(keep, "--sweep") for keep in sweep.split(",")]
    from msgspec.structs import replace

    from moeprune.calibration.analysis import load_analysis, require_analysis_of
    from moeprune.evaluation import evaluate as evaluation
    from moeprune.evaluation.latency import BATCH_SIZES, check_batch_sizes
    from moeprune.models.model import fingerprint, unpruned_fingerprint
    from moeprune.pruning.results import Sweep
    from moeprune.pruning.sweep import KEEPS, methods, on_frontier
    from moeprune.pruning.sweep import sweep as run_sweep
    from moeprune.report import commands as reports
    from moeprune.report import page
    from moeprune.report.html import to_html
    from moeprune.report.plot import plot_frontier

    latency_batches = latency_batch or BATCH_SIZES
    check_batch_sizes(latency_batches)
    runtime = runtime_for(device, dtype, batch_size, not reporter.quiet)
    loaded = load_model(checkpoint, model, preprocess)
    dataset = open_data(data, loaded, split, "test", limit)
    analysed = None if analysis is None else load_analysis(analysis)
    background = page.Background(
        loaded.plan, loaded.details.provenance, analysed, evaluation.environment(runtime)
    )
    if is_sweep:
        assert analysed is not None
        scopes = scopes_of(loaded.config.moe_layers.values())
        if frontier is not None:
            todo = list(methods(keeps or KEEPS, scopes))
        else:
            todo = _ways(loaded, keeps, scopes, scope, signal, compensate)
        measured_batches = latency_batches if latency else None
        rows = [row for row, _ in run_sweep(loaded, todo, analysed, dataset, seed, runtime, measured_batches)]
        rows = [replace(row, on_frontier=best) for row, best in zip(rows, on_frontier(rows), strict=True)]
        swept = Sweep(
            checkpoint=str(checkpoint),
            data=dataset.info,
            rows=rows,
            plot=None if frontier is None else str(frontier),
            environment=evaluation.environment(runtime),
        )
        if frontier is not None:
            title = f"{checkpoint.name} on {dataset.spec} ({dataset.samples} samples)"
            plot_frontier(rows, title, frontier, reporter.force)
        if report is not None:
            write_text(report, to_html(page.sweep(swept, background)), reporter.force)
        reporter.emit(swept, reports.sweep)
        return 0
    full = None if baseline is None else load_model(baseline, model, preprocess)
    if full is not None and full.plan:
        raise MoepruneError(
            f"`--baseline {baseline}` is pruned itself, expected the full model",
            "give the checkpoint that the model was pruned from",
        )
    if full is not None and loaded.plan and unpruned_fingerprint(loaded) != fingerprint(full):
        warn(f"`{checkpoint}` was not pruned from `{baseline}`: what is compared is another full model")
    if analysed is not None:
        require_analysis_of(loaded.config.moe_layers, unpruned_fingerprint(loaded), analysed)
    found = evaluation.evaluate(loaded, dataset, full, runtime, latency_batches if latency else None)
    gates = judge(found, limits, confidence)
    found = replace(
        found,
        checkpoint=str(checkpoint),
        baseline=None if baseline is None else str(baseline),
        gates=gates,
        passed=all(gate.passed for gate in gates),
    )
    if found.forgetting is not None and found.difference is not None:
        changes = {change.index: change for change in found.forgetting.classes}
        for change in (changes[index] for index in found.forgetting.collapsed):
            warn(
                f"class {change.index} collapsed: {reports.percent(change.baseline_accuracy)} →"
                f" {reports.percent(change.accuracy)} of its {change.samples} samples, while the average"
                f" accuracy changed by {reports.points(-found.difference.accuracy_drop)}"
            )
    if report is not None:
        write_text(report, to_html(page.evaluation(found, background)), reporter.force)
    reporter.emit(found, reports.evaluation)
    return 0 if found.passed else 1


def _ways(
    model: Model,
    keeps: Sequence[Fraction | int],
    possible_scopes: Sequence[str],
    scopes: list[str] | None,
    signals: list[str] | None,
    compensations: list[str] | None,
) -> list[Variant]:
    """What a sweep evaluates: all that is possible of what was asked for; warns of what is left out."""
    from moeprune.pruning.compensation import MAX_REGRESSORS
    from moeprune.pruning.sweep import COMPENSATIONS_TRIED, grid, without_large_refits

    compensations = compensations or list(COMPENSATIONS_TRIED)
    every = grid(keeps, scopes or possible_scopes, signals or SIGNALS, compensations, possible_scopes[0])
    ways, left_out = without_large_refits(every, model)
    if not any(way.signal != "random" and way.keep for way in (*ways, *left_out)) and signals != ["random"]:
        raise MoepruneError(
            "no way to prune has such a scope, signal and compensation together",
            "`gram`, `refit` and `merge` go with scope static alone, `merge` not with `gram`",
        )
    if left_out:
        shares = ", ".join(dict.fromkeys(str(way.keep) for way in left_out))
        warn(f"`refit` is left out at {shares}: it would take more than {MAX_REGRESSORS:,} regressors")
    return ways


def _check_sweep(
    frontier: Path | None,
    analysis: Path | None,
    sweep_only: dict[str, Any],
    baseline: Path | None,
    latency: bool,
    gates: list[float | None],
) -> None:
    """Refuse what does not go with `--sweep` or `--frontier`."""
    which = "--sweep" if frontier is None else "--frontier"
    if baseline is not None or any(value is not None for value in gates):
        raise MoepruneError(
            f"`{which}` prunes the full model in many ways: it takes no `--baseline` and no gates",
            "give them to an eval of the checkpoint that you choose",
        )
    if analysis is None:
        raise MoepruneError(f"`{which}` needs `--analysis`", "write one with `moeprune analyze`")
    for option, choices in (("--scope", SCOPES), ("--signal", SIGNALS), ("--compensate", COMPENSATIONS)):
        if frontier is not None and sweep_only[option]:
            raise MoepruneError(f"`{option}` does not go with `--frontier`", "give `--sweep` alone")
        for value in sweep_only[option] or ():
            check_choice(option, value, choices)
    if frontier is None:
        if latency:
            raise MoepruneError(
                "`--latency` does not go with `--sweep`", "give `--frontier`, or an eval of one"
            )
        return
    from moeprune.report.plot import check_plot

    check_plot(frontier)
