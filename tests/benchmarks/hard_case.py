"""What each way to prune keeps where nothing hides the damage: two Soft MoE layers without residuals.

    python tests/benchmarks/hard_case.py [single] [vit]

Trains a vision transformer on pairs of digits (three blocks, the last two with 64 experts and no residual
around them), prunes it in every way and prints what is left of its accuracy. The two demo checkpoints, `single` (one
layer of 128 experts, digits) and `vit` (three layers of 64 experts with residuals, pairs of digits), take its place
where they are named. Each takes several minutes.
"""

import sys

from common import shipped, table, without_residuals

METHODS = [
    ("static", "random", "none"),
    ("input", "combine", "none"),  # the paper's rule
    ("input", "combine", "mean"),
    ("input", "deviation", "lstsq"),
    ("input", "deviation", "affine"),
    ("static", "combine", "none"),
    ("static", "gram", "none"),
    ("static", "combine", "merge"),
    ("static", "deviation", "mean"),
    ("static", "gram", "mean"),
    ("static", "deviation", "lstsq"),
    ("static", "gram", "lstsq"),
    ("static", "deviation", "affine"),
    ("static", "gram", "affine"),
    ("static", "gram", "affine", 0.99),  # in the directions that hold 99 % of it
    ("static", "gram", "refit"),
    ("static", "gram", "renorm-refit"),
    ("static", "gram", "low-rank", 4),  # of this rank
    ("static", "gram", "low-rank", 8),
    ("static", "gram", "low-rank-lstsq", 4),
    ("static", "gram", "low-rank-lstsq", 8),
    ("static", "combine", "linear"),
    ("static", "auto", "auto"),
]


def main() -> None:
    for name in sys.argv[1:]:
        print(name)
        table(shipped(name), METHODS)
    if not sys.argv[1:]:
        table(without_residuals([(64, 64), (64, 64)], steps=1500), METHODS)


if __name__ == "__main__":
    main()
