"""One measured figure with its target."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class Figure:
    """A ratio, or whatever has a target.

    Attributes:
        name: What was measured.
        rounds: Its value in each round.
        target: What it should reach; None only tells.
        at_least: Whether the target is a lower bound, or an upper one.
        unit: Of the value; empty for a ratio.
        details: Absolute values that the figure was made of; they drift with the machine.
    """

    name: str
    rounds: list[float]
    target: float | None
    at_least: bool = True
    unit: str = ""
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


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each column."""
    return {key: median(row[key] for row in rows) for key in rows[0]}
