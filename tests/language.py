"""A tiny language model of the tests' own: a causal mean of embeddings, two layers of dense gates, a head."""

from pathlib import Path

import torch
from torch import Tensor, nn

from moeprune.data.tokens import TokenFormat
from moeprune.models.architecture import AdoptedLayer, ModuleConfig
from moeprune.models.description import Details
from moeprune.models.model import Model
from tests.test_seam import Gates, GatesConfig

V, D, N, LONGEST = 300, 6, 8, 64


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
