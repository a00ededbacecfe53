"""Reads a server's /metrics, and what changed between two readings."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

# Name and labels of a sample.
Series = tuple[str, frozenset[tuple[str, str]]]
TIMEOUT_S = 5.0


class ScrapeError(RuntimeError):
    """The metrics can not be read; the message says from where and why."""


@dataclass(frozen=True)
class Scrape:
    """One reading.

    Attributes:
        time: Monotonic seconds.
        samples: Value of every series.
    """

    time: float
    samples: Mapping[Series, float]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the series of that name that have these labels; 0 if there is none."""
        wanted = labels.items()
        return sum(
            value for (other, had), value in self.samples.items() if other == name and wanted <= had
        )

    def by_label(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Values of such series, summed by one of their labels."""
        values: dict[str, float] = {}
        for (other, had), value in self.samples.items():
            if other == name and labels.items() <= had:
                key = dict(had).get(label, "")
                values[key] = values.get(key, 0.0) + value
        return values

    def labels(self, name: str) -> dict[str, str]:
        """The labels of the series of that name, or of one of them; empty if there is none."""
        return next((dict(had) for other, had in self.samples if other == name), {})


def scrape(url: str) -> Scrape:
    """Reads ``url``, such as http://127.0.0.1:8080/metrics.

    Raises:
        ScrapeError: If it can not be reached, or answers something else.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:  # noqa: S310 - the user's
            text = response.read().decode()
        samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except urllib.error.URLError as error:
        raise ScrapeError(f"{url}: {getattr(error, 'reason', error)}") from error
    except (OSError, ValueError) as error:
        raise ScrapeError(f"{url}: {error}") from error
    return Scrape(time.monotonic(), samples)


class Change:
    """What changed between two readings of one server.

    Args:
        before: The earlier reading.
        after: The later one.
    """

    def __init__(self, before: Scrape, after: Scrape) -> None:
        self.seconds = max(after.time - before.time, 1e-9)
        started = "process_start_time_seconds"
        # Counters of a server that was started again begin at zero.
        same = before.value(started) == after.value(started)
        self._samples = {
            series: value - (before.samples.get(series, 0.0) if same else 0.0)
            for series, value in after.samples.items()
        }
        self._delta = Scrape(after.time, self._samples)

    def rate(self, name: str, **labels: str) -> float:
        """Increase a second of a counter."""
        return self._delta.value(name, **labels) / self.seconds

    def rates(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The same by one of its labels."""
        increases = self._delta.by_label(name, label, **labels)
        return {key: value / self.seconds for key, value in increases.items()}

    def buckets(self, name: str, **labels: str) -> list[tuple[float, float]]:
        """Upper bounds of a histogram and how many new observations are in each bucket."""
        cumulative = sorted(
            (float(bound), count)
            for bound, count in self._delta.by_label(f"{name}_bucket", "le", **labels).items()
        )
        below = 0.0
        counts = []
        for bound, count in cumulative:
            counts.append((bound, count - below))
            below = count
        return counts

    def mean(self, name: str, **labels: str) -> float | None:
        """Mean of a histogram's new observations; None if there is none."""
        count = self._delta.value(f"{name}_count", **labels)
        return self._delta.value(f"{name}_sum", **labels) / count if count else None

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """A quantile of a histogram's new observations, linear within its bucket.

        Of what lies beyond the last bound only that bound is known. None without observations.
        """
        buckets = self.buckets(name, **labels)
        rank = share * sum(count for _, count in buckets)
        lower = 0.0
        for bound, count in buckets:
            if count and rank <= count:
                return lower if bound == float("inf") else lower + (bound - lower) * rank / count
            rank -= count
            lower = bound
        return None
