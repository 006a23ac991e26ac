"""How often the paper's rule finds the experts that are best for an input.

    python tests/benchmarks/oracle.py

Trains the single-layer model with n = 4, 8 and 12 experts that share 512 hidden units (n = 12: 504), and for
every image of the test split tries all subsets of n/8, n/4 and n/2 experts. Prints what each signal picks
against that: the means over 3 seeds, and the least and the most of them. About three minutes on two cores.
"""

from __future__ import annotations

import statistics
from typing import Any

from common import RUNTIME, SEEDS, test_set
from oracle_subsets import compare_signals

import moeprune
from moeprune.demo.train import single_layer_recipe, train

EXPERTS = (4, 8, 12)
FIGURES = ("accuracy", "found_best", "as_right", "percentile")


def compared(num_experts: int, seed: int) -> dict[str, Any]:
    """What `moeprune analyze --oracle` says of the only layer of a model trained with the seed."""
    model = train(single_layer_recipe(num_experts), seed)
    data = test_set(model)
    analysis = moeprune.analyze(model, "digits:calibration", RUNTIME)
    found = compare_signals(model, analysis, data, data.samples, RUNTIME)
    [layer] = found["layers"].values()
    return {"accuracy": found["accuracy"], **layer}


def main() -> None:
    for num_experts in EXPERTS:
        runs = [compared(num_experts, seed) for seed in SEEDS]
        full, without = (
            " / ".join(f"{100 * run[key]:.1f}" for run in runs)
            for key in ("accuracy", "accuracy_without_experts")
        )
        print(f"n = {num_experts}: accuracy of {full} % with all experts, {without} % with none")
        print(f"{'k':>3} {'signal':10}", *(f"{figure:>21}" for figure in FIGURES))
        for rows in zip(*(run["rows"] for run in runs), strict=True):
            cells = []
            for figure in FIGURES:
                values = [100 * row[figure] for row in rows]
                cells.append(f"{statistics.fmean(values):7.1f} ({min(values):4.1f}-{max(values):5.1f})")
            print(f"{rows[0]['k']:3} {rows[0]['signal']:10}", *cells, flush=True)
        print()


if __name__ == "__main__":
    main()
