"""The commands, in the order of `--help`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moeprune.calibration.results import AnalyzeRequest
from moeprune.cli.command import command
from moeprune.cli.reporter import Reporter
from moeprune.demo.records import DemoRequest
from moeprune.files.disk import check_output_folder
from moeprune.models.request import ExportRequest, InspectRequest
from moeprune.models.runtime import Runtime
from moeprune.pruning.request import PruneRequest, SweepRequest
from moeprune.records import Request

Report = Annotated[
    Path | None,
    typer.Option(help="Write a page with figures too: one HTML file that loads nothing.", show_envvar=False),
]
SCHEMAS = (
    "analyze, demo, eval, eval-language (of eval of a language model), export, inspect, prune, sweep (of eval --sweep),"
    " sweep-language (of that of a language model), or plan (a plan file)."
)


@command
def inspect(reporter: Reporter, request: InspectRequest) -> None:
    """Show the contents of a checkpoint.

    Layers, experts, parameters, size, FLOPs, plan and provenance.
    """
    from moeprune.models.inspection import inspect_checkpoint

    reporter.show(inspect_checkpoint(request.checkpoint))


@command
def analyze(reporter: Reporter, request: AnalyzeRequest, *, report: Report = None) -> None:
    """Measure how much each expert matters to each input.

    Runs calibration data through an unpruned checkpoint, once.
    """
    reporter.check_outputs(output=request.output, report=report)
    from moeprune.calibration.analysis import analyze_checkpoint
    from moeprune.evaluation.evaluate import environment

    found, model, analysis = analyze_checkpoint(request)
    reporter.write_page(report, found, model, analysis, environment(request.runtime))
    reporter.show(found)


@command
def prune(reporter: Reporter, request: PruneRequest) -> None:
    """Write a checkpoint that runs fewer experts.

    How many is set by one of --keep, --mass, --max-size, --max-flops, --max-accuracy-drop and --plan.
    """
    is_folder = request.checkpoint.is_model_folder
    if is_folder and request.output is not None:
        check_output_folder(request.output, reporter.output.force, request.checkpoint.path)
    folder, file = (request.output, None) if is_folder else (None, request.output)
    reporter.check_outputs(folder, output=file, save_plan=request.save_plan)
    from moeprune.pruning.checkpoint import prune_checkpoint

    reporter.show(prune_checkpoint(request))


@command
def eval(reporter: Reporter, request: SweepRequest, *, report: Report = None) -> int:
    """Report accuracy, size, FLOPs and latency, and judge them.

    Compares a checkpoint with the full model (--baseline); a gate that fails makes exit code 1. With --sweep
    or --plot, prunes a full model in many ways and evaluates each.
    """
    reporter.check_outputs(plot=request.plot, report=report)
    if request.is_sweep:
        return _sweep(reporter, request, report)
    from moeprune.evaluation.checkpoint import evaluate_checkpoint

    found, model, analysis = evaluate_checkpoint(request)
    reporter.write_page(report, found, model, analysis, found.environment)
    reporter.show(found)
    return 0 if found.passed else 1


def _sweep(reporter: Reporter, request: SweepRequest, report: Path | None) -> int:
    from moeprune.pruning.checkpoint import sweep_checkpoint
    from moeprune.pruning.results import Sweep

    found, model, analysis = sweep_checkpoint(request)
    if request.plot is not None and isinstance(found, Sweep):
        from moeprune.report.trade_off import plot_trade_off
        from moeprune.report.words import checkpoint_on_data

        title = checkpoint_on_data(request.checkpoint.path.name, found.data)
        plot_trade_off(found.rows, title, request.plot, reporter.output.force)
    reporter.write_page(report, found, model, analysis, found.environment)
    reporter.show(found)
    return 0


@command
def export(reporter: Reporter, request: ExportRequest) -> None:
    """Write a checkpoint for the library or the code that it came from.

    Takes unpruned models, and those pruned with scope static and compensation renorm or renorm-refit. Verifies on
    random images that the library's model computes the same, if it is installed.
    """
    reporter.check_outputs(output=request.output)
    from moeprune.models.export import export
    from moeprune.models.opening import open_model

    model = open_model(request.checkpoint)
    reporter.show(export(model, request.output, request.to, overwrite=reporter.output.force))


@command
def demo(reporter: Reporter, request: DemoRequest) -> None:
    """Analyze, prune and evaluate three shipped checkpoints.

    Runs on scikit-learn's digits and the sources of Python's library, in a few minutes on two cores.
    """
    from moeprune.demo.run import run_demo

    runtime = Runtime(request.device, batch_size=256, progress=not reporter.output.quiet)
    runtime.require_device()
    reporter.show(run_demo(request.output, request.train, request.seed, runtime))


@command
def schema(
    reporter: Reporter, request: Request, *, name: Annotated[str, typer.Argument(metavar="NAME", help=SCHEMAS)]
) -> None:
    """Print the JSON Schema of a command's JSON report, or of a plan file."""
    from moeprune.report.commands import schema_of

    reporter.write(json.dumps(schema_of(name), indent=2) + "\n")
