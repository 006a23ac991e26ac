"""The commands. Torch is imported inside them only: `--help` and usage errors answer at once."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from moeprune import __version__
from moeprune.errors import MoepruneError
from moeprune.gate import check_limits, judge
from moeprune.output import check_apart, check_choice, check_output, check_outputs, check_report, emit, warn
from moeprune.plan import COMPENSATIONS, SCOPES, SIGNALS, is_possible, parse_keep

if TYPE_CHECKING:
    from moeprune.data import Dataset
    from moeprune.model import Model
    from moeprune.runtime import Runtime

app = typer.Typer(
    help="Inference-time expert pruning of Soft Mixture-of-Experts models.",
    epilog="Exit codes: 0 passed, 1 a gate failed, 2 anything wrong with the call, the input or the"
    " program, 130 interrupted, 143 terminated.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint (.safetensors).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; auto takes CUDA if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32: in the precision of the weights. bf16: under autocast.")]
BatchSize = Annotated[
    int, typer.Option(help="Inputs of a forward pass; with scope batch also the batch that shares experts.")
]
Limit = Annotated[int | None, typer.Option(help="Take only so many samples, drawn with a fixed seed.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**63 - 1)]
Split = Annotated[str | None, typer.Option(help="Split of a built-in data set: train, calibration or test.")]
Factory = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="Builds the model, where the checkpoint is one of your own code. That code is run.",
    ),
]
Preprocess = Annotated[
    list[str] | None,
    typer.Option(
        help="Override one preprocessing setting, such as resize=256 or mean=0.5.", metavar="KEY=VALUE"
    ),
]
OutputFormat = Annotated[str, typer.Option(help="Format of the report: text or json.")]
OutputFile = Annotated[Path | None, typer.Option(help="Write the report there, not to stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace output files that exist.")]


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Register a command that returns its exit code, and map what it raises to exit codes."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = function(*args, **kwargs) or 0
        except MoepruneError as error:
            _fail(f"error: {error}\n")
        except BrokenPipeError:
            sys.stdout = None  # nobody reads it any more
            raise typer.Exit(2) from None
        except Exception as error:
            if _is_out_of_memory(error):
                sizes = "`--batch-size`" + (" or `--latency-batch`" if kwargs.get("latency") else "")
                _fail(f"error: out of memory ({error})\n\nhint: give a smaller {sizes}\n")
            _fail(f"{traceback.format_exc()}\nerror: moeprune failed; this is a defect, please report it\n")
        raise typer.Exit(code)

    app.command(function.__name__)(run)
    return run


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is Python's own, torch's on a device, or torch's on the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _fail(message: str) -> NoReturn:
    sys.stderr.write(message)
    raise typer.Exit(2)


def _show_version(value: bool) -> None:
    if value:
        print(f"moeprune {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@command
def inspect(
    checkpoint: Checkpoint,
    output_format: OutputFormat = "text",
    output_file: OutputFile = None,
    force: Force = False,
) -> None:
    """Show what is in a checkpoint.

    Layers, experts, parameters, size, FLOPs, plan and provenance, from the file's header alone.
    """
    check_report(output_format, output_file, force)
    from moeprune import report
    from moeprune.description import read_description
    from moeprune.header import read_header
    from moeprune.plan import plan_to_json
    from moeprune.size import size_and_cost

    header = read_header(checkpoint)
    config, plan, details = read_description(header)
    plans = plan_to_json(plan)
    layers = {
        name: {
            "experts": layer.num_experts,
            "slots_per_expert": layer.slots_per_expert,
            "hidden_dim": layer.hidden_dim,
            "parameters": sum(t.numel for key, t in header.tensors.items() if key.startswith(f"{name}.")),
            "plan": plans.get(name),
        }
        for name, layer in config.soft_moe_layers.items()
    }
    found = {
        "schema_version": 1,
        "checkpoint": str(checkpoint),
        "architecture": config.to_json(),
        "preprocessing": details.preprocessing.to_json(),
        "layers": layers,
        **size_and_cost(config, plan, header.tensors),
        "source": details.source,
        "provenance": details.provenance,
    }
    emit(found, report.inspection, output_format, output_file)


@command
def analyze(
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Calibration data: digits, pairs, a .npz, a .safetensors, or a folder.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The analysis to write (.safetensors).")],
    model: Factory = None,
    split: Split = None,
    preprocess: Preprocess = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 64,
    output_format: OutputFormat = "text",
    output_file: OutputFile = None,
    force: Force = False,
) -> None:
    """Measure what each expert matters to each input.

    Runs calibration data through an unpruned checkpoint, once.
    """
    check_report(output_format, output_file, force)
    check_output(output, force)
    check_apart(output, output_file)
    from moeprune import calibration, report
    from moeprune.statistics import summarize

    runtime = _runtime(device, dtype, batch_size)
    loaded = _load(checkpoint, model, preprocess)
    analysis = calibration.analyze(loaded, _open(data, loaded, split, "calibration", limit), runtime)
    calibration.save_analysis(analysis, output)
    layers = {name: summarize(statistics) for name, statistics in analysis.layers.items()}
    for name, layer in layers.items():
        if layer["experts"] == 1:
            warn(
                f"layer `{name}` has one expert: nothing to prune. A Soft MoE of one expert cannot even"
                " represent some simple convex functions, however large the expert is (Chung et al. 2024,"
                " Theorem 1): train with many small experts"
            )
    found = {
        "schema_version": 1,
        "checkpoint": str(checkpoint),
        "analysis": str(output),
        "data": analysis.provenance["data"],
        "layers": layers,
    }
    emit(found, report.analysis, output_format, output_file)


@command
def prune(
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
            help="What stands in for dropped experts: none, renorm, mean, lstsq, affine or refit.",
            show_default="none",
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
            "--one-shot",
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
    output_format: OutputFormat = "text",
    output_file: OutputFile = None,
    force: Force = False,
) -> None:
    """Write a checkpoint that runs few experts.

    Say how many with one of --keep, --mass, --max-size, --max-flops, --max-accuracy-drop and --plan.
    """
    check_report(output_format, output_file, force)
    if output is None and save_plan is None:
        raise MoepruneError("nothing to write", "give `--output` or `--save-plan`")
    check_outputs(output, save_plan, output_file, force)
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
    ways = {"--scope": scope, "--signal": signal, "--compensate": compensate}
    if plan is not None and (spare := [option for option, value in ways.items() if value is not None]):
        raise MoepruneError(f"`{spare[0]}` does not go with `--plan`", "the plan says it for each layer")
    if scope is None:
        scope = "static" if mass is None else "input"
    signal = "combine" if signal is None else signal
    compensate = "none" if compensate is None else compensate
    check_choice("--scope", scope, SCOPES)
    check_choice("--signal", signal, SIGNALS)
    check_choice("--compensate", compensate, COMPENSATIONS)
    if not is_possible(scope, signal, compensate):
        static = f"--signal {signal}" if signal == "gram" else f"--compensate {compensate}"
        raise MoepruneError(
            f"`{static}` is for one set for all inputs, not for `--scope {scope}`", "give `--scope static`"
        )
    if mass is not None and (scope != "input" or not 0 < mass <= 1):
        raise MoepruneError(
            f"`--mass {mass:g}` with `--scope {scope}`", "give a share in 0…1, with `--scope input`"
        )
    if one_shot and data is not None:
        raise MoepruneError("`--one-shot` reads no data", "leave `--data` or `--one-shot` out")
    if data is None and (split is not None or limit is not None):
        raise MoepruneError("`--split` and `--limit` go with `--data`", "give the data that they are of")
    if max_accuracy_drop is not None and (data is None or output is None or one_shot):
        raise MoepruneError(
            "`--max-accuracy-drop` searches and confirms on labelled data",
            "give it with `--data`, and `--output`, without `--one-shot`",
        )
    kept = None if keep is None else parse_keep(keep)
    from moeprune import pruning, report
    from moeprune.calibration import load_analysis, require_analysis_of
    from moeprune.description import read_description
    from moeprune.header import read_header
    from moeprune.model import save
    from moeprune.plan import plan_to_json
    from moeprune.plan_file import read_plan, write_plan
    from moeprune.planning import plans_for
    from moeprune.search import prune_best, prune_within_drop
    from moeprune.size import size_and_cost
    from moeprune.streaming import file_fingerprint

    runtime = _runtime(device, dtype, batch_size)
    full = read_header(checkpoint)
    config, existing, details = read_description(full)
    pruning.require_unpruned(existing)
    measured = None if analysis is None else load_analysis(analysis)
    if measured is not None and (max_size is not None or max_flops is not None):
        require_analysis_of(config.soft_moe_layers, file_fingerprint(full), measured)
    search = None
    if max_accuracy_drop is not None:
        dense = _load(checkpoint, model, preprocess)
        assert data is not None
        result = prune_within_drop(
            dense,
            _open(data, dense, split, "calibration", limit),
            max_accuracy_drop,
            analysis=measured,
            scope=scope,
            signal=signal,
            compensate=compensate,
            seed=seed,
            runtime=runtime,
        )
        assert output is not None
        save(result.model, output)
        search = result.report
    else:
        if plan is not None:
            plans = [read_plan(plan, config.soft_moe_layers)]
        else:
            plans = plans_for(
                config, full.tensors, measured, keep=kept, mass=mass, max_size=max_size, max_flops=max_flops,
                scope=scope, signal=signal, compensation=compensate,
            )  # fmt: skip
        wanted = plans[0]
        is_static = all(layer.scope == "static" for layer in wanted.values())
        if output is not None and is_static and data is None and not pruning.needs_pass(wanted, one_shot):
            preprocessing = details.preprocessing.updated(preprocess or [])
            pruning.prune_file(
                checkpoint, output, measured, plan=wanted, preprocessing=preprocessing, seed=seed
            )
        elif output is not None:
            dense = _load(checkpoint, model, preprocess)
            pruned = prune_best(
                dense,
                plans if pruning.needs_pass(wanted, one_shot) else [wanted],
                measured,
                data=None if data is None else _open(data, dense, split, "calibration", limit),
                one_shot=one_shot,
                seed=seed,
                runtime=runtime,
            )
            save(pruned, output)
    pruned_size = None
    if output is not None:
        header = read_header(output)
        _, wanted, _ = read_description(header)
        pruned_size = size_and_cost(config, wanted, header.tensors)
    if save_plan is not None:
        write_plan(wanted, save_plan)
    found = {
        "schema_version": 1,
        "checkpoint": None if output is None else str(output),
        "saved_plan": None if save_plan is None else str(save_plan),
        "plan": plan_to_json(wanted),
        "model": pruned_size,
        "full_model": size_and_cost(config, {}, full.tensors),
        "search": search,
    }
    emit(found, report.pruning, output_format, output_file)


@command
def eval(
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
        Path | None, typer.Option(help="With --sweep or --frontier: what `moeprune analyze` wrote.")
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
            "--latency", help="Time forward passes too; with --baseline, in turn with the full model's."
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
    model: Factory = None,
    split: Split = None,
    preprocess: Preprocess = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    output_format: OutputFormat = "text",
    output_file: OutputFile = None,
    force: Force = False,
) -> int:
    """Report accuracy, size, FLOPs and latency, and judge them.

    Compares a checkpoint with the full model (--baseline); a gate that fails makes exit code 1. With
    --sweep, prunes a full model in many ways and evaluates each.
    """
    check_report(output_format, output_file, force)
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
    sweep_only = {"--analysis": analysis, "--scope": scope, "--signal": signal, "--compensate": compensate}
    if sweep is None and frontier is None:
        for option, given in sweep_only.items():
            if given:
                raise MoepruneError(f"`{option}` goes with `--sweep`", "add `--sweep 1/16,1/8,1/4`")
        check_limits(limits, has_baseline=baseline is not None, has_latency=latency)
        keeps = []
    else:
        _check_sweep(frontier, sweep_only, baseline, latency, limits, output_file, force)
        keeps = [] if sweep is None else [parse_keep(keep, "--sweep") for keep in sweep.split(",")]
    from moeprune import evaluation, report
    from moeprune.calibration import load_analysis
    from moeprune.frontier import KEEPS, on_frontier, variants
    from moeprune.latency import BATCH_SIZES, check_batch_sizes
    from moeprune.plot import plot_frontier
    from moeprune.sweep import grid, scopes_of
    from moeprune.sweep import sweep as run_sweep

    latency_batches = latency_batch or BATCH_SIZES
    check_batch_sizes(latency_batches)
    runtime = _runtime(device, dtype, batch_size)
    loaded = _load(checkpoint, model, preprocess)
    dataset = _open(data, loaded, split, "test", limit)
    found: dict[str, Any] = {"schema_version": evaluation.SCHEMA_VERSION, "checkpoint": str(checkpoint)}
    if analysis is not None:
        first, *others = scopes_of(loaded)
        if frontier is not None:
            labels, todo = zip(*variants(keeps or KEEPS, (first, *others)), strict=True)
        else:
            scopes = scope or (first, *others)
            todo = tuple(
                grid(keeps, scopes, signal or SIGNALS, compensate or COMPENSATIONS, control_scope=first)
            )
            labels = (None,) * len(todo)
        measured_batches = latency_batches if latency else None
        results = run_sweep(loaded, todo, load_analysis(analysis), dataset, seed, runtime, measured_batches)
        rows = [{"label": label, **row} for label, (row, _) in zip((None, *labels), results, strict=True)]
        for row, best in zip(rows, on_frontier(rows), strict=True):
            row["on_frontier"] = best
        found |= {
            "data": dataset.to_json(),
            "rows": rows,
            "plot": None if frontier is None else str(frontier),
            "environment": evaluation.environment(runtime),
        }
        if frontier is not None:
            title = f"{checkpoint.name} on {dataset.spec} ({dataset.samples} samples)"
            plot_frontier(rows, title, frontier)
        emit(found, report.sweep, output_format, output_file)
        return 0
    full = None if baseline is None else _load(baseline, model, preprocess)
    found["baseline"] = None if baseline is None else str(baseline)
    found |= evaluation.evaluate(loaded, dataset, full, runtime, latency_batches if latency else None)
    for name in (found["forgetting"] or {}).get("collapsed", ()):
        entry = next(entry for entry in found["forgetting"]["classes"] if entry["class"] == name)
        warn(
            f"class {name} collapsed: {report.percent(entry['baseline_accuracy'])} →"
            f" {report.percent(entry['accuracy'])} of its {entry['samples']} samples, while the average"
            f" accuracy changed by {report.points(-found['difference']['accuracy_drop'])}"
        )
    found["gates"] = judge(found, limits)
    found["passed"] = all(gate["passed"] for gate in found["gates"])
    emit(found, report.evaluation, output_format, output_file)
    return 0 if found["passed"] else 1


@command
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A checkpoint of a known library, or of moeprune (.safetensors, .pt, ...)."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The checkpoint to write; by its suffix as safetensors or .pt."),
    ],
    to: Annotated[
        str, typer.Option(help="What to write: moeprune, or the library that is to load it.")
    ] = "moeprune",
    source: Annotated[
        str | None,
        typer.Option(
            help="The library that wrote the file, where its tensors do not tell; with --model also its"
            " release, such as soft-mixture-of-experts==0.1.0, where that is not the installed one."
        ),
    ] = None,
    source_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="What the tensors cannot tell, as the library's constructor takes it, such as num_heads=6"
            " (repeatable).",
            metavar="KEY=VALUE",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Which entry of a training checkpoint holds the weights, such as model_ema."),
    ] = None,
    model: Factory = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="With --model: a keyword argument of the function, a Python literal or else a text"
            " (repeatable).",
            metavar="KEY=VALUE",
        ),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(help="With --model: the shape of one input, such as 3,224,224.", metavar="C,H,W"),
    ] = None,
    preprocess: Preprocess = None,
    output_format: OutputFormat = "text",
    output_file: OutputFile = None,
    force: Force = False,
) -> None:
    """Take a checkpoint of another library or of your own code, or give one back.

    Proves on random images that the library's own model computes the same, where it is installed.
    """
    check_report(output_format, output_file, force)
    check_output(output, force)
    check_apart(output, output_file)
    from moeprune.sources import LAYER_LIBRARIES, SOURCES
    from moeprune.sources.given import parse_settings

    check_choice("--to", to, ("moeprune", *SOURCES, *LAYER_LIBRARIES))
    if source is not None and model is None:
        check_choice("--source", source, tuple(SOURCES))
    arguments = parse_settings(source_arg or ())
    if model is None and (model_arg or input_shape is not None):
        raise MoepruneError(
            "`--model-arg` and `--input-shape` go with `--model`", "say what builds the model"
        )
    if model is not None and arguments:
        raise MoepruneError("`--source-arg` does not go with `--model`", "give `--model-arg`")
    from moeprune import adoption, conversion, report
    from moeprune.adopted import parse_arguments, parse_shape
    from moeprune.evaluation import size_and_cost

    converted: adoption.Adopted | conversion.Converted
    if to != "moeprune" and adoption.is_own_model(checkpoint):
        converted = adoption.give_back(checkpoint, output, to, model)
    elif model is None:
        converted = conversion.convert(checkpoint, output, to, source, arguments, preprocess, key)
    elif to != "moeprune" or conversion.is_ours(checkpoint):
        raise MoepruneError(
            f"`--model` takes in a file that your own code wrote: not `{checkpoint}` with `--to {to}`",
            "leave `--model` out, or give that file",
        )
    else:
        shape, own_arguments = parse_shape(input_shape), parse_arguments(model_arg or ())
        converted = adoption.adopt_file(
            checkpoint, output, model, own_arguments, shape, key, preprocess, source
        )
    found = {
        "schema_version": 1,
        "checkpoint": str(checkpoint),
        "output": str(output),
        **converted.to_json(),
        "model": size_and_cost(converted.model),
    }
    emit(found, report.conversion, output_format, output_file)


@command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write into.")] = Path(
        "moeprune-demo"
    ),
    train: Annotated[
        bool,
        typer.Option("--train", help="Train both models anew first (minutes), as the shipped ones were."),
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    output_format: OutputFormat = "text",
    output_file: OutputFile = None,
    force: Force = False,
) -> None:
    """Show the whole story on two real checkpoints.

    Analyzes, prunes and evaluates them on scikit-learn's digits, in under a minute on two cores.
    """
    check_report(output_format, output_file, force)
    if output.exists() and not output.is_dir():
        raise MoepruneError(f"`{output}` is a file, expected a directory", "give another with `-o`")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise MoepruneError(
            f"`{output}` is not empty", "give another with `-o`, or `--force` to write into it"
        )
    from moeprune import report
    from moeprune.demo import run_demo

    found = run_demo(output, train, seed, _runtime(device, "float32", 256))
    emit(found, report.demo, output_format, output_file)


def _check_sweep(
    frontier: Path | None,
    sweep_only: dict[str, Any],
    baseline: Path | None,
    latency: bool,
    limits: dict[str, float | None],
    output_file: Path | None,
    force: bool,
) -> None:
    """Refuse what does not go with `--sweep` or `--frontier`."""
    which = "--sweep" if frontier is None else "--frontier"
    if baseline is not None or any(limit is not None for limit in limits.values()):
        raise MoepruneError(
            f"`{which}` prunes the full model in many ways: it takes no `--baseline` and no gates",
            "give them to an eval of the checkpoint that you choose",
        )
    if sweep_only["--analysis"] is None:
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
    from moeprune.plot import check_plot

    check_output(frontier, force)
    check_apart(frontier, output_file)
    check_plot(frontier)


def _load(path: Path, factory: str | None, preprocess: list[str] | None) -> Model:
    from dataclasses import replace

    from moeprune.model import load

    model = load(path, factory)
    for name, layer in model.config.soft_moe_layers.items():
        if layer.dispatch_over == "batch":
            warn(
                f"layer `{name}` takes its dispatch softmax over the batch, as it was trained: results depend"
                " on `--batch-size` and on the order of the inputs"
            )
    if preprocess:
        updated = model.details.preprocessing.updated(preprocess)
        model.details = replace(model.details, preprocessing=updated)
    return model


def _open(spec: str, model: Model, split: str | None, default_split: str, limit: int | None) -> Dataset:
    from moeprune.data import BUILT_IN
    from moeprune.model import dataset_for

    if split is not None and spec not in BUILT_IN:
        raise MoepruneError(
            f"`--split {split}` does not go with `{spec}`", f"it picks a split of {' or '.join(BUILT_IN)}"
        )
    return dataset_for(model, spec, split or default_split, limit)


def _runtime(device: str, dtype: str, batch_size: int) -> Runtime:
    from moeprune.runtime import Runtime

    runtime = Runtime(device, dtype, batch_size, progress=True)
    _ = runtime.torch_device  # a missing device is told before any work
    return runtime
