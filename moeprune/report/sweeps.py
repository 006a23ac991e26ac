"""The report of a sweep: its table, and which ways to prune it recommends."""

from collections.abc import Iterator, Sequence

from moeprune.pruning.results import LanguageSweep, LanguageSweepRow, Sweep, SweepRow
from moeprune.report.document import Block, Cell, Document, Lines, Table
from moeprune.report.words import checkpoint_on_data, percent

NEAR = 0.01  # accuracy below the full model's that counts as near it


def sweep(result: Sweep) -> Document:
    """Return a row for each way to prune, and the smallest and the cheapest that come near the full model."""
    latency = result.rows[0].latency
    columns = ["kept", "scope, signal,\ncompensation", "accuracy\n%", "same\n%", "size\n%", "FLOPs\n%"]
    columns += [f"speed-up,\nbatch {latency.batches[0].batch_size}"] if latency else []
    rows: list[Sequence[Cell] | None] = []
    for before, row in zip((None, *result.rows), result.rows, strict=False):
        if before is not None and before.keep != row.keep:
            rows.append(None)
        is_full = row.scope is None
        way = "full model" if is_full else _way(row)
        kept = {"0": "none", "1.0": "all"}.get(row.keep, row.keep)
        deviation = "" if row.accuracy_sd is None else f" ± {100 * row.accuracy_sd:.1f}"
        cells = [kept, way, f"{100 * row.accuracy:.2f}{deviation}", f"{100 * row.agreement:.1f}"]
        for cost in ("size", "flops"):
            is_best = not is_full and row.on_frontier is not None and getattr(row.on_frontier, cost)
            cells.append(f"{'*' if is_best else ''}{100 * getattr(row, cost):.1f}")
        rows.append([*cells, f"{row.speedup:.2f}×"] if latency else cells)
    draws = max(row.draws for row in result.rows)
    notes = [
        f"same: predictions as the full model's; size, FLOPs: of the full model's; random: mean ± sd of {draws} draws",
        "*: no other row is as accurate at less cost, or more accurate at no more",
    ]
    notes += [f"drawn in {result.plot}"] if result.plot is not None else []
    blocks: list[Block] = [Table(columns, rows), Lines(notes), Lines(list(_answer(result.rows)))]
    return Document(checkpoint_on_data(result.checkpoint, result.data), blocks)


def _way(row: SweepRow) -> str:
    """Return scope, signal and compensation; of `auto` what it has chosen."""
    rank = "" if row.rank is None else f" {row.rank:g}"
    way = f"{row.scope} {row.signal} {row.compensate}{rank}"
    return f"auto: {row.compensate}{rank}" if row.label == "auto" else way


def best_of(rows: Sequence[SweepRow]) -> Iterator[tuple[str, str, SweepRow | None]]:
    """Yield for size and FLOPs their name, the field, and the row of the least within NEAR of the full model.

    Random experts and none at all are controls, not ways to prune.
    """
    near = [row for row in _near(rows) if row.keep != "0" and row.signal != "random"]
    for name, cost in (("size", "size"), ("FLOPs", "flops")):
        yield name, cost, min(near, key=lambda row: (getattr(row, cost), -row.accuracy), default=None)


def highlights(rows: Sequence[SweepRow]) -> Iterator[tuple[str, str, str]]:
    """Return the full model's accuracy, and the ways to prune that `best_of` finds."""
    yield "accuracy of the full model", percent(rows[0].accuracy, 2), f"{len(rows) - 1} ways to prune it"
    for name, cost, best in best_of(rows):
        label = f"least {name} within {100 * NEAR:g} pt"
        if best is None:
            yield label, "–", "none of them"
        else:
            note = f"{best.keep}, {best.label}: accuracy {percent(best.accuracy, 2)}"
            yield label, percent(getattr(best, cost)), note


def _near(rows: Sequence[SweepRow]) -> list[SweepRow]:
    return [row for row in rows[1:] if row.accuracy >= rows[0].accuracy - NEAR]


def _answer(rows: Sequence[SweepRow]) -> Iterator[str]:
    """Yield the options of the smallest and of the cheapest model, and whether it needs experts at all."""
    for name, cost, best in best_of(rows):
        start = f"least {name} within {100 * NEAR:g} pt of the full model:"
        if best is None:
            yield f"{start} none of these ways to prune"
            continue
        how = f"--keep {best.keep} --scope {best.scope} --signal {best.signal} --compensate {best.compensate}"
        how += "" if best.rank is None else f" --rank {best.rank:g}"
        yield f"{start} {percent(getattr(best, cost))} at {percent(best.accuracy, 2)} by `{how}`"
    controls = [row.compensate or "" for row in _near(rows) if row.keep == "0"]
    if "linear" in controls:
        yield f"a linear map in place of each MoE layer is within {100 * NEAR:g} pt too: `--compensate linear`"
    elif controls:
        how = ", ".join(controls)
        yield f"no expert at all ({how}) is within {100 * NEAR:g} pt too: on this data the experts hardly matter"


def language_sweep(result: LanguageSweep) -> Document:
    """Return a row for each way to prune a language model, and the options of the best one of each size."""
    columns = ["experts", "hidden\nunits", "signal,\ncompensation", "loss\nincrease", "same next\ntoken %", "KL"]
    rows: list[Sequence[Cell] | None] = []
    groups = _by_share(result.rows[1:])
    for own in [result.rows[:1], *groups.values()]:
        for row in own:
            deviation = "" if row.loss_increase_sd is None else f" ± {row.loss_increase_sd:.4f}"
            way = "full model" if row.signal is None else f"{row.signal}, {row.compensate}"
            kept = "all" if row.keep == "1.0" else row.keep
            figures = f"{row.loss_increase:+.4f}{deviation}", f"{100 * row.agreement:.1f}", f"{row.kl:.4f}"
            rows.append([kept, row.width or "all", way, *figures, f"{100 * row.size:.1f}", f"{100 * row.flops:.1f}"])
        rows.append(None)
    full = f"full model: loss {result.rows[0].loss:.4f} nats per token; size, FLOPs: of its own"
    lines = [full]
    for share, own in groups.items():
        best = min(own, key=lambda row: row.loss_increase)
        lines.append(f"least loss increase at {share}: {best.loss_increase:+.4f} by `{best.options}`")
    title = checkpoint_on_data(result.checkpoint, result.data, f" of {result.sequence_length} tokens")
    return Document(title, [Table([*columns, "size\n%", "FLOPs\n%"], rows[:-1]), Lines(lines)])


def _by_share(rows: Sequence[LanguageSweepRow]) -> dict[str, list[LanguageSweepRow]]:
    """Return the rows by the share of experts, or of hidden units, that is left."""
    found: dict[str, list[LanguageSweepRow]] = {}
    for row in rows:
        found.setdefault(row.width or row.keep, []).append(row)
    return found
