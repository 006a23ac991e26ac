"""When does the combine mass tell experts apart? The same model with ever sharper routers.

    python tests/benchmarks/sharpness.py

Trains the single-layer model with the router's scale starting at 1, 2, 4, 8 and 16, and keeps 1/8 of
the experts by the paper's rule or at random (mean of 10 draws), the others giving zero. Where an
input's best 1/8 hold little more of its mass than those of a uniform router, the rule keeps little:
that is the verdict that `moeprune analyze` gives (INFORMATIVE_MASS was read off this table). All on the
calibration split, so that the test split has no part in that choice. A few minutes on two cores.
"""

import dataclasses
from fractions import Fraction

import moeprune
from moeprune.calibration.statistics import INFORMATIVE_MASS
from moeprune.demo.train import single_layer_recipe, train
from moeprune.pruning.sweep import Variant, sweep

SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
SHARE = Fraction(1, 8)
VARIANTS = {
    "the paper's rule": Variant(SHARE, "input", "combine", "none"),
    "random experts": Variant(SHARE, "static", "random", "none"),
}


def main() -> None:
    print(f"share of the full model's accuracy at {SHARE}; informative from a mass of {INFORMATIVE_MASS}")
    columns = [f"{'n':>4}", f"{'scale':>6}", f"{'trained':>8}", f"{'mass of 1/8':>12}", f"{'unused':>7}"]
    print(*columns, *(f"{variant:>17}" for variant in VARIANTS))
    for num_experts in (32, 128):
        for scale in SCALES:
            model = train(dataclasses.replace(single_layer_recipe(num_experts), scale=scale))
            data = moeprune.open_data("digits:calibration", model.input_format)
            analysis = moeprune.analyze(model, data)
            [layer] = analysis.layers.values()
            _, *rows = (row for row, _ in sweep(model, VARIANTS.values(), analysis, data))
            trained, mass = float(model.get_parameter("blocks.0.soft_moe.scale")), layer.kept_mass[num_experts // 8 - 1]
            unused = int((layer.max_mass < 0.1 / num_experts).sum())
            cells = f"{num_experts:4} {scale:6g} {trained:8.2f} {mass:12.3f} {unused:7}"
            print(cells, *(f"{row.retained:17.3f}" for row in rows), flush=True)


if __name__ == "__main__":
    main()
