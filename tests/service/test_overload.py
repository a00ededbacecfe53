"""Callers that leave, wait too long, or are too many: on both transports."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.http2.frames import RST_STREAM, SETTINGS, ErrorCode, frame
from service.rpc.classify import CLASSIFY
from tests.conftest import wait_until
from tests.http2.wire import Caller, call
from tests.service.test_rpc import IMAGE, handled, pixels, rich_detail, scrape

TRANSPORTS = pytest.mark.parametrize("transport", ["http2", "grpcio"])
# About 0.2 s for the one slot, in fp32.
LONG = pixels(IMAGE * 4096)
# Large enough to wait in the same lane.
LARGE = pixels(IMAGE * 32)
NO_RETRIES = [("grpc.enable_retries", 0)]


def dropped(server, reason):
    return scrape(server)[f'digits_requests_dropped_total{{reason="{reason}"}}']


@pytest.fixture
def busy(start_server, request):
    """Starts a server with one slot; returns it, a stub, and a way to occupy the slot."""
    channels = []

    def start(transport, *flags):
        server = start_server(
            f"--transport={transport}", "--instances=1", "--model-version=2", *flags
        )
        channel = grpc.insecure_channel(server.address, options=NO_RETRIES)
        channels.append(channel)
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        stub.Classify(pixels(IMAGE))
        # A batch is counted just after its answers left.
        wait_until(lambda: scrape(server)["digits_images_total"] == 1)

        def occupy():
            futures = [stub.Classify.future(LONG, timeout=60)]
            wait_until(lambda: scrape(server)["digits_queue_images"] > 100)
            return futures

        return server, stub, occupy

    yield start
    for channel in channels:
        channel.close()


@TRANSPORTS
def test_calls_cancelled_in_the_queue_cost_no_inference(busy, transport):
    server, stub, occupy = busy(transport, "--max-queue-images=8192")
    images = scrape(server)["digits_images_total"]
    long = occupy()
    futures = [stub.Classify.future(LARGE) for _ in range(50)]
    started = f'grpc_method="Classify",grpc_service="{SERVICE}",grpc_type="unary"'
    wait_until(lambda: scrape(server)[f"grpc_server_started_total{{{started}}}"] == 52)
    for future in futures:
        future.cancel()
    assert len(long[0].result().predictions) == 4096
    wait_until(lambda: handled(server, "CANCELLED") == 50)
    assert dropped(server, "cancelled") == 50
    assert scrape(server)["digits_images_total"] - images == 4096
    assert scrape(server)["digits_batch_size_sum"] == 4097


def is_halted(pid):
    """True once every thread has stopped, which takes a moment after the signal."""
    states = [
        path.read_text().rpartition(")")[2][1] for path in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) == {"T"}


def test_calls_that_were_cancelled_before_they_were_read_cost_no_inference(start_server):
    """All that a caller sent while the process was halted is read together when it goes on."""
    server = start_server("--instances=1")
    address = SimpleNamespace(port=int(server.address.rpartition(":")[2]))
    message = pixels(IMAGE).SerializeToString()
    streams = range(1, 41, 2)
    cancel = struct.pack(">I", ErrorCode.CANCEL)
    with Caller(address) as caller:
        caller.until(lambda kind, *_: kind == SETTINGS)
        os.kill(server.process.pid, signal.SIGSTOP)
        wait_until(lambda: is_halted(server.process.pid))
        try:
            calls = [call(stream, message, CLASSIFY.path) for stream in streams]
            cancels = [frame(RST_STREAM, 0, stream, cancel) for stream in streams]
            caller.send(b"".join([*calls, *cancels]))
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        wait_until(lambda: handled(server, "CANCELLED") == 20)
    assert scrape(server)["digits_images_total"] == 0


@TRANSPORTS
def test_full_queue_refuses_with_a_retry_hint_and_keeps_serving(busy, transport):
    server, stub, occupy = busy(transport, "--max-queue-images=64")
    long = occupy()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Classify(LARGE)
    error = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "the queue is full; retry later"
    delay = rich_detail(error, error_details_pb2.RetryInfo).retry_delay
    assert 0.005 <= delay.ToNanoseconds() / 1e9 < 10
    pushback = [v for k, v in error.trailing_metadata() if k == "grpc-retry-pushback-ms"]
    assert len(pushback) == 1
    assert len(long[0].result().predictions) == 4096
    assert len(stub.Classify(pixels(IMAGE)).predictions) == 1
    assert dropped(server, "queue_full") == handled(server, "RESOURCE_EXHAUSTED") == 1


@TRANSPORTS
def test_deadline_that_the_queue_can_not_meet_is_refused_at_once(busy, transport):
    server, stub, occupy = busy(transport, "--max-queue-images=40000")
    long = [*occupy(), *(stub.Classify.future(LONG, timeout=60) for _ in range(8))]
    wait_until(lambda: scrape(server)["digits_queue_images"] > 12_000)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Classify(LARGE, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "longer than the deadline allows" in caught.value.details()
    assert [len(future.result().predictions) for future in long] == [4096] * 9


SERVICE = "digits.v1.DigitClassifierService"


@TRANSPORTS
def test_queue_full_item_of_a_stream_is_answered_in_place(busy, transport):
    _, stub, occupy = busy(transport, "--max-queue-images=64")
    long = occupy()
    request = digits_pb2.ClassifyStreamRequest(request=LARGE)
    [answer] = stub.ClassifyStream(iter([request]), timeout=30)
    assert answer.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert answer.error.retry_after_ms >= 5
    assert len(long[0].result().predictions) == 4096


@TRANSPORTS
def test_single_image_is_answered_while_a_large_request_fills_its_lane(busy, transport):
    _, stub, occupy = busy(transport, "--max-queue-images=64")
    [long] = occupy()
    for _ in range(5):
        assert len(stub.Classify(pixels(IMAGE), timeout=10).predictions) == 1
    assert not long.done()
    assert len(long.result().predictions) == 4096
