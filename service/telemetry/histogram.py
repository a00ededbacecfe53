"""Histograms that take many observations at once, for Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from service.artifact.reference import bucket_counts


class BulkHistogram(Collector):
    """A histogram that takes many observations under one lock.

    prometheus_client's own takes several microseconds an observation, a tax on a call that costs
    about sixty in all.

    Args:
        name: Metric name.
        documentation: Help text.
        buckets: Upper bounds, ascending, without infinity.
        labels: Constant labels.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        buckets: Sequence[float],
        labels: dict[str, str] | None = None,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(buckets)
        self._labels = labels or {}
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe_many(self, values: Iterable[float]) -> None:
        """Adds a few observations."""
        bounds, counts = self._bounds, self._counts
        with self._lock:
            for value in values:
                counts[bisect_left(bounds, value)] += 1
                self._sum += value

    def observe_array(self, values: npt.NDArray[np.floating[Any]]) -> None:
        """Adds observations by the hundred, for which numpy costs less."""
        self.add(bucket_counts(values, self._bounds).tolist(), float(values.sum()))

    def add(self, counts: Sequence[int], total: float) -> None:
        """Adds observations that were counted elsewhere.

        Args:
            counts: How many fell into each bucket, the last of which is up to infinity.
            total: Their sum.
        """
        with self._lock:
            for bucket, count in enumerate(counts):
                self._counts[bucket] += count
            self._sum += total

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """One family with one series."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        family = HistogramMetricFamily(self._name, self._documentation, labels=list(self._labels))
        cumulative, running = [], 0
        for bound, count in zip([*map(float, self._bounds), "+Inf"], counts, strict=True):
            running += count
            cumulative.append((str(bound), running))
        family.add_metric(list(self._labels.values()), cumulative, total)
        yield family


class MergedHistogram(Collector):
    """Several ``BulkHistogram`` of one name, exported as one family.

    Args:
        parts: Histograms with the same name and different labels.
    """

    def __init__(self, parts: Sequence[BulkHistogram]) -> None:
        self._parts = parts

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """One family with a series for each part."""
        families = [family for part in self._parts for family in part.collect()]
        for family in families[1:]:
            families[0].samples.extend(family.samples)
        yield families[0]
