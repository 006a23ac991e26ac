"""A tiny language model of the tests' own: a causal mean of embeddings, two layers of dense gates, a head; and text."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from moeprune.data.tokens import TokenFormat
from moeprune.models.architecture import AdoptedLayer, ModuleConfig
from moeprune.models.description import Details
from moeprune.models.model import Model
from tests.test_seam import Gates, GatesConfig

V, D, N, LONGEST = 300, 6, 8, 64
BOS, EOS = 0, 1


class TinyLanguageModel(Model):
    def __init__(self, tokenizer: Path | None = None):
        layers = {f"moe.{i}": AdoptedLayer(GatesConfig(D, N), "moeprune", LONGEST, i) for i in range(2)}
        super().__init__(ModuleConfig(None, {}, (1, 1, LONGEST), V, layers, 2 * LONGEST * D * V), Details())
        self.tokenizer = tokenizer
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.moe = nn.ModuleList(Gates(GatesConfig(D, N)) for _ in range(2))
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1.0 if parameter.ndim == 2 else 0.5)
        self.requires_grad_(False).eval()

    @property
    def input_format(self) -> TokenFormat:
        return TokenFormat(V, LONGEST, self.tokenizer)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        for layer in self.moe:
            x = x + layer(x)
        return self.head(x)


def ids(count: int, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(V, (count, length), generator=torch.Generator().manual_seed(seed))


def spoken(model: Model, count: int, length: int = 12, seed: int = 0) -> Tensor:
    """Token ids that a model says by itself, so that no other predicts them better."""
    generator = torch.Generator().manual_seed(seed)
    found = ids(count, 1, seed)
    for _ in range(length - 1):
        found = torch.cat([found, torch.multinomial(model(found)[:, -1].softmax(-1), 1, generator=generator)], 1)
    return found


def make_tokenizer(folder: Path, texts: Iterable[str]) -> Path:
    """A tokenizer of bytes and some merges, which puts BOS before a text and would cut it after two tokens."""
    import tokenizers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    core.enable_truncation(2)
    core.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_lines(path: Path, documents: Iterable[object]) -> Path:
    """A document on each line, with blank lines between them."""
    path.write_text("".join(json.dumps(document) + "\n\n" for document in documents))
    return path
