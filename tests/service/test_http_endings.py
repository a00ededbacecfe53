"""How a request of /v1/classify ends that the core does not answer, without a model."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import grpc
import pytest
from aiohttp import ClientSession

from service.ops_http.errors import HTTP_STATUS
from service.serving.request import Refusal
from tests.conftest import wait_until
from tests.service.port import FakeGate, port

# How the core refuses, with its HTTP status.
REFUSED = {
    Refusal.QUEUE_FULL: 429,
    Refusal.EXPIRED: 504,
    Refusal.CANCELLED: 499,
    Refusal.STOPPED: 503,
    Refusal.FAILED: 500,
    Refusal.UNAUTHENTICATED: 401,
}


@pytest.mark.parametrize("refusal", REFUSED)
def test_each_refusal_has_its_http_status(refusal: Any) -> None:
    def refuse(requests: Any) -> None:
        for request in requests:
            request.refusal, request.retry_after_s = refusal, 1.2
            request.reply([request])

    async def run() -> None:
        async with (
            port(gate=FakeGate(refuse)) as (url, _),
            ClientSession() as client,
            client.post(f"{url}/v1/classify", json={"pixels": ""}) as response,
        ):
            error = (await response.json())["error"]
            assert response.status == REFUSED[refusal]
            assert HTTP_STATUS[grpc.StatusCode[error["code"]]] == response.status
            assert response.headers.get("Retry-After") == ("2" if response.status == 429 else None)

    asyncio.run(run())


def test_a_caller_that_leaves_cancels_its_request() -> None:
    requests: list[Any]
    told: list[Any]
    requests, told = [], []
    body = b'{"pixels": ""}'
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

    async def run() -> None:
        async with port(gate=FakeGate(requests.extend), count=told.append) as (_, number):
            with socket.create_connection(("127.0.0.1", number)) as peer:
                peer.sendall(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
                await asyncio.to_thread(wait_until, lambda: requests)
                assert not requests[0].origin.cancelled
            await asyncio.to_thread(wait_until, lambda: requests[0].origin.cancelled and told, 4)

    asyncio.run(run())
    assert told == [499]


def test_a_request_without_an_answer_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.playground.classify.DEADLINE_S", 0.1)
    requests: list[Any] = []

    async def run() -> None:
        async with (
            port(gate=FakeGate(requests.extend)) as (url, _),
            ClientSession() as client,
            client.post(f"{url}/v1/classify", json={"pixels": ""}) as response,
        ):
            assert response.status == 504
            assert (await response.json())["error"]["code"] == "DEADLINE_EXCEEDED"

    asyncio.run(run())
    assert requests[0].origin.cancelled


def test_an_error_of_ours_tells_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("an internal")

    async def run() -> None:
        async with (
            port(gate=FakeGate(fail)) as (url, _),
            ClientSession() as client,
            client.post(f"{url}/v1/classify", json={"pixels": ""}) as response,
        ):
            assert response.status == 500
            assert "an internal" not in await response.text()

    asyncio.run(run())
    assert "an internal" in caplog.text


def test_livez_says_when_the_engine_stalls_though_the_server_is_ready() -> None:
    async def run() -> None:
        async with port(is_alive=lambda: False) as (url, _), ClientSession() as client:
            async with client.get(f"{url}/livez") as response:
                assert (response.status, await response.text()) == (503, "STALLED\n")
            async with client.get(f"{url}/healthz") as response:
                assert response.status == 200

    asyncio.run(run())
