"""The clients under fault: outages and permanent errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from digits.channel import MAX_ANSWER_BYTES
from digits.client import AsyncDigitClient, DigitClient, DigitError
from digits.v1 import digits_pb2, digits_pb2_grpc
from service.config import ServerConfig
from service.top.scrape import scrape
from tests.conftest import RunningServer, wait_until
from tests.digits.faults import (
    CLIENTS,
    EXHAUSTED,
    IMAGE,
    NEVER,
    UNAVAILABLE,
    Servicer,
)


@contextlib.contextmanager
def hanging_up(connections: Any, greeting: bytes = b"") -> Iterator[str]:
    """An address at which every connection is greeted and closed; the list gets one item each."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    with listener.accept()[0] as connection:
                        connection.sendall(greeting)
                    connections.append(1)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_reconnecting_does_not_slow_down_with_the_length_of_an_outage() -> None:
    """gRPC itself would need a minute for as many attempts, and two for each one later on."""
    connections: list[Any] = []
    with hanging_up(connections) as address, DigitClient(address) as client:

        def reconnected() -> bool:
            with pytest.raises(DigitError):
                client.classify(IMAGE)
            return len(connections) >= 9

        wait_until(reconnected, timeout_s=30)


def test_asynchronous_client_reconnects_as_often() -> None:
    async def ask(address: str) -> None:
        async with AsyncDigitClient(address) as client:
            while len(connections) < 9:
                with pytest.raises(DigitError):
                    await client.classify(IMAGE)

    connections: list[Any] = []
    with hanging_up(connections) as address:
        asyncio.run(asyncio.wait_for(ask(address), 30))


def test_error_says_since_when_the_server_is_not_reachable(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/socket"
    with DigitClient(address) as client:
        errors = []
        for _ in range(2):
            with pytest.raises(
                DigitError, match=r"not reachable since 20\d\d-\d\d-\d\d "
            ) as caught:
                client.classify(IMAGE)
            errors.append(caught.value)
        assert errors[0].unreachable_since == errors[1].unreachable_since
        server = serve(Servicer(), address)
        wait_until(lambda: answers(client))
        server.stop(None).wait()
        with pytest.raises(DigitError) as caught:
            wait_until(lambda: client.classify(IMAGE) is None)
        later, before = caught.value.unreachable_since, errors[0].unreachable_since
        assert later
        assert before
        assert later > before


def answers(client: Any) -> Any:
    with contextlib.suppress(DigitError):
        return client.classify(IMAGE).digits == [5]
    return False


@CLIENTS
def test_server_that_refuses_is_reachable(serve: Callable[..., Any], classify: Any) -> None:
    with pytest.raises(DigitError, match=r"UNAVAILABLE: not now$") as caught:
        classify(serve(Servicer(error=UNAVAILABLE)))
    assert caught.value.unreachable_since is None


@CLIENTS
def test_error_says_that_no_http2_is_spoken(classify: Any) -> None:
    greeting = b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(64)
    with (
        hanging_up([], greeting) as address,
        pytest.raises(DigitError, match="what listens there does not speak HTTP/2"),
    ):
        classify(address)


@CLIENTS
@pytest.mark.parametrize(
    ("error", "metadata"),
    [
        (EXHAUSTED, ()),
        (EXHAUSTED, NEVER),
        (UNAVAILABLE, NEVER),
        (UNAVAILABLE, (("grpc-retry-pushback-ms", "soon"),)),
        (UNAVAILABLE, (("grpc-retry-pushback-ms", "9" * 5000),)),
    ],
)
def test_permanent_error_is_not_retried(
    serve: Callable[..., Any], classify: Any, error: Any, metadata: Any
) -> None:
    servicer = Servicer(error=error, metadata=metadata)
    with pytest.raises(DigitError, match="not now") as caught:
        classify(serve(servicer))
    assert servicer.calls == 1
    assert not caught.value.transient


@CLIENTS
def test_message_over_the_servers_limit_is_sent_once(server: RunningServer, classify: Any) -> None:
    many = np.zeros((20_000, 28, 28), np.uint8)
    with pytest.raises(DigitError, match="more than the server takes: lower req") as caught:
        classify(server.address, many, request_images=20_000)
    assert caught.value.code is EXHAUSTED
    assert not caught.value.transient


@pytest.mark.parametrize("metadata", [(), [("x-note", "x" * 20_000)]], ids=["pixels", "metadata"])
def test_retry_policy_of_grpc_sends_what_is_too_large_once(
    start_server: Callable[..., RunningServer], metadata: Any
) -> None:
    """The one of docs/clients.md for other languages; the pushback tells it what is permanent."""
    policy = {
        "maxAttempts": 5,
        "initialBackoff": "0.05s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    name = {"service": "digits.v1.DigitClassifierService"}
    config = json.dumps({"methodConfig": [{"name": [name], "retryPolicy": policy}]})
    server = start_server("--transport=http2", "--max-images-per-request=1")
    images = 1 if metadata else 2000
    # gRPC keeps longer messages than 256 KiB for a retry only if it is told to.
    options = [("grpc.service_config", config), ("grpc.per_rpc_retry_buffer_size", 2**22)]
    with grpc.insecure_channel(server.address, options) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(digits_pb2.ClassifyRequest(pixels=bytes(784 * images)), metadata=metadata)
    assert caught.value.code() is EXHAUSTED

    def handled() -> Any:
        seen = scrape(f"{server.http}/metrics")
        return seen.value("grpc_server_handled_total", grpc_code="RESOURCE_EXHAUSTED")

    assert wait_until(handled) == 1


def test_item_that_is_refused_for_good_is_answered_in_its_place(serve: Callable[..., Any]) -> None:
    servicer = Servicer()
    with DigitClient(serve(servicer)) as client:
        refused = list(client.classify_stream([IMAGE] * 3))
    assert [str(error) for error in refused] == ["RESOURCE_EXHAUSTED: never"] * 3
    assert servicer.calls == 1


@CLIENTS
def test_largest_answer_that_a_server_can_be_told_to_give_is_taken(
    serve: Callable[..., Any], classify: Any
) -> None:
    settings = {field.name: field.metadata["bounds"] for field in fields(ServerConfig)}
    _, most = settings["max_images_per_request"]
    assert len(classify(serve(Servicer(answers=most))).predictions) == most


@CLIENTS
def test_answer_over_the_clients_limit_is_said_to_be_that(
    serve: Callable[..., Any], classify: Any
) -> None:
    servicer = Servicer(answers=MAX_ANSWER_BYTES // 50)
    with pytest.raises(DigitError, match="the answer is larger than a client takes") as caught:
        classify(serve(servicer))
    assert caught.value.code is EXHAUSTED
    assert servicer.calls == 1
