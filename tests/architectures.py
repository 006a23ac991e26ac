"""Small random language models of many architectures of transformers, and folders of them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import tests.peers  # noqa: F401 (makes transformers importable)

LAYERS, EXPERTS, TOP_K, VOCABULARY = 2, 8, 2, 64
BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "num_experts_per_tok": TOP_K,
}  # fmt: skip
ROUTED = {"n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "n_shared_experts": 1}
UNGROUPED = {**ROUTED, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 2, "topk_group": 1,
}  # fmt: skip
FULL_ATTENTION = {"layer_types": ["full_attention"] * LAYERS}
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": EXPERTS},
    "deepseek_v2": {**ROUTED, **LATENT, "first_k_dense_replace": 0, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**ROUTED, **LATENT, "first_k_dense_replace": 1},
    "glm4_moe": UNGROUPED,
    "dots1": UNGROUPED,
    "minimax_m2": {"num_local_experts": EXPERTS},
    "granitemoe": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, **FULL_ATTENTION},
    "phimoe": {"num_local_experts": EXPERTS},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS, "moe_intermediate_size": 16, "moe_k": TOP_K, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0, "moe_layer_end_index": 1,
    },
    "llama4_text": {
        "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 1,
    },
    "qwen3_next": {
        "num_experts": EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, **FULL_ATTENTION,
    },
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": TOP_K},
}  # fmt: skip


def language_model(name: str, **changes: Any) -> nn.Module:
    """A model whose weights tell experts apart: those of routers and experts are large, biases above 0."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(name, **{**BASE, **CASES[name], **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if any(part in key for part in ("expert", "gate", "router", "bias")):
                tensor.normal_(std=0.3)
            if "correction_bias" in key:
                tensor.abs_()
    return model


def load(folder: Path) -> nn.Module:
    """What transformers loads in float64, all keys used and none missing."""
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info.values()), info
    return model.eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whatever their shards."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@torch.no_grad()
def logits(model: nn.Module, seed: int = 0) -> Tensor:
    """Logits for two random texts of twelve tokens."""
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    return model(tokens, use_cache=False).logits


def forbid(model: nn.Module, kept: Mapping[str, Sequence[int]], num_experts: int = EXPERTS) -> nn.Module:
    """The same model whose routers may not choose the experts that are not kept, by names of layers."""
    for name, module in model.named_modules():
        layer = next((layer for layer in kept if _is_within(name, layer)), None)
        if layer is None:
            continue
        dropped = [j for j in range(num_experts) if j not in kept[layer]]
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if key in ("e_score_correction_bias", "expert_bias"):
                tensor.data[..., dropped] = -1e30
        if name.rpartition(".")[2] in ("gate", "router"):
            module.forward = _without(module.forward, num_experts, dropped)
    return model


def _is_within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def _without(forward: Any, num_experts: int, dropped: Sequence[int]) -> Any:
    """The forward of a router in which the logits of some experts are as low as can be."""

    def masked(*arguments: Any, **options: Any) -> Any:
        linear = F.linear

        def of_kept(*inputs: Tensor) -> Tensor:
            found = linear(*inputs)
            if found.shape[-1] == num_experts:
                found = found.clone()
                found[..., list(dropped)] = -1e30
            return found

        with patch.object(F, "linear", of_kept):
            return forward(*arguments, **options)

    return masked


def saved_models(tmp_path_factory) -> Callable[[str], Path]:
    """Return what gives the folder of a small model of an architecture, in several shards; each is made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "full"
            language_model(name).save_pretrained(made[name], max_shard_size="40KB")
        return made[name]

    return folder


def model_with_images(**changes: Any) -> Any:
    """A small model that takes text and images; changes: of the config of its language part."""
    import transformers

    text = BASE | CASES["qwen3_moe"] | changes
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 16}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = transformers.AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    return transformers.AutoModelForImageTextToText.from_config(config).eval()
