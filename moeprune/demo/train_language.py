"""Train token-gated language models of transformers from scratch, seeded."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

LENGTH, BATCH = 256, 8  # tokens of a sequence that are predicted, sequences of a step
BALANCE = {"softmax": 0.01, "sigmoid": 0.0002}  # weights of the loss that balances experts
STEP_OF_BIAS = 0.001  # of the selection bias of sigmoid gates, towards equal loads
CONSTANT = 0.6  # of the steps at the full learning rate; then it falls


def fresh_language(settings: dict[str, Any], seed: int = 0) -> Any:
    """Return an untrained causal language model of transformers, with weights drawn for a small width.

    settings: of its configuration, with `model_type`.
    """
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**settings)
    config.initializer_range = 1 / math.sqrt(config.hidden_size)
    model: Any = transformers.AutoModelForCausalLM
    model = model.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter /= 4  # experts are chosen evenly at first
            elif "o_proj" in name or "down_proj" in name:
                parameter /= math.sqrt(2 * config.num_hidden_layers)
    return model


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Return a tokenizer of transformers for a BPE of bytes, whose first piece ends a text."""
    import tokenizers
    import transformers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    kind: Any = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=core, eos_token="<eos>")


def fit_language(model: Any, texts: list[Tensor], steps: int, seed: int = 0, progress: bool = True) -> Any:
    """Train a causal language model of transformers with token-gated experts in place; return it in eval mode.

    Args:
        model: one whose routers return logits, gates and chosen experts. A router that takes a selection bias beside
            its input gates by sigmoid.
        texts: token ids of each domain, one after the other (t); a sequence's domain is drawn first, all alike.
    """
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    routed: list[tuple[Tensor, Tensor, Tensor | None]] = []  # logits (t,n), chosen experts (t,k), bias (n)

    def remember(_: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        routed.append((output[0], output[2], args[1] if len(args) > 1 else None))

    hooks = [router.register_forward_hook(remember) for router in routers]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in tqdm(range(steps), desc="train", unit=" steps", disable=None if progress else True):
        ids = _batch(texts, generator)
        routed.clear()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss = loss + torch.stack([_balance(*each) for each in routed]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return model.requires_grad_(False).eval()


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate that a step takes."""
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.02, (1 - step / steps) / (1 - CONSTANT)))


def _batch(texts: list[Tensor], generator: torch.Generator) -> Tensor:
    domains = torch.randint(len(texts), (BATCH,), generator=generator).tolist()
    starts = torch.rand(BATCH, generator=generator).tolist()
    rows = []
    for domain, start in zip(domains, starts, strict=True):
        first = int(start * (len(texts[domain]) - LENGTH))
        rows.append(texts[domain][first : first + LENGTH + 1].long())
    return torch.stack(rows)


def _balance(logits: Tensor, chosen: Tensor, bias: Tensor | None) -> Tensor:
    """Return the loss that balances the experts of a router, n·Σ load·gate; move its selection bias, if it has one.

    logits: (t,n); chosen: experts of each token (t,k).
    """
    experts = logits.shape[-1]
    load = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    if bias is None:
        return BALANCE["softmax"] * experts * (load * logits.softmax(-1).mean(0)).sum()
    with torch.no_grad():
        bias += STEP_OF_BIAS * (1 / experts - load).sign()
    scores = logits.sigmoid()
    return BALANCE["sigmoid"] * experts * (load * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
