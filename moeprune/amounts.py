"""Amounts as users give them: shares and numbers of experts, budgets in bytes or FLOPs."""

import math
import re
from fractions import Fraction

from moeprune.errors import MoepruneError


def parse_keep(keep: str | float, option: str = "--keep", what: str = "experts") -> Fraction | int:
    """Read how many experts to keep: a number of experts such as `16`, or a share such as `1/8`, `0.125` or `12.5%`.

    A whole number is a number of experts; with a point, a slash or a percent sign it is a share, as all floats are.
    Returns an int of at least 1 for a number, a Fraction in (0, 1] for a share; anything else is a MoepruneError.

    >>> parse_keep("1/8"), parse_keep("12.5%"), parse_keep("1.0"), parse_keep("1")
    (Fraction(1, 8), Fraction(1, 8), Fraction(1, 1), 1)
    """
    text, hint = str(keep).strip(), f"give a share of the {what} such as 1/8 or 0.125, or a number of {what} such as 16"
    number = text.removesuffix("%").rstrip()
    try:
        if "e" in number.lower() and not 1e-9 < abs(float(number)) < 1e9:
            raise ValueError  # a Fraction writes all digits out
        value = Fraction(number) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        raise MoepruneError(f"`{option} {text}` is neither a share nor a number", hint) from None
    if value <= 0:
        others = "; `--compensate linear` runs no experts, but a linear map" * (option == "--keep")
        raise MoepruneError(f"`{option} {text}` keeps no {what.removesuffix('s')}", f"give at least 1{others}")
    if text.isdigit():
        return int(text)
    if value > 1:
        hint = f"a number of {what} has no point: {value}" if value.denominator == 1 and "%" not in text else hint
        raise MoepruneError(f"`{option} {text}` is more than all {what}", hint)
    return value


def parse_rank(rank: str) -> int | float:
    """Read a mean rank: a number such as `8`, or a share of one such as `1/4`, for which few maps have a rank at all.

    Returns an int of at least 1 or a float below 1; anything else is a MoepruneError.

    >>> parse_rank("8"), parse_rank("1/4")
    (8, 0.25)
    """
    found = parse_keep(rank, "--rank", "directions")
    return int(found) if found >= 1 else float(found)


def keep_to_text(keep: Fraction | int) -> str:
    """Return what `parse_keep` reads: `1.0` for all experts, `1` for one."""
    return "1.0" if isinstance(keep, Fraction) and keep == 1 else str(keep)


def parse_budget(budget: str | float, unit: str, option: str) -> tuple[float, bool]:
    """Read a budget: a share in (0, 1] such as `0.4` or `40%`, or an amount such as `1.5MB`.

    unit: of amounts, `B` or `FLOPs`; it may be left out after a prefix. Returns the number and whether it is a share;
    anything else is a MoepruneError.

    >>> parse_budget("40%", "B", "--max-size"), parse_budget("1 MiB", "B", "--max-size")
    ((0.4, True), (1048576.0, False))
    """
    text = str(budget).strip()
    hint = f"give a share such as 0.4 or 40%, or an amount such as 500k{unit}"
    form = rf"(\d*\.?\d*(?:e[+-]?\d+)?) ?(?:(%)|([kmgt]?)(i?)({unit})?)"
    found = re.fullmatch(form, text, re.IGNORECASE | re.ASCII)
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    if not found or not 0 < value < math.inf:
        raise MoepruneError(f"`{option} {text}` is neither a share nor an amount above 0", hint)
    _, percent, prefix, binary, named = found.groups()
    if prefix or named:
        return value * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "), False
    value /= 100 if percent else 1
    if value > 1:
        raise MoepruneError(f"`{option} {text}` is more than the whole model", hint)
    return value, True


def experts_to_keep(
    keep: Fraction | int, num_experts: int, layer: str, option: str = "--keep", what: str = "experts"
) -> int:
    """Return k for a layer: a share above 0 is rounded to the nearest number, at least 1.

    A MoepruneError if it has fewer experts than are asked for.

    >>> experts_to_keep(Fraction(1, 8), 128, "blocks.0.soft_moe")
    16
    """
    if isinstance(keep, Fraction) and keep > 0:
        return max(1, int(keep * num_experts + Fraction(1, 2)))
    if keep > num_experts:
        raise MoepruneError(
            f"`{option} {keep}` is more than the {num_experts} {what} of layer `{layer}`",
            f"give at most {num_experts}, or a share such as 1/8",
        )
    return int(keep)
