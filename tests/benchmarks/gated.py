"""Loss of pruned language models with token-gated experts, for each way to prune them.

    python tests/benchmarks/gated.py softmax|sigmoid PACKAGES CACHE [--draws 3] [--keeps 16,8,4] [--only WORDS]

Trains the model first where CACHE lacks it (gated_models.py; PACKAGES are unpacked as corpus.py says), then prunes it
with 20,480 tokens of calibration text from eight domains in all ways, and prints the increase of the loss on 12,288
tokens of other text in nats per byte, and the agreement with the full model's next token: means over draws of the
calibration text. Ways that are known to CACHE are not run again. About an hour a model on one core.

Baselines choose experts on the full model, as their papers do: REAP (arXiv 2510.13999), M-SMoE (arXiv 2310.01334:
experts are merged into the most frequent ones by similar router logits, hidden units aligned) and HC-SMoE (arXiv
2410.08589: hierarchical clustering of mean outputs); merged experts are averages by frequency. MoNE (arXiv 2507.00390)
is the signal `mone` with constants.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gated_models
import scipy.cluster.hierarchy
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

import moeprune
from moeprune.layers.gated_moe import GatedMoE
from moeprune.layers.observation import Observation
from moeprune.models.model import Model, private_copy

N, LENGTH, OF_DOMAIN, TESTED = 32, 256, 10, 6
RUNTIME = moeprune.Runtime("cpu", batch_size=16)
PLAIN = ("frequency", "combine", "reap")


def sequences(path: Path, tokenizer: Any, count: int, seed: int) -> Tensor:
    """Some sequences of each domain (8·count, LENGTH + 1)."""
    generator, found = random.Random(seed), []
    for ids in gated_models.tokens_by_domain(path, tokenizer):
        starts = generator.sample(range((len(ids) - LENGTH - 1) // LENGTH), count)
        found += [ids[start * LENGTH : start * LENGTH + LENGTH + 1] for start in starts]
    return torch.stack(found).long()


def bytes_of(ids: Tensor, tokenizer: Any) -> int:
    """The bytes of all tokens that are predicted; a character of a piece is a byte, the end of a text none."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    lengths = torch.tensor([0, *map(len, pieces[1:])])
    return int(lengths[ids[:, 1:]].sum())


class Draw:
    """A draw of calibration text, what it says of the full model, and the ways to prune by it."""

    def __init__(self, model: Model, ids: Tensor, seed: int):
        self.model, self.ids, self.seed = model, ids, seed
        self.analysis = moeprune.analyze(model, ids, runtime=RUNTIME)
        self.seen: dict[str, Observation] = {}
        for name, layer in model.moe_layers.items():
            layer.observer = lambda seen, name=name: self.seen.__setitem__(name, seen)
        model(ids[:, :-1])
        for layer in model.moe_layers.values():
            layer.observer = None

    def one_shot(self, k: int, signal: str) -> Model:
        """Experts chosen on the full model, and no more."""
        how = {"signal": signal, "compensate": "renorm", "one_shot": True, "seed": self.seed}
        return moeprune.prune(self.model, self.analysis, keep=k, runtime=RUNTIME, **how)

    def pruned(self, **options: Any) -> Model:
        """What moeprune makes of the model."""
        return moeprune.prune(self.model, data=self.ids, seed=self.seed, runtime=RUNTIME, **options)

    def m_smoe(self, k: int) -> Model:
        """Experts merged into the most frequent ones."""
        groups = {}
        for name, layer in self._layers():
            seen = self.seen[name]
            best = _counts(seen).topk(k).indices.sort().values
            logits = F.normalize(layer.logits(seen.tokens.flatten(0, 1)), dim=0)
            group = best[(logits.mT @ logits[:, best]).argmax(1)]
            groups[name] = group.index_copy(0, best, best)
        return self._merged(groups, align=True)

    def hc_smoe(self, k: int) -> Model:
        """Clusters of experts merged into one each."""
        groups = {}
        for name, layer in self._layers():
            tokens = self.seen[name].tokens.flatten(0, 1)
            means = layer.outputs_of_all(tokens, torch.eye(layer.config.output_width)).mean(1)
            tree = scipy.cluster.hierarchy.linkage(means.numpy(), "average")
            label = torch.from_numpy(scipy.cluster.hierarchy.fcluster(tree, k, "maxclust"))
            counts = _counts(self.seen[name])
            firsts = {int(each): int(torch.where(label == each, counts, -1).argmax()) for each in label.unique()}
            groups[name] = torch.tensor([firsts[int(each)] for each in label])
        return self._merged(groups, align=False)

    def _layers(self) -> list[tuple[str, GatedMoE]]:
        return [(name, layer) for name, layer in self.model.moe_layers.items() if isinstance(layer, GatedMoE)]

    def _merged(self, groups: dict[str, Tensor], align: bool) -> Model:
        """The model whose experts are the average of their group, which is that of one of them."""
        model = private_copy(self.model)
        for name, layer in self._layers():
            first, second = layer.fc1_weight.clone(), layer.fc2_weight.clone()  # type: ignore[union-attr]
            counts, h = _counts(self.seen[name]) + 1e-6, second.shape[2]
            for j in groups[name].unique().tolist():
                members = (groups[name] == j).nonzero().flatten().tolist()
                total = torch.zeros_like(first[j]), torch.zeros_like(second[j])
                for i in members:
                    one = layer.fc1_weight[i], layer.fc2_weight[i]  # type: ignore[index]
                    if align and i != j:
                        like = layer.fc1_weight[j].unflatten(1, (2, h)), layer.fc2_weight[j]  # type: ignore[index]
                        gates = one[0].unflatten(1, (2, h))
                        cost = torch.einsum("dgh,dgi->hi", like[0], gates) + like[1].mT @ one[1]
                        order = torch.from_numpy(scipy.optimize.linear_sum_assignment(-cost.numpy())[1])
                        one = gates[:, :, order].flatten(1), one[1][:, order]
                    share = counts[i] / counts[members].sum()
                    for sum_of, part in zip(total, one, strict=True):
                        sum_of += share * part
                first[members], second[members] = total
            merged = model.get_submodule(name)
            merged.fc1_weight, merged.fc2_weight = nn.Parameter(first, False), nn.Parameter(second, False)
        return model


def _counts(seen: Any) -> Tensor:
    """How often each expert is chosen (n)."""
    return torch.tensor([float(count) for count in seen.rows.counts])


def ways(draw: Draw, k: int) -> dict[str, Callable[[], Model]]:
    """All ways to keep the bytes of k experts, by name."""
    width = k * draw.model.config.moe_layers[next(iter(draw.seen))].expert_width // N

    def ours(**options: Any) -> Callable[[], Model]:
        return lambda: draw.pruned(**{"keep": k} | options)

    found = {signal: lambda signal=signal: draw.one_shot(k, signal) for signal in ("random", *PLAIN)}
    return found | {
        "M-SMoE": lambda: draw.m_smoe(k),
        "HC-SMoE": lambda: draw.hc_smoe(k),
        "MoNE": ours(signal="mone", compensate="mean"),
        "gram, renorm": ours(compensate="renorm"),
        "random, renorm-refit": ours(signal="random", compensate="renorm-refit"),
        "reap, renorm-refit": ours(signal="reap", compensate="renorm-refit"),
        "gram, renorm-refit": ours(compensate="renorm-refit"),
        "mean": ours(compensate="mean"),
        "lstsq": ours(compensate="lstsq"),
        "affine": ours(compensate="affine"),
        "low-rank 8": ours(compensate="low-rank", rank=8),
        "width": ours(keep=None, width=width),
    }


def run(kind: str, packages: Path, cache: Path, draws: int, keeps: list[int], only: str) -> None:
    """Measure what CACHE does not know yet, and print the table."""
    folder = gated_models.trained(kind, cache, packages)
    tokenizer, path = AutoTokenizer.from_pretrained(folder), cache / f"{kind}.jsonl"
    model = moeprune.load(folder)
    assert isinstance(model, Model)
    test = sequences(cache / "corpus" / "test.jsonl", tokenizer, TESTED, 99)
    per_byte = test[:, 1:].numel() / bytes_of(test, tokenizer)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["seed"], row["k"], row["way"]) for row in known}
    for seed in range(draws):
        draw = Draw(model, sequences(cache / "corpus" / "calibration.jsonl", tokenizer, OF_DOMAIN, seed), seed)
        for k in keeps:
            for name, make in ways(draw, k).items():
                if (seed, k, name) in done or not any(word in name for word in only.split(",")):
                    continue
                pruned = make()
                figures = moeprune.evaluate(pruned, test, model, RUNTIME)
                assert figures.difference is not None
                row = {
                    "seed": seed, "k": k, "way": name, "full": per_byte * figures.baseline_model.loss,
                    "increase": per_byte * figures.difference.loss_increase,
                    "agreement": figures.difference.agreement,
                    "size": pruned.cost().bytes / model.cost().bytes,
                }  # fmt: skip
                known.append(row)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
    print_table(kind, known, keeps)


def print_table(kind: str, rows: list[dict[str, Any]], keeps: list[int]) -> None:
    """Print the mean increase of each way over draws, also as a share of REAP's, and the agreement."""
    print(f"\n| {kind}, full {rows[0]['full']:.3f} | " + " | ".join(f"{k} of {N}" for k in keeps) + " |")
    print("|---|" + "--:|" * len(keeps))
    means, missing = {}, (math.nan, math.nan)
    for row in rows:
        means.setdefault((row["way"], row["k"]), []).append((row["increase"], row["agreement"]))
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for k in keeps:
            increase, agreement = (statistics.fmean(each) for each in zip(*means.get((way, k), [missing]), strict=True))
            reap = statistics.fmean(each for each, _ in means.get(("reap", k), [missing]))
            cells.append(f"+{increase:.3f} ({increase / reap:.2f}) {agreement:.2f}")
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=gated_models.KINDS)
    parser.add_argument("packages", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--keeps", default="16,8,4")
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    sys.modules.setdefault("torchvision", None)  # not needed, and broken where it was built for another torch
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    run(given.kind, given.packages, given.cache, given.draws, [*map(int, given.keeps.split(","))], given.only)
