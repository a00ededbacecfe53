"""Calls to a server and what it counted and logged of them."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.rpc.classify import SERVICE
from tests.conftest import RunningServer

TRANSPORTS = pytest.mark.parametrize("transport", ["http2", "grpcio"])
# gRPC's own retries would hide what a test wants to see.
NO_RETRIES = [("grpc.enable_retries", 0)]
IMAGE = bytes(784)
# The same in every process that collects these tests: some stand in the names of cases.
ANNA, BERT = (f"{name}-" + 8 * "0Aa_" for name in ("anna", "bert"))


def pixels(data: Any) -> Any:
    return digits_pb2.ClassifyRequest(pixels=data)


def stub_for(address: str) -> tuple[grpc.Channel, Any]:
    channel = grpc.insecure_channel(address, options=NO_RETRIES)
    return channel, digits_pb2_grpc.DigitClassifierServiceStub(channel)


def encoded(*files: Any) -> Any:
    return digits_pb2.ClassifyRequest(encoded=digits_pb2.EncodedImages(files=files))


def refused(call: Any, *arguments: Any, **options: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    return caught.value


def rich_detail(error: Any, kind: Any) -> Any:
    [data] = [v for k, v in error.trailing_metadata() if k == "grpc-status-details-bin"]
    status = status_pb2.Status.FromString(data)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    detail = kind()
    assert status.details[0].Unpack(detail)
    return detail


def bearer(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


def scrape(server: RunningServer) -> dict[Any, float]:
    with urllib.request.urlopen(f"{server.http}/metrics") as response:
        text = response.read().decode()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines)}


def handled(server: RunningServer, code: Any, method: str = "Classify", kind: str = "unary") -> Any:
    return scrape(server)[
        f'grpc_server_handled_total{{grpc_code="{code}",grpc_method="{method}",'
        f'grpc_service="{SERVICE}",grpc_type="{kind}"}}'
    ]


def stream_of(requests: Any) -> Any:
    return (digits_pb2.ClassifyStreamRequest(request=request) for request in requests)


def dropped(server: RunningServer, reason: Any) -> Any:
    return scrape(server)[f'digits_requests_dropped_total{{reason="{reason}"}}']


def entries(server: RunningServer, start: Any) -> list[Any]:
    """Log lines whose message begins so."""
    lines = [json.loads(line) for line in server.log_text().splitlines()]
    return [line for line in lines if line["message"].startswith(start)]
