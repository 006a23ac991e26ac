"""Token ids as inputs of a model, the counterpart of pixels in preprocessing.py; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from moeprune.data.preprocessing import InputFormat
from moeprune.errors import MoepruneError
from moeprune.files.disk import read_json

MOST_TOKENS = 2048  # of a sequence, unless `--sequence-length` states it
TOKENIZER_HINT = "tokenise the text with the model's own tokenizer"


@dataclass(frozen=True)
class TokenFormat:
    """The inputs of a model that takes token ids (b,s) and gives logits (b,s,V), and how text becomes token ids.

    vocabulary: V; ids lie below it. longest: tokens of the longest sequence. tokenizer: the folder of the tokenizer;
    None: the model takes `input_ids` only. sequence_length: tokens of each sequence of text; None: `length`.
    by: the field of a document that names its group.
    """

    vocabulary: int
    longest: int
    tokenizer: Path | None = None
    sequence_length: int | None = None
    by: str | None = None

    array = "input_ids"
    """The name of the array of inputs in a file."""
    classes = 0
    """Inputs have no labels: each token is the label of those before it."""
    has_head = True

    @property
    def has_chat_template(self) -> bool:
        """True if the folder of the tokenizer has a template that makes text of conversations."""
        if self.tokenizer is None:
            return False
        settings, template = self.tokenizer / "tokenizer_config.json", self.tokenizer / "chat_template.jinja"
        return template.is_file() or (settings.is_file() and "chat_template" in read_json(settings, "settings"))

    @property
    def length(self) -> int:
        """Tokens of each sequence that text is packed into."""
        return self.sequence_length or min(MOST_TOKENS, self.longest)

    @property
    def in_words(self) -> str:
        """A description such as `up to 4096 tokens of a vocabulary of 32000`."""
        return f"up to {self.longest} tokens of a vocabulary of {self.vocabulary}"

    def agrees_with(self, other: AnyFormat) -> bool:
        """Return True if the ids of both mean the same, as far as that is known."""
        return isinstance(other, TokenFormat) and self.vocabulary == other.vocabulary

    def prepared(self, sequence_length: int | None, by: str | None) -> TokenFormat:
        """Return the format with the options of text that a user gives, checked."""
        if sequence_length is not None and not 2 <= sequence_length <= self.longest:
            raise MoepruneError(
                f"`--sequence-length {sequence_length}` does not fit the model, which takes {self.in_words}",
                f"give 2 to {self.longest}",
            )
        return replace(self, sequence_length=sequence_length or self.sequence_length, by=by or self.by)

    def misfit(self, spec: str, shape: tuple[int, ...]) -> MoepruneError:
        """Return the error that says that token ids of a data set have another shape."""
        expected = f"[n, s] with s from 2 to {self.longest}"
        hint = "give sequences of token ids, all of one length, without padding"
        return MoepruneError(f"`input_ids` of `{spec}` have the shape {list(shape)}, expected {expected}", hint)


AnyFormat: TypeAlias = "InputFormat | TokenFormat"
