"""Memory of unfinished requests is bounded in bytes; large messages are read in turns."""

from __future__ import annotations

import itertools
import struct
import threading
from typing import Any

import grpc
import pytest

from service.http2 import Limits
from service.http2.frames import END_HEADERS, HEADERS, frame
from tests.http2.echo import ROUTES, Streaming, Unary, echo
from tests.http2.wire import (
    STREAM,
    UNARY,
    Caller,
    answers,
    call,
    compressed,
    data,
    eventually,
    headers,
    opening,
    running,
)

SMALL = [(b"x-%03d" % number, b"1") for number in range(100)]
MANY = [(b"x-%03d" % number, b"1") for number in range(300)]
BLOCK = headers(UNARY, (b"x-big", bytes(15_000)))
PACKED = (b"grpc-encoding", b"gzip")
# What a connection sends of its call number n, and the least that must be counted for it.
UNFINISHED = {
    "headers of a call": (lambda n: opening(n, UNARY, *SMALL), 10_000),
    "headers of a stream": (lambda n: opening(n, STREAM, *SMALL), 10_000),
    "headers of what is no call": (
        lambda n: frame(HEADERS, END_HEADERS, n, headers(UNARY, *MANY, method=b"GET")),
        2_000,
    ),
    "a message without its end": (
        lambda n: (
            opening(n, UNARY) + data(n, b"\0" + struct.pack(">I", 9000) + bytes(9000), end=False)
        ),
        9_000,
    ),
}


@pytest.mark.parametrize("kind", UNFINISHED)
def test_all_that_is_not_whole_is_counted_and_bounded(kind: str) -> None:
    make, size = UNFINISHED[kind]
    with running(ROUTES, limits=Limits(held_bytes=90 * size)) as server:
        with Caller(server) as some:
            some.send(b"".join(make(2 * n + 1) for n in range(20)))
            eventually(lambda: server.held_bytes >= 20 * size)
        eventually(lambda: server.held_bytes == 0)
        with Caller(server) as many:
            many.send(b"".join(make(2 * n + 1) for n in range(200)))
            assert answers(server)
            eventually(lambda: 0 <= server.held_bytes <= 90 * size)
        eventually(lambda: server.held_bytes == 0)


@pytest.mark.parametrize(
    "frames", [frame(HEADERS, 0, 1, BLOCK), frame(HEADERS, END_HEADERS, 1, BLOCK)[:-1]]
)
def test_frames_and_header_blocks_that_are_not_whole_are_counted_and_bounded(frames: Any) -> None:
    with running(ROUTES, limits=Limits(held_bytes=100_000)) as server:
        callers = [Caller(server) for _ in range(20)]
        for number, caller in enumerate(callers):
            caller.send(frames)
            if number == 5:
                eventually(lambda: server.held_bytes > 80_000)
        eventually(lambda: server.connections <= 7)
        assert answers(server)
        for caller in callers:
            caller.socket.close()
        eventually(lambda: server.held_bytes == 0)


def test_call_of_too_many_headers_is_rejected() -> None:
    with running(ROUTES) as server, Caller(server) as caller:
        caller.send(opening(1, UNARY, *[(b"x", b"1")] * 200))
        assert b"expected at most 128 headers, got 20" in caller.status()


@pytest.mark.parametrize("path", [UNARY, STREAM])
def test_what_takes_long_to_unfold_is_done_in_turns(
    path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a burst of such messages one is handled, then what another connection sent meanwhile."""
    monkeypatch.setattr("service.http2.server.TURN_S", 0.0)
    order: list[Any]
    order, began, sent = [], threading.Event(), threading.Event()

    def handle(calls: Any) -> None:
        order.extend(len(call.message) for call in calls)
        began.set()
        sent.wait(30)
        echo(calls)

    class Receiver:
        def __init__(self, call: Any) -> None:
            self.call = call

        def message(self, message: Any) -> None:
            order.append(len(message))
            began.set()
            sent.wait(30)

        def half_closed(self) -> None:
            self.call.end()

        def cancelled(self) -> None:
            pass

    receiver: Any = Receiver
    routes = {UNARY: Unary(handle), STREAM: Streaming(receiver)}
    bomb, count = compressed(bytes(2**21)), 12
    with running(routes) as server, Caller(server) as large, Caller(server) as small:
        if path == UNARY:
            large.send(
                b"".join(
                    opening(2 * n + 1, UNARY, PACKED) + data(2 * n + 1, bomb) for n in range(count)
                )
            )
        else:
            large.send(opening(1, STREAM, PACKED))
            large.send(b"".join(data(1, bomb, end=n == count - 1) for n in range(count)))
        assert began.wait(30)
        small.send(call())
        sent.set()
        eventually(lambda: len(order) == count + 1)
    assert order.index(5) < 4


def test_bytes_that_a_connection_holds_are_given_back_when_its_caller_goes() -> None:
    with running(ROUTES) as server:
        with Caller(server) as caller:
            half = b"\0" + struct.pack(">I", 60_000) + bytes(16_000)
            caller.send(
                b"".join(opening(2 * n + 1) + data(2 * n + 1, half, end=False) for n in range(50))
            )
            eventually(lambda: 0 <= server.held_bytes - 50 * len(half) < 50 * 3000)
        eventually(lambda: server.held_bytes == 0)
        assert server.connections == 0


def test_one_connection_may_send_large_messages_in_turn_only() -> None:
    """Each gets 64 KiB; no more than the reservation beyond that, however many there are."""
    limits = Limits(reserved_bytes=2**20)
    with running(ROUTES, limits=limits) as server, Caller(server) as caller:
        size = 2**20
        for number in range(20):
            prefix = b"\0" + struct.pack(">I", size) + bytes(10_000)
            caller.send(opening(2 * number + 1) + data(2 * number + 1, prefix, end=False))
        granted = [
            stream for kind, _, stream, _ in itertools.islice(caller.frames(), 4) if kind == 8
        ]
        assert [stream for stream in granted if stream] == [1]


def test_many_large_messages_of_one_connection_all_come_through() -> None:
    """More than its reservation at the same time, and none waits for ever."""
    limits = Limits(reserved_bytes=2**21)
    with (
        running(ROUTES, limits=limits) as server,
        grpc.insecure_channel(
            f"127.0.0.1:{server.port}", options=[("grpc.max_receive_message_length", -1)]
        ) as channel,
    ):
        message = bytes(2**20)
        calls = [channel.unary_unary(UNARY).future(message, timeout=120) for _ in range(30)]
        assert all(len(call.result()) == len(message) for call in calls)
        assert server.held_bytes == 0


def test_connection_that_holds_most_of_too_much_loses_its_largest_call() -> None:
    limits = Limits(held_bytes=125_000)
    with running(ROUTES, limits=limits) as server, Caller(server) as small, Caller(server) as large:
        half = b"\0" + struct.pack(">I", 60_000) + bytes(10_000)
        small.send(opening() + data(1, half, end=False))
        eventually(lambda: server.held_bytes > len(half))
        for number in range(10):
            stream_id = 2 * number + 1
            large.send(opening(stream_id) + data(stream_id, half, end=False))
        ended = large.until(lambda _, flags, stream, __: flags & 1 and stream)
        assert b"unfinished requests" in ended[3]
        small.send(data(1, bytes(16_000), end=False) + data(1, bytes(16_000), end=False))
        small.send(data(1, bytes(16_000), end=False) + data(1, bytes(2_000)))
        assert b"grpc-status" in small.status()
