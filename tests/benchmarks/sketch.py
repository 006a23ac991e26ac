"""What choosing experts by few random directions of the output costs, beside the noise between calibration draws.

    python tests/benchmarks/sketch.py [single] [vit] [hard] [FILE.safetensors:DATA]

Sums for choosing look at the layer's output in a few random directions (DIRECTIONS in moeprune.calibration.sums). For
each draw of 300 calibration samples the k best experts are chosen so, and by all directions. Both sets are judged by
what they lose under `affine`, in all directions and on test data, as a share of the output's square: mean (standard
deviation over draws), of the model's layer with the most experts. FILE:DATA: as for auto.py.
"""

import argparse
import statistics
from fractions import Fraction
from unittest.mock import patch

from auto import case
from common import RUNTIME

import moeprune
from moeprune.amounts import experts_to_keep
from moeprune.calibration import sums

DRAWS, SAMPLES, KEEPS = 5, 300, (Fraction(1, 32), Fraction(1, 16), Fraction(1, 8), Fraction(1, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["single", "vit", "hard"])
    for name in parser.parse_args().cases:
        model, every, test = case(name)
        every_direction = patch.object(sums, "DIRECTIONS", 10**6)
        with every_direction:
            judged = moeprune.analyze(model, test, RUNTIME).layers
        layer = max(judged, key=lambda each: judged[each].num_experts)
        gram, n, power = judged[layer].gram_affine.double(), judged[layer].num_experts, float(judged[layer].gram.sum())
        draws = []
        for seed in range(DRAWS):
            places = every.part(range(seed, every.samples, DRAWS), f"draw {seed}").sample(SAMPLES)
            sketched = moeprune.analyze(model, places, RUNTIME).layers[layer]
            with every_direction:
                draws.append((sketched, moeprune.analyze(model, places, RUNTIME).layers[layer]))
        width = model.config.moe_layers[layer].output_width
        print(f"{name}, {n} experts, {sums.DIRECTIONS} of {width} directions")
        print(f"{'kept':>6} {'few directions':>20} {'all directions':>20}  experts chosen by both")
        for keep in KEEPS:
            k, losses, shared = experts_to_keep(keep, n, layer), ([], []), []
            for ways in draws:
                sets = [set(way.best_kept(k, "affine")) for way in ways]
                shared.append(len(sets[0] & sets[1]) / k)
                for found, kept in zip(losses, sets, strict=True):
                    dropped = [j for j in range(n) if j not in kept]
                    found.append(float(gram[dropped][:, dropped].sum()) / power)
            cells = [f"{statistics.fmean(found):.5f} ({statistics.stdev(found):.5f})" for found in losses]
            print(f"{keep!s:>6} {cells[0]:>20} {cells[1]:>20}  {statistics.fmean(shared):.2f}", flush=True)


if __name__ == "__main__":
    main()
