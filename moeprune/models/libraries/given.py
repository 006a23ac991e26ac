"""What a user says about a file with `--source-arg KEY=VALUE`: read without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moeprune.errors import MoepruneError

Parser = Callable[[str], Any]


def parse_settings(settings: Iterable[str]) -> dict[str, str]:
    """`KEY=VALUE` texts as values by key.

    Raises:
        MoepruneError: a text without `=`, or a key that is given twice.
    """
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise MoepruneError(
                f"`--source-arg {setting}` is no KEY=VALUE", "such as `--source-arg num_heads=6`"
            )
        if key in found:
            raise MoepruneError(f"`--source-arg {key}` is given twice: {found[key]!r} and {value!r}")
        found[key] = value
    return found


def parse_given(given: Mapping[str, str], parsers: Mapping[str, Parser]) -> dict[str, Any]:
    """Read the values of known keys.

    Args:
        parsers: by key; each raises a ValueError that says what it expects.

    Raises:
        MoepruneError: an unknown key, or a value that its parser does not take.
    """
    if unknown := sorted(set(given) - set(parsers)):
        raise MoepruneError(
            f"unknown `--source-arg` {', '.join(f'`{key}`' for key in unknown)}",
            f"known are {', '.join(sorted(parsers))}",
        )
    values = {}
    for key, text in given.items():
        try:
            values[key] = parsers[key](text)
        except ValueError as error:
            raise MoepruneError(f"`--source-arg {key}={text}`: {error}") from None
    return values


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError("expected a whole number")
    return int(text)


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("expected a number")
    return value


def flag(text: str) -> bool:
    """`true` or `false`."""
    if text.lower() not in ("true", "false"):
        raise ValueError("expected true or false")
    return text.lower() == "true"


def size(text: str) -> tuple[int, int]:
    """Height and width: `224`, or `192x256`."""
    sides = [count(side) for side in text.strip("()[]").replace("x", ",").split(",")]
    if len(sides) not in (1, 2) or 0 in sides:
        raise ValueError("expected a side such as 224, or height and width such as 192x256")
    return sides[0], sides[-1]


def one_of(*choices: str) -> Parser:
    """One of some texts."""

    def parse(text: str) -> str:
        if text.strip("'\"") not in choices:
            raise ValueError(f"expected one of {in_words(choices)}")
        return text.strip("'\"")

    return parse


def optional(parser: Parser) -> Parser:
    """What a parser takes, or `None`."""
    return lambda text: None if text.lower() == "none" else parser(text)


def in_words(choices: Iterable[object]) -> str:
    """Such as `token, avg or ''`."""
    *others, last = [str(choice) or "''" for choice in choices]
    return f"{', '.join(others)} or {last}" if others else last
