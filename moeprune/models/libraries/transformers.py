"""Sparse MoE blocks of transformers (tested with 5.24) as ours; transformers itself is not imported.

A block has a router (`gate` or `router`), stacked `experts`, and often shared experts that all tokens run. Ours takes
the place of router and experts; shared experts stay the code that they are.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.layers.interface import Activation
from moeprune.layers.layer import MoELayer

ROUTERS: dict[str, dict[str, Any]] = {
    r"(Mixtral|MiniMax|Qwen3_5Moe|Qwen3VLMoeText|Qwen3OmniMoeText)TopKRouter": {"normalized": True},
    r"GraniteMoe(SWA|Hybrid|Shared)?TopKRouter|GptOssTopKRouter": {"normalized": True},
    r"HunYuanMoEV1Gate": {"normalized": True},
    r"(Qwen[234]|Olmoe|FlexOlmo|Mellum)\w*TopKRouter": {},
    r"Ernie4_5_Moe(VLMoe)?TopKRouter": {"normalized": True, "float32_router": True},
    r"(DeepseekV2|DeepseekOcr2Text)TopkRouter": {"float32_router": True},
    r"(DeepseekV3|DeepseekV32|Dots1|ExaoneMoe|Glm4Moe|Glm4MoeLite|Glm4vMoeText|GlmMoeDsa|SolarOpen)TopkRouter": {
        "gates": "sigmoid",
        "group_score": "best_two",
        "float32_router": True,
    },
    r"MiniMaxM2TopKRouter": {"gates": "sigmoid", "normalized": True},
    r"Llama4Router": {"gates": "sigmoid", "weigh": "inputs"},
    r"PhimoeTopKRouter": {"gates": "sparsemixer"},
}
"""What routers of these classes do; the first that fits. Softmax gates by default; more is read from attributes."""

ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "GELU": "gelu", "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh", "QuickGELUActivation": "quick_gelu", "ReLU": "relu", "ReLU6": "relu6",
    "ReLUSquaredActivation": "relu2", "LeakyReLU": "leaky_relu", "Mish": "mish", "MishActivation": "mish",
    "Hardswish": "hardswish", "Tanh": "tanh", "Sigmoid": "sigmoid", "LinearActivation": "identity",
}  # fmt: skip

ROUTER_NAMES, SHARED = ("gate", "router"), ("shared_expert", "shared_experts", "shared_mlp")
PARTS = {*ROUTER_NAMES, *SHARED, "experts", "shared_expert_gate"}
PAIRS = ("GptOssMLP", "Llama4TextMoe")  # blocks that return router logits beside the output
ALPHA = 1.702  # of gpt-oss: x·sigmoid(alpha·x) is our quick_gelu


class RoutedBlock(nn.Module):
    """A block with one of our layers for router and routed experts; its shared experts stay."""

    def __init__(self, block: nn.Module, layer: MoELayer):
        super().__init__()
        self.routed = layer
        self.shared: nn.Module | None = next((getattr(block, name) for name in SHARED if _has(block, name)), None)
        self.shared_gate: nn.Module | None = getattr(block, "shared_expert_gate", None)
        self.returns_pair = returns_pair(block)

    def forward(self, x: Tensor) -> Any:
        """Return the output (b,m,d), with None for the router logits where the block returns these too."""
        output = self.routed(x)
        if self.shared is not None:
            shared = self.shared(x)
            output = output + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
        return (output, None) if self.returns_pair else output


def returns_pair(block: nn.Module) -> bool:
    """Return True for a block that returns router logits beside the output."""
    return bool(getattr(block, "returns_pair", type(block).__name__ in PAIRS))


def return_no_router_logits(config: Any) -> None:
    """Have models of a config of transformers return no router logits, which our layers do not give."""
    for part in (config, config.get_text_config()):
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False


def is_block(module: nn.Module) -> bool:
    """Return True for a block of transformers with a router, known or not, and stacked experts."""
    is_theirs = type(module).__module__.startswith("transformers.")
    return is_theirs and _router(module) is not None and hasattr(getattr(module, "experts", None), "down_proj")


def layers_around(module: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Return the names of the layers that blocks are in, and of those beside them; none if a block is in no list."""
    found = dict[str, None]()
    for name in blocks:
        while not isinstance(module.get_submodule(name), nn.ModuleList):
            if not name:
                return []
            name = name.rpartition(".")[0]
        found |= dict.fromkeys(f"{name}.{index}" for index in range(len(module.get_submodule(name))))  # type: ignore[arg-type]
    return list(found)


def describe_block(block: Any, name: str) -> tuple[GatedMoEConfig, dict[str, Tensor]]:
    """Return the config of our layer that computes what router and experts do, and its tensors: views of theirs.

    block: a module. name: of the block, for errors. Raises a MoepruneError if ours cannot compute the same.
    """
    router, experts = _router(block), block.experts
    known = [fields for pattern, fields in ROUTERS.items() if re.fullmatch(pattern, type(router).__name__)]
    extra = {part for part, _ in block.named_children()} - PARTS
    if router is None or not known or extra:
        parts = f"{type(block).__name__} with a {type(router).__name__}" + "".join(f" and `{part}`" for part in extra)
        raise MoepruneError(f"block `{name}` is a {parts}, which moeprune does not know")
    tensors = tensors_of_block(block)
    fields = _fields_of_experts(experts, name) | known[0]
    if _has(router, "norm_topk_prob"):
        fields["normalized"] = router.norm_topk_prob
    if _has(router, "routed_scaling_factor"):
        fields["gate_scale"] = float(router.routed_scaling_factor)
    if _has(router, "num_group") and getattr(router, "topk_method", "group_limited_greedy") != "greedy":
        fields |= {"groups": router.num_group, "groups_kept": router.topk_group}
    if fields.get("gates") == "sparsemixer":
        fields["jitter"] = router.router_jitter_noise
    n, d = tensors["router_weight"].shape
    config = GatedMoEConfig(
        d, n, tensors["fc2_weight"].shape[2], router.top_k, selection_bias="selection_bias" in tensors,
        router_bias="router_bias" in tensors, **fields,
    )  # fmt: skip
    return config, {key: tensor.detach() for key, tensor in tensors.items()}


def tensors_of_block(block: Any) -> dict[str, Tensor]:
    """Return the tensors of router and experts, those that the block has, by our names; views where these differ."""
    router, experts, tensors = _router(block), getattr(block, "experts", None), dict[str, Tensor]()
    if router is not None:
        tensors["router_weight"] = router.wg.weight if _has(router, "wg") else router.weight
    if _has(router, "bias"):
        tensors["router_bias"] = router.bias
    owners: list[Any] = [router, block, getattr(router, "moe_statics", None)]
    for owner in owners:
        if _has(owner, "e_score_correction_bias"):
            tensors["selection_bias"] = owner.e_score_correction_bias.flatten()
    if experts is None:
        return tensors
    first: Tensor = experts.gate_up_proj if _has(experts, "gate_up_proj") else experts.up_proj
    last: Tensor = experts.down_proj
    is_transposed = getattr(experts, "is_transposed", type(experts).__name__ == "Llama4TextExperts")
    tensors |= {"fc1_weight": first if is_transposed else first.mT, "fc2_weight": last.mT if is_transposed else last}
    if getattr(experts, "has_bias", False):
        of_first = experts.gate_up_proj_bias if _has(experts, "gate_up_proj") else experts.up_proj_bias
        tensors |= {"fc1_bias": of_first, "fc2_bias": experts.down_proj_bias}
    return tensors


def _fields_of_experts(experts: Any, name: str) -> dict[str, Any]:
    """Return fields of the config that stacked experts decide."""
    kind = type(experts).__name__
    is_oss, has_gate = kind == "GptOssExperts", hasattr(experts, "gate_up_proj")
    gate = getattr(type(experts), "_apply_gate", None)
    is_custom = gate is not None and gate.__name__ != "_default_apply_gate" and not is_oss
    if is_custom or getattr(experts, "has_post_expert_norm", False) or (is_oss and experts.alpha != ALPHA):
        raise MoepruneError(f"experts of block `{name}`, a {kind}, compute what moeprune cannot")
    fields: dict[str, Any] = {"expert": "glu" if has_gate else "mlp"}
    if is_oss:
        fields |= {"activation": "quick_gelu", "limit": float(experts.limit)}
    else:
        activation = type(experts.act_fn).__name__
        if activation not in ACTIVATIONS:
            raise MoepruneError(f"experts of block `{name}` have a {activation}, which moeprune does not know")
        fields["activation"] = ACTIVATIONS[activation]
    if not getattr(experts, "is_concatenated", True):
        fields["gate_columns"] = "even"
    if getattr(experts, "has_bias", False):
        fields["bias"] = True
    return fields


def _router(block: Any) -> Any:
    return next((getattr(block, name) for name in ROUTER_NAMES if _has(block, name)), None)


def _has(owner: Any, name: str) -> bool:
    return getattr(owner, name, None) is not None
