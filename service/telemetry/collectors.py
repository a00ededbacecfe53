"""Collectors for metrics that the library has no class for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from service.telemetry.logs import dropped_lines


class Before(Collector):
    """Does something before other metrics are collected; has none itself.

    Args:
        work: Done at each scrape.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def collect(self) -> Iterable[Metric]:
        """Runs the work; has no metrics itself."""
        self._work()
        return ()


class LogLines(Collector):
    """Log lines that were dropped."""

    def collect(self) -> Iterable[Metric]:
        """One family."""
        yield CounterMetricFamily(
            "digits_log_lines_dropped",
            "Log lines not written: standard error was not read fast enough, or was full.",
            value=dropped_lines(),
        )
