"""How often a call is made that fails: once, if a retry can not help."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from digits.client import AsyncDigitClient, DigitClient, DigitError, Pictures
from digits.errors import PERMANENT
from digits.v1 import digits_pb2_grpc
from service.top.scrape import scrape
from tests.conftest import RunningServer, wait_until

Ask = Callable[[str, Pictures], DigitError]


def blocking(address: str, pictures: Pictures) -> DigitError:
    with DigitClient(address, request_images=10_000) as client, pytest.raises(DigitError) as caught:
        client.classify(pictures)
    return caught.value


def asynchronous(address: str, pictures: Pictures) -> DigitError:
    async def ask() -> None:
        async with AsyncDigitClient(address, request_images=10_000) as client:
            await client.classify(pictures)

    with pytest.raises(DigitError) as caught:
        asyncio.run(ask())
    return caught.value


CLIENTS = pytest.mark.parametrize("ask", [blocking, asynchronous])


def handled(server: RunningServer) -> dict[str, float]:
    """Calls of Classify that the server has ended, by status code."""
    values = scrape(f"{server.http}/metrics")
    return {
        code.name: values.value(
            "grpc_server_handled_total", grpc_method="Classify", grpc_code=code.name
        )
        for code in grpc.StatusCode
    }


REFUSED: dict[str, tuple[Pictures, grpc.StatusCode]] = {
    "no picture": (b"nonsense", grpc.StatusCode.INVALID_ARGUMENT),
    "no image": ([], grpc.StatusCode.INVALID_ARGUMENT),
    "too many images": (np.zeros((5000, 784), np.uint8), grpc.StatusCode.INVALID_ARGUMENT),
    "too large": (np.zeros((8000, 784), np.uint8), grpc.StatusCode.RESOURCE_EXHAUSTED),
}


@CLIENTS
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_server_refuses_for_good_is_sent_once(
    server: RunningServer, ask: Ask, what: str
) -> None:
    pictures, code = REFUSED[what]
    before = handled(server)
    error = ask(server.address, pictures)
    assert error.code is code
    assert not error.transient
    after = wait_until(lambda: (now := handled(server)) != before and now)
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    if what == "too large" and server.announced["transport"] == "grpcio":
        code = grpc.StatusCode.CANCELLED  # grpcio's own rejection looks like that to a handler
    assert changed == {code.name: 1}


class Refusing(digits_pb2_grpc.DigitClassifierServiceServicer):
    """Refuses with a code, and says when to come back all the same."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code
        self.attempts = 0

    def Classify(self, request: Any, context: Any) -> Any:
        self.attempts += 1
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=1_000_000))
        packed = any_pb2.Any()
        packed.Pack(retry)
        status = status_pb2.Status(code=self.code.value[0], message="no", details=[packed])
        context.set_trailing_metadata(
            (
                ("grpc-retry-pushback-ms", "1"),
                ("grpc-status-details-bin", status.SerializeToString()),
            )
        )
        context.abort(self.code, "no")


@CLIENTS
@pytest.mark.parametrize("code", sorted(PERMANENT, key=str), ids=lambda code: code.name)
def test_no_delay_makes_a_permanent_code_transient(
    serve: Any, ask: Ask, code: grpc.StatusCode
) -> None:
    servicer = Refusing(code)
    assert ask(serve(servicer), np.zeros((28, 28), np.uint8)).code is code
    assert servicer.attempts == 1
