"""Figure 1 of Chung et al. 2024 on scikit-learn's digits: the more experts, the better a few of them do.

    python tests/benchmarks/figure1.py [-o figure1.png]

Trains the single-layer model with n experts that share 512 hidden units, for n = 8 … 128 and 3 seeds,
and evaluates the paper's rule (each input keeps its best experts by combine mass, the others give
zero) and random experts on the test split. About ten minutes on two cores.
"""

import argparse
import statistics
from fractions import Fraction
from pathlib import Path

from common import RUNTIME, SEEDS, test_set

import moeprune
from moeprune.demo.train import single_layer_recipe, train
from moeprune.evaluation.evaluate import predict

EXPERTS = (8, 16, 32, 64, 128)
SHARES = tuple(Fraction(1, part) for part in (8, 4, 2, 1))


def retained(num_experts: int, seed: int) -> dict[tuple[str, Fraction], float]:
    """Accuracy as a share of the full model's, by signal and share of experts kept."""
    model = train(single_layer_recipe(num_experts), seed)
    keys = [(signal, share) for signal in ("combine", "random") for share in SHARES]
    way = {"scope": "input", "compensate": "none", "seed": seed}
    models = [moeprune.prune(model, keep=share, signal=signal, **way) for signal, share in keys]
    full, *pruned = (
        float(found.correct.double().mean()) for found in predict([model, *models], test_set(model), RUNTIME)
    )
    return {key: accuracy / full for key, accuracy in zip(keys, pruned, strict=True)}


def plot(means: dict[tuple[str, Fraction], list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="experts n (512 hidden units)", ylabel="share of the full accuracy")
    for signal, style in (("combine", "o-"), ("random", "x:")):
        for index, share in enumerate(SHARES[:-1]):
            label = f"{share} kept, {'combine mass' if signal == 'combine' else 'random'}"
            axes.plot(EXPERTS, means[signal, share], style, color=f"C{index}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(EXPERTS, [str(n) for n in EXPERTS])
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's Figure 1 on digits.")
    parser.add_argument("-o", "--output", type=Path, help="where to write the plot (PNG or SVG)")
    output = parser.parse_args().output
    means: dict[tuple[str, Fraction], list[float]] = {}
    print(f"accuracy as a share of the full model's, mean of {len(SEEDS)} seeds (standard deviation)")
    columns = (f"{signal} {share}" for signal in ("combine", "random") for share in SHARES)
    print(f"{'n':>4}" + "".join(f"{column:>16}" for column in columns))
    for num_experts in EXPERTS:
        runs = [retained(num_experts, seed) for seed in SEEDS]
        line = f"{num_experts:4}"
        for key in runs[0]:
            values = [run[key] for run in runs]
            means.setdefault(key, []).append(statistics.fmean(values))
            line += f"{statistics.fmean(values):>9.3f} ({statistics.stdev(values):.2f})"
        print(line, flush=True)
    if output is not None:
        plot(means, output)


if __name__ == "__main__":
    main()
