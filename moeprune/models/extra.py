"""State of modules that is neither parameter nor buffer (`get_extra_state`), as tensors that a checkpoint can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files.foreign import EXTRA

MARK = b"json:"


def encode_extra(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose values are all tensors: others become the bytes of their JSON.

    Raises a MoepruneError that names a value that JSON does not give back as it was.
    """
    return {name: value if isinstance(value, Tensor) else _encoded(name, value) for name, value in state.items()}


def decode_extra(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict that was encoded."""
    return {name: _decoded(value) if name.endswith(EXTRA) else value for name, value in state.items()}


def _encoded(name: str, value: Any) -> Tensor:
    try:
        text = json.dumps(value)
        if json.loads(text) != value:
            raise ValueError("it would change")
    except (TypeError, ValueError, RecursionError) as error:
        message = f"`{name}` is a {type(value).__name__} that no checkpoint can hold ({error})"
        raise MoepruneError(message, "let `get_extra_state` return a tensor or JSON values") from None
    return torch.tensor(list(MARK + text.encode()), dtype=torch.uint8)


def _decoded(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1:
        found = bytes(value.tolist())
        if found.startswith(MARK):
            return json.loads(found.removeprefix(MARK))
    return value
