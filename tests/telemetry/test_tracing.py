"""Real OTLP on loopback: a span for each RPC, under the caller's, with its stages."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.rpc.classify import SERVICE
from tests.calls import IMAGE, TRANSPORTS
from tests.conftest import ROOT, RunningServer, wait_until

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = [("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")]
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Receives spans."""

    endpoint: str

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._received: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        with self._lock:
            self._received.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def resources(self) -> list[Any]:
        with self._lock:
            return [
                spans.resource for request in self._received for spans in request.resource_spans
            ]

    @property
    def names(self) -> set[Any]:
        return {span.name for span in self._all()}

    def spans(self, name: str) -> list[Any]:
        return [span for span in self._all() if span.name == name]

    def _all(self) -> list[Any]:
        with self._lock:
            received = list(self._received)
        return [
            span
            for request in received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def wait_for(self, name: str) -> Any:
        """The one span of that name."""
        [span] = wait_until(lambda: self.spans(name))
        return span


@pytest.fixture
def collector() -> Iterator[Collector]:
    servicer = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    servicer.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None).wait()


@pytest.fixture
def traced(
    start_server: Callable[..., RunningServer], collector: Any
) -> Iterator[Callable[..., tuple[RunningServer, Any, Any]]]:
    """Starts a traced server; returns its stub."""
    channels = []

    def start(transport: Any, **env: Any) -> tuple[RunningServer, Any, Any]:
        server = start_server(
            f"--transport={transport}", f"--otlp-endpoint={collector.endpoint}", env={**SOON, **env}
        )
        channels.append(grpc.insecure_channel(server.address))
        return server, channels[-1], digits_pb2_grpc.DigitClassifierServiceStub(channels[-1])

    yield start
    for channel in channels:
        channel.close()


def attributes(span: Any) -> dict[Any, Any]:
    return {item.key: item.value.int_value or item.value.string_value for item in span.attributes}


@TRANSPORTS
def test_a_call_is_a_span_under_its_callers_with_its_stages(
    traced: Callable[..., tuple[RunningServer, Any, Any]], collector: Collector, transport: str
) -> None:
    _, channel, stub = traced(transport)
    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    request = digits_pb2.ClassifyRequest(pixels=IMAGE * 3)
    answer = stub.Classify(request, metadata=TRACEPARENT, timeout=30)
    span = collector.wait_for(f"{SERVICE}/Classify")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert span.kind == span.SPAN_KIND_SERVER
    told = attributes(span)
    assert told["rpc.system"] == "grpc"
    assert told["digits.images"] == 3
    assert told["digits.model.version"] == answer.model.version
    queue, batch, inference = (collector.wait_for(n) for n in ("queue", "batch", "inference"))
    assert queue.parent_span_id == batch.parent_span_id == span.span_id
    assert inference.parent_span_id == batch.span_id
    assert attributes(batch)["digits.batch.images"] == 3
    assert span.start_time_unix_nano <= queue.start_time_unix_nano <= queue.end_time_unix_nano
    assert queue.end_time_unix_nano == batch.start_time_unix_nano == inference.start_time_unix_nano
    assert inference.end_time_unix_nano <= batch.end_time_unix_nano <= span.end_time_unix_nano
    inferred_us = (inference.end_time_unix_nano - inference.start_time_unix_nano) / 1e3
    assert inferred_us == pytest.approx(answer.timing.inference_us, abs=2)
    assert collector.spans("grpc.health.v1.Health/Check") == []
    [name] = [
        item.value.string_value
        for item in collector.resources[0].attributes
        if item.key == "service.name"
    ]
    assert name == "digits-serving"


@TRANSPORTS
def test_failed_calls_and_other_methods_have_spans_too(
    traced: Callable[..., tuple[RunningServer, Any, Any]], collector: Collector, transport: str
) -> None:
    _, _, stub = traced(transport)
    with pytest.raises(grpc.RpcError):
        stub.Classify(digits_pb2.ClassifyRequest(), metadata=TRACEPARENT, timeout=30)
    failed = collector.wait_for(f"{SERVICE}/Classify")
    assert attributes(failed)["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert failed.trace_id.hex() == TRACE_ID
    stub.GetModel(digits_pb2.GetModelRequest(), metadata=TRACEPARENT, timeout=30)
    assert collector.wait_for(f"{SERVICE}/GetModel").parent_span_id.hex() == PARENT_ID
    items = [digits_pb2.ClassifyStreamRequest(request={"pixels": IMAGE})] * 3
    assert len(list(stub.ClassifyStream(iter(items), timeout=30))) == 3
    stream = collector.wait_for(f"{SERVICE}/ClassifyStream")
    assert stream.parent_span_id == b""


@TRANSPORTS
def test_a_caller_can_not_write_into_the_log(
    traced: Callable[..., tuple[RunningServer, Any, Any]], collector: Collector, transport: str
) -> None:
    server, _, stub = traced(transport)
    metadata = [*TRACEPARENT, ("baggage", "no-equals-sign-hush" * 100)]
    stub.Classify(digits_pb2.ClassifyRequest(pixels=IMAGE), metadata=metadata, timeout=30)
    collector.wait_for(f"{SERVICE}/Classify")
    assert "hush" not in server.log_text()


def test_documented_spans_are_those_that_are_sent(
    traced: Callable[..., tuple[RunningServer, Any, Any]], collector: Collector
) -> None:
    _, _, stub = traced("http2")
    stub.Classify(digits_pb2.ClassifyRequest(pixels=IMAGE), timeout=30)
    stub.GetModel(digits_pb2.GetModelRequest(), timeout=30)
    items = [digits_pb2.ClassifyStreamRequest(request={"pixels": IMAGE})]
    assert len(list(stub.ClassifyStream(iter(items), timeout=30))) == 1
    documented = documented_spans()
    sent = {name: set(attributes(collector.wait_for(name))) for name in documented}
    assert sent == documented
    assert collector.names == set(documented)


def documented_spans() -> dict[Any, set[Any]]:
    """Attributes by the name of their span, from the table in docs/metrics.md."""
    text = (ROOT / "docs/metrics.md").read_text()
    table = text.partition("<!-- spans -->")[2].partition("<!-- end of spans -->")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): set(re.findall(r"`(.+?)`", row[3])) for row in rows}


def test_the_standard_variables_apply(
    traced: Callable[..., tuple[RunningServer, Any, Any]], collector: Collector
) -> None:
    server, _, stub = traced("http2", OTEL_TRACES_SAMPLER="always_off")
    stub.Classify(digits_pb2.ClassifyRequest(pixels=IMAGE), metadata=TRACEPARENT, timeout=30)
    assert server.stop() == 0
    assert collector.resources == []


def test_what_waits_is_sent_before_the_exit(
    traced: Callable[..., tuple[RunningServer, Any, Any]], collector: Collector
) -> None:
    server, _, stub = traced("http2", OTEL_BSP_SCHEDULE_DELAY="3600000")
    stub.Classify(digits_pb2.ClassifyRequest(pixels=IMAGE), timeout=30)
    assert server.stop() == 0
    assert len(collector.spans(f"{SERVICE}/Classify")) == 1


def test_a_collector_that_is_away_keeps_nothing_from_being_answered(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server("--otlp-endpoint=http://127.0.0.1:9", env=SOON)
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        for _ in range(50):
            stub.Classify(digits_pb2.ClassifyRequest(pixels=IMAGE), timeout=30)
    stopping = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - stopping < 8  # its exporter would go on for longer


def test_without_an_endpoint_opentelemetry_is_not_even_imported() -> None:
    check = "import service.server, sys; assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_an_endpoint_that_is_no_url_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "service.cli", "serve", "--otlp-endpoint=collector:4317"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "otlp_endpoint: expected http://… or https://…, got 'collector:4317'" in ended.stderr
