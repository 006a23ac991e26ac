"""What each way to prune keeps of the two demo checkpoints.

    python tests/benchmarks/compensation.py

The table of hard_case.py for `single` (one layer of 128 experts, digits) and `vit` (three layers of 64
experts with residuals, pairs of digits). About eight minutes on two cores.
"""

from __future__ import annotations

from common import shipped, table
from hard_case import METHODS


def main() -> None:
    for name in ("single", "vit"):
        print(name)
        table(shipped(name), METHODS)
        print()


if __name__ == "__main__":
    main()
