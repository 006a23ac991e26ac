"""The report of `moeprune eval`."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import asdict

from moeprune.evaluation.results import Evaluation, Forgetting, Latency, ModelFigures
from moeprune.report.document import Block, Document, Lines, Table
from moeprune.report.words import amount, checkpoint_on_data, ci95, percent, plural, points

WORST_CLASSES = 3


def evaluation(result: Evaluation) -> Document:
    """Return figures of the model, alone or beside the full model's, latency and gates."""
    full, difference = result.baseline_model, result.difference
    labels, figures = zip(*_figures(result.model), strict=True)
    columns = {"": labels, "model": figures}
    if full and difference:
        changes = {
            "accuracy": points(-difference.accuracy_drop),
            "top-5 accuracy": points(result.model.top5_accuracy - full.top5_accuracy),
            "size": f"{-100 * difference.size_reduction:+.1f} %",
            "FLOPs per input": f"{-100 * difference.flops_reduction:+.1f} %",
        }
        columns["full model"] = tuple(text for _, text in _figures(full))
        columns["difference"] = tuple(changes.get(label, "") for label in labels)
    blocks: list[Block] = [Table(tuple(columns), [*zip(*columns.values(), strict=True)])]
    if difference and result.forgetting:
        drop, p = points(difference.accuracy_drop), f"{difference.mcnemar_p:.3g}"
        line = f"accuracy drop {drop} ({ci95(difference.accuracy_drop_ci95)}; McNemar p = {p}),"
        line += f" same prediction as the full model on {percent(difference.agreement, 2)}"
        blocks.append(Lines([line, _flips(result.forgetting)]))
    if result.latency:
        blocks.append(_latency(result.latency, result.environment.device))
    return Document(checkpoint_on_data(result.checkpoint, result.data), blocks, result.gates)


def _figures(model: ModelFigures) -> list[tuple[str, str]]:
    """Return labels and values; parts of the figure above them are indented."""
    low, high = model.accuracy_ci95
    total, *flops = asdict(model.flops_per_input).items()
    return [
        ("accuracy", f"{percent(model.accuracy, 2)} ({100 * low:.1f} to {100 * high:.1f})"),
        ("top-5 accuracy", percent(model.top5_accuracy, 2)),
        ("loss", f"{model.loss:.4f}"),
        ("experts per input", f"{model.experts_per_input:.4g}"),
        ("parameters", amount(model.parameters)),
        ("size", amount(model.bytes, "B")),
        *((f"  {part}", amount(size, "B")) for part, size in asdict(model.bytes_by_part).items()),
        ("FLOPs per input", amount(total[1])),
        *((f"  {part}", amount(count)) for part, count in flops),
    ]


def _flips(forgetting: Forgetting) -> str:
    """Return the inputs that flip, and the classes that lost most."""
    lost, won = len(forgetting.lost), len(forgetting.won)
    text = f"inputs that flip: {lost} from right to wrong, {won} from wrong to right"
    worst = []
    for change in forgetting.classes[:WORST_CLASSES]:
        if change.accuracy_drop > 0:
            before, after = percent(change.baseline_accuracy, 0), percent(change.accuracy, 0)
            worst.append(f"{change.index} ({before} → {after} of {change.samples})")
    return text + (f"; classes that lost most: {', '.join(worst)}" if worst else "")


def _latency(latency: Latency, device: str) -> Table:
    where = device if device != "cpu" else f"cpu with {plural(latency.threads, 'thread')}"
    rows = []
    for batch in latency.batches:
        row = {"batch": str(batch.batch_size)}
        model = {"model": _seconds(batch.model_seconds, batch.model_seconds_iqr)}
        if batch.speedup and batch.speedup_iqr and batch.baseline_seconds and batch.baseline_seconds_iqr:
            low, high = batch.speedup_iqr
            row["speed-up"] = f"{batch.speedup:.2f}× ({low:.2f} to {high:.2f})"
            model["full model"] = _seconds(batch.baseline_seconds, batch.baseline_seconds_iqr)
        rows.append(row | model | {"repetitions": str(batch.repetitions)})
    title = f"latency on {where}: median (middle half) of the repetitions"
    return Table(tuple(rows[0]), [tuple(row.values()) for row in rows], title)


def _seconds(median: float, quartiles: Sequence[float]) -> str:
    """Return all three in the unit of the median: `1.23 ms (1.2 to 1.31)`."""
    scale, unit = (1.0, "s") if median >= 0.9995 else (1e-3, "ms") if median >= 0.9995e-3 else (1e-6, "µs")
    middle, low, high = (f"{float(f'{value / scale:.3g}'):g}" for value in (median, *quartiles))
    return f"{middle} {unit} ({low} to {high})"
