"""What was observed of a figure: the bound that it shows, and how many samples would show more; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moeprune.evaluation.intervals import drop_at_most, median_at_least, share_at_least

MOST_SAMPLES = 100_000_000
"""No more are asked for: a limit that these do not decide is as good as met exactly."""


class Evidence(Protocol):
    """Samples of a figure that an evaluation reports."""

    @property
    def samples(self) -> int:
        """How many there are."""

    def bound(self, confidence: float) -> float:
        """The one-sided bound of the figure that is against the model.

        Args:
            confidence: in 0.5…1, the probability that the true figure is no worse.
        """

    def keeps(self, limit: float, confidence: float, samples: int) -> bool:
        """Whether the bound would keep a limit, if so many samples had the same rates."""


@dataclass(frozen=True)
class Share:
    """Successes among independent samples; the limit is the least share."""

    successes: int
    samples: int

    def bound(self, confidence: float) -> float:
        """See Evidence."""
        return share_at_least(self.successes, self.samples, confidence)

    def keeps(self, limit: float, confidence: float, samples: int) -> bool:
        """See Evidence."""
        return share_at_least(self.successes * samples / self.samples, samples, confidence) >= limit


@dataclass(frozen=True)
class Drop:
    """Inputs by who predicts them right: both models, only the full one, only the pruned one, or neither;
    the limit is the largest drop.
    """

    both: int
    lost: int
    won: int
    neither: int

    @property
    def samples(self) -> int:
        """See Evidence."""
        return self.both + self.lost + self.won + self.neither

    def bound(self, confidence: float) -> float:
        """See Evidence."""
        return drop_at_most(self.both, self.lost, self.won, self.neither, confidence)

    def keeps(self, limit: float, confidence: float, samples: int) -> bool:
        """See Evidence."""
        times = samples / self.samples
        return (
            drop_at_most(
                times * self.both, times * self.lost, times * self.won, times * self.neither, confidence
            )
            <= limit
        )


@dataclass(frozen=True)
class Median:
    """Positive values of independent repetitions; the limit is the least median."""

    values: Sequence[float]

    @property
    def samples(self) -> int:
        """See Evidence."""
        return len(self.values)

    def bound(self, confidence: float) -> float:
        """See Evidence."""
        return median_at_least(self.values, confidence)

    def keeps(self, limit: float, confidence: float, samples: int) -> bool:
        """See Evidence; the same as that more than half of all values are no less than the limit."""
        kept = sum(value >= limit for value in self.values)
        return share_at_least(kept * samples / self.samples, samples, confidence) >= 0.5


def samples_needed(evidence: Evidence, limit: float, confidence: float) -> int | None:
    """The fewest samples whose bound would keep a limit if they had the same rates as those there are.

    Args:
        evidence: whose bound does not keep the limit.

    Returns:
        More samples than there are; None if MOST_SAMPLES are too few.

    >>> samples_needed(Share(100, 100), 0.98, 0.95)
    149
    """
    few, many = evidence.samples, 2 * evidence.samples
    while not evidence.keeps(limit, confidence, many):
        few, many = many, 2 * many
        if many > MOST_SAMPLES:
            return None
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if evidence.keeps(limit, confidence, middle) else (middle, many)
    return many
