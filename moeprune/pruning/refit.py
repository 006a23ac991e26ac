"""Refit the last linears of many wide experts one after the other: block Gauss-Seidel on the ridge regression of all.

A joint regression of k experts of width h takes a matrix of k·h × k·h numbers. Here the fit of each expert takes what
its own tokens still lack beside all others (Gauss-Seidel), so that matrices are h × h, and tokens are the rows of their
experts alone. Each expert has a ridge of its own, chosen by held-out error.

Axes: b inputs, m tokens, t = b·m, h width of an expert, o width of the output, r rows of an expert.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moeprune.calibration.ridge import Equations, Fit, column_scale, solve, solve_held_out
from moeprune.calibration.sums import wide_dtype
from moeprune.calibration.walk import Stage
from moeprune.layers.layer import MoELayer
from moeprune.layers.routed_rows import RoutedRows

SWEEPS, ENOUGH = 8, 0.01  # over all experts, at most; until one lowers the error by less than this share
CHOOSING = 2  # sweeps that choose ridges anew: later ones take those of the last


class _Batch(NamedTuple):
    """What a pruned layer shows of a batch, and what its output still lacks."""

    seen: RoutedRows  # without outputs
    lacking: Tensor  # (t,o), updated in place
    is_second: Tensor  # tokens of the second half of the data (t)


def refit_by_expert(stage: Stage, layer: MoELayer) -> tuple[float, float]:
    """Refit the last linears of a pruned layer whose tokens choose experts, with their biases, in place.

    Returns the squared error of the layer's output that is left, and an estimate of it on inputs that were not fitted.
    """
    batches = [*_batches(stage, layer)]
    bias = getattr(layer, "fc2_bias", None)
    experts, width, h = layer.fc2_weight.shape
    changes = torch.zeros(experts, h + (bias is not None), width, device=layer.fc2_weight.device)
    left, fits = _square(batches), list[Fit | None]([None] * experts)
    for sweep in range(SWEEPS):
        fits = [
            _refit(batches, j, changes[j], bias is not None, None if sweep < CHOOSING else fit)
            for j, fit in enumerate(fits)
        ]
        before, left = left, _square(batches)
        if not left < (1 - ENOUGH) * before:
            break
    layer.fc2_weight = torch.nn.Parameter(layer.fc2_weight + changes[:, :h].mT.to(layer.fc2_weight), False)
    if bias is not None:
        layer.fc2_bias = torch.nn.Parameter(bias + changes[:, h].to(bias), False)
    more = max(sum(fit.held_out - fit.fitted for fit in fits if fit is not None), 0.0)
    if not stage.has_stream:
        return left, left + more
    own = along = 0.0  # of what fits made up for, only a part is due to the layer's own output
    wide = wide_dtype(layer.fc2_weight.device)
    for _, _, gap in stage.observe(layer):
        own += float(gap.own.square().sum(dtype=wide))
        along += float((gap.own * gap.whole).sum(dtype=wide))
    return own, own + more * min(max(along / max(left, 1e-30), 0.0), 1.0)


def _batches(stage: Stage, layer: MoELayer) -> Iterator[_Batch]:
    for members, seen, gap in stage.observe(layer):
        assert isinstance(seen, RoutedRows)
        is_second = torch.zeros(len(gap.own), dtype=torch.bool, device=gap.own.device).index_fill(0, members[1], True)
        without = replace(seen, term_outputs=gap.own[:0], output=gap.own[:0])
        lacking = gap.whole.flatten(0, 1)
        yield _Batch(without, lacking, is_second.repeat_interleave(gap.own.shape[1]))


def _square(batches: list[_Batch]) -> float:
    """Return the square of all that is lacking."""
    return sum(float(batch.lacking.square().sum(dtype=wide_dtype(batch.lacking.device))) for batch in batches)


def _refit(batches: list[_Batch], expert: int, change: Tensor, has_bias: bool, known: Fit | None) -> Fit:
    """Fit the change of one expert's last linear (h,o), with its bias in the last row, in place.

    known: an earlier fit whose ridges are taken. Returns the fit that chose them.
    """
    size, width = change.shape
    dtype = wide_dtype(change.device)
    power, cross = change.new_zeros(2, size, size, dtype=dtype), change.new_zeros(2, size, width, dtype=dtype)
    square = power.new_zeros(2)
    taken = []
    for seen, lacking, is_second in batches:
        rows = seen.rows.slices[expert]
        tokens = seen.rows.tokens[rows]
        hidden = seen.taken_by(expert)
        if has_bias:
            hidden = torch.cat([hidden, seen.row_weights[rows, None].float()], 1)
        taken.append((tokens, hidden))
        target = lacking[tokens] + hidden @ change  # without this expert's change
        for half, is_in in enumerate((~is_second[tokens], is_second[tokens])):
            some, wanted = hidden[is_in], target[is_in]
            power[half] += some.mT @ some
            cross[half] += some.mT @ wanted
            square[half] += wanted.square().sum(dtype=dtype)
    sums = power.to("cpu", torch.float64), cross.to("cpu", torch.float64), square.tolist()
    halves = [Equations(*parts) for parts in zip(*sums, strict=True)]
    kinds = [size - 1, 1] if has_bias else [size]
    if known is None or known.ridges is None:
        known = solve_held_out((halves[0], halves[1]), kinds)
        solution = known.solution
    else:
        both = halves[0] + halves[1]
        scale = column_scale(both.power.diagonal(), kinds)
        solution = solve(both.scaled(scale), known.ridges) / scale[:, None]
    update = solution.to(change) - change
    for (_, lacking, _), (tokens, hidden) in zip(batches, taken, strict=True):
        lacking.index_add_(0, tokens, hidden @ update, alpha=-1)
    change += update
    return known._replace(solution=change[:0])
