"""How fast a layer of token-gated experts is on the CPU, compared with transformers' own block of Qwen3-MoE.

    python tests/benchmarks/gated_latency.py

One thread, float32, random weights, the same for all: d 512, 64 experts of width 256, 8 for each token. transformers
runs experts in a loop (`eager`), or as grouped products (`grouped_mm`, its default); its third way, with copies of the
chosen weights, is slower than both. Numbers are how many times as fast ours is, as medians over interleaved
repetitions; the last column is how many times as fast half of the experts are as all.
"""

import statistics
import sys

import torch

from moeprune.evaluation.latency import interleaved
from moeprune.layers.layer import layer_of_tensors
from moeprune.layers.surgery import prune_layer
from moeprune.models.libraries.transformers import describe_block
from moeprune.plan import LayerPlan

TOKENS = (1, 8, 32, 512)
THEIRS = ("eager", "grouped_mm")


@torch.inference_mode()
def main() -> None:
    sys.modules.setdefault("torchvision", None)  # not needed, and broken where it was built for another torch
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8}
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True)
    block = Qwen3MoeSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ours = layer_of_tensors(describe_block(block, "block")[0], None, describe_block(block, "block")[1])
    kept = prune_layer(ours, LayerPlan("static", 32, 64, "combine", "renorm", tuple(range(0, 64, 2))))

    def theirs(way: str):
        def run(x):
            config._experts_implementation = way
            return block(x)

        return run

    functions = {"ours": ours, "half": kept} | {way: theirs(way) for way in THEIRS}
    print("|", " | ".join(["tokens", "ours, ms", *(f"over {way}" for way in THEIRS), "half over ours"]), "|")
    print("|--:" * (3 + len(THEIRS)) + "|")
    for tokens in TOKENS:
        seconds = interleaved(functions, [torch.randn(1, tokens, 512) for _ in range(8)])

        def ratio(slow, fast, of=seconds):
            return statistics.median(a / b for a, b in zip(of[slow], of[fast], strict=True))

        cells = [f"{ratio(way, 'ours'):.2f}×" for way in THEIRS] + [f"{ratio('ours', 'half'):.2f}×"]
        print(
            "|", " | ".join([str(tokens), f"{1e3 * statistics.median(seconds['ours']):.2f}", *cells]), "|", flush=True
        )


if __name__ == "__main__":
    main()
