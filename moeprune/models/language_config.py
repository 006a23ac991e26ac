"""The architecture of a language model from a folder of transformers, as plain data; no torch."""

from moeprune.data.tokens import MOST_TOKENS
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.models.architecture import ModelConfig
from moeprune.plan import Count, Positive


class LanguageConfig(ModelConfig, frozen=True, tag="language"):
    """A language model with layers of token-gated experts; token ids (b,s) in, logits (b,s,V) out.

    FLOPs are those of a sequence of as many tokens as text is packed into unless a user says otherwise.

    model_type: as transformers names it. vocabulary: V. longest: tokens of the longest sequence. layers: by their names
    in the folder, in the order of the data flow. other_flops: all but the layers'; every attention counts as full.
    """

    model_type: str
    vocabulary: Positive
    longest: Positive
    layers: dict[str, GatedMoEConfig]
    other_flops: Count

    @property
    def num_classes(self) -> int:
        """0: each token is the label of those before it."""
        return 0

    @property
    def moe_layers(self) -> dict[str, GatedMoEConfig]:
        """The layers by their names in the folder, in the order of the data flow."""
        return self.layers

    def tokens(self, name: str) -> int:
        """Return the tokens of a sequence."""
        return min(MOST_TOKENS, self.longest)
