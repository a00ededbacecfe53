"""Prometheus metrics. The hot path's are noted once a batch and counted in bulk.

Names follow go-grpc-middleware for RPCs (codes as gRPC spells them) and ``digits_`` for the rest;
base units; every series is present from the start, so that an alert sees a zero before the first
error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
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
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service.batcher import Batcher
from service.histogram import BulkHistogram, MergedHistogram
from service.job import Batch, Refusal
from service.quality import Quality, Seen
from service.triton import TritonNames

if TYPE_CHECKING:
    from service.call import Call
    from service.model import ServedModel

logger = logging.getLogger(__name__)

# Their creation times would double the number of series; process_start_time_seconds says when.
disable_created_metrics()  # type: ignore[no-untyped-call]

SERVICE = "digits.v1.DigitClassifierService"
# Methods of the service, with the grpc_type label that go-grpc-middleware gives them.
METHODS = {"Classify": "unary", "ClassifyStream": "bidi_stream", "GetModel": "unary"}
# Those of every service whose calls each are one request: ``digits top``, alerts and dashboard look
# at these. A stream carries many, and what becomes of them is in the metrics of requests.
INFERENCE_METHODS = ("Classify", "ModelInfer")

# Seconds: 50 us to the 20 s of a long deadline, about 1-2.5-5 a decade.
LATENCY_BUCKETS = (
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0,
)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# What /v1/classify answers with.
HTTP_STATUSES = (200, 400, 401, 403, 405, 408, 413, 415, 429, 499, 500, 503, 504)
# Images that wait to be counted: numpy costs as much for one of them as for a hundred.
BULK_IMAGES = 1024
# One failing model must not fill the log.
FAILURE_LOG_INTERVAL_S = 1.0


class _Answers(NamedTuple):
    """What a batch brought.

    Attributes:
        batch_images: Images in the batch.
        seconds: Of inference.
        images: In the calls that were answered with OK.
        queue_s: What each of these waited.
        handling_s: What each took from arrival to answer, if it is an RPC of its own.
        seen: What they were answered.
    """

    batch_images: int
    seconds: float
    images: int
    queue_s: list[float]
    handling_s: list[float]
    seen: list[Seen]


class _Before(Collector):
    """Does something before other metrics are collected; has none itself."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def collect(self) -> Iterable[Metric]:
        """Nothing."""
        self._work()
        return ()


class Metrics:
    """Every metric of the server, in a registry of its own.

    Args:
        triton_names: Whether to export Triton's ``nv_inference_*`` as well.
        services: Methods of services beside our own, as ``METHODS`` tells them, by service.
    """

    def __init__(
        self,
        *,
        triton_names: bool = False,
        services: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._lock, self._counting = threading.Lock(), threading.Lock()
        self._uncounted: list[_Answers] = []
        self._uncounted_images = 0
        self.registry = CollectorRegistry()
        self.registry.register(_Before(self._count_answers))  # collected in this order
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._rpc_metrics({SERVICE: METHODS, **(services or {})})
        self._batch_metrics()
        self._http_metrics()
        self._model_metrics()
        self._quality = Quality(self.registry)
        self._triton: TritonNames | None = None
        if triton_names:
            self._triton = TritonNames()
            self.registry.register(self._triton)
        self._last_failure_log = -FAILURE_LOG_INTERVAL_S

    def _rpc_metrics(self, services: Mapping[str, Mapping[str, str]]) -> None:
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
        rpcs = [(name, *rpc) for name, methods in services.items() for rpc in methods.items()]
        for service, method, kind in rpcs:
            values = (kind, service, method)
            self._started[service, method] = started.labels(*values)
            for code in StatusCode:
                self._handled[service, method, code] = handled.labels(*values, code.name)
            self._handling[service, method] = BulkHistogram(
                "grpc_server_handling_seconds",
                "Seconds from arrival to answer.",
                LATENCY_BUCKETS,
                dict(zip(labels, values, strict=True)),
            )
        self.registry.register(MergedHistogram(list(self._handling.values())))
        self._classify_started = self._started[SERVICE, "Classify"]
        self._classify_ok = self._handled[SERVICE, "Classify", StatusCode.OK]
        self._classify_handling = self._handling[SERVICE, "Classify"]

    def _batch_metrics(self) -> None:
        self._images = Counter("digits_images_total", "Images answered.", registry=self.registry)
        self._queue_images = Gauge(
            "digits_queue_images", "Images that wait for a batch.", registry=self.registry
        )
        self._queue_limit = Gauge(
            "digits_queue_limit_images",
            "Images that may wait in each of the two lanes.",
            registry=self.registry,
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

    def _http_metrics(self) -> None:
        self._http_requests = Counter(
            "digits_http_requests_total",
            "Requests for /v1/classify, by HTTP status of the answer; 499 where the caller left.",
            ["status"],
            registry=self.registry,
        )
        for status in HTTP_STATUSES:
            self._http_requests.labels(status)

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
            "digits_transport", "1 for what carries Classify.", registry=self.registry
        )
        self._ready = Gauge(
            "digits_ready", "1 while readiness says SERVING.", registry=self.registry
        )
        self._device_fallback = Gauge(
            "digits_device_fallback",
            "1 while the CPU serves although a GPU was meant to.",
            registry=self.registry,
        )

    def watch_queue(self, batcher: Batcher, limit: int) -> None:
        """Reads the queue's length from the batcher at each scrape.

        Args:
            batcher: Owns the queue.
            limit: Images that may wait in each lane.
        """
        self._queue_images.set_function(lambda: batcher.queued_images)
        self._queue_limit.set(limit)
        if self._triton is not None:
            self._triton.watch_queue(lambda: batcher.queued_jobs)

    def watch_readiness(self, is_ready: Callable[[], bool]) -> None:
        """Asks at each scrape."""
        self._ready.set_function(is_ready)

    def started(self, count: int) -> None:
        """``count`` Classify calls arrived."""
        self._classify_started.inc(count)

    def handled(self, code: StatusCode, seconds: Sequence[float]) -> None:
        """Classify calls ended other than with OK, each after so long."""
        self._handled[SERVICE, "Classify", code].inc(len(seconds))
        self._classify_handling.observe_many(seconds)

    def batch(self, batch: Batch, answered: Sequence[Call], now: float) -> None:
        """A batch ran, and by it these calls, or items of streams, were answered with OK.

        What is to be counted waits until there is enough of it, or until somebody looks.
        """
        if self._triton is not None:
            self._triton.batch(batch, answered, now)
        if not batch.images or batch.error is not None:
            return
        if not batch.split and len(answered) == len(batch.parts):
            assert batch.result is not None
            images = batch.images
            seen = [(batch.result, batch.pixels)]  # one object to hold, not one a call
        else:
            images = sum([call.count for call in answered])
            seen = [(call.result, call.images) for call in answered]
        answers = _Answers(
            batch.images,
            batch.seconds,
            images,
            [call.started - call.enqueued for call in answered],
            [now - call.received for call in answered if call.is_rpc],
            seen,
        )
        with self._lock:
            self._uncounted.append(answers)
            self._uncounted_images += max(batch.images, images)  # the rest ran in other batches
            enough = self._uncounted_images >= BULK_IMAGES
        if enough and self._counting.acquire(blocking=False):  # else somebody is at it
            try:
                self._count_waiting()
            finally:
                self._counting.release()

    def _count_answers(self) -> None:
        """Returns when everything is counted that came before."""
        with self._counting:
            self._count_waiting()

    def _count_waiting(self) -> None:
        """Counts what waits for it; ``_counting`` must be held."""
        with self._lock:
            uncounted, self._uncounted = self._uncounted, []
            self._uncounted_images = 0
        if not uncounted:
            return
        batch_images, seconds, images, queue_s, handling_s, seen = zip(*uncounted, strict=True)
        handling = _array(chain.from_iterable(handling_s))
        self._batch_size.observe_many(batch_images)  # of a batch, not of a call: a few
        self._inference_seconds.observe_many(seconds)
        self._images.inc(sum(images))
        self._queue_seconds.observe_array(_array(chain.from_iterable(queue_s)))
        self._classify_ok.inc(len(handling))
        self._classify_handling.observe_array(handling)
        self._quality.look_at([*chain.from_iterable(seen)])

    def dropped(self, refusals: Sequence[Refusal]) -> None:
        """Requests got no prediction, not for what was in them."""
        for refusal, count in Counts(refusals).items():
            self._dropped[refusal].inc(count)
        if self._triton is not None:
            self._triton.dropped(refusals)

    def knows(self, service: str, method: str) -> bool:
        """Whether RPCs of this name are counted."""
        return (service, method) in self._started

    def rpc_started(self, service: str, method: str, count: int = 1) -> None:
        """RPCs other than Classify began."""
        self._started[service, method].inc(count)

    def rpc_handled(self, service: str, method: str, code: StatusCode, seconds: float) -> None:
        """An RPC other than Classify ended."""
        self._handled[service, method, code].inc()
        self._handling[service, method].observe_many((seconds,))

    def http_request(self, status: int) -> None:
        """A request for /v1/classify was answered with this HTTP status."""
        self._http_requests.labels(status).inc()

    def serving(self, model: ServedModel) -> None:
        """``model`` answers from now on."""
        self._model_info.clear()
        ref = model.ref
        self._model_info.labels(ref.version, ref.sha256, ref.precision, ref.execution_provider).set(
            1
        )
        self._device_fallback.set(model.engine.fell_back)
        self._count_answers()  # by the reference that they belong to
        self._quality.compare_with(model.artifact.reference)
        if self._triton is not None:
            self._triton.serving(ref.name, ref.version)

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

    def transport(self, name: str) -> None:
        """What carries Classify was decided."""
        self._transport.info({"transport": name})

    def log_failure(self, error: Exception) -> None:
        """Logs why inference failed, at most once a second."""
        now = time.monotonic()
        if now - self._last_failure_log >= FAILURE_LOG_INTERVAL_S:
            self._last_failure_log = now
            logger.error("inference failed", exc_info=error)


def _array(values: Iterable[float]) -> npt.NDArray[np.float64]:
    return np.fromiter(values, np.float64)
