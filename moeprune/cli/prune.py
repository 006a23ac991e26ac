"""`moeprune prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    Seed,
    Split,
)
from moeprune.cli.reporter import Reporter, check_choice
from moeprune.cli.settings import parse_settings
from moeprune.errors import MoepruneError
from moeprune.plan import COMPENSATIONS, FITTED, SCOPES, SIGNALS, Method, is_possible, parse_keep


def prune(
    reporter: Reporter,
    checkpoint: Checkpoint,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The checkpoint to write (.safetensors).")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Experts to keep in each layer: a share (1/8) or a number (16).", metavar="K"),
    ] = None,
    mass: Annotated[
        float | None,
        typer.Option(
            help="With scope input: each input keeps the fewest experts that hold this share of its combine"
            " mass."
        ),
    ] = None,
    max_size: Annotated[
        float | None, typer.Option(help="Budget: share of the full model's bytes that may remain.")
    ] = None,
    max_flops: Annotated[
        float | None, typer.Option(help="Budget: share of the full model's FLOPs that may remain.")
    ] = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            help="Search the smallest model within this drop on half of the labelled --data, and confirm it"
            " on the other half."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="What to do with each layer: JSON, or a checkpoint that was pruned.")
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(help="Write the plan as JSON; without -o, that alone, from the analysis.")
    ] = None,
    analysis: Annotated[
        Path | None, typer.Option(help="What `moeprune analyze` wrote for this checkpoint.")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="static: one set, the rest is gone. input, batch: each input or batch its own.",
            show_default="static",
        ),
    ] = None,
    signal: Annotated[
        str | None,
        typer.Option(help="Score of an expert: combine, deviation, gram or random.", show_default="combine"),
    ] = None,
    compensate: Annotated[
        str | None,
        typer.Option(
            help="What stands in for dropped experts: none, renorm, mean, lstsq, affine, refit or merge.",
            show_default="none",
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="With lstsq, affine or refit: give what they add in the fewest directions of the output that"
            " hold this share of it, such as 0.99, where that is cheaper.",
            show_default="all directions",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration data: measure each layer behind the already pruned ones. fits read the"
            " analysis's own data if this is not given."
        ),
    ] = None,
    one_shot: Annotated[
        bool,
        typer.Option(
            "--one-shot/--no-one-shot",
            show_default=False,
            help="Take all layers from the analysis, without a pass over data that measures each behind the"
            " already pruned ones.",
        ),
    ] = False,
    model: Factory = None,
    split: Split = None,
    preprocess: Preprocess = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
) -> None:
    """Write a checkpoint that runs few experts.

    Say how many with one of --keep, --mass, --max-size, --max-flops, --max-accuracy-drop and --plan.
    """
    if output is None and save_plan is None:
        raise MoepruneError("nothing to write", "give `--output` or `--save-plan`")
    reporter.check_outputs(output=output, save_plan=save_plan)
    amounts = {
        "--keep": keep, "--mass": mass, "--max-size": max_size, "--max-flops": max_flops,
        "--max-accuracy-drop": max_accuracy_drop, "--plan": plan,
    }  # fmt: skip
    given = [option for option, value in amounts.items() if value is not None]
    if len(given) != 1:
        both = " and ".join(f"`{option}`" for option in given) or "none of the options that say how many"
        raise MoepruneError(f"{both} given", f"give one of {', '.join(f'`{option}`' for option in amounts)}")
    for option, share in (("--max-size", max_size), ("--max-flops", max_flops)):
        if share is not None and not 0 < share <= 1:
            raise MoepruneError(f"`{option} {share:g}` is no share of the full model", "give one in 0…1")
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 1:
        raise MoepruneError(f"`--max-accuracy-drop {max_accuracy_drop:g}` is no fraction", "give one in 0…1")
    ways = {"--scope": scope, "--signal": signal, "--compensate": compensate, "--energy": energy}
    if plan is not None and (spare := [option for option, value in ways.items() if value is not None]):
        raise MoepruneError(f"`{spare[0]}` does not go with `--plan`", "the plan says it for each layer")
    if scope is None:
        scope = "static" if mass is None else "input"
    signal = "combine" if signal is None else signal
    compensate = "none" if compensate is None else compensate
    check_choice("--scope", scope, SCOPES)
    check_choice("--signal", signal, SIGNALS)
    check_choice("--compensate", compensate, COMPENSATIONS)
    if signal == "gram" and compensate == "merge":
        raise MoepruneError(
            "`--signal gram` does not go with `--compensate merge`", "give `--signal combine`"
        )
    if not is_possible(scope, signal, compensate):
        static = f"--signal {signal}" if signal == "gram" else f"--compensate {compensate}"
        raise MoepruneError(
            f"`{static}` is for one set for all inputs, not for `--scope {scope}`",
            f"give `--scope static`, or another `{static.split()[0]}`",
        )
    if energy is not None and (compensate not in FITTED or not 0 < energy < 1):
        raise MoepruneError(
            f"`--energy {energy:g}` with `--compensate {compensate}`",
            f"give a share above 0 and below 1, with {', '.join(FITTED)}",
        )
    if mass is not None and (scope != "input" or not 0 < mass <= 1):
        raise MoepruneError(
            f"`--mass {mass:g}` with `--scope {scope}`", "give a share in 0…1, with `--scope input`"
        )
    if one_shot and data is not None:
        raise MoepruneError("`--one-shot` reads no data", "leave `--data` or `--one-shot` out")
    if data is not None and output is None:
        raise MoepruneError(
            "`--save-plan` alone reads no `--data`",
            "leave it out, or give `--output` to choose experts by it",
        )
    if data is None and (split is not None or limit is not None):
        raise MoepruneError("`--split` and `--limit` go with `--data`", "give the data that they are of")
    if max_accuracy_drop is not None and (data is None or output is None or one_shot):
        raise MoepruneError(
            "`--max-accuracy-drop` searches and confirms on labelled data",
            "give it with `--data`, and `--output`, without `--one-shot`",
        )
    kept = None if keep is None else parse_keep(keep)
    method = Method(scope, signal, compensate, mass, energy)
    from moeprune.calibration.analysis import load_analysis, require_analysis_of
    from moeprune.files.checkpoint import fingerprint
    from moeprune.files.header import read_header
    from moeprune.models.cost import size_and_cost
    from moeprune.models.description import read_description
    from moeprune.models.model import save
    from moeprune.pruning import apply as pruning
    from moeprune.pruning.budgets import plans_for
    from moeprune.pruning.plan_file import read_plan, write_plan
    from moeprune.pruning.results import Pruned
    from moeprune.pruning.search import DropLimit, prune_best, prune_within_drop
    from moeprune.pruning.streaming import prune_file
    from moeprune.report import commands as report

    runtime = runtime_for(device, dtype, batch_size, not reporter.quiet)
    full = read_header(checkpoint)
    config, existing, details = read_description(full)
    pruning.require_unpruned(existing)
    measured = None if analysis is None else load_analysis(analysis)
    if measured is not None and (max_size is not None or max_flops is not None):
        require_analysis_of(config.moe_layers, fingerprint(full, config.to_json()), measured)
    search = None
    if max_accuracy_drop is not None:
        dense = load_model(checkpoint, model, preprocess)
        assert data is not None
        result = prune_within_drop(
            dense,
            open_data(data, dense, split, "calibration", limit),
            DropLimit(max_accuracy_drop),
            analysis=measured,
            method=method,
            seed=seed,
            runtime=runtime,
        )
        assert output is not None
        save(result.model, output, reporter.force)
        search = result.report
    else:
        if plan is not None:
            plans = [read_plan(plan, config.moe_layers)]
        else:
            plans = plans_for(
                config, full.tensors, measured, method, keep=kept, max_size=max_size, max_flops=max_flops
            )
        wanted = plans[0]
        is_static = all(layer.scope == "static" for layer in wanted.values())
        if output is not None and is_static and data is None and not pruning.needs_pass(wanted, one_shot):
            preprocessing = details.preprocessing.updated(parse_settings(preprocess, "--preprocess"))
            prune_file(
                full, output, measured, plan=wanted, preprocessing=preprocessing, seed=seed,
                overwrite=reporter.force,
            )  # fmt: skip
        elif output is not None:
            dense = load_model(checkpoint, model, preprocess)
            pruned = prune_best(
                dense,
                plans if pruning.needs_pass(wanted, one_shot) else [wanted],
                measured,
                data=None if data is None else open_data(data, dense, split, "calibration", limit),
                one_shot=one_shot,
                seed=seed,
                runtime=runtime,
            )
            save(pruned, output, reporter.force)
    pruned_size = None
    if output is not None:
        header = read_header(output)
        _, wanted, _ = read_description(header)
        pruned_size = size_and_cost(config, wanted, header.tensors)
    if save_plan is not None:
        write_plan(wanted, save_plan)
    found = Pruned(
        checkpoint=None if output is None else str(output),
        saved_plan=None if save_plan is None else str(save_plan),
        plan=wanted,
        model=pruned_size,
        full_model=size_and_cost(config, {}, full.tensors),
        search=search,
    )
    reporter.emit(found, report.pruning)
