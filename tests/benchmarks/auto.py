"""What `auto` keeps beside the best method that is stated, for few and many calibration samples.

    python tests/benchmarks/auto.py [single] [vit] [hard] [FILE.safetensors:DATA] [--samples 100 500 2000]

FILE:DATA is a trained model and a spec of data with a training and a test split, such as a model of fashion.py and its
folder. For each number of samples and each share the table has the accuracy of `auto` as a share of the full model's,
what it chose, and the best stated method. The samples are drawn from the calibration split with a seed.
"""

import argparse

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
    {"scope": "input", "signal": "combine", "compensate": "none"},
    {"scope": "input", "compensate": "affine"},
]


def case(name: str) -> tuple[Model, Dataset, Dataset]:
    """A model, its calibration data, and its test data."""
    if ":" in name:
        path, _, spec = name.partition(":")
        model: Model = moeprune.load(path)
        return model, *(moeprune.open_data(f"{spec}:{split}", model.input_format) for split in ("train", "test"))
    model = without_residuals([(64, 64), (64, 64)], steps=1500) if name == "hard" else shipped(name)
    return model, calibration(model, 0), test_set(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["single", "vit", "hard"])
    parser.add_argument("--samples", nargs="*", type=int, default=[100, 500, 2000])
    chosen = parser.parse_args()
    for name in chosen.cases:
        model, every, test = case(name)
        full = accuracy(model, test)
        print(f"{name}: full model {full:.4f}")
        print(f"{'samples':>7} {'kept':>6} {'auto':>7}  {'chosen':24} {'best':>7}  of stated methods")
        for samples in chosen.samples:
            if samples > every.samples > chosen.samples[0]:
                continue
            data = every.sample(samples)
            for keep in KEEPS:
                options = {"keep": keep, "runtime": RUNTIME}
                pruned = moeprune.prune(model, data=data, **options)
                plan = next(iter(pruned.plan.values()))
                of = {
                    " ".join(map(str, way.values())): accuracy(moeprune.prune(model, data=data, **way, **options), test)
                    for way in STATED
                }
                best = max(of, key=of.__getitem__)
                how = f"{plan.compensation} {plan.rank or ''}"
                shares = accuracy(pruned, test) / full, of[best] / full
                print(f"{data.samples:7} {keep:>6} {shares[0]:7.3f}  {how:24} {shares[1]:7.3f}  {best}", flush=True)


if __name__ == "__main__":
    main()
