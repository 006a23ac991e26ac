"""`moeprune demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.options import Device
from moeprune.cli.reporter import Reporter
from moeprune.errors import MoepruneError


def demo(
    reporter: Reporter,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write into.")] = Path(
        "moeprune-demo"
    ),
    train: Annotated[
        bool,
        typer.Option(
            "--train/--no-train",
            show_default=False,
            help="Train both models anew first (minutes), as the shipped ones were.",
        ),
    ] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**63 - 1)] = 0,
) -> None:
    """Show the whole story on two real checkpoints.

    Analyzes, prunes and evaluates them on scikit-learn's digits, in under a minute on two cores.
    """
    if output.exists() and not output.is_dir():
        raise MoepruneError(f"`{output}` is a file, expected a directory", "give another with `-o`")
    if output.is_dir() and any(output.iterdir()) and not reporter.force:
        raise MoepruneError(
            f"`{output}` is not empty", "give another with `-o`, or `--force` to write into it"
        )
    from moeprune.demo.run import run_demo
    from moeprune.models.runtime import Runtime

    runtime = Runtime(device, batch_size=256, progress=reporter.progress)
    runtime.require_device()
    reporter.emit(run_demo(output, train, seed, runtime))
