"""What narrower experts keep of the accuracy, against fewer experts at the same bytes.

    python tests/benchmarks/width.py [single] [vit] [DRAWS]

Drops hidden units of all experts of the two demo checkpoints (moeprune.pruning.width), and prints what is left of the
accuracy on the test split, mean and range over DRAWS of the calibration data (3), and by how much the predictions
change (mean total variation). The models with fewer experts have the bytes of the narrower one as a budget, which is
split over the layers. Takes about half an hour on two cores.
"""

import statistics
import sys
from typing import Any

from common import RUNTIME, SEEDS, accuracy, calibration, shipped, test_set

import moeprune
from moeprune.pruning.auto import compare

WIDTHS = ("1/2", "1/4", "1/8")
NARROW: list[dict[str, Any]] = [{}, {"compensate": "renorm-refit"}]
FEWER = ("auto", "affine", "renorm-refit", "low-rank")


def retained(name: str, draws: int) -> None:
    """Print what a demo checkpoint keeps of its accuracy in each way, for each width."""
    full = shipped(name)
    test = test_set(full)
    of_full, drawn = accuracy(full, test), [calibration(full, seed) for seed in SEEDS[:draws]]
    print(f"{name}: full model {of_full:.4f}")
    units = min(layer.hidden_units or 0 for layer in full.config.moe_layers.values())
    for width in (width for width in WIDTHS if units >= int(width[2:])):
        sizes = {}
        ways = [{"width": width, **how} for how in NARROW] + [{"compensate": compensate} for compensate in FEWER]
        for way in ways:
            results = []
            for seed, data in enumerate(drawn):
                budget = {} if "width" in way else {"max_size": f"{sizes[seed]}B"}
                try:
                    pruned = moeprune.prune(full, data=data, seed=seed, runtime=RUNTIME, **way, **budget)
                except moeprune.MoepruneError as error:
                    print(error)
                    continue
                cost = pruned.cost()
                sizes.setdefault(seed, cost.bytes)
                change = float(compare([pruned], full, test, RUNTIME)[0].mean())
                results.append((accuracy(pruned, test) / of_full, change, cost.bytes, cost.flops_per_input.total))
            if results:
                kept, *figures = zip(*results, strict=True)
                change, size, flops = map(statistics.fmean, figures)
                what = ", ".join(str(value) for value in way.values()) + ("" if "width" in way else ", fewer experts")
                print(
                    f"{'width ' * ('width' in way) + what:32} {statistics.fmean(kept):.3f}"
                    f" ({min(kept):.3f}-{max(kept):.3f})  change {change:.4f}  size {size / full.cost().bytes:.3f}"
                    f"  FLOPs {flops / full.cost().flops_per_input.total:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    for model in [word for word in sys.argv[1:] if not word.isdigit()] or ("single", "vit"):
        retained(model, *numbers or [len(SEEDS)])
