"""What `auto` keeps beside the best method that is stated, for few and many calibration samples.

    python tests/benchmarks/auto.py [single] [vit] [hard] [FILE.safetensors:DATA] [--samples 100 500 2000]
        [--max-size 0.1 0.2 0.3 0.5] [--seed 0] [--stated mean lstsq affine refit]

FILE:DATA is a trained model and a spec of data with a training and a test split, such as a model of fashion.py and its
folder. For each number of samples and each share of experts, or with --max-size of bytes, the table has the accuracy of
`auto` as a share of the full model's, what it chose, and the best stated method that can meet it, of all or with some
compensations. The samples are drawn from the calibration split with a seed.
"""

import argparse
from contextlib import suppress

from common import RUNTIME, accuracy, calibration, shipped, test_set, without_residuals

import moeprune
from moeprune.data.datasets import Dataset
from moeprune.models.model import Model

KEEPS = ("1/32", "1/16", "1/8", "1/4")
STATED = [
    {"scope": "static", "compensate": "mean"},
    {"scope": "static", "compensate": "lstsq"},
    {"scope": "static", "compensate": "affine"},
    {"scope": "static", "compensate": "refit"},
    {"scope": "static", "compensate": "renorm-refit"},
    {"scope": "static", "compensate": "low-rank", "rank": 4},
    {"scope": "static", "compensate": "low-rank", "rank": 8},
    {"scope": "static", "compensate": "low-rank-lstsq", "rank": 8},
    {"scope": "input", "signal": "combine", "compensate": "none"},
    {"scope": "input", "compensate": "affine"},
]


def case(name: str, seed: int) -> tuple[Model, Dataset, Dataset]:
    """A model, its calibration data, and its test data."""
    if ":" in name:
        path, _, spec = name.partition(":")
        model: Model = moeprune.load(path)
        return model, *(moeprune.open_data(f"{spec}:{split}", model.input_format) for split in ("train", "test"))
    model = without_residuals([(64, 64), (64, 64)], steps=1500) if name == "hard" else shipped(name)
    return model, calibration(model, seed), test_set(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["single", "vit", "hard"])
    parser.add_argument("--samples", nargs="*", type=int, default=[100, 500, 2000])
    parser.add_argument("--max-size", nargs="*", type=float, help="shares of the bytes, in place of those of experts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stated", nargs="*", default=[way["compensate"] for way in STATED])
    chosen = parser.parse_args()
    ways = [way for way in STATED if way["compensate"] in chosen.stated]
    amounts = [{"keep": keep} for keep in KEEPS] if not chosen.max_size else [{"max_size": s} for s in chosen.max_size]
    for name in chosen.cases:
        model, every, test = case(name, chosen.seed)
        full = accuracy(model, test)
        print(f"{name}: full model {full:.4f}, seed {chosen.seed}")
        print(f"{'samples':>7} {'amount':>6} {'auto':>7}  {'chosen':24} {'best':>7}  of stated methods")
        for samples in chosen.samples:
            if samples > every.samples > chosen.samples[0]:
                continue
            data = every.sample(samples)
            for amount in amounts:
                options = {**amount, "runtime": RUNTIME}
                pruned = moeprune.prune(model, data=data, **options)
                plan = next(iter(pruned.plan.values()))
                of = {}
                for way in ways:
                    with suppress(moeprune.MoepruneError):  # it cannot meet the budget
                        found = moeprune.prune(model, data=data, **way, **options)
                        of[" ".join(map(str, way.values()))] = accuracy(found, test)
                best = max(of, key=of.__getitem__, default="none")
                how = f"{plan.k} {plan.compensation} {plan.rank or ''}"
                shares = accuracy(pruned, test) / full, of.get(best, 0.0) / full
                [given] = amount.values()
                print(f"{data.samples:7} {given:>6} {shares[0]:7.3f}  {how:24} {shares[1]:7.3f}  {best}", flush=True)


if __name__ == "__main__":
    main()
