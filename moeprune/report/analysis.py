"""The report of `moeprune analyze`."""

from __future__ import annotations

from moeprune.calibration.results import AnalysisReport, LayerSummary
from moeprune.report.document import Document, Lines, Table
from moeprune.report.words import checkpoint_on_data, percent


def analysis(result: AnalysisReport) -> Document:
    """Return the spread of the combine mass in each layer, and advice."""
    columns = (
        "layer", "experts", "mass of the best 1/8\nper input", "\none set for all", "\nuniform router",
        "experts with 50 / 90 / 99 %\nper input", "\nover all inputs", "unused\nexperts",
    )  # fmt: skip
    rows = []
    for name, layer in result.layers.items():
        masses = layer.best_eighth_mass, layer.static_eighth_mass, layer.uniform_mass
        per_input = " / ".join(f"{count:.1f}" for count in layer.experts_for_mass_per_input)
        overall = " / ".join(map(str, layer.experts_for_mass_overall))
        unused = str(len(layer.unused_experts))
        rows.append((name, str(layer.experts), *map(percent, masses), per_input, overall, unused))
    advice = [f"{name}: {_advice(layer)}" for name, layer in result.layers.items()]
    return Document(checkpoint_on_data(result.checkpoint, result.data), [Table(columns, rows), Lines(advice)])


def _advice(layer: LayerSummary) -> str:
    """Return in words whether the combine mass distinguishes experts, and what to try."""
    n = layer.experts
    if n == 1:
        return "one expert: nothing to prune"
    few = f"the best {max(1, n // 8)} of {n} experts"
    masses = layer.best_eighth_mass, layer.static_eighth_mass, layer.uniform_mass
    best, static, uniform = (percent(mass, 0) for mass in masses)
    if not layer.informative:
        return (
            f"the combine signal is weak: {few} hold {best} of an input's mass (uniform: {uniform}),"
            " so dropping the others costs much. Compensate (`--compensate affine`), and compare with"
            " `random` and no experts at all in a sweep"
        )
    text = (
        f"the combine signal is informative: {few} hold {best} of an input's mass, one set for all inputs"
        f" {static}, a uniform router's {uniform}. Without compensation, scope `input` loses least"
    )
    if "static" not in layer.scopes:
        return text + " (this layer cannot be pruned with scope `static`)"
    return f"{text}; `static` with `--signal gram --compensate affine` often keeps more, and shrinks the file"
