"""Traces: a span for each RPC, over OTLP.

OpenTelemetry's own instrumentation of gRPC sits in grpcio's interceptors, where a call of the
native transport never comes by, and where it would cost every call a context. The spans here are
made when a call has ended, from the times that were taken anyway, and carry the same attributes:
https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from grpc import StatusCode

from service.background import in_daemon_thread
from service.metrics import SERVICE

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from service.call import Call
    from service.job import Batch

SERVICE_NAME = "digits-serving"
# What the collector gets for the last spans when the server stops.
FLUSH_S = 2.0
# Codes that are the server's doing, by the semantic conventions; others are the caller's.
SERVER_FAULTS = frozenset(
    {
        StatusCode.UNKNOWN,
        StatusCode.DEADLINE_EXCEEDED,
        StatusCode.UNIMPLEMENTED,
        StatusCode.INTERNAL,
        StatusCode.UNAVAILABLE,
        StatusCode.DATA_LOSS,
    }
)


class TracingError(RuntimeError):
    """Traces were asked for and can not be had; the message says why."""


class Tracing:
    """Makes spans of RPCs that ended and sends them in the background. Thread-safe.

    The standard variables apply: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
    OTEL_PROPAGATORS, OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_* and the rest.

    Args:
        endpoint: URL of the collector; http:// is plaintext, https:// is TLS.

    Raises:
        TracingError: If OpenTelemetry is not installed, or the endpoint is no URL.
    """

    def __init__(self, endpoint: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise TracingError(f"otlp_endpoint: expected http://… or https://…, got {endpoint!r}")
        try:
            from opentelemetry import propagate, trace  # noqa: PLC0415 - may be absent
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError as error:
            raise TracingError(
                f"otlp_endpoint: {error.name} is not installed: pip install 'digits-serving[otel]'"
            ) from error
        resource = Resource.create(
            {
                "service.name": SERVICE_NAME,
                "service.version": importlib.metadata.version(SERVICE_NAME),
            }
        )
        self._trace = trace
        self._extract = propagate.extract
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer(SERVICE_NAME)

    async def flush(self) -> None:
        """Sends what waits. An exporter that retries heeds no time limit, so it gets none."""
        flushing = in_daemon_thread(self._provider.force_flush)
        await asyncio.wait({flushing}, timeout=FLUSH_S)

    def answered(self, calls: Sequence[Call], batch: Batch, now: float) -> None:
        """See ``RpcListener.answered``."""
        clock = _WallClock()
        for call in calls:
            if call.is_rpc:
                span = self._begin_classify(call, clock)
                if span.is_recording():
                    span.set_attribute("digits.images", call.count)
                    span.set_attribute("digits.model.version", batch.source.ref.version)
                    self._add_stages(span, call, clock, now)
                _end(span, StatusCode.OK, clock(now))

    def failed(self, calls: Sequence[Call], code: StatusCode, message: str, now: float) -> None:
        """See ``RpcListener.failed``."""
        clock = _WallClock()
        for call in calls:
            span = self._begin_classify(call, clock)
            span.set_attribute("digits.images", call.count)
            self._end_badly(span, code, message)
            _end(span, code, clock(now))

    def rpc(
        self,
        service: str,
        method: str,
        code: StatusCode,
        *,
        peer: str,
        metadata: Iterable[Any],
        began: float,
        now: float,
    ) -> None:
        """See ``RpcListener.rpc``."""
        clock = _WallClock()
        span = self._begin(service, method, peer, metadata, clock(began))
        self._end_badly(span, code, "")
        _end(span, code, clock(now))

    def _begin_classify(self, call: Call, clock: _WallClock) -> Span:
        start_ns = clock(call.received)
        return self._begin(SERVICE, "Classify", call.peer, call.metadata, start_ns)

    def _begin(
        self, service: str, method: str, peer: str, metadata: Iterable[Any], start_ns: int
    ) -> Span:
        """A span under the caller's, if the caller sent one."""
        # Baggage is used nowhere, and OpenTelemetry writes a malformed one into the log, whole.
        carrier = {
            key: value for key, value, *_ in metadata if key != "baggage" and isinstance(value, str)
        }
        return self._tracer.start_span(
            f"{service}/{method}",
            context=self._extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "network.peer.address": peer,
            },
            start_time=start_ns,
        )

    def _add_stages(self, span: Span, call: Call, clock: _WallClock, now: float) -> None:
        """The wait in the queue, and the batches that the call was in, with their inference."""
        self._child(span, "queue", clock(call.enqueued), clock(call.started))
        batch = self._child(
            span,
            "batch",
            clock(call.started),
            clock(now),
            {"digits.batch.images": call.batch_images},
        )
        # Of a request that was split the inferences add up; they began with the first batch.
        self._child(batch, "inference", clock(call.started), clock(call.started + call.inference_s))

    def _child(
        self,
        parent: Span,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: dict[str, int] | None = None,
    ) -> Span:
        context = self._trace.set_span_in_context(parent)
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=start_ns)
        span.end(end_ns)
        return span

    def _end_badly(self, span: Span, code: StatusCode, message: str) -> None:
        if code in SERVER_FAULTS:
            span.set_status(self._trace.StatusCode.ERROR, message)


def _end(span: Span, code: StatusCode, end_ns: int) -> None:
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    span.end(end_ns)


class _WallClock:
    """Turns monotonic seconds into nanoseconds since the epoch."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def __call__(self, monotonic_s: float) -> int:
        return self._offset_ns + int(monotonic_s * 1e9)
