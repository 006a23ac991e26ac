"""Whether it pays to split a budget over the layers, in place of the same share of experts in each.

    python tests/benchmarks/allocation.py

For the demo's vision transformer (three layers with residuals) and one that is trained here (four layers of
64 and 32 experts without residuals): at the bytes that uniform shares take, what `prune --max-size` keeps,
which tries the planned split and the uniform one. About fifteen minutes on two cores.
"""

import statistics
from fractions import Fraction

from common import RUNTIME, SEEDS, accuracy, calibration, shipped, test_set, without_residuals

import moeprune
from moeprune.files.checkpoint import tensor_infos
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import Method, uniform_plan
from moeprune.pruning.apply import apply_plan
from moeprune.pruning.auto import choose
from moeprune.pruning.budgets import costs_of, plans_within

SHARES = ("1/32", "1/16", "1/8", "1/4", "1/2")
COMPENSATIONS = ("mean", "lstsq", "affine")


def compare(model: SoftMoEViT) -> None:
    test = test_set(model)
    full = accuracy(model, test)
    print(f"full model {full:.4f}; uniform → planned, as a share of it: mean of {len(SEEDS)} draws")
    print(f"{'':8}", *(f"{share:>18}" for share in SHARES))
    draws = [calibration(model, seed) for seed in SEEDS]
    analyses = [moeprune.analyze(model, data, RUNTIME) for data in draws]
    infos = tensor_infos(model.state_dict())
    for compensation in COMPENSATIONS:
        method = Method("static", "gram", compensation)
        costs = costs_of(model.config, method, infos)
        cells = []
        for share in SHARES:
            uniform = uniform_plan(model.config.moe_layers, Fraction(share), method)
            budget = costs.of({name: layer.k for name, layer in uniform.items()}) / costs.full
            results: dict[str, list[float]] = {"uniform": [], "planned": []}
            for data, analysis in zip(draws, analyses, strict=True):
                planned = plans_within(model.config, infos, analysis, method, budget)[0]
                for which, plans in (("uniform", [uniform]), ("planned", [planned, uniform])):
                    plan, _ = choose(model, plans, data, 0, RUNTIME)
                    pruned = apply_plan(model, plan, analysis, data=data, runtime=RUNTIME)
                    results[which].append(accuracy(pruned, test) / full)
            uniform_mean, planned_mean = (statistics.fmean(result) for result in results.values())
            cells.append(f"{uniform_mean:8.3f} → {planned_mean:.3f}  ")
        print(f"{compensation:8}", *cells, flush=True)


def main() -> None:
    print("vit")
    compare(shipped("vit"))
    print("\nfour layers without residuals")
    compare(without_residuals([(64, 8), (32, 16), (64, 8), (32, 16)], steps=3000, position=0.1, noise=0.1))


if __name__ == "__main__":
    main()
