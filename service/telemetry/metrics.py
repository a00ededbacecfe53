"""Prometheus metrics. The hot path's are noted once a batch and counted in bulk.

Names follow go-grpc-middleware for RPCs (codes as gRPC spells them) and ``digits_`` for the rest;
base units; every series is present from the start, so that an alert sees a zero before the first
error.
"""

from __future__ import annotations

import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

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
    values,
)

from service.serving.batch import Batch
from service.serving.batcher import Batcher
from service.serving.model import ServedModel
from service.serving.request import Refusal, Request
from service.telemetry.answers import AnswerMetrics, Seen
from service.telemetry.collectors import Before, LogLines
from service.telemetry.histogram import BulkHistogram, MergedHistogram
from service.telemetry.listener import EndedCall, Method

# PROMETHEUS_MULTIPROC_DIR would have the library keep values in files there, which outlive the
# process and belong to other servers too. This one is a single process, and has a registry itself.
values.ValueClass = values.MutexValue
# Their creation times would double the number of series; process_start_time_seconds says when.
disable_created_metrics()  # type: ignore[no-untyped-call]

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


class _Answers(NamedTuple):
    """What a batch brought.

    Attributes:
        batch_images: Images in the batch.
        seconds: Of inference.
        images: In the requests that have their result by it.
        queue_s: What each of these waited.
        seen: What they were answered.
    """

    batch_images: int
    seconds: float
    images: int
    queue_s: list[float]
    seen: list[Seen]


class Metrics:
    """Every metric of the server, in a registry of its own.

    A listener of the recorder (``RpcListener``) and of the core (``BatchListener``).

    Args:
        methods: Every method there is.
    """

    def __init__(self, methods: Iterable[Method]) -> None:
        self._lock, self._counting = threading.Lock(), threading.Lock()
        self._uncounted: list[_Answers] = []
        self._uncounted_images = 0
        self._unhandled: list[tuple[Method, list[float]]] = []
        self._unhandled_calls = 0
        self.registry = CollectorRegistry()
        self.registry.register(Before(self._count))  # collected in this order
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._rpc_metrics(list(methods))
        self._batch_metrics()
        self._http_metrics()
        self._model_metrics()
        self._answers = AnswerMetrics(self.registry)
        self.registry.register(LogLines())

    def _rpc_metrics(self, methods: Sequence[Method]) -> None:
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
        for method in methods:
            values = (method.kind, method.service, method.name)
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

    def _batch_metrics(self) -> None:
        self._images = Counter("digits_images_total", "Images answered.", registry=self.registry)
        self._queue_images = Gauge(
            "digits_queue_images", "Images that wait for a batch.", registry=self.registry
        )
        self._batch_target = Gauge(
            "digits_batch_target_images",
            "Images that a batch of small requests takes at most, as the batcher decided.",
            registry=self.registry,
        )
        self._image_cost = Gauge(
            "digits_image_cost_seconds",
            "Seconds that an image adds to such a batch, as measured.",
            registry=self.registry,
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
        self._dropped: dict[Refusal, Counter] = {
            refusal: dropped.labels(refusal.value)
            for refusal in Refusal
            if refusal is not Refusal.INVALID
        }

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
            "Attempts to load a release of the model.",
            ["result"],
            registry=self.registry,
        )
        self._loads = {result: loads.labels(result) for result in ("loaded", "refused", "failed")}
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
        samples = Counter(
            "digits_samples_total",
            "Images drawn for --sample-dir, by what became of them.",
            ["result"],
            registry=self.registry,
        )
        self._samples = {result: samples.labels(result) for result in ("written", "failed", "full")}
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
        """Reads the queue's length and the batcher's decisions at each scrape.

        Args:
            batcher: Owns the queue.
            limit: Images that may wait in each lane.
        """
        self._queue_images.set_function(lambda: batcher.queued_images)
        self._queue_limit.set(limit)
        self._batch_target.set_function(lambda: batcher.batch_images)
        self._image_cost.set_function(lambda: batcher.image_cost_s)

    def watch_readiness(self, is_ready: Callable[[], bool]) -> None:
        """Asks at each scrape."""
        self._ready.set_function(is_ready)

    def began(self, method: Method, count: int) -> None:
        """See ``RpcListener``."""
        self._started[method].inc(count)

    def ended(
        self, method: Method, calls: Sequence[EndedCall], code: StatusCode, message: str, now: float
    ) -> None:
        """See ``RpcListener``."""
        del message
        seconds = [now - call.received for call in calls]
        if code is not StatusCode.OK:
            self._handled[method, code].inc(len(seconds))
            self._handling[method].observe_many(seconds)
            return
        with self._lock:
            self._unhandled.append((method, seconds))
            self._unhandled_calls += len(seconds)
            enough = self._unhandled_calls >= BULK_IMAGES
        self._count_if(enough)

    def batch(self, batch: Batch) -> None:
        """See ``BatchListener``.

        Observations are buffered until there are enough of them, or until the next scrape.
        """
        predictions = batch.predictions
        if predictions is None:
            return
        finished = batch.finished
        if not batch.split and len(finished) == len(batch.parts):
            images = batch.images
            pixels = [request.images for request in finished]
            seen: list[Seen] = [(predictions.probabilities, predictions.is_digit, pixels)]
        else:
            images = sum([request.count for request in finished])
            seen = [_seen(request) for request in finished]
        queue_s = [request.started - request.enqueued for request in finished]
        answers = _Answers(batch.images, batch.seconds, images, queue_s, seen)
        with self._lock:
            self._uncounted.append(answers)
            self._uncounted_images += max(batch.images, images)  # the rest ran in other batches
            enough = self._uncounted_images >= BULK_IMAGES
        self._count_if(enough)

    def _count_if(self, enough: bool) -> None:
        if enough and self._counting.acquire(blocking=False):  # else another thread counts
            try:
                self._count_waiting()
            finally:
                self._counting.release()

    def _count(self) -> None:
        """Returns when everything is counted that came before."""
        with self._counting:
            self._count_waiting()

    def _count_waiting(self) -> None:
        """Counts what waits for it; ``_counting`` must be held."""
        with self._lock:
            uncounted, self._uncounted = self._uncounted, []
            unhandled, self._unhandled = self._unhandled, []
            self._uncounted_images = self._unhandled_calls = 0
        by_method: dict[Method, list[float]] = {}
        for method, seconds in unhandled:
            by_method.setdefault(method, []).extend(seconds)
        for method, seconds in by_method.items():
            self._handled[method, StatusCode.OK].inc(len(seconds))
            self._handling[method].observe_array(np.array(seconds))
        if not uncounted:
            return
        batch_images, batch_seconds, images, queue_s, seen = zip(*uncounted, strict=True)
        self._batch_size.observe_many(batch_images)  # of a batch, not of a call: a few
        self._inference_seconds.observe_many(batch_seconds)
        self._images.inc(sum(images))
        self._queue_seconds.observe_array(_array(chain.from_iterable(queue_s)))
        self._answers.look_at([*chain.from_iterable(seen)])

    def refused(self, requests: Sequence[Request]) -> None:
        """See ``BatchListener``."""
        self.dropped([request.refusal for request in requests if request.refusal is not None])

    def dropped(self, refusals: Sequence[Refusal]) -> None:
        """Requests got no prediction, not for what was in them."""
        for refusal, count in Counts(refusals).items():
            self._dropped[refusal].inc(count)

    def http_request(self, status: int) -> None:
        """A request for /v1/classify was answered with this HTTP status."""
        self._http_requests.labels(status).inc()

    def serving(self, model: ServedModel) -> None:
        """``model`` answers from now on."""
        self._model_info.clear()
        self._model_info.labels(model.version, model.sha256, model.precision, model.provider).set(1)
        self._device_fallback.set(model.engine.fell_back)
        self._count()  # by the reference that they belong to
        self._answers.compare_with(model.variant.reference)

    def model_load(self, result: str) -> None:
        """A release was ``loaded`` or ``refused``, or loading it ``failed`` and is tried again."""
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

    def samples(self, result: str, images: int) -> None:
        """Drawn images were ``written``, or not: it ``failed``, or the folder is ``full``."""
        self._samples[result].inc(images)

    def transport(self, name: str) -> None:
        """What carries Classify was decided."""
        self._transport.info({"transport": name})


def _seen(request: Request) -> Seen:
    """What one request was answered."""
    assert request.result is not None
    rows = slice(request.first, request.first + request.count)
    return request.result.probabilities[rows], request.result.is_digit[rows], [request.images]


def _array(values: Iterable[float]) -> npt.NDArray[np.float64]:
    return np.fromiter(values, np.float64)
