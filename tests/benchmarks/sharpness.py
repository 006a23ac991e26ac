"""When does the combine mass tell experts apart? The same model with ever sharper routers.

    python tests/benchmarks/sharpness.py

Trains the single-layer model with the router's scale starting at 1, 2, 4, 8 and 16, and keeps 1/8 of
the experts by combine mass or at random (mean of 10 draws), without compensation and with `lstsq`.
Where the best 1/8 hold little more of an input's mass than those of a uniform router, the signal says
little: that is the verdict that `moeprune analyze` gives (INFORMATIVE_MASS). A few minutes.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import moeprune
from moeprune.statistics import INFORMATIVE_MASS, summarize
from moeprune.sweep import Variant, sweep
from moeprune.train import single_layer_recipe, train

SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
SHARE = Fraction(1, 8)
VARIANTS = {
    "input, none": Variant(SHARE, "input", "combine", "none"),
    "random, none": Variant(SHARE, "static", "random", "none"),
    "static, lstsq": Variant(SHARE, "static", "combine", "lstsq"),
    "random, lstsq": Variant(SHARE, "static", "random", "lstsq"),
    "no experts, lstsq": Variant(0, "static", "combine", "lstsq"),
}


def main() -> None:
    print(
        f"accuracy as a share of the full model's at {SHARE}; informative from a mass of {INFORMATIVE_MASS}"
    )
    columns = [f"{'n':>4}", f"{'scale':>6}", f"{'trained':>8}", f"{'mass of 1/8':>12}", f"{'full':>6}"]
    print(*columns, *(f"{variant:>18}" for variant in VARIANTS))
    for num_experts in (32, 128):
        for scale in SCALES:
            model = train(dataclasses.replace(single_layer_recipe(num_experts), scale=scale))
            calibration = moeprune.open_data("digits:calibration", model.input_format)
            analysis = moeprune.analyze(model, calibration)
            [layer] = (summarize(statistics) for statistics in analysis.layers.values())
            test = moeprune.open_data("digits:test", model.input_format)
            full, *rows = (row for row, _ in sweep(model, VARIANTS.values(), analysis, test))
            trained, mass = float(model.get_parameter("blocks.0.soft_moe.scale")), layer["best_eighth_mass"]
            print(
                f"{num_experts:4} {scale:6g} {trained:8.2f} {mass:12.3f} {full['accuracy']:6.3f}",
                *(f"{row['retained']:18.3f}" for row in rows),
                flush=True,
            )


if __name__ == "__main__":
    main()
