"""Numbers, plans and other values in words."""

import re
from collections.abc import Mapping
from typing import Any

from msgspec.structs import asdict

from moeprune.data.spec import DataInfo
from moeprune.models.results import FlopsByPart
from moeprune.plan import LayerPlan

NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def percent(share: float, digits: int = 1) -> str:
    """Return a share as percent: `0.125` is `12.5 %`."""
    return f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """Return a difference of shares as percentage points, with its sign."""
    return f"{100 * difference + 0.0:+.2f} pt"


def ci95(bounds: tuple[float, float]) -> str:
    """Return a 95 % interval of a difference of shares."""
    return f"95 %: {points(bounds[0])} to {points(bounds[1])}"


def amount(value: float, unit: str = "") -> str:
    """Return a number with a decimal prefix: `12345` is `12.3 k`."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while abs(value) >= 999.5 and (larger := next(prefixes, None)):
        prefix, value = larger, value / 1000
    digits = f"{value:.0f}" if not prefix and float(value).is_integer() else f"{value:.3g}"
    return f"{digits} {prefix}{unit}".strip()


def plural(count: int, noun: str) -> str:
    """Return a number of things: `1 block`, `2 blocks`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def plain(value: Any) -> str:
    """Return JSON values as text on one line, without control characters."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    text = "automatic" if value is None else str(value)
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def legal(text: str) -> str:
    """Replace characters that XML and HTML cannot hold."""
    return NOT_IN_XML.sub("\ufffd", text)


def flops_in_words(flops: FlopsByPart) -> str:
    """Return the total and its parts."""
    parts = ", ".join(f"{name} {amount(value)}" for name, value in asdict(flops).items() if name != "total")
    return f"{amount(flops.total)} ({parts})"


def plan_in_words(plan: LayerPlan, with_kept: bool = False) -> str:
    """Return the plan of one layer in words; with_kept: and the kept experts, if it has one set of them."""
    most = "" if plan.mass is None else f"mass {plan.mass:g} in at most "
    count = f"{most}{plan.k} of {plan.num_experts}"
    if plan.compensation == "linear":
        return f"a linear map in place of {plan.num_experts} experts and their router"
    has_rank = plan.has_basis or plan.is_low_rank
    rank = f" in {plural(int(plan.rank or 0), 'direction')}" if has_rank else ""
    rank = f" of rank {_mean_rank(plan)}" if has_rank and plan.is_low_rank else rank
    width = "" if plan.width is None else f", {plural(plan.width, 'hidden unit')} each"
    kept = f": {plain(plan.kept)}" if with_kept and plan.kept is not None else ""
    return f"{plan.scope}, {count} by {plan.signal}, {plan.compensation}{rank}{width}{kept}"


def _mean_rank(plan: LayerPlan) -> str:
    ranks = plan.ranks or [plan.rank or 0]
    return f"{ranks[0]:g}" if len({*ranks}) == 1 else f"{sum(ranks) / len(ranks):.2g} on average"


def keep_in_words(keep: str) -> str:
    """Return how many experts of each layer a `--keep` keeps, in words: `1` is one expert, `1.0` all of them."""
    return (
        plural(int(keep), "expert") if keep.isdigit() else "all experts" if keep == "1.0" else f"{keep} of the experts"
    )


def checkpoint_on_data(checkpoint: str | None, data: DataInfo, of: str = "") -> str:
    """Return a title that names both; of: what a sample is, such as ` of 8 tokens`."""
    return f"{checkpoint or 'a model'} on {data.spec} ({data.samples} samples{of})"
