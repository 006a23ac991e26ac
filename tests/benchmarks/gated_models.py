"""The two language models of gated.py: 4 layers of 32 experts, 4 of them for a token; trained on corpus.py's text."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from corpus import VOCABULARY, write_corpus
from transformers import AutoTokenizer

from moeprune.demo.train_language import fit_language, fresh_language

STEPS = 3000
SMALL = 0.02  # standard deviation of embeddings, head and routers at first
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "num_experts_per_tok": 4, "norm_topk_prob": True, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"model_type": "qwen3_moe", "num_experts": 32, "decoder_sparse_step": 1},
    "sigmoid": {"model_type": "minimax_m2", "num_local_experts": 32, "rotary_dim": 32},
}


def trained(kind: str, cache: Path, packages: Path, steps: int = STEPS) -> Path:
    """Return the folder of a model, trained first where the cache lacks it (about 20 minutes on one core).

    kind: `softmax` (Qwen3-MoE) or `sigmoid` (MiniMax-M2, with a selection bias); packages: see corpus.py.
    """
    corpus, folder = cache / "corpus", cache / f"{kind}-{steps}"
    if not corpus.exists():
        write_corpus(packages, corpus)
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(corpus)
        model = initialized(fresh_language({**SHAPE, **KINDS[kind]}))
        fit_language(model, tokens_by_domain(corpus / "train.jsonl", tokenizer), steps)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def initialized(model: Any) -> Any:
    """Draw weights by the number of inputs of each linear, and small ones for embeddings, head and routers."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            is_small = name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight"))
            std = SMALL if is_small else weight.shape[-1] ** -0.5
            if name.split(".")[-2:] == ["o_proj", "weight"] or "down_proj" in name:
                std /= (2 * model.config.num_hidden_layers) ** 0.5
            torch.nn.init.normal_(weight, std=std)
    return model


def tokens_by_domain(path: Path, tokenizer: Any) -> list[torch.Tensor]:
    """Return the token ids of each domain (t), its documents one after the other, each after an end of text."""
    found: dict[str, list[int]] = {}
    for line in path.read_text().splitlines():
        document = json.loads(line)
        found.setdefault(document["domain"], []).extend([0, *tokenizer(document["text"])["input_ids"]])
    return [torch.tensor(ids, dtype=torch.int16) for ids in found.values()]


if __name__ == "__main__":
    sys.modules.setdefault("torchvision", None)  # not needed, and broken where it was built for another torch
    name, where, unpacked = sys.argv[1:4]
    torch.set_num_threads(1)
    print(trained(name, Path(where), Path(unpacked), *map(int, sys.argv[4:])))
