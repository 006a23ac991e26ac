"""Blocks of transformers as our layers: the same numbers as their own forward passes, in float64."""

import importlib

import pytest
import torch

import moeprune
import tests.peers  # noqa: F401  (makes transformers importable)
from moeprune.layers.layer import layer_of_tensors
from moeprune.models.libraries.transformers import RoutedBlock, describe_block, is_block

pytest.importorskip("transformers")
GROUPS, NO_GROUPS = {"n_group": 4, "topk_group": 2}, {"n_group": 1, "topk_group": 1}
LIMITED = {"topk_method": "group_limited_greedy"}
MOE = {"moe_intermediate_size": 6}
SHARED = {**MOE, "shared_expert_intermediate_size": 9}
ERNIE = {**MOE, "moe_k": 3, "moe_num_experts": 16}
SCALE = {"routed_scaling_factor": 2.5}
CASES = {  # module, class of the block, class and fields of the config
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", {}),
    "qwen2": ("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", SHARED),
    "qwen3": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", {**MOE, "norm_topk_prob": True}),
    "qwen3 not normalised": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", MOE),
    "qwen3-next": ("qwen3_next", "Qwen3NextSparseMoeBlock", "Qwen3NextConfig", SHARED),
    "qwen3.5": ("qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", "Qwen3_5MoeTextConfig", SHARED),
    "olmoe": ("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", {"hidden_act": "gelu"}),
    "deepseek-v2": ("deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config", {**MOE, **GROUPS, **LIMITED, **SCALE}),
    "deepseek-v2 greedy": ("deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config", {**MOE, "topk_method": "greedy"}),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", {**MOE, **GROUPS, **SCALE}),
    "glm-4": ("glm4_moe", "Glm4MoeMoE", "Glm4MoeConfig", {**MOE, **NO_GROUPS, "norm_topk_prob": False}),
    "dots.1": ("dots1", "Dots1MoE", "Dots1Config", {**MOE, **GROUPS, "n_shared_experts": 2}),
    "minimax-m2": ("minimax_m2", "MiniMaxM2SparseMoeBlock", "MiniMaxM2Config", {}),
    "granite": ("granitemoe", "GraniteMoeMoE", "GraniteMoeConfig", {}),
    "gpt-oss": ("gpt_oss", "GptOssMLP", "GptOssConfig", {"swiglu_limit": 0.5}),
    "phi": ("phimoe", "PhimoeSparseMoeBlock", "PhimoeConfig", {"num_experts_per_tok": 2, "router_jitter_noise": 0.3}),
    "ernie-4.5": ("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", "Ernie4_5_MoeConfig", ERNIE),
    "llama-4": ("llama4", "Llama4TextMoe", "Llama4TextConfig", {"hidden_act": "relu2"}),
    "hunyuan": ("hunyuan_v1_moe", "HunYuanMoEV1Moe", "HunYuanMoEV1Config", {"moe_topk": 3}),
}


def build(name: str, **fields):
    module, block, config, own = CASES[name]
    package = f"transformers.models.{module}"
    sizes = {
        "hidden_size": 8, "intermediate_size": 6, "num_experts_per_tok": 3, "num_attention_heads": 2,
        "num_hidden_layers": 1,
    } | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 16)  # fmt: skip
    known = getattr(importlib.import_module(f"{package}.configuration_{module}"), config)
    names = set(known.__dataclass_fields__) | set(known.attribute_map)
    given = {key: value for key, value in (sizes | own | fields).items() if key in names}
    torch.manual_seed(0)
    made = getattr(importlib.import_module(f"{package}.modeling_{module}"), block)(known(**given)).double().eval()
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data.normal_(std=0.7)
    return made


@pytest.fixture
def in_float64(monkeypatch):
    """Blocks that cast to float32 for the router stay in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def ours_for(block) -> RoutedBlock:
    config, tensors = describe_block(block, "mlp")
    own = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *block.buffers())}
    assert all(tensor.untyped_storage().data_ptr() in own for tensor in tensors.values())  # nothing is copied
    return RoutedBlock(block, layer_of_tensors(config, None, tensors))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_our_layer_computes_what_the_block_does(name, in_float64):
    block = build(name)
    assert is_block(block)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    expected, found = block(x), ours_for(block)(x)
    if isinstance(expected, tuple):
        expected, found = expected[0].view_as(x), found[0]
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3"])
def test_experts_are_chosen_as_by_a_block_in_bfloat16(name):
    """Some routers compute logits in float32, others in bfloat16, where near ones are equal."""
    block = build(name).bfloat16()
    x = torch.randn(1, 300, 8, dtype=torch.bfloat16)
    expected, found = block(x).float(), ours_for(block)(x).float()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.std()))


def test_blocks_that_are_not_known_are_refused(monkeypatch):
    block = build("mixtral")
    block.norm = torch.nn.LayerNorm(8)
    with pytest.raises(moeprune.MoepruneError, match=r"block `a.mlp` is a MixtralSparseMoeBlock .* and `norm`"):
        describe_block(block, "a.mlp")
    block = build("qwen3", hidden_act="xielu")
    with pytest.raises(moeprune.MoepruneError, match="XIELUActivation"):
        describe_block(block, "a.mlp")
    monkeypatch.setitem(CASES, "jamba", ("jamba", "JambaSparseMoeBlock", "JambaConfig", {}))
    with pytest.raises(moeprune.MoepruneError, match="JambaSparseMoeBlock"):
        describe_block(build("jamba"), "a.mlp")
