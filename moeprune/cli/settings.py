"""`KEY=VALUE` on the command line, read as values."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterable
from typing import Any

from moeprune.errors import MoepruneError


def parse_settings(texts: Iterable[str] | None, option: str) -> dict[str, Any]:
    """Read the `KEY=VALUE` texts of an option.

    Raises:
        MoepruneError: a text without a key, a key that is given twice, or a value that JSON does not have.

    >>> parse_settings(["depth=4", "pool=avg", "mean=0.5,0.4"], "--model-arg")
    {'depth': 4, 'pool': 'avg', 'mean': [0.5, 0.4]}
    """
    settings: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise MoepruneError(f"`{option} {text}` is not KEY=VALUE", f"such as `{option} depth=4`")
        if key in settings:
            raise MoepruneError(f"`{option} {key}` is given twice")
        try:
            settings[key] = parse_value(value)
        except (TypeError, ValueError) as error:
            raise MoepruneError(f"`{option} {text}`: {error}", "give numbers, texts or lists") from None
    return settings


def parse_value(text: str) -> Any:
    """Read a value in the spelling of JSON or Python, or else as text; tuples become lists, `none` is None.

    Raises:
        TypeError, ValueError: a value that JSON does not have, such as a set or an infinite number.
    """
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python about odd literals, which are texts
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            return json.loads(json.dumps(value, allow_nan=False))
    return text
