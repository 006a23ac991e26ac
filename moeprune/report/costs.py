"""Size, FLOPs and latency of models as rows of tables."""

from collections.abc import Sequence

from msgspec.structs import asdict

from moeprune.evaluation.results import Latency
from moeprune.models.results import ModelCost
from moeprune.report.document import Table
from moeprune.report.words import amount, plural


def cost_rows(model: ModelCost) -> list[tuple[str, str]]:
    """Return labels and values; parts of the figure above them are indented."""
    total, *flops = asdict(model.flops_per_input).items()
    return [
        ("experts per input", f"{model.experts_per_input:.4g}"),
        ("parameters", amount(model.parameters)),
        ("size", amount(model.bytes, "B")),
        *((f"  {part}", amount(size, "B")) for part, size in asdict(model.bytes_by_part).items()),
        ("FLOPs per input", amount(total[1])),
        *((f"  {part}", amount(count)) for part, count in flops),
    ]


def cost_changes(size_reduction: float, flops_reduction: float) -> dict[str, str]:
    """Return the differences of size and FLOPs by label."""
    return {
        "size": f"{-100 * size_reduction + 0.0:+.1f} %",
        "FLOPs per input": f"{-100 * flops_reduction + 0.0:+.1f} %",
    }


def latency_table(latency: Latency, device: str) -> Table:
    """Return a row for each batch size."""
    where = device if device != "cpu" else f"cpu with {plural(latency.threads, 'thread')}"
    rows = []
    for batch in latency.batches:
        row = {"batch": str(batch.batch_size)}
        model = {"model": _seconds(batch.model_seconds, batch.model_seconds_iqr)}
        if batch.speedup and batch.speedup_iqr and batch.baseline_seconds and batch.baseline_seconds_iqr:
            low, high = batch.speedup_iqr
            row["speed-up"] = f"{batch.speedup:.2f}× ({low:.2f} to {high:.2f})"
            model["full model"] = _seconds(batch.baseline_seconds, batch.baseline_seconds_iqr)
        rows.append(row | model | {"runs": str(batch.repetitions)})
    title = f"latency on {where}: median (middle half) of the runs"
    return Table(tuple(rows[0]), [tuple(row.values()) for row in rows], title)


def _seconds(median: float, quartiles: Sequence[float]) -> str:
    """Return all three in the unit of the median: `1.23 ms (1.2 to 1.31)`."""
    scale, unit = (1.0, "s") if median >= 0.9995 else (1e-3, "ms") if median >= 0.9995e-3 else (1e-6, "µs")
    middle, low, high = (f"{float(f'{value / scale:.3g}'):g}" for value in (median, *quartiles))
    return f"{middle} {unit} ({low} to {high})"
