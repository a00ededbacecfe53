"""Prometheus metrics. The hot path's are observed in bulk, once a batch.

Names follow go-grpc-middleware for RPCs (codes as gRPC spells them) and ``digits_`` for the rest;
base units; every series is present from the start, so that an alert sees a zero before the first
error.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from grpc import StatusCode
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from service.batcher import Batch, Refusal

if TYPE_CHECKING:
    from service.call import Call
    from service.model import ServedModel

logger = logging.getLogger(__name__)

# Their creation times would double the number of series; process_start_time_seconds says when.
disable_created_metrics()  # type: ignore[no-untyped-call]

SERVICE = "digits.v1.DigitClassifierService"
# Methods of the service, with the grpc_type label that go-grpc-middleware gives them.
METHODS = {"Classify": "unary", "ClassifyStream": "bidi_stream", "GetModel": "unary"}

# Seconds: 50 us to the 20 s of a long deadline, about 1-2.5-5 a decade.
LATENCY_BUCKETS = (
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0,
)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# One failing model must not fill the log.
FAILURE_LOG_INTERVAL_S = 1.0


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
        """Adds observations."""
        bounds, counts = self._bounds, self._counts
        with self._lock:
            for value in values:
                counts[bisect_left(bounds, value)] += 1
                self._sum += value

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


class Metrics:
    """Every metric of the server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._rpc_metrics()
        self._batch_metrics()
        self._model_metrics()
        self._last_failure_log = -FAILURE_LOG_INTERVAL_S

    def _rpc_metrics(self) -> None:
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        started = Counter(
            "grpc_server_started_total", "RPCs begun.", labels, registry=self.registry
        )
        handled = Counter(
            "grpc_server_handled_total",
            "RPCs ended, by status code.",
            [*labels, "grpc_code"],
            registry=self.registry,
        )
        self._started = {}
        self._handled = {}
        self._handling = {}
        for method, kind in METHODS.items():
            values = (kind, SERVICE, method)
            self._started[method] = started.labels(*values)
            for code in StatusCode:
                self._handled[method, code] = handled.labels(*values, code.name)
            self._handling[method] = BulkHistogram(
                "grpc_server_handling_seconds",
                "Seconds from arrival to answer.",
                LATENCY_BUCKETS,
                dict(zip(labels, values, strict=True)),
            )
        self.registry.register(MergedHistogram(list(self._handling.values())))
        self._classify_started = self._started["Classify"]
        self._classify_ok = self._handled["Classify", StatusCode.OK]
        self._classify_handling = self._handling["Classify"]

    def _batch_metrics(self) -> None:
        self._images = Counter("digits_images_total", "Images answered.", registry=self.registry)
        self._queue_images = Gauge(
            "digits_queue_images", "Images that wait for a batch.", registry=self.registry
        )
        self._batch_size = BulkHistogram("digits_batch_size", "Images in a batch.", BATCH_BUCKETS)
        self._queue_seconds = BulkHistogram(
            "digits_queue_seconds", "Seconds a request waited for its first batch.", LATENCY_BUCKETS
        )
        self._inference_seconds = BulkHistogram(
            "digits_inference_seconds", "Seconds of one batch in the engine.", LATENCY_BUCKETS
        )
        for histogram in (self._batch_size, self._queue_seconds, self._inference_seconds):
            self.registry.register(histogram)
        dropped = Counter(
            "digits_requests_dropped_total",
            "Requests that got no prediction, not for what was in them, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self._dropped = {refusal: dropped.labels(refusal.value) for refusal in Refusal}

    def _model_metrics(self) -> None:
        self._model_info = Gauge(
            "digits_model_info",
            "1 for the model in service.",
            ["version", "sha256", "precision", "provider"],
            registry=self.registry,
        )
        loads = Counter(
            "digits_model_loads_total",
            "Attempts to load a model version.",
            ["result"],
            registry=self.registry,
        )
        self._loads = {result: loads.labels(result) for result in ("loaded", "refused")}
        golden_checks = Counter(
            "digits_golden_checks_total",
            "Checks of the golden digits on the engine in service.",
            ["result"],
            registry=self.registry,
        )
        self._golden_checks = {
            passed: golden_checks.labels("passed" if passed else "failed")
            for passed in (True, False)
        }
        self._engine_stalled = Gauge(
            "digits_engine_stalled",
            "1 while an inference has been running longer than the limit.",
            registry=self.registry,
        )
        credentials = Counter(
            "digits_credential_loads_total",
            "Attempts to read changed certificates or tokens again.",
            ["kind", "result"],
            registry=self.registry,
        )
        self._credential_loads = {
            (kind, result): credentials.labels(kind, result)
            for kind in ("tls", "tokens")
            for result in ("loaded", "refused")
        }
        self._transport = Info(
            "digits_transport", "What carries Classify, and why.", registry=self.registry
        )

    def watch_queue(self, batcher: object) -> None:
        """Reads the queue's length from the batcher at each scrape."""
        self._queue_images.set_function(lambda: batcher.queued_images)  # type: ignore[attr-defined]

    def started(self, count: int) -> None:
        """``count`` Classify calls arrived."""
        self._classify_started.inc(count)

    def handled(self, code: StatusCode, seconds: Sequence[float]) -> None:
        """Classify calls ended other than with OK, each after so long."""
        self._handled["Classify", code].inc(len(seconds))
        self._classify_handling.observe_many(seconds)

    def batch(self, batch: Batch, answered: Sequence[Call], now: float) -> None:
        """A batch ran, and by it these calls, or items of streams, were answered with OK."""
        if batch.images and batch.error is None:
            self._batch_size.observe_many((batch.images,))
            self._inference_seconds.observe_many((batch.seconds,))
        if answered:
            self._images.inc(sum([call.count for call in answered]))
            self._queue_seconds.observe_many([call.started - call.enqueued for call in answered])
        rpcs = [call for call in answered if call.is_rpc]
        if rpcs:
            self._classify_ok.inc(len(rpcs))
            self._classify_handling.observe_many([now - call.received for call in rpcs])

    def dropped(self, refusals: Sequence[Refusal]) -> None:
        """Requests got no prediction, not for what was in them."""
        for refusal, count in Counts(refusals).items():
            self._dropped[refusal].inc(count)

    def rpc_started(self, method: str) -> None:
        """An RPC other than Classify began."""
        self._started[method].inc()

    def rpc_handled(self, method: str, code: StatusCode, seconds: float) -> None:
        """An RPC other than Classify ended."""
        self._handled[method, code].inc()
        self._handling[method].observe_many((seconds,))

    def serving(self, model: ServedModel) -> None:
        """``model`` answers from now on."""
        self._model_info.clear()
        ref = model.ref
        self._model_info.labels(ref.version, ref.sha256, ref.precision, ref.execution_provider).set(
            1
        )

    def model_load(self, result: str) -> None:
        """A version was ``loaded`` or ``refused``."""
        self._loads[result].inc()

    def golden_check(self, *, passed: bool) -> None:
        """The golden digits were run on the engine in service."""
        self._golden_checks[passed].inc()

    def engine_stalled(self, stalled: bool) -> None:
        """Whether an inference does not return."""
        self._engine_stalled.set(stalled)

    def credential_load(self, kind: str, result: str) -> None:
        """Changed files of ``tls`` or ``tokens`` were ``loaded`` or ``refused``."""
        self._credential_loads[kind, result].inc()

    def transport(self, name: str, reason: str) -> None:
        """What carries Classify was decided."""
        self._transport.info({"transport": name, "reason": reason})

    def log_failure(self, error: Exception) -> None:
        """Logs why inference failed, at most once a second."""
        now = time.monotonic()
        if now - self._last_failure_log >= FAILURE_LOG_INTERVAL_S:
            self._last_failure_log = now
            logger.error("inference failed", exc_info=error)
