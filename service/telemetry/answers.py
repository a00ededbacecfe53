"""Metrics of what the model answers and what it is shown, and of their drift from training."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service.artifact.reference import BOUNDS, Reference, observe
from service.serving.request import IMAGE_BYTES
from service.telemetry.drift import Window
from service.telemetry.histogram import BulkHistogram

# Probabilities float32[N, 10] and is_digit float32[N], and the pixels of the images they are of, in
# one or several pieces.
Seen = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Sequence[bytes | memoryview]]


class AnswerMetrics(Collector):
    """Counts answered images. Thread-safe.

    Args:
        registry: Where the metrics are exported.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        # They belong to no registry: this object is what is collected.
        predictions = Counter(
            "digits_predictions_total", "Images answered, by digit.", ["digit"], registry=None
        )
        self._predictions = [predictions.labels(str(digit)) for digit in range(10)]
        self._confidence = BulkHistogram(
            "digits_confidence", "Probability of the digit answered.", BOUNDS["confidence"]
        )
        self._is_digit = BulkHistogram(
            "digits_is_digit",
            "Probability that an image is a digit at all; 1 of models that were not trained to "
            "tell.",
            BOUNDS["is_digit"],
        )
        self._ink = BulkHistogram(
            "digits_ink_ratio", "Brightness of an image, of one bright all over.", BOUNDS["ink"]
        )
        psi = Gauge(
            "digits_drift_psi",
            "Population-stability index of the latest images against the model's reference; NaN "
            "while they are too few, or the model has none.",
            ["feature"],
            registry=None,
        )
        self._psi = {feature: psi.labels(feature) for feature in BOUNDS}
        self._window_images = Gauge(
            "digits_drift_window_images",
            "Images that digits_drift_psi is computed from.",
            registry=None,
        )
        self._exported: tuple[Collector, ...] = (
            predictions, self._confidence, self._is_digit, self._ink, psi, self._window_images,
        )  # fmt: skip
        self._window: Window | None = None
        self._lock = threading.Lock()
        registry.register(self)

    def compare_with(self, reference: Reference) -> None:
        """Another model serves: what comes from here on is compared with its reference."""
        with self._lock:
            self._window = Window(reference)

    def look_at(self, seen: Sequence[Seen]) -> None:
        """Counts what was answered, best by the hundred: numpy costs as much for one image."""
        if not seen:
            return
        probabilities = np.concatenate([each for each, _, _ in seen])
        is_digit = np.concatenate([each for _, each, _ in seen])
        pieces = [piece for _, _, images in seen for piece in images]
        pixels = np.frombuffer(b"".join(pieces), np.uint8).reshape(-1, IMAGE_BYTES)
        observed = observe(pixels, probabilities, is_digit)
        counts = observed.counts()
        for counter, count in zip(self._predictions, counts["digit"].tolist(), strict=True):
            counter.inc(count)
        self._confidence.add(counts["confidence"].tolist(), float(observed.confidence.sum()))
        self._is_digit.add(counts["is_digit"].tolist(), float(observed.is_digit.sum()))
        self._ink.add(counts["ink"].tolist(), float(observed.ink.sum()))
        with self._lock:
            if self._window is not None:
                self._window.add(observed)

    def collect(self) -> Iterable[Metric]:
        """Every family."""
        drift, images = dict.fromkeys(BOUNDS, float("nan")), 0
        with self._lock:
            if self._window is not None:
                drift, images = self._window.stability(), self._window.images
        self._window_images.set(images)
        for feature, value in drift.items():
            self._psi[feature].set(value)
        for metric in self._exported:
            yield from metric.collect()
