"""One measured figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

# What a ratio may lose between two runs of the same code; shared machines differ by as much.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Figure:
    """A ratio, or another value that tells something.

    Attributes:
        key: What results are compared by; stays when the name changes.
        name: What was measured.
        rounds: Its value in each round.
        target: What it should reach; None only tells.
        at_least: Whether more is better, and the target a lower bound.
        unit: Of the value; empty for a ratio.
        tolerance: By which share it may be worse than in the committed result; None for absolute
            values, which differ with the machine: they are told and not compared.
        details: Absolute values that the figure was made of.
    """

    key: str
    name: str
    rounds: list[float]
    target: float | None = None
    at_least: bool = True
    unit: str = ""
    tolerance: float | None = TOLERANCE
    details: dict[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Median of the rounds."""
        return median(self.rounds)

    @property
    def met(self) -> bool:
        """Whether the target is reached, or there is none."""
        if self.target is None:
            return True
        return self.value >= self.target if self.at_least else self.value <= self.target

    def regression(self, committed: Figure) -> str | None:
        """What is worse than in the committed result by more than may be; None if nothing is."""
        if self.tolerance is None:
            return None
        sign = -1 if self.at_least else 1
        bound = committed.value * (1 + sign * self.tolerance)
        if (self.value - bound) * sign <= 0:
            return None
        expected = f"{'at least' if self.at_least else 'at most'} {bound:.3g}"
        got = f"got {self.value:.3g}; {committed.value:.3g} is committed"
        return f"{self.name}: expected {expected}, {got}"


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each column."""
    return {key: median(row[key] for row in rows) for key in rows[0]}


def ratios(rows: list[dict[str, float]], above: str, below: str) -> list[float]:
    """One column over another, row by row."""
    return [row[above] / row[below] for row in rows]
