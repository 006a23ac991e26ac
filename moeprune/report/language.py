"""The report of an evaluation of a language model."""

from collections.abc import Iterator, Sequence

from moeprune.errors import listed
from moeprune.evaluation.language_results import LanguageEvaluation, LanguageFigures, LanguageGroup
from moeprune.report.costs import cost_changes, cost_rows, latency_table
from moeprune.report.document import Block, Cell, Document, Lines, Table
from moeprune.report.words import amount, checkpoint_on_data, percent, points

Bounds = tuple[float, float] | None


def language(result: LanguageEvaluation) -> Document:
    """Return figures of the model, alone or beside the full model's, of each group, latency and gates."""
    full, difference = result.baseline_model, result.difference
    labels, figures = zip(*_figures(result.model), strict=True)
    columns = {"": labels, "model": figures}
    blocks: list[Block] = []
    if full and difference:
        changes = {
            "loss (nats per token)": f"{difference.loss_increase:+.4f}",
            "perplexity": f"× {difference.perplexity_ratio:.4g}",
            "next token predicted": points(-difference.accuracy_drop),
            **cost_changes(difference.size_reduction, difference.flops_reduction),
        }
        columns["full model"] = tuple(text for _, text in _figures(full))
        columns["difference"] = tuple(changes.get(label, "") for label in labels)
        increase = (
            f"loss increase {difference.loss_increase:+.4f}{_within(difference.loss_increase_ci95)} nats per token"
        )
        same = f"same next token as the full model at {percent(difference.agreement, 2)}"
        same += f"{_within(difference.agreement_ci95, 2, 100)} of all tokens, KL divergence {difference.kl:.4g}"
        blocks.append(Lines([f"{increase}, perplexity × {difference.perplexity_ratio:.4g}", same]))
    blocks.insert(0, Table(tuple(columns), [*zip(*columns.values(), strict=True)]))
    if result.groups:
        blocks.append(_groups(result.groups, full is not None))
    if shifted := [name for name, shift in result.shift.items() if shift.is_shifted]:
        text = "the data is not like the calibration data: larger errors than predicted in"
        blocks.append(Lines([f"{text} {listed(shifted)} (see the warning)"]))
    if result.latency:
        blocks.append(latency_table(result.latency, result.environment.device))
    title = checkpoint_on_data(result.checkpoint, result.data, f" of {result.sequence_length} tokens")
    return Document(title, blocks, result.gates)


def _within(bounds: Bounds, digits: int = 4, scale: float = 1) -> str:
    return "" if bounds is None else f" (95 %: {scale * bounds[0]:.{digits}f} to {scale * bounds[1]:.{digits}f})"


def _figures(model: LanguageFigures) -> list[tuple[str, str]]:
    bits = [] if model.bits_per_byte is None else [("bits per byte", f"{model.bits_per_byte:.4f}")]
    return [
        ("loss (nats per token)", f"{model.loss:.4f}{_short(model.loss_ci95, '.4f')}"),
        ("perplexity", f"{model.perplexity:.5g}{_short(model.perplexity_ci95, '.5g')}"),
        *bits,
        ("next token predicted", f"{percent(model.accuracy, 2)}{_short(model.accuracy_ci95, '.1f', 100)}"),
        *cost_rows(model),
    ]


def _short(bounds: Bounds, spec: str, scale: float = 1) -> str:
    return "" if bounds is None else f" ({scale * bounds[0]:{spec}} to {scale * bounds[1]:{spec}})"


def _groups(groups: Sequence[LanguageGroup], has_baseline: bool) -> Table:
    rows: list[Sequence[Cell]] = []
    for group in groups:
        bits = "" if group.bits_per_byte is None else f"{group.bits_per_byte:.4f}"
        row = [group.name, str(group.samples), f"{group.loss:.4f}", f"{group.perplexity:.5g}", bits]
        if has_baseline:
            increase = f"{group.loss_increase:+.4f}{_short(group.loss_increase_ci95, '.4f')}"
            row += [f"{group.baseline_loss:.4f}", increase, percent(group.agreement or 0), f"{group.kl:.4g}"]
        else:
            row.append(percent(group.accuracy))
        rows.append(row)
    compared = (
        ("full\nmodel", "increase\n(95 %)", "same next\ntoken", "KL") if has_baseline else ("next token\npredicted",)
    )
    return Table(
        ("group", "sequences", "loss", "perplexity", "bits per\nbyte", *compared), rows, "results of each group"
    )


def highlights(result: LanguageEvaluation) -> Iterator[tuple[str, str, str]]:
    """Yield the most important figures: labels, values, and a note on each."""
    model, full, difference = result.model, result.baseline_model, result.difference
    size, flops = amount(model.bytes, "B"), amount(model.flops_per_input.total)
    if difference is None or full is None:
        yield "loss", f"{model.loss:.4f}", f"nats per token{_within(model.loss_ci95)}"
        yield "perplexity", f"{model.perplexity:.5g}", ""
        yield "size", size, ""
        yield "FLOPs per input", flops, ""
        return
    yield "loss increase", f"{difference.loss_increase:+.4f}", f"nats per token{_within(difference.loss_increase_ci95)}"
    ratio = f"{full.perplexity:.5g} → {model.perplexity:.5g}"
    yield "perplexity", f"× {difference.perplexity_ratio:.4g}", ratio
    sizes, counts = f"{amount(full.bytes, 'B')} → {size}", f"{amount(full.flops_per_input.total)} → {flops}"
    yield "size", percent(1 - difference.size_reduction), f"of the full model's: {sizes}"
    yield "FLOPs per input", percent(1 - difference.flops_reduction), f"of the full model's: {counts}"
    yield "same next token", percent(difference.agreement, 2), f"as the full model; KL divergence {difference.kl:.4g}"
    if result.latency is not None:
        slowest, batch = min((row.speedup or 1.0, row.batch_size) for row in result.latency.batches)
        yield "speed-up, at least", f"{slowest:.2f}×", f"at batch {batch}"
