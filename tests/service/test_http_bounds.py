"""What callers of the HTTP port may take: bytes, time, connections and turns of the loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from aiohttp import ClientSession
from prometheus_client import CollectorRegistry

from service.assembly import MAX_HTTP_CONNECTIONS as MAX_CONNECTIONS
from service.ops_http.app import MAX_BODY_BYTES
from service.ops_http.connections import SILENCE_S
from service.ops_http.metrics import LOOP_SHARE
from service.playground.classify import BODY_S, MAX_AT_ONCE
from service.playground.requests import MAX_JSON_BYTES
from tests.conftest import RunningServer, wait_until
from tests.service.http import JSON, SEVEN, answers, ask, classify, connect, form
from tests.service.port import port


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("kind", "limit"), [(JSON, MAX_JSON_BYTES), ("image/png", MAX_BODY_BYTES)])
def test_a_body_over_the_limit_is_refused(
    web: RunningServer, kind: Any, limit: Any, declared: bool
) -> None:
    with connect(web) as peer:
        framing = f"Content-Length: {limit + 1}" if declared else "Transfer-Encoding: chunked"
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{framing}\r\n\r\n"
        peer.sendall(head.encode())
        if not declared:  # of a declared length, nothing is waited for
            peer.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (limit + 1, bytes(limit + 1)))
        answer = peer.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert f"at most {limit} bytes".encode() in answer


def test_a_form_over_the_limit_is_refused(web: RunningServer) -> None:
    body, kind = form([bytes(MAX_BODY_BYTES // 4)] * 5)
    with connect(web) as peer:
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
        peer.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            peer.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert peer.recv(65536).startswith(b"HTTP/1.1 413")


def test_bodies_that_trickle_hold_others_up_for_a_bounded_time(web: RunningServer) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(web)) for _ in range(MAX_AT_ONCE)]
        for peer in slow:
            peer.sendall(head + b"Content-Length: 1000\r\n\r\nx")
        wait_until(lambda: classify(web, b"x", "image/png")[0] == 429, BODY_S)
        status, headers, answer = classify(web, b"x", "image/png")
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer["error"]["code"] == "RESOURCE_EXHAUSTED"
        assert ask(web, "/healthz")[0] == 200
        for peer in slow:
            assert peer.recv(4096).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < BODY_S + 10
        assert classify(web, SEVEN.read_bytes(), "image/png")[0] == 200


def test_an_address_that_asks_too_often_is_told_when_to_come_back(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server(
        "--playground", constants={"service.playground.classify.REQUESTS_PER_S": 1}
    )
    data = SEVEN.read_bytes()
    assert classify(server, data, "image/png")[0] == 200
    asked = [classify(server, data, "image/png") for _ in range(2)]
    status, headers, answer = asked[-1]  # the first may have saved up a moment's worth
    assert (status, headers["Retry-After"]) == (429, "1")
    assert 0 < answer["error"]["retry_after_s"] <= 1
    assert answers(server)[429] >= 1
    wait_until(lambda: classify(server, data, "image/png")[0] == 200, 10)


def test_a_header_that_trickles_is_cut_off(web: RunningServer) -> None:
    began = time.monotonic()
    with connect(web) as peer:
        peer.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        peer.settimeout(0.2)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 3 * SILENCE_S:
                peer.sendall(b"X-Slow: 1\r\n")
                with contextlib.suppress(TimeoutError):
                    if peer.recv(4096) == b"":
                        break
    assert SILENCE_S - 1 < time.monotonic() - began < 2 * SILENCE_S


@pytest.mark.full
def test_probes_are_answered_beside_2000_idle_connections(web: RunningServer) -> None:
    process = psutil.Process(web.process.pid)
    before = process.memory_info().rss, process.num_threads(), process.num_fds()
    with contextlib.ExitStack() as stack:
        for number in range(2000):
            peer = stack.enter_context(connect(web))
            if number % 2:
                peer.sendall(b"GET /metrics HTTP/1.1\r\nX-Half: ")
            if number % 500 == 499:
                assert ask(web, "/healthz")[0] == 200
                assert process.num_fds() - before[2] <= MAX_CONNECTIONS + 10
        assert classify(web, SEVEN.read_bytes(), "image/png")[2]["predictions"][0]["digit"] == 7
        assert process.num_threads() - before[1] <= 2
        assert process.memory_info().rss - before[0] < 32 * 2**20


def test_who_has_the_most_connections_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here each address of loopback counts as one; the one that was there first has one."""
    monkeypatch.setattr("service.ops_http.connections.SILENCE_S", 3600)
    monkeypatch.setattr("service.ops_http.connections.neighbourhood", str)

    async def run() -> None:
        async with port() as (url, number), ClientSession() as client:
            with contextlib.ExitStack() as stack:
                address = ("127.0.0.1", number)
                first = socket.create_connection(address, source_address=("127.0.0.2", 0))
                stack.enter_context(first)
                for _ in range(MAX_CONNECTIONS + 3):
                    many = stack.enter_context(socket.create_connection(address))
                async with client.get(f"{url}/healthz") as response:
                    assert response.status == 200
                for peer in (first, many):
                    peer.setblocking(False)
                    with pytest.raises(BlockingIOError):
                        peer.recv(1)

    asyncio.run(run())


def test_one_connection_too_many_cuts_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.ops_http.connections.SILENCE_S", 3600)

    async def run() -> None:
        async with port() as (url, number), ClientSession() as client:
            with contextlib.ExitStack() as stack:
                peers = []
                for _ in range(MAX_CONNECTIONS + 3):
                    peer = stack.enter_context(socket.create_connection(("127.0.0.1", number)))
                    peer.settimeout(30)
                    peers.append(peer)
                async with client.get(f"{url}/healthz") as response:
                    assert response.status == 200
                for peer in peers[:4]:  # the client's was one more
                    with contextlib.suppress(ConnectionResetError):
                        assert await asyncio.to_thread(peer.recv, 1) == b""
                peers[4].setblocking(False)
                with pytest.raises(BlockingIOError):
                    peers[4].recv(1)

    asyncio.run(run())


def test_pipelined_scrapes_that_nobody_reads_do_not_keep_a_probe_out(web: RunningServer) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS - 10):
            peer = stack.enter_context(connect(web))
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        began = time.monotonic()
        assert ask(web, "/healthz")[0] == 200
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("together", [1, 50])
def test_renderings_for_scrapes_take_a_bounded_share_of_the_loop(together: int) -> None:
    began = []

    class Slow:
        def collect(self) -> list[Any]:
            began.append(time.monotonic())
            time.sleep(0.02)
            return []

    registry = CollectorRegistry()
    registry.register(Slow())

    def accept(number: int) -> dict[str, str]:  # each another version
        return {"Accept": f"application/openmetrics-text; version=1.{number}"}

    async def run() -> None:
        async with port(registry=registry) as (url, _), ClientSession() as client:
            began.clear()  # registering looks once
            for _ in range(5):
                answers = await asyncio.gather(
                    *(client.get(f"{url}/metrics", headers=accept(n)) for n in range(together))
                )
                assert {answer.status for answer in answers} == {200}

    asyncio.run(run())
    between = [later - earlier for earlier, later in itertools.pairwise(began)]
    assert min(between) > 0.02 / LOOP_SHARE
    assert len(began) < 5 * max(2, together / 5)  # they are shared


def test_malformed_http_is_refused_in_a_line_and_logged_in_none(web: RunningServer) -> None:
    before = web.log_text()
    for garbage in (
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with connect(web) as peer:
            peer.sendall(garbage)
            answer = peer.recv(65536)
        assert b" 400 " in answer.splitlines()[0], (garbage[:40], answer)
        assert b"Server: digits-serving" in answer
        assert b'"code": "BAD_REQUEST"' in answer
    assert web.log_text() == before


def test_a_broken_body_is_refused(web: RunningServer) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with connect(web) as peer:
        peer.sendall(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert b" 400 " in peer.recv(65536).splitlines()[0]
    assert "Traceback" not in web.log_text()
