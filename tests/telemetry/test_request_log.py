"""Logs tell how RPCs ended: all that fits the allowance, nothing that a caller could abuse."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.telemetry.allowance import Allowance
from service.telemetry.logs import _TextFormatter
from service.telemetry.request_log import request_id
from tests.calls import TRANSPORTS, entries
from tests.conftest import RunningServer, wait_until

INK = bytes([173]) * 784


@TRANSPORTS
def test_a_line_tells_who_called_how_it_ended_and_how_long_it_took(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--request-log-per-s=100")
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        request = digits_pb2.ClassifyRequest(pixels=INK * 3)
        metadata = [("x-request-id", "order-66"), ("authorization", "Bearer hush-hush")]
        stub.Classify(request, metadata=metadata, timeout=30)
        stub.GetModel(digits_pb2.GetModelRequest(), metadata=metadata, timeout=30)
    [line] = wait_until(lambda: entries(server, "Classify OK"))
    assert (line["request_id"], line["images"], line["batch_images"]) == ("order-66", 3, 3)
    assert line["peer"].startswith(("ipv4:127.0.0.1:", "127.0.0.1:"))
    assert line["total_ms"] >= line["inference_ms"] > 0
    assert wait_until(lambda: entries(server, "GetModel OK"))[0]["request_id"] == "order-66"
    assert "hush" not in server.log_text()
    forms = (
        "\\xad\\xad",
        "173, 173",
        "adad",
        "ra2tra2t",
    )  # of the image: escaped, listed, hex, base64
    assert not [form for form in forms if form in server.log_text()]


@TRANSPORTS
def test_a_refused_call_is_told_with_its_reason(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--request-log-per-s=100")
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.Classify(digits_pb2.ClassifyRequest(pixels=b"short"), timeout=30)
    [line] = wait_until(lambda: entries(server, "Classify INVALID_ARGUMENT"))
    assert line["error"] == "pixels: expected a multiple of 784 bytes, got 5 bytes"


@TRANSPORTS
def test_a_flood_is_sampled_and_does_not_hide_failures(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--request-log-per-s=2")
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        good = [
            stub.Classify.future(digits_pb2.ClassifyRequest(pixels=INK), timeout=30)
            for _ in range(300)
        ]
        assert {call.code() for call in good} == {StatusCode.OK}
        assert stub.Classify.future(digits_pb2.ClassifyRequest(), timeout=30).code() is not None
        wait_until(lambda: entries(server, "Classify INVALID_ARGUMENT"))
        first = len(entries(server, "Classify OK"))
        assert 2 <= first < 100

        def one_more_line() -> bool:
            stub.Classify(digits_pb2.ClassifyRequest(pixels=INK), timeout=30)
            return len(entries(server, "Classify OK")) > first

        wait_until(one_more_line)
    told = entries(server, "Classify OK")
    assert sum(line["suppressed"] for line in told) + len(told) >= 290


def test_no_line_is_written_without_an_allowance(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server("--request-log-per-s=0")
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        stub.Classify(digits_pb2.ClassifyRequest(pixels=INK), timeout=30)
    assert server.stop() == 0
    assert entries(server, "Classify") == []


def test_an_allowance_fills_up_again_and_counts_what_it_passed_over() -> None:
    allowance = Allowance(2)
    assert allowance.take(5, now=100) == (2, 0)
    assert allowance.take(4, now=100.1) == (0, 3)
    assert allowance.take(1, now=100.6) == (1, 7)
    assert allowance.take(1, now=200) == (1, 0)


@pytest.mark.parametrize("hostile", ["two\nlines", 'a "quoted" one', "x" * 65, "", b"\xff"])
def test_a_request_id_that_could_forge_a_line_is_replaced(hostile: Any) -> None:
    made_up = request_id([("x-request-id", hostile)])
    assert len(made_up) == 16
    assert made_up != request_id([])


def test_text_lines_carry_the_fields() -> None:
    record = logging.makeLogRecord({"msg": "moved", "fields": {"to": "version 2", "count": 3}})
    assert _TextFormatter("%(message)s").format(record) == 'moved to="version 2" count=3'
