"""Traces: a span for each RPC, over OTLP.

OpenTelemetry's own instrumentation of gRPC sits in grpcio's interceptors. The spans here are
made when a call has ended, from the times that were taken anyway, and carry the same attributes:
https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpc import StatusCode

from service.host.background import in_daemon_thread
from service.host.extras import not_installed
from service.serving.request import Request
from service.telemetry.listener import EndedCall, Method

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from service.telemetry.listener import Method

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
            raise TracingError(f"otlp_endpoint: {not_installed(error, 'otel')}") from error
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
        """Sends what waits. An exporter that retries ignores a time limit, so it gets none."""
        flushing = in_daemon_thread(self._provider.force_flush)
        await asyncio.wait({flushing}, timeout=FLUSH_S)

    def began(self, method: Method, count: int) -> None:
        """See ``RpcListener``."""

    def ended(
        self, method: Method, calls: Sequence[EndedCall], code: StatusCode, message: str, now: float
    ) -> None:
        """See ``RpcListener``."""
        clock = _WallClock()
        for call in calls:
            span = self._begin(method, call.peer, call.metadata, clock(call.received))
            request = call.state
            if isinstance(request, Request) and span.is_recording():
                self._describe(span, request, clock, now)
            if code in SERVER_FAULTS:
                span.set_status(self._trace.StatusCode.ERROR, message)
            span.set_attribute("rpc.grpc.status_code", code.value[0])
            span.end(clock(now))

    def _begin(
        self, method: Method, peer: str, metadata: Sequence[tuple[str, str | bytes]], start_ns: int
    ) -> Span:
        """A span under the caller's, if the caller sent one."""
        # Baggage is used nowhere, and OpenTelemetry writes a malformed one into the log, whole.
        carrier = {
            key: value for key, value, *_ in metadata if key != "baggage" and isinstance(value, str)
        }
        return self._tracer.start_span(
            f"{method.service}/{method.name}",
            context=self._extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": method.service,
                "rpc.method": method.name,
                "network.peer.address": peer,
            },
            start_time=start_ns,
        )

    def _describe(self, span: Span, request: Request, clock: _WallClock, now: float) -> None:
        """The wait in the queue, and the batches that the call was in, with their inference."""
        span.set_attribute("digits.images", request.count)
        if request.result is None:
            return
        span.set_attribute("digits.model.version", request.result.model.version)
        started = clock(request.started)
        self._child(span, "queue", clock(request.enqueued), started)
        size = {"digits.batch.images": request.batch_images}
        batch = self._child(span, "batch", started, clock(now), size)
        # Of a request that was split the inferences add up; they began with the first batch.
        self._child(batch, "inference", started, clock(request.started + request.inference_s))

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


class _WallClock:
    """Turns monotonic seconds into nanoseconds since the epoch."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def __call__(self, monotonic_s: float) -> int:
        return self._offset_ns + int(monotonic_s * 1e9)
