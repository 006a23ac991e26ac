"""Tokenizers of Hugging Face folders: text and conversations into token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import MoepruneError
from moeprune.files.disk import read_json

EXTRA = "install them: `pip install 'moeprune[hf]'`"
Ints = NDArray[np.int64]


class Encoded(NamedTuple):
    """The token ids of a text (t,), and how many UTF-8 bytes of it each of them stands for (t,)."""

    ids: NDArray[np.int32]
    bytes: Ints


class Tokenizer:
    """The tokenizer in a folder: of `tokenizer.json`, or one that transformers makes of the folder's other files."""

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / "tokenizer.json").is_file():
            try:
                import tokenizers
            except ImportError:
                raise MoepruneError("text needs the package tokenizers", EXTRA) from None
            try:
                self.core: Any = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # of Rust, a plain Exception
                raise MoepruneError(f"`{folder / 'tokenizer.json'}` is not a tokenizer ({error})") from None
        else:
            self.core = getattr(self.of_transformers, "backend_tokenizer", None)
            if self.core is None:
                message = f"the tokenizer of `{folder}` has no fast form"
                raise MoepruneError(message, "give token ids, `input_ids` in a .npz or .safetensors file")
        self.core.no_truncation()
        self.core.no_padding()

    @cached_property
    def of_transformers(self) -> Any:
        """The tokenizer as transformers opens it, which runs no code of the folder."""
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MoepruneError(f"the tokenizer of `{self.folder}` needs the package transformers", EXTRA) from None
        try:
            return AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # anything can be wrong with the files of a folder
            reason = f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
            hint = "copy the tokenizer's files into the folder, or give token ids, `input_ids` in a .npz file"
            raise MoepruneError(f"no tokenizer in `{self.folder}` {reason}", hint) from None

    @cached_property
    def first(self) -> list[int]:
        """The ids that the tokenizer puts before a text, such as that of BOS."""
        found = self.core.encode("a")
        mask = [*found.special_tokens_mask, 0]
        return found.ids[: mask.index(0)]

    @cached_property
    def end(self) -> list[int]:
        """The id that ends a document, EOS; none if the folder does not name it."""
        token, ids = self._file("tokenizer_config.json").get("eos_token"), None
        if token is not None:
            ids = self.core.token_to_id(token["content"] if isinstance(token, dict) else token)
        for name in ("generation_config.json", "config.json"):
            ids = self._file(name).get("eos_token_id") if ids is None else ids
        return [] if ids is None else ids[:1] if isinstance(ids, list) else [ids]

    def _file(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        found = read_json(path, "an object of settings") if path.is_file() else {}
        return found if isinstance(found, dict) else {}

    def render(self, messages: Any) -> str:
        """Return a conversation as the text that the folder's chat template makes of it."""
        try:
            return str(self.of_transformers.apply_chat_template(messages, tokenize=False))
        except MoepruneError:
            raise
        except Exception as error:  # of templates, which raise what they like
            raise MoepruneError(
                f"the chat template of `{self.folder}` refuses the messages ({type(error).__name__}: {error})",
                "give `messages` as the model expects them, or plain `text`",
            ) from None

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Return the tokens of each text, without BOS and EOS."""
        found = self.core.encode_batch(list(texts), add_special_tokens=False)
        return [_encoded(text, each) for text, each in zip(texts, found, strict=True)]


def _encoded(text: str, found: Any) -> Encoded:
    """A token stands for the bytes from where the one before it ends; white space between two belongs to the later."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    ends = np.concatenate([[0], 1 + np.digitize(points, (0x80, 0x800, 0x10000))]).cumsum()  # of characters, in bytes
    offsets = np.array([end for _, end in found.offsets], np.int64)
    return Encoded(np.array(found.ids, np.int32), np.diff(ends[np.maximum.accumulate(offsets)], prepend=0))
