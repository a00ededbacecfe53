"""Callers that leave, wait too long, or are too many: on both transports."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from digits.v1 import digits_pb2
from service.http2.frames import RST_STREAM, SETTINGS, ErrorCode, frame
from service.rpc.classify import CLASSIFY, SERVICE
from tests.calls import IMAGE, TRANSPORTS, dropped, handled, pixels, rich_detail, scrape
from tests.conftest import RunningServer, wait_until
from tests.gate import Gate
from tests.http2.wire import Caller, call
from tests.service.conftest import LARGE


@TRANSPORTS
def test_calls_cancelled_in_the_queue_cost_no_inference(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    server, stub, long, gate = busy(transport, "--max-queue-images=8192")
    futures = [stub.Classify.future(LARGE) for _ in range(50)]
    started = f'grpc_method="Classify",grpc_service="{SERVICE}",grpc_type="unary"'
    wait_until(lambda: scrape(server)[f"grpc_server_started_total{{{started}}}"] == 51)
    for future in futures:
        future.cancel()
    stub.GetModel(digits_pb2.GetModelRequest())  # behind the cancellations on the same connection
    gate.open()
    assert len(long.result().predictions) == 4096
    wait_until(lambda: handled(server, "CANCELLED") == 50)
    assert dropped(server, "cancelled") == 50
    wait_until(lambda: scrape(server)["digits_images_total"] == 4096)
    assert scrape(server)["digits_batch_size_sum"] == 4096


def is_halted(pid: Any) -> bool:
    """True once every thread has stopped, which takes a moment after the signal."""
    states = [
        path.read_text().rpartition(")")[2][1] for path in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) == {"T"}


def test_calls_that_were_cancelled_before_they_were_read_cost_no_inference(
    start_server: Callable[..., RunningServer],
) -> None:
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
def test_full_queue_refuses_with_a_retry_hint_and_keeps_serving(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    server, stub, long, gate = busy(transport, "--max-queue-images=64")
    with pytest.raises(grpc.RpcError) as caught:
        stub.Classify(LARGE)
    error = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "the queue is full; retry later"
    delay = rich_detail(error, error_details_pb2.RetryInfo).retry_delay
    assert 0.005 <= delay.ToNanoseconds() / 1e9 < 10
    metadata: Any = error.trailing_metadata()
    pushback = [v for k, v in metadata if k == "grpc-retry-pushback-ms"]
    assert len(pushback) == 1
    gate.open()
    assert len(long.result().predictions) == 4096
    assert len(stub.Classify(pixels(IMAGE)).predictions) == 1
    assert dropped(server, "queue_full") == handled(server, "RESOURCE_EXHAUSTED") == 1


@TRANSPORTS
def test_deadline_that_the_queue_can_not_meet_is_refused_at_once(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    # Any batch counts as one of a second: the long request, as a minute.
    slow = {"service.serving.cost.MIN_BATCH_S": 1.0}
    _, stub, long, gate = busy(transport, "--max-queue-images=8192", constants=slow)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Classify(LARGE, timeout=15)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "longer than the deadline allows" in str(caught.value.details())
    gate.open()
    assert len(long.result().predictions) == 4096


@TRANSPORTS
def test_queue_full_item_of_a_stream_is_answered_in_place(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    _, stub, long, gate = busy(transport, "--max-queue-images=64")
    request = digits_pb2.ClassifyStreamRequest(request=LARGE)
    [answer] = stub.ClassifyStream(iter([request]), timeout=30)
    assert answer.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert answer.error.retry_after_ms >= 5
    gate.open()
    assert len(long.result().predictions) == 4096


@TRANSPORTS
def test_single_image_is_answered_while_a_large_request_fills_its_lane(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    server, stub, long, gate = busy(transport, "--max-queue-images=64")
    for _ in range(5):
        waiting = scrape(server)["digits_queue_images"]
        single = stub.Classify.future(pixels(IMAGE), timeout=60)
        wait_until(lambda waiting=waiting: scrape(server)["digits_queue_images"] > waiting)
        for _ in range(2):  # the batch of the long request that is in the slot, and then the single
            gate.let_one_pass()
        assert len(single.result().predictions) == 1
    assert not long.done()
    gate.open()
    assert len(long.result().predictions) == 4096
