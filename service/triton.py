"""Triton's metric names, for autoscalers and dashboards that were made for Triton.

Source of names and meanings: docs/user_guide/metrics.md of triton-inference-server/server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector

from service.job import Batch, Refusal

if TYPE_CHECKING:
    from service.call import Call

REASONS = {
    Refusal.QUEUE_FULL: "REJECTED",
    Refusal.DEADLINE_UNREACHABLE: "REJECTED",
    Refusal.EXPIRED: "REJECTED",
    Refusal.RATE_LIMITED: "REJECTED",
    Refusal.CANCELLED: "CANCELED",
    Refusal.FAILED: "BACKEND",
    Refusal.STOPPED: "OTHER",
    Refusal.UNAUTHENTICATED: "OTHER",
}
LABELS = ("model", "version")


@dataclass
class _Totals:
    """What was counted since the version came into service; times are summed over requests."""

    success: int = 0
    failure: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS.values(), 0))
    images: int = 0
    batches: int = 0
    input_s: float = 0.0
    queue_s: float = 0.0
    infer_s: float = 0.0
    output_s: float = 0.0

    def request_s(self) -> float:
        """From arrival to answer."""
        return self.input_s + self.queue_s + self.infer_s + self.output_s


class TritonNames(Collector):
    """Counts what Triton counts, of the version in service; another one starts at zero.

    Thread-safe. Counters are exported as untyped: their names lack the ending that OpenMetrics
    demands of a counter.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = _Totals()
        self._model: tuple[str, str] | None = None
        self._pending: Callable[[], int] = int

    def watch_queue(self, pending: Callable[[], int]) -> None:
        """Asks for the number of waiting requests at each scrape."""
        self._pending = pending

    def serving(self, name: str, version: str) -> None:
        """This model answers from now on."""
        with self._lock:
            self._model = (name, version)
            self._totals = _Totals()

    def batch(self, batch: Batch, answered: Sequence[Call], now: float) -> None:
        """A batch ran, and by it these calls were answered with OK."""
        with self._lock:
            totals = self._totals
            if batch.images and batch.error is None:
                totals.images += batch.images
                totals.batches += 1
            totals.success += len(answered)
            for call in answered:
                totals.input_s += call.enqueued - call.received
                totals.queue_s += call.started - call.enqueued
                totals.infer_s += call.inference_s
                # The batches of one that was split may have run side by side.
                totals.output_s += max(0.0, now - call.started - call.inference_s)

    def dropped(self, refusals: Sequence[Refusal]) -> None:
        """Valid requests got no prediction."""
        with self._lock:
            for refusal in refusals:
                self._totals.failure[REASONS[refusal]] += 1

    def collect(self) -> Iterable[Metric]:
        """Every family; nothing before a model serves, whose name the series carry."""
        with self._lock:
            if self._model is None:
                return
            model, counted = self._model, self._counted()
            failures = dict(self._totals.failure)
        for name, (text, value) in counted.items():
            family = UnknownMetricFamily(name, text, labels=LABELS)
            family.add_metric(model, value)
            yield family
        failure = UnknownMetricFamily(
            "nv_inference_request_failure",
            "Requests without a prediction, by reason.",
            labels=(*LABELS, "reason"),
        )
        for reason, count in failures.items():
            failure.add_metric((*model, reason), count)
        yield failure
        pending = GaugeMetricFamily(
            "nv_inference_pending_request_count", "Requests that wait for a batch.", labels=LABELS
        )
        pending.add_metric(model, self._pending())
        yield pending

    def _counted(self) -> dict[str, tuple[str, float]]:
        """Help and value by name, of all that have no labels but the model's."""
        totals = self._totals
        return {
            "nv_inference_request_success": ("Requests answered.", totals.success),
            "nv_inference_count": ("Images that the model ran.", totals.images),
            "nv_inference_exec_count": ("Batches that the model ran.", totals.batches),
        } | {
            f"nv_inference_{stage}_duration_us": (f"Microseconds, all requests: {what}.", s * 1e6)
            for stage, what, s in (
                ("request", "from arrival to answer", totals.request_s()),
                ("queue", "in the queue", totals.queue_s),
                ("compute_input", "reading and validating", totals.input_s),
                ("compute_infer", "in the model", totals.infer_s),
                ("compute_output", "answering", totals.output_s),
            )
        }
